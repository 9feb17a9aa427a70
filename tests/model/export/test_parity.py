"""Exports in the engines that read them: the same model passes, and one that was altered in any way does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import PipelineError
from model.export import certified, engines, gguf, parity
from model.export.gguf import write_gguf
from model.export.package import GGUF_KINDS, export
from model.text.tokenizer import without_bound
from model.weights.loading import FORMAT_VERSION, QUANTIZATION
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
from tests.support.tiny import CONTEXT, ROPE_SCALING

pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is imported here already; in a separate process it would be again, for seconds."""
    monkeypatch.setattr(parity, "_ask", lambda engine, path, asked, _: engines.ENGINES[engine](path, asked))


def export_certified(source: Source, folder: Path) -> certified.CertifiedExport:
    return certified.export_with_certificates(
        folder / "rex",
        folder / "quantized",
        Path(source[1].tokens.filename).parent,
        folder / "out",
        sequence_length=CONTEXT,
        name="mine",
        provenance={},
    )


def test_every_engine_runs_the_same_model_in_a_process_of_its_own(glm4: Made) -> None:
    folder = glm4[3]
    export(folder / "rex", folder / "out", gguf_kinds=GGUF_KINDS)
    for engine, path, precision in (
        ("transformers", "hf", "float32"),
        ("compressed-tensors", "compressed-tensors", "int8"),
        ("llama.cpp", "gguf/model-f32.gguf", "float32"),
        ("llama.cpp", "gguf/model-q8_0.gguf", "q8_0"),
        ("llama.cpp", "gguf/model-q4_0.gguf", "q4_0"),
    ):
        found = certificate(glm4, engine, path, precision)
        assert found.passed, found.differences
        assert found.greedy_tokens > 100 and found.scored_tokens >= parity.SCORED_TOKENS
        assert engine in found.engine
        assert found.compared_with == ("checkpoint" if precision == "float32" else precision)
        assert found.bits_per_byte_difference <= found.bits_per_byte_bound == 1e-3
        assert (found.bits_per_byte_lost_by_rounding == 0) == (precision == "float32")


def test_a_bfloat16_checkpoint_is_the_same_model_too(glm4: Made, in_this_process: None) -> None:
    model, tokenizer, dataset, folder = glm4
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder / "rex")
    export(folder / "rex", folder / "out", ["hf", "gguf"], gguf_kinds=["full"])
    for engine, path in (("transformers", "hf"), ("llama.cpp", "gguf/model-bf16.gguf")):
        found = certificate((model, tokenizer, dataset, folder), engine, path, "bfloat16")
        assert found.passed, found.differences


LLAMA, QWEN3 = {"post_norm": False}, {"post_norm": False, "qk_norm": True}
FULL_PRECISION = [("transformers", "hf", "float32"), ("llama.cpp", "gguf/model-f32.gguf", "float32")]
ROUNDED = [
    ("compressed-tensors", "compressed-tensors", "int8"),
    ("llama.cpp", "gguf/model-q8_0.gguf", "q8_0"),
    ("llama.cpp", "gguf/model-q4_0.gguf", "q4_0"),
]


@pytest.mark.parametrize(
    ("shape", "files"),
    [
        (LLAMA, FULL_PRECISION),
        (QWEN3, FULL_PRECISION),
        ({**LLAMA, "rope_scaling": ROPE_SCALING["llama3"]}, [*FULL_PRECISION, *ROUNDED]),
        ({**LLAMA, "rope_scaling": ROPE_SCALING["linear"]}, FULL_PRECISION),
        ({**LLAMA, "rope_scaling": ROPE_SCALING["dynamic"]}, FULL_PRECISION),
        ({**QWEN3, "rope_scaling": ROPE_SCALING["yarn"]}, FULL_PRECISION),
        ({**LLAMA, "rope_scaling": {**ROPE_SCALING["yarn"], "attention_factor": 1.3, "beta_fast": 2}}, FULL_PRECISION),
        ({"partial_rotary_factor": 0.5}, [*FULL_PRECISION, *ROUNDED]),
        ({"partial_rotary_factor": 0.5, "rope_scaling": ROPE_SCALING["yarn"]}, FULL_PRECISION),
        ({**LLAMA, "partial_rotary_factor": 0.5}, FULL_PRECISION),
    ],
    ids=str,
)
def test_other_layouts_and_rotary_embeddings_are_the_same_model_too(
    source: Source, tmp_path: Path, in_this_process: None, shape: dict[str, Any], files: list[tuple[str, str, str]]
) -> None:
    made = make(source, tmp_path, hidden_size=64, head_dim=16, **shape)
    export(tmp_path / "rex", tmp_path / "out", gguf_kinds=GGUF_KINDS)
    for engine, path, precision in files:
        found = certificate(made, engine, path, precision)
        assert found.passed, found.differences
        # llama.cpp does not bound a run of characters: its tokens differ beyond the bound, and only there.
        runs = [line.split("'")[1] for line in found.explained_differences if line.startswith("tokens of")]
        assert runs == (["runs of 768 characters"] if engine == "llama.cpp" else [])


