"""Models to export, ways to break what was exported, and the certificates of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from model.export import parity
from model.export.parity import Certificate
from model.modeling_rex import RexForCausalLM
from model.text.chat.template import end_ids
from model.text.tokens import TokenDataset
from model.weights import export as layouts
from tests.support.tiny import tiny_model

Source = tuple[PreTrainedTokenizerFast, TokenDataset]
Made = tuple[RexForCausalLM, PreTrainedTokenizerFast, TokenDataset, Path]
OTHER_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def make(source: Source, folder: Path, **shape: Any) -> Made:
    """A checkpoint in `folder`/rex whose norms differ from each other."""
    tokenizer, dataset = source
    model = tiny_model(tokenizer, stops=True, initializer_range=0.2, **shape)
    model.generation_config.eos_token_id = end_ids(tokenizer)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder / "rex")
    tokenizer.save_pretrained(folder / "rex")
    return model, tokenizer, dataset, folder


def certificate(made: Made, engine: str, path: str, precision: str = "float32", **options: Any) -> Certificate:
    """What the engine says of `path` below `folder`/out."""
    model, tokenizer, dataset, folder = made
    return parity.certify(model, tokenizer, dataset, engine, folder / "out" / path, precision, **options)


def swap_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query and key rows stay in REX's order."""
    monkeypatch.setattr(layouts, "interleave_pairs", lambda weight, *_: weight)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_rope_base(folder: Path) -> None:
    """Another base of the rotary frequencies in an exported folder."""
    edit(folder / "config.json", lambda config: config["rope_parameters"].update(rope_theta=500.0))


def change_pre_tokenizer(folder: Path) -> None:
    """Another split of text in an exported folder."""
    edit(folder / "tokenizer.json", lambda state: state.update(pre_tokenizer=OTHER_PRE_TOKENIZER))
