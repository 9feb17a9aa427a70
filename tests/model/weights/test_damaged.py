"""Damaged files of a model: each is refused in one line that names the file, at every entry that reads it."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import PipelineError
from model.text.chat import check
from model.text.tokenizer import load_tokenizer
from model.weights.loading import load_model
from model.weights.stock import read_weights
from tests.support.tiny import save_tiny_model

MODEL = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
DEEP = 200_000
NOT_JSON_OBJECTS = {
    "empty": b"",
    "truncated": b'{"model_type": "re',
    "NUL bytes": bytes(64),
    "not UTF-8": b'{"model_type": "\xff"}',
    "UTF-16": '{"model_type": "rex"}'.encode("utf-16"),
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "string": b'"rex"',
    "deep list": b"[" * DEEP,
    "deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "number of 5,000 digits": b'{"model_type": ' + b"9" * 5000 + b"}",
}
WRONG_VALUES: tuple[Any, ...] = ("x", -1, 1.5, 10**12, 10**100, [], {}, True, float("inf"), "\0")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("original"))


@pytest.fixture
def model_dir(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def refusal(load: Callable[[Path], object], model_dir: Path, name: str) -> str:
    with pytest.raises(PipelineError) as caught:
        load(model_dir)
    message = str(caught.value)
    assert type(caught.value) is PipelineError  # not one that is tried again
    assert "\n" not in message
    assert str(model_dir / name) in message
    assert re.search(r"again|expected|take another model", message)
    return message


@pytest.mark.parametrize("content", NOT_JSON_OBJECTS.values(), ids=NOT_JSON_OBJECTS)
@pytest.mark.parametrize(
    ("load", "name"),
    [
        (load_model, "config.json"),
        (load_model, "generation_config.json"),
        (load_model, "quantization.json"),
        (read_weights, "config.json"),
        (read_weights, "model.safetensors.index.json"),
        *((load_tokenizer, name) for name in TOKENIZER),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(
    load: Callable[[Path], object], name: str, content: bytes, model_dir: Path
) -> None:
    (model_dir / name).write_bytes(content)
    refusal(load, model_dir, name)


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("value", WRONG_VALUES, ids=repr)
@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_another_type_or_range_is_refused_before_memory_is_taken(
    name: str, value: object, model_dir: Path
) -> None:
    edited(model_dir / "config.json", **{name: value})
    assert f"{name} is" in refusal(load_model, model_dir, "config.json")


@pytest.mark.parametrize("name", [name for name in SIZES if name != "max_position_embeddings"])
def test_a_size_that_no_memory_holds_is_compared_with_the_weights(name: str, model_dir: Path) -> None:
    edited(model_dir / "config.json", **{name: 2**30})
    assert "config.json" in refusal(load_model, model_dir, "")


@pytest.mark.parametrize("value", ["x", [], {}, None, "\0", float("nan"), -1])
@pytest.mark.parametrize("name", ["rms_norm_eps", "initializer_range"])
def test_a_number_of_another_type_is_refused(name: str, value: object, model_dir: Path) -> None:
    edited(model_dir / "config.json", **{name: value})
    assert f"{name} is" in refusal(load_model, model_dir, "config.json")


@pytest.mark.parametrize("value", ["x", -1, 1.5, 10**12, {}, True, "\0"])
@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_token_that_is_no_number_of_one_is_refused(file: str, name: str, value: object, model_dir: Path) -> None:
    edited(model_dir / file, **{name: value})
    refusal(load_model, model_dir, file)


@pytest.mark.parametrize("value", [None, "x", 0, [], {}], ids=repr)
@pytest.mark.parametrize("load", [load_model, read_weights])
def test_a_type_of_model_that_is_none_is_refused(
    load: Callable[[Path], object], value: object, model_dir: Path
) -> None:
    edited(model_dir / "config.json", model_type=value)
    assert "model_type" in refusal(load, model_dir, "config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [*itertools.product(["model"], [None, "x", -1, [], True]), *itertools.product(["added_tokens"], ["x", -1, True])],
)
def test_a_tokenizer_whose_parts_are_of_other_types_is_refused(name: str, value: object, model_dir: Path) -> None:
    edited(model_dir / "tokenizer.json", **{name: value})
    refusal(load_tokenizer, model_dir, "tokenizer.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab": []},
        {"vocab": {"a": -1}},
        {"vocab": {"a": 0}},
        {"merges": [["a"]]},
        {"merges": "x"},
        {"type": "x"},
        {"continuing_subword_prefix": "x"},
        {"continuing_subword_prefix": "longer than every merge"},
        {"dropout": "x"},
    ],
    ids=repr,
)
def test_a_tokenizer_whose_model_is_damaged_is_refused(changes: dict[str, object], model_dir: Path) -> None:
    state = json.loads((model_dir / "tokenizer.json").read_text())
    edited(model_dir / "tokenizer.json", model={**state["model"], **changes})
    refusal(load_tokenizer, model_dir, "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"eos_token": []}),
        ("tokenizer_config.json", {"extra_special_tokens": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("special_tokens_map.json", {"eos_token": 5}),
        ("special_tokens_map.json", {"eos_token": [1]}),
        ("added_tokens.json", {"x": [1]}),
        ("added_tokens.json", {"x": "y", "z": 1}),
    ],
)
def test_a_file_beside_the_tokenizer_with_wrong_types_is_refused(
    name: str, content: dict[str, object], model_dir: Path
) -> None:
    (model_dir / name).write_text(json.dumps(content))
    refusal(load_tokenizer, model_dir, name)


def test_a_chat_template_that_is_not_utf_8_is_refused(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    assert "UTF-8" in refusal(load_tokenizer, model_dir, "chat_template.jinja")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ a }}\n{% if x %}", "line 2"),
        ("\n\n{{ x | no_such_filter }}", "line 3: No filter named 'no_such_filter'"),
        ("{{ x is no_such_test }}", "line 1: No test named"),
        ("{% no_such_tag %}", "line 1: Encountered unknown tag"),
        ("{{ 'x }}", "line 1"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "nested too deep"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deep"),
        (5, "is a number"),
        ([{"name": "default", "template": "{{ 1 }}"}, {"name": "tools", "template": "{{ 1"}], "line 1"),
    ],
    ids=range(9),
)
def test_a_chat_template_that_is_not_jinja_is_refused_by_file_and_line(
    template: Any, found: str, model_dir: Path
) -> None:
    edited(model_dir / "tokenizer_config.json", chat_template=template)
    assert found in refusal(load_tokenizer, model_dir, "tokenizer_config.json")
    if isinstance(template, str):
        (model_dir / "chat_template.jinja").write_text(template)
        assert found in refusal(load_tokenizer, model_dir, "chat_template.jinja")


@pytest.mark.parametrize("template", ["{{ raise_exception('roles alternate') }}", "{{ messages[7].content.x }}", "\n"])
def test_a_chat_template_that_refuses_conversations_is_loaded(template: str, model_dir: Path) -> None:
    edited(model_dir / "tokenizer_config.json", chat_template=template)
    assert load_tokenizer(model_dir).chat_template == template


def test_a_chat_template_that_does_not_end_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_RENDERING_S", 0.5)
    before = set(threading.enumerate())
    edited(model_dir / "tokenizer_config.json", chat_template="{% for a in range(99999) %}" * 9 + "{% endfor %}" * 9)
    assert "does not end" in refusal(load_tokenizer, model_dir, "tokenizer_config.json")
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("changes", [{"eos_token": None}, {"eos_token": "<|no such token|>"}], ids=repr)
def test_a_tokenizer_without_the_token_that_ends_a_text_is_refused(changes: dict[str, object], model_dir: Path) -> None:
    edited(model_dir / "tokenizer_config.json", **changes)
    assert "eos_token" in refusal(load_tokenizer, model_dir, "tokenizer_config.json")


def _shortened(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _with_header(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def _rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda path, share=share: _shortened(path, share) for share in (0.0, 0.001, 0.5, 0.999)),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
        lambda path: _with_header(path, b"[]"),
        lambda path: _with_header(path, b"{"),
        lambda path: _with_header(path, b"[" * DEEP),
        lambda path: _with_header(path, b'{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}'),
        lambda path: _with_header(path, b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'),
    ],
)
@pytest.mark.parametrize("load", [load_model, read_weights])
def test_damaged_weights_are_refused(
    load: Callable[[Path], object], damage: Callable[[Path], object], model_dir: Path
) -> None:
    damage(model_dir / "model.safetensors")
    refusal(load, model_dir, "model.safetensors")


@pytest.mark.parametrize("name", MODEL)
def test_a_folder_in_the_place_of_a_file_is_refused(name: str, model_dir: Path) -> None:
    (model_dir / name).unlink()
    (model_dir / name).mkdir()
    refusal(load_model, model_dir, name)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda weights: weights.clear(), "model.layers.0"),
        (lambda weights: weights.pop("model.norm.weight"), "no tensor model.norm.weight"),
        (lambda weights: weights.update(x=torch.zeros(1)), "holds x"),
        (lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}), "with shape (3,)"),
        (lambda weights: weights.update({"model.norm.weight": torch.zeros(32, dtype=torch.int64)}), "int64"),
        (lambda weights: weights.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(64, 32).int()}), "int32"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration_are_refused(
    damage: Callable[[dict[str, torch.Tensor]], object], found: str, model_dir: Path
) -> None:
    _rewritten(model_dir / "model.safetensors", damage)
    assert found in refusal(load_model, model_dir, "model.safetensors")


@pytest.mark.processes
def test_a_command_prints_the_line_alone(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_bytes(b"[" * DEEP)
    command = [sys.executable, "-m", "model.weights.loading", str(model_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "generation_config.json is not JSON (nested too deep)" in ended.stderr