def test_transformers_finds_query_and_key_rows_in_the_wrong_order(
    glm4: Made, monkeypatch: pytest.MonkeyPatch, in_this_process: None
) -> None:
    swap_rows(monkeypatch)
    export(glm4[3] / "rex", glm4[3] / "out", ["hf"])
    assert "a log-probability differs" in " ".join(certificate(glm4, "transformers", "hf").differences)


def test_transformers_finds_another_rope_base(glm4: Made, in_this_process: None) -> None:
    export(glm4[3] / "rex", glm4[3] / "out", ["hf"])
    change_rope_base(glm4[3] / "out/hf")
    assert "a log-probability differs" in " ".join(certificate(glm4, "transformers", "hf").differences)


def test_transformers_finds_another_pre_tokenizer(glm4: Made, in_this_process: None) -> None:
    export(glm4[3] / "rex", glm4[3] / "out", ["hf"])
    change_pre_tokenizer(glm4[3] / "out/hf")
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


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default", "rope_theta": 500.0}, {**ROPE_SCALING["linear"], "rope_theta": 10_000.0}], ids=str
)
def test_llama_cpp_finds_other_rotary_embeddings(glm4: Made, rope: dict[str, Any]) -> None:
    model, tokenizer, _, folder = glm4
    (folder / "out").mkdir()
    model.config.rope_parameters = rope
    write_gguf(model, tokenizer, folder / "out/other.gguf", "full", name="other")
    assert "a log-probability differs" in " ".join(certificate(glm4, "llama.cpp", "other.gguf").differences)


def test_llama_cpp_finds_another_pre_tokenizer(glm4: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "PRE_TOKENIZER", "llama-bpe")
    export(glm4[3] / "rex", glm4[3] / "out", ["gguf"])
    found = certificate(glm4, "llama.cpp", "gguf/model-f32.gguf").differences
    assert any(line.startswith("tokens of") for line in found)


def test_llama_cpp_finds_four_bit_values_in_the_wrong_order(glm4: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    in_order = gguf.int4.quantize_weight

    def swapped(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scale_NG = in_order(weight_NK)
        return packed << 4 | packed >> 4, scale_NG

    with monkeypatch.context() as patch:
        patch.setattr(gguf.int4, "quantize_weight", swapped)
        export(glm4[3] / "rex", glm4[3] / "out", ["gguf"], gguf_kinds=["q4_0"])
    found = certificate(glm4, "llama.cpp", "gguf/model-q4_0.gguf", "q4_0")
    assert "a log-probability differs" in " ".join(found.differences)


def test_a_file_that_an_engine_cannot_load_is_one_line(glm4: Made) -> None:
    (glm4[3] / "out").mkdir()
    (glm4[3] / "out/broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(PipelineError, match=r"^llama.cpp cannot run .*broken.gguf: .*; export the checkpoint again$"):
        certificate(glm4, "llama.cpp", "broken.gguf")


def test_a_difference_and_what_was_not_run_are_named_beside_the_files(
    source: Source,
    tmp_path: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(source, tmp_path, post_norm=True)
    (tmp_path / "quantized").mkdir()
    monkeypatch.setattr(certified, "installed_engines", lambda: {"transformers": "5"})
    swap_rows(monkeypatch)
    found = export_certified(source, tmp_path)
    assert [certificate.file for certificate in found.certificates] == ["hf"]
    assert found.differences and all(line.startswith("transformers 5") for line in found.differences)
    assert found.left_out == [
        f"certificate of {file}: not checked, as {package} is not installed (pip install '.[export]' in the repository)"
        for file, package in (
            ("compressed-tensors", "compressed-tensors"),
            ("gguf/model-f32.gguf", "xllamacpp"),
            ("gguf/model-q8_0.gguf", "xllamacpp"),
        )
    ]
    written = json.loads((tmp_path / "out" / certified.CERTIFICATES).read_text())
    assert written["certificates"][0]["differences"] and written["left_out"] == found.left_out
    assert "certificates.json" in (tmp_path / "out/SHA256SUMS").read_text()


def test_a_model_served_in_four_bits_is_certified_as_a_gguf_in_four_bits_too(
    source: Source,
    tmp_path: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(source, tmp_path, post_norm=True)
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / QUANTIZATION).write_text(json.dumps({"format_version": FORMAT_VERSION, "method": "int4"}))
    monkeypatch.setattr(certified, "installed_engines", lambda: {"llama.cpp": "1"})
    found = export_certified(source, tmp_path)
    assert [one.precision for one in found.certificates] == ["float32", "q8_0", "q4_0"] and not found.differences
