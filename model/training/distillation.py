"""Knowledge distillation: a finished checkpoint as the teacher of a smaller or shorter training.

The teacher reads each batch beside the student, without gradients and in the training's precision; `loss.py` turns both
models' hidden states into the loss, chunk by chunk. It must have the same vocabulary, or its probabilities would be of
other tokens.
"""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from model.errors import PipelineError
from model.loading import load_model
from model.modeling_rex import RexForCausalLM
from model.text.tokenizer import load_tokenizer


def load_teacher(
    checkpoint: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int, device: torch.device
) -> RexForCausalLM:
    """The model of `training.distill_from` on `device`, in full precision, without gradients.

    Raises PipelineError where it is no complete checkpoint, has another vocabulary than `tokenizer`, or reads fewer
    tokens than a window has.
    """
    what = f"training.distill_from is {str(checkpoint)!r}"
    if not (checkpoint / "model.safetensors").is_file():
        raise PipelineError(f"{what}: no model.safetensors there; name the folder of a trained checkpoint")
    theirs, ours = load_tokenizer(checkpoint).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        differing = len(theirs.items() ^ ours.items())
        raise PipelineError(
            f"{what}: its tokenizer ({len(theirs):,} tokens) is another than this experiment's ({len(ours):,} tokens, "
            f"{differing:,} entries differ); take it over with tokenizer=pretrained tokenizer.path=FOLDER"
        )
    teacher = load_model(checkpoint, quantized=False)
    if teacher.config.max_position_embeddings < sequence_length:
        raise PipelineError(
            f"{what}: it reads {teacher.config.max_position_embeddings:,} tokens and a window has {sequence_length:,} "
            "(tokenizer.sequence_length); lower that, or take a teacher of a longer context"
        )
    teacher.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    return teacher
