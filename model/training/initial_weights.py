"""Finished checkpoints that a training builds on: the initial weights, and the teacher of a distillation.

The teacher runs on each batch beside the student, without gradients and in the training's precision; `loss.py` turns
both models' hidden states into the loss. Both must have the training's own vocabulary: the same ids would mean other
tokens.
"""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.text.tokenizer import load_tokenizer
from model.weights.loading import WEIGHTS, load_model, load_weights, stored_shapes


def start_from(model: RexForCausalLM, checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Load the weights of `training.init_from`.

    Raises PipelineError where they are missing, of another shape, or of another vocabulary than `tokenizer`.
    """
    option = f"training.init_from is {str(checkpoint)!r}"
    weights = _weights(option, checkpoint)
    found = stored_shapes(weights)
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name in sorted({*found, *expected}):
        old, new = (list(shapes[name]) if name in shapes else "missing" for shapes in (found, expected))
        if old != new:
            raise PipelineError(
                f"{option}: {name} is {old} there and {new} in this experiment; take the model's shape over from it, "
                "and its tokenizer with tokenizer=pretrained tokenizer.path=FOLDER"
            )
    _check_vocabulary(option, checkpoint, tokenizer)
    load_weights(model, weights, dtype=model.dtype)


def load_teacher(
    checkpoint: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int, device: torch.device
) -> RexForCausalLM:
    """The model of `training.distill_from` on `device`, in full precision, without gradients.

    Raises PipelineError where it is no complete checkpoint, has another vocabulary than `tokenizer`, or reads fewer
    tokens than a window has.
    """
    option = f"training.distill_from is {str(checkpoint)!r}"
    _weights(option, checkpoint)
    _check_vocabulary(option, checkpoint, tokenizer)
    teacher = load_model(checkpoint, quantized=False)
    if teacher.config.max_position_embeddings < sequence_length:
        raise PipelineError(
            f"{option}: it reads {teacher.config.max_position_embeddings:,} tokens and a window has "
            f"{sequence_length:,} (tokenizer.sequence_length); lower that, or take a teacher of a longer context"
        )
    teacher.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    return teacher


def _weights(option: str, checkpoint: Path) -> Path:
    weights = checkpoint / WEIGHTS
    if not weights.is_file():
        raise PipelineError(f"{option}: no {WEIGHTS} there; name the folder of a trained checkpoint")
    return weights


def _check_vocabulary(option: str, checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    theirs, ours = load_tokenizer(checkpoint).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        raise PipelineError(
            f"{option}: its tokenizer ({len(theirs):,} tokens) is another than this experiment's ({len(ours):,} "
            f"tokens, {len(theirs.items() ^ ours.items()):,} entries differ); take it over with tokenizer=pretrained "
            "tokenizer.path=FOLDER"
        )
