"""Exports in the engines that read them: the same model passes, and one that was altered in any way does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from model.errors import PipelineError
from model.export import certified, engines, gguf, parity
from model.export.gguf import write_gguf
from model.export.package import export
from model.export.parity import Certificate, certify
from model.modeling_rex import RexForCausalLM
from model.settings import CorpusSettings, TokenizerSettings
from model.text.chat import add_marks, end_ids
from model.text.corpus import build_corpus
from model.text.tokenizer import load_tokenizer, without_bound
from model.text.tokens import TokenDataset, build_tokenized_dataset
from model.weights import export as layouts
from tests.tiny import CONTEXT, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.processes]

Made = tuple[RexForCausalLM, PreTrainedTokenizerFast, TokenDataset, Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedTokenizerFast, TokenDataset]:
    folder = tmp_path_factory.mktemp("text")
    texts = [
        f"def f{n}(x):\n    return 'naïve größe' + {n * n}  # it's  東京 {chr(0x3400 + n)}\n" * 3 for n in range(200)
    ]
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_corpus(CorpusSettings(source="files", paths=[str(path)]), folder / "corpus")
    settings = TokenizerSettings(kind="bpe", vocab_size=320, sequence_length=CONTEXT)
    build_tokenized_dataset(settings, folder / "corpus", folder / "tokens")
    tokenizer = load_tokenizer(folder / "tokens" / "tokenizer")
    add_marks(tokenizer)
    return tokenizer, TokenDataset(folder / "tokens", "validation", CONTEXT)


@pytest.fixture
def glm4(source: tuple[PreTrainedTokenizerFast, TokenDataset], tmp_path: Path) -> Made:
    return make(source, tmp_path, post_norm=True)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is imported here already; in a separate process it would be again, for seconds."""
    monkeypatch.setattr(parity, "_ask", lambda engine, path, asked, _: engines.ENGINES[engine](path, asked))


def make(source: tuple[PreTrainedTokenizerFast, TokenDataset], folder: Path, **norms: bool) -> Made:
    tokenizer, dataset = source
    model = tiny_model(tokenizer, stops=True, initializer_range=0.2, **norms)
    model.generation_config.eos_token_id = end_ids(tokenizer)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder / "rex")
    tokenizer.save_pretrained(folder / "rex")
    return model, tokenizer, dataset, folder


def certificate(made: Made, engine: str, path: str, precision: str = "float32") -> Certificate:
    model, tokenizer, dataset, folder = made
    return certify(model, tokenizer, dataset, engine, folder / "out" / path, precision)


def test_every_engine_runs_the_same_model_in_a_process_of_its_own(glm4: Made) -> None:
    folder = glm4[3]
    export(folder / "rex", folder / "out")
    for engine, path, precision in (
        ("transformers", "hf", "float32"),
        ("llama.cpp", "gguf/model-f32.gguf", "float32"),
        ("llama.cpp", "gguf/model-q8_0.gguf", "q8_0"),
    ):
        found = certificate(glm4, engine, path, precision)
        assert found.passed, found.differences
        assert found.greedy_tokens > 100 and found.scored_tokens > 20
        assert engine in found.engine


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_the_layouts_without_post_norms_are_the_same_model_too(
    source: tuple[PreTrainedTokenizerFast, TokenDataset], tmp_path: Path, in_this_process: None, qk_norm: bool
) -> None:
    made = make(source, tmp_path, post_norm=False, qk_norm=qk_norm)
    export(tmp_path / "rex", tmp_path / "out", ["hf", "gguf"])
    for engine, path in (("transformers", "hf"), ("llama.cpp", "gguf/model-f32.gguf")):
        found = certificate(made, engine, path)
        assert found.passed, found.differences
        # llama.cpp does not bound a run of characters: its tokens differ beyond the bound, and only there.
        runs = [line.split("'")[1] for line in found.explained_differences if line.startswith("tokens of")]
        assert runs == (["runs of 768 characters"] if engine == "llama.cpp" else [])


def swap_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "interleave_pairs", lambda weight, *_: weight)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_transformers_finds_query_and_key_rows_in_the_wrong_order(
    glm4: Made, monkeypatch: pytest.MonkeyPatch, in_this_process: None
) -> None:
    swap_rows(monkeypatch)
    export(glm4[3] / "rex", glm4[3] / "out", ["hf"])
    assert "a log-probability differs" in " ".join(certificate(glm4, "transformers", "hf").differences)


