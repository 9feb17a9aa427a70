"""The command `python -m model.export`."""

import argparse
import re
import sys
from pathlib import Path

from model.errors import ends_in_one_line
from model.export.package import DEFAULT_GGUF_KINDS, FORMATS, GGUF_KINDS, export


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
    parser.add_argument(
        "--gguf",
        choices=GGUF_KINDS,
        nargs="+",
        default=DEFAULT_GGUF_KINDS,
        metavar="KIND",
        help="weights of the GGUFs, one file each: full (F32 or BF16), q8_0, q4_0; default: full q8_0",
    )
    parser.add_argument("--name", default="rex", help="name in the model card and in GGUF; default: rex")
    given = parser.parse_args(arguments)
    if given.to not in ("gguf", "all") and given.gguf != DEFAULT_GGUF_KINDS:
        parser.error(f"--gguf is for --to gguf or all, and --to is {given.to}")
    if not re.fullmatch(r"\w[\w.-]*", given.name, re.ASCII):
        parser.error(f"--name is {given.name!r}: expected letters, digits, '.', '_' and '-', as Ollama takes them")
    formats = FORMATS if given.to == "all" else (given.to,)
    made = export(given.checkpoint, given.out, formats, gguf_kinds=given.gguf, name=given.name)
    for file in made.files:
        print(f"{given.out / file.path}  {file.precision}")
    for form, reason in made.left_out.items():
        print(f"left out: {form}: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
