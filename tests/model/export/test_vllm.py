"""The comparison with vLLM: the command, and the certificates where there is an environment that has it.

`make vllm` makes one; the variable VLLM_PYTHON names the interpreter of another.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.errors import PipelineError
from model.export.package import export
from model.export.vllm import main
from model.settings import CorpusSettings, TokenizerSettings
from model.text.corpus import build_corpus
from model.text.tokens import build_tokenized_dataset
from tests.model.export.exports import (
    Made,
    Source,
    certificate,
    change_pre_tokenizer,
    change_rope_base,
    edit,
    make,
    swap_rows,
)
from tests.support.tiny import ROPE_SCALING, TEXT, save_tiny_model
from tests.support.vllm import PYTHON, needs_vllm


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "text.txt").write_text(TEXT * 400)
    build_corpus(
        CorpusSettings(source="files", paths=[str(folder / "text.txt")], split_by="position"), folder / "corpus"
    )
    build_tokenized_dataset(TokenizerSettings(vocab_size=280, sequence_length=96), folder / "corpus", folder / "tokens")
    save_tiny_model(folder / "rex")
    export(folder / "rex", folder / "out", ["hf"])
    return [str(folder / name) for name in ("out", "rex", "tokens")]


def test_an_interpreter_that_is_not_there_is_one_line(folders: list[str], capsys) -> None:
    assert main([*folders, "--python", "no/python"]) == 1
    assert capsys.readouterr().err == (
        "error: --python is 'no/python': expected the interpreter of an environment with vLLM\n"
    )


def test_a_folder_without_an_export_is_one_line(folders: list[str], tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path), *folders[1:], "--python", sys.executable]) == 1
    assert "has none of hf, compressed-tensors: export the checkpoint first" in capsys.readouterr().err


@pytest.mark.processes
def test_an_environment_without_vllm_is_named(folders: list[str], capsys) -> None:
    assert main([*folders, "--python", sys.executable]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: vllm cannot run ") and "No module named 'vllm'" in said and said.count("\n") == 1


@pytest.fixture
def glm4(source: Source, tmp_path: Path) -> Made:
    """With heads of a size that vLLM's attention has on a CPU."""
    return make(source, tmp_path, post_norm=True, hidden_size=128, intermediate_size=128)


def vllm_certificate(made: Made) -> list[str]:
    return certificate(made, "vllm", "hf", python=PYTHON).differences


@needs_vllm
@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"partial_rotary_factor": 0.5},
        {"post_norm": False, "rope_scaling": ROPE_SCALING["llama3"]},
        {"post_norm": False, "qk_norm": True, "rope_scaling": ROPE_SCALING["yarn"]},
    ],
    ids=str,
)
def test_vllm_runs_the_same_model(source: Source, tmp_path: Path, shape: dict[str, Any]) -> None:
    made = make(source, tmp_path, hidden_size=128, intermediate_size=128, **shape)
    export(tmp_path / "rex", tmp_path / "out", ["hf"])
    assert vllm_certificate(made) == []


@needs_vllm
@pytest.mark.slow
@pytest.mark.processes
def test_vllm_finds_query_and_key_rows_in_the_wrong_order(glm4: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    swap_rows(monkeypatch)
    export(glm4[3] / "rex", glm4[3] / "out", ["hf"])
    assert "a log-probability differs" in " ".join(vllm_certificate(glm4))


@needs_vllm
@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("damage", "difference"),
    [(change_rope_base, "a log-probability differs"), (change_pre_tokenizer, "tokens of")],
    ids=["rope base", "pre-tokenizer"],
)
def test_vllm_finds_a_changed_file(glm4: Made, damage: Callable[[Path], None], difference: str) -> None:
    export(glm4[3] / "rex", glm4[3] / "out", ["hf"])
    damage(glm4[3] / "out/hf")
    assert difference in " ".join(vllm_certificate(glm4))


@needs_vllm
@pytest.mark.slow
@pytest.mark.processes
def test_an_export_that_vllm_cannot_load_is_named_by_its_own_error(glm4: Made) -> None:
    export(glm4[3] / "rex", glm4[3] / "out", ["hf"])
    edit(glm4[3] / "out/hf/config.json", lambda config: config.update(num_key_value_heads=3))
    with pytest.raises(PipelineError, match=r"^vllm cannot run .*Error: .*; export the checkpoint again$") as said:
        vllm_certificate(glm4)
    assert "root cause" not in str(said.value)
