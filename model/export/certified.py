"""Exports a checkpoint and runs each file in its engine before later stages use it."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.export.engines import PACKAGES, installed_engines
from model.export.package import DEFAULT_GGUF_KINDS, ExportedFile, export, write_checksums
from model.export.parity import Certificate, certify
from model.progress import Log, silent
from model.system.revision import code_revision
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset
from model.weights.loading import load_model, read_method

CERTIFICATES = "certificates.json"


@dataclass(frozen=True)
class CertifiedExport:
    """Certificates of the engines, and reasons for each format that was not written or not run."""

    certificates: list[Certificate]
    left_out: list[str]

    @property
    def differences(self) -> list[str]:
        """Every difference found, prefixed by engine and file."""
        return [f"{found.engine}, {found.file}: {line}" for found in self.certificates for line in found.differences]


def export_with_certificates(
    checkpoint_dir: Path,
    quantized_dir: Path,
    dataset_dir: Path,
    output_dir: Path,
    *,
    sequence_length: int,
    name: str,
    provenance: Mapping[str, Any],
    log: Log = silent,
) -> CertifiedExport:
    """Write every format of a checkpoint, and the certificates of the installed engines to `certificates.json`.

    quantized_dir: the quantized model whose bits per byte the model card quotes, with the commit of the code; if it is
    int4, there is a GGUF in Q4_0 as well.
    Raises PipelineError for an incomplete checkpoint, or if an engine cannot load its file.
    """
    described = {**provenance, **_measured(quantized_dir), "commit": code_revision()}
    kinds = (*DEFAULT_GGUF_KINDS, *(["q4_0"] if read_method(quantized_dir) == "int4" else []))
    made = export(checkpoint_dir, output_dir, gguf_kinds=kinds, name=name, provenance=described)
    model = load_model(checkpoint_dir, quantized=False)
    dataset = TokenDataset(dataset_dir, "validation", sequence_length)
    engines = installed_engines()
    left_out = [f"{form}: {reason}" for form, reason in made.left_out.items()]
    left_out += [
        f"certificate of {file.path}: not checked, as {PACKAGES[file.engine]} is not installed (pip install "
        "'.[export]' in the repository)"
        for file in made.files
        if file.engine not in engines
    ]

    def run(file: ExportedFile) -> Certificate:
        path, own = output_dir / file.path, load_tokenizer(checkpoint_dir)  # a tokenizer serves one thread at a time
        return certify(model, own, dataset, file.engine, path, file.precision, name=file.path)

    certificates: list[Certificate] = []
    # Two at once: each engine's process imports for seconds on one core.
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(run, [file for file in made.files if file.engine in engines]):
            log(
                f"{found.engine} on {found.file}: log-probabilities within {found.log_probability_difference:.2g} "
                f"nats, {len(found.differences)} differences, {len(found.explained_differences)} explained"
            )
            certificates.append(found)
    text = json.dumps({"certificates": [asdict(c) for c in certificates], "left_out": left_out}, indent=2)
    (output_dir / CERTIFICATES).write_text(text + "\n", encoding="utf-8")
    write_checksums(output_dir)
    return CertifiedExport(certificates, left_out)


def _measured(quantized_dir: Path) -> dict[str, Any]:
    path = quantized_dir / "summary.json"
    if not path.is_file():
        return {}
    summary = json.loads(path.read_text(encoding="utf-8"))
    return {"bits per byte": {key: value for key, value in summary.items() if key.startswith("bits_per_byte")}}