def test_transformers_finds_another_rope_base(glm4: Made, in_this_process: None) -> None:
    export(glm4[3] / "rex", glm4[3] / "out", ["hf"])
    edit(glm4[3] / "out/hf/config.json", lambda config: config["rope_parameters"].update(rope_theta=500.0))
    assert "a log-probability differs" in " ".join(certificate(glm4, "transformers", "hf").differences)


def test_transformers_finds_another_pre_tokenizer(glm4: Made, in_this_process: None) -> None:
    other = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    export(glm4[3] / "rex", glm4[3] / "out", ["hf"])
    edit(glm4[3] / "out/hf/tokenizer.json", lambda state: state.update(pre_tokenizer=other))
    assert any(line.startswith("tokens of") for line in certificate(glm4, "transformers", "hf").differences)


def test_a_tokenizer_that_lost_its_bound_on_runs_is_a_difference_outside_of_gguf(
    glm4: Made, in_this_process: None
) -> None:
    unbounded = json.loads(without_bound(glm4[1].backend_tokenizer).to_str())["pre_tokenizer"]
    export(glm4[3] / "rex", glm4[3] / "out", ["hf"])
    edit(glm4[3] / "out/hf/tokenizer.json", lambda state: state.update(pre_tokenizer=unbounded))
    found = certificate(glm4, "transformers", "hf")
    assert [line.split("'")[1] for line in found.differences] == ["runs of 768 characters"]


def test_llama_cpp_finds_query_and_key_rows_in_the_wrong_order(glm4: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    swap_rows(monkeypatch)
    export(glm4[3] / "rex", glm4[3] / "out", ["gguf"])
    assert "a log-probability differs" in " ".join(certificate(glm4, "llama.cpp", "gguf/model-f32.gguf").differences)


def test_llama_cpp_finds_another_rope_base(glm4: Made) -> None:
    model, tokenizer, _, folder = glm4
    (folder / "out").mkdir()
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    write_gguf(model, tokenizer, folder / "out/other.gguf", "full", name="other")
    assert "a log-probability differs" in " ".join(certificate(glm4, "llama.cpp", "other.gguf").differences)


def test_llama_cpp_finds_another_pre_tokenizer(glm4: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "PRE_TOKENIZER", "llama-bpe")
    export(glm4[3] / "rex", glm4[3] / "out", ["gguf"])
    found = certificate(glm4, "llama.cpp", "gguf/model-f32.gguf").differences
    assert any(line.startswith("tokens of") for line in found)


def test_a_file_that_an_engine_cannot_load_is_one_line(glm4: Made) -> None:
    (glm4[3] / "out").mkdir()
    (glm4[3] / "out/broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(PipelineError, match=r"^llama.cpp cannot run .*broken.gguf: .*; export the checkpoint again$"):
        certificate(glm4, "llama.cpp", "broken.gguf")


def test_a_difference_and_what_was_not_run_are_named_beside_the_files(
    source: tuple[PreTrainedTokenizerFast, TokenDataset],
    tmp_path: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(source, tmp_path, post_norm=True)
    (tmp_path / "quantized").mkdir()
    monkeypatch.setattr(certified, "installed_engines", lambda: {"transformers": "5"})
    swap_rows(monkeypatch)
    found = certified.export_with_certificates(
        tmp_path / "rex",
        tmp_path / "quantized",
        Path(source[1].tokens.filename).parent,
        tmp_path / "out",
        sequence_length=CONTEXT,
        name="mine",
        provenance={},
    )
    assert [certificate.file for certificate in found.certificates] == ["hf"]
    assert found.differences and all(line.startswith("transformers 5") for line in found.differences)
    assert found.left_out == [
        "certificate of compressed-tensors: compressed-tensors is not installed",
        "certificate of gguf/model-f32.gguf: llama.cpp is not installed",
        "certificate of gguf/model-q8_0.gguf: llama.cpp is not installed",
    ]
    written = json.loads((tmp_path / "out" / certified.CERTIFICATES).read_text())
    assert written["certificates"][0]["differences"] and written["left_out"] == found.left_out
    assert "certificates.json" in (tmp_path / "out/SHA256SUMS").read_text()
