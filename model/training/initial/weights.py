"""Loads the initial weights of a training, and the teacher of a distillation.

The teacher runs on each batch without gradients, in the training's precision; `loss.py` computes the loss from both
models' hidden states. Both checkpoints must have the training's vocabulary, so that ids mean the same tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.text.chat.template import MARKS
from model.text.tokenizer import load_tokenizer
from model.weights.loading import WEIGHTS, load_model
from model.weights.stock import differing_options, read_weights, weight_files

_OF_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")


def start_from(model: RexForCausalLM, checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Load the weights of `training.init_from`: a REX checkpoint, or a stock model of the same architecture.

    Role marks that `tokenizer` adds to the checkpoint's vocabulary are initialized to the mean of the other embeddings,
    and embeddings of no token are left out.
    Raises PipelineError if they are missing, differ in shape or vocabulary from `model` and `tokenizer`, or would
    compute different results in this experiment, for example with another rotary base.
    """
    option = f"training.init_from is {str(checkpoint)!r}"
    with _named(option):
        if not weight_files(checkpoint):
            raise PipelineError(f"no {WEIGHTS} there; name the folder of a trained checkpoint, or of a stock model")
        found, options = read_weights(checkpoint), differing_options(checkpoint, model.config)
        theirs, ours = load_tokenizer(checkpoint).get_vocab(), tokenizer.get_vocab()
    added = ours.keys() - theirs.keys()
    is_extended = bool(added) and added <= set(MARKS.values()) and {**ours, **theirs} == ours
    if theirs == ours or is_extended:
        # Published models have rows beyond their tokenizer, to a round number, which no text uses.
        found |= {name: found[name][: len(theirs)] for name in _OF_TOKENS if name in found}
    if is_extended:
        found |= {name: _with_rows(found[name], len(added)) for name in _OF_TOKENS if name in found}
    expected = dict(model.named_parameters())
    for name in sorted({*found, *expected}):
        old, new = (list(given[name].shape) if name in given else "missing" for given in (found, expected))
        if old != new:
            raise PipelineError(
                f"{option}: {name} is {old} there and {new} in this experiment; use the checkpoint's model shape"
                f"{' (' + ' '.join(options) + ')' if options else ''}, and its tokenizer with tokenizer=pretrained "
                "tokenizer.path=FOLDER"
            )
    if options:
        raise PipelineError(
            f"{option}: it computes different results than this experiment's model; set {' '.join(options)}"
        )
    if not is_extended:
        _check_vocabulary(option, theirs, ours)
    # strict=False because a tied head has no entry. All other names were compared.
    model.load_state_dict(found, strict=False)


def _with_rows(weight_VD: torch.Tensor, added: int) -> torch.Tensor:
    """Embeddings with a row for each added token."""
    return torch.cat([weight_VD, weight_VD.mean(0, keepdim=True).expand(added, -1)])


def load_teacher(
    checkpoint: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int, device: torch.device
) -> RexForCausalLM:
    """The model of `training.distill_from` on `device`, in full precision, without gradients.

    Raises PipelineError if it is not a complete checkpoint, has another vocabulary than `tokenizer`, or a context
    shorter than a window.
    """
    option = f"training.distill_from is {str(checkpoint)!r}"
    with _named(option):
        if not (checkpoint / WEIGHTS).is_file():
            raise PipelineError(f"no {WEIGHTS} there; name the folder of a trained checkpoint")
        theirs = load_tokenizer(checkpoint).get_vocab()
    _check_vocabulary(option, theirs, tokenizer.get_vocab())
    with _named(option):
        teacher = load_model(checkpoint, quantized=False)
    if teacher.config.max_position_embeddings < sequence_length:
        raise PipelineError(
            f"{option}: its context is {teacher.config.max_position_embeddings:,} tokens and a window has "
            f"{sequence_length:,} (tokenizer.sequence_length); lower that, or use a teacher with a longer context"
        )
    teacher.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    return teacher


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Name the option in the errors of the folder that it names."""
    try:
        yield
    except PipelineError as error:
        raise PipelineError(f"{option}: {error}") from None


def _check_vocabulary(option: str, theirs: Mapping[str, int], ours: Mapping[str, int]) -> None:
    if theirs != ours:
        raise PipelineError(
            f"{option}: its tokenizer ({len(theirs):,} tokens) differs from this experiment's ({len(ours):,} "
            f"tokens, {len(theirs.items() ^ ours.items()):,} entries differ); use it with tokenizer=pretrained "
            "tokenizer.path=FOLDER"
        )
