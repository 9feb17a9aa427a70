"""The command `python -m model.export`."""

import argparse
import sys
from pathlib import Path

from model.errors import ends_in_one_line
from model.export.package import FORMATS, export


@ends_in_one_line
def main(arguments: list[str] | None = None) -> int:
    """Write a REX checkpoint in the formats of other engines; prints one line and exits with 1 on an error."""
    parser = argparse.ArgumentParser(prog="python -m model.export", description=main.__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a trained checkpoint")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument(
        "--to",
        choices=(*FORMATS, "all"),
        default="all",
        help="hf: safetensors for transformers, vLLM, SGLang; compressed-tensors: int8 for vLLM; "
        "gguf: llama.cpp, Ollama",
    )
    parser.add_argument("--name", default="rex", help="name in the model card and in GGUF; default: rex")
    given = parser.parse_args(arguments)
    made = export(given.checkpoint, given.out, FORMATS if given.to == "all" else (given.to,), name=given.name)
    for file in made.files:
        print(f"{given.out / file.path}  {file.precision}")
    for form, reason in made.left_out.items():
        print(f"left out: {form}: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
