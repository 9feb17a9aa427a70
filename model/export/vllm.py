"""Compares an export in vLLM with its checkpoint: `make export-vllm`, or with an interpreter that has vLLM:

python -m model.export.vllm EXPORT CHECKPOINT DATASET --python .venv-vllm/bin/python

It pins its own torch and transformers and takes gigabytes, so it needs a separate environment, and its certificate is
not part of the asset.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from model.errors import PipelineError, ends_in_one_line
from model.export.parity import certify
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset
from model.weights.loading import load_model

FOLDERS = ("hf", "compressed-tensors")
"""The folders of an export that vLLM reads."""


@ends_in_one_line
def main(arguments: list[str] | None = None) -> int:
    """Print a certificate of vLLM, JSON, for each folder of an export that it reads; status 1 for a difference."""
    parser = argparse.ArgumentParser(prog="python -m model.export.vllm", description=main.__doc__)
    parser.add_argument("export", type=Path, help="folder that model.export wrote")
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint it was made from")
    parser.add_argument("dataset", type=Path, help="folder of the tokenized dataset, for held-out text")
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment that has vLLM")
    given = parser.parse_args(arguments)
    if not given.python.is_file():
        raise PipelineError(f"--python is {str(given.python)!r}: expected the interpreter of an environment with vLLM")
    folders = [folder for folder in FOLDERS if (given.export / folder / "config.json").is_file()]
    if not folders:
        raise PipelineError(f"{given.export} has none of {', '.join(FOLDERS)}: export the checkpoint first")
    model, tokenizer = load_model(given.checkpoint, quantized=False), load_tokenizer(given.checkpoint)
    dataset = TokenDataset(given.dataset, "validation", model.config.max_position_embeddings)
    full = str(model.dtype).removeprefix("torch.")
    passed = True
    for folder in folders:
        precision = "int8" if folder == "compressed-tensors" else full
        path = given.export / folder
        found = certify(model, tokenizer, dataset, "vllm", path, precision, name=folder, python=given.python.absolute())
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
        passed &= found.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
