"""The command that compares an export in vLLM; the comparison itself needs vLLM's environment (`make export-vllm`)."""

import sys
from pathlib import Path

import pytest

from model.export.package import export
from model.export.vllm import main
from model.settings import CorpusSettings, TokenizerSettings
from model.text.corpus import build_corpus
from model.text.tokens import build_tokenized_dataset
from tests.tiny import TEXT, save_tiny_model


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
