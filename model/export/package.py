"""Writes all files of an export to one folder, with a model card (README.md) and checksums (SHA256SUMS).

hf/: GLM-4, GLM, Llama or Qwen3 layout in safetensors, for transformers, vLLM and SGLang. compressed-tensors/: int8 in
the layout that vLLM reads. gguf/: model-f32.gguf (or -bf16), model-q8_0.gguf, model-q4_0.gguf if it is requested, and a
Modelfile, for llama.cpp and Ollama.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from model.artifact import MANIFEST, file_digests, read_origin
from model.errors import PipelineError
from model.export.compressed_tensors import write_compressed_tensors
from model.export.gguf import reason_against, write_gguf
from model.export.ollama import modelfile
from model.modeling_rex import RexForCausalLM
from model.system.revision import code_revision
from model.text.tokenizer import MAX_RUN_LENGTH, load_tokenizer
from model.weights.export import copy_tokenizer, export_checkpoint
from model.weights.loading import load_model

FORMATS = ("hf", "compressed-tensors", "gguf")
GGUF_KINDS = ("full", "q8_0", "q4_0")
"""Weights of a GGUF, the largest first. full: F32, or BF16 for a bfloat16 model."""
DEFAULT_GGUF_KINDS = ("full", "q8_0")
CARD, CHECKSUMS = "README.md", "SHA256SUMS"


@dataclass(frozen=True)
class ExportedFile:
    """A model that an engine loads: `path` relative to the output folder, and the storage precision of its weights."""

    path: str
    precision: str
    engine: str
    """The engine that reads it."""


@dataclass(frozen=True)
class Export:
    """The files written, and the reason for each format left out."""

    files: tuple[ExportedFile, ...]
    left_out: dict[str, str]


def export(
    checkpoint_dir: Path,
    output_dir: Path,
    formats: Sequence[str] = FORMATS,
    *,
    gguf_kinds: Sequence[str] = DEFAULT_GGUF_KINDS,
    name: str = "rex",
    provenance: Mapping[str, Any] | None = None,
) -> Export:
    """Write `formats` of a REX checkpoint in full precision.

    gguf_kinds: the weights of the GGUFs, one file each, of GGUF_KINDS. name: of the model in the card and in GGUF.
    provenance: lines of the model card, by title; none: what the checkpoint's manifest says, and this code's commit.
    A format that cannot represent the model is left out, with the reason, if other formats were requested as well.
    Raises PipelineError if `checkpoint_dir` is not a REX checkpoint, or the only requested format cannot represent it.
    """
    if not (checkpoint_dir / "config.json").is_file():
        raise PipelineError(f"no config.json in {checkpoint_dir}: expected a REX checkpoint; train one first")
    if output_dir.resolve() == checkpoint_dir.resolve() or (output_dir.exists() and not output_dir.is_dir()):
        raise PipelineError(f"{output_dir} is a file or the checkpoint's own folder: name another one to write to")
    model, tokenizer = load_model(checkpoint_dir, quantized=False), load_tokenizer(checkpoint_dir)
    precision = str(model.dtype).removeprefix("torch.")
    files: list[ExportedFile] = []
    left_out: dict[str, str] = {}
    output_dir.mkdir(parents=True, exist_ok=True)
    if "hf" in formats:
        export_checkpoint(checkpoint_dir, output_dir / "hf")
        files.append(ExportedFile("hf", precision, "transformers"))
    if "compressed-tensors" in formats:
        write_compressed_tensors(model, output_dir / "compressed-tensors")
        copy_tokenizer(checkpoint_dir, output_dir / "compressed-tensors")
        files.append(ExportedFile("compressed-tensors", "int8", "compressed-tensors"))
    if "gguf" in formats:
        reason = reason_against(model.config, tokenizer)
        if reason and len(formats) > 1:
            left_out["gguf"] = reason
        else:
            files += _write_ggufs(model, tokenizer, output_dir / "gguf", name, gguf_kinds)
    (output_dir / CARD).write_text(
        _card(name, files, left_out, provenance or _provenance(checkpoint_dir)), encoding="utf-8"
    )
    write_checksums(output_dir)
    return Export(tuple(files), left_out)


def _provenance(checkpoint_dir: Path) -> dict[str, Any]:
    origin = read_origin(checkpoint_dir) or {}
    known = {
        "experiment": origin.get("experiment"),
        "upstream versions": {**origin.get("upstream", {}), origin.get("asset", ""): origin.get("content_hash")},
        "configuration": origin.get("config"),
        "bits per byte": (origin.get("registration") or {}).get("bits_per_byte"),
    }
    return {**(known if origin else {}), "commit": code_revision()}


def write_checksums(output_dir: Path) -> None:
    """Write the sha256 of every file but the manifest, as `sha256sum --check` reads it."""
    digests = file_digests(output_dir)
    lines = [f"{digest['sha256']}  {path}\n" for path, digest in digests.items() if path not in (CHECKSUMS, MANIFEST)]
    (output_dir / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def _write_ggufs(
    model: RexForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, name: str, kinds: Sequence[str]
) -> list[ExportedFile]:
    folder.mkdir(parents=True, exist_ok=True)
    full = "bf16" if model.dtype == torch.bfloat16 else "f32"
    files = []
    for kind in (kind for kind in GGUF_KINDS if kind in kinds):
        file = f"model-{full if kind == 'full' else kind}.gguf"
        write_gguf(model, tokenizer, folder / file, kind, name=name)
        precision = str(model.dtype).removeprefix("torch.") if kind == "full" else kind
        files.append(ExportedFile(f"gguf/{file}", precision, "llama.cpp"))
    smallest = Path(files[-1].path).name
    (folder / "Modelfile").write_text(modelfile(model, tokenizer, smallest), encoding="utf-8")
    return files


def _card(name: str, files: Sequence[ExportedFile], left_out: Mapping[str, str], provenance: Mapping[str, Any]) -> str:
    lines = [f"# {name}", "", "A REX model in formats that need no code of this project.", ""]
    lines += ["| folder or file | weights |", "|---|---|"]
    lines += [f"| `{file.path}` | {file.precision} |" for file in files]
    lines += ["", *(f"Left out: {form} ({reason})." for form, reason in left_out.items())]
    paths = [file.path for file in files]
    lines += ["", "## Run", "", "```sh"]
    if "hf" in paths:
        lines += ["vllm serve ./hf"]
        lines += ["""python -c 'from transformers import pipeline; print(pipeline("text-generation", "hf")("Once"))'"""]
    if any(path.startswith("gguf/") for path in paths):
        smallest = [path for path in paths if path.startswith("gguf/")][-1]
        lines += [f'llama-completion -m {smallest} -p "Once"']
        lines += [f"ollama create {name} -f gguf/Modelfile && ollama run {name} Once"]
    lines += ["```", ""]
    if any(path.startswith("gguf/") for path in paths):
        runs = f"runs of more than {MAX_RUN_LENGTH} letters, digits, signs or spaces"
        lines += [f"llama.cpp and Ollama do not split {runs}: their tokens may differ there.", ""]
    lines += ["## Provenance", ""]
    lines += [
        f"- {title}: {value if isinstance(value, str) else '`' + json.dumps(value, sort_keys=True, default=str) + '`'}"
        for title, value in provenance.items()
    ]
    lines += [
        "- License: weights follow the licenses of the text that they were trained on; check them before you share it."
    ]
    return "\n".join(lines) + "\n"
