"""llama.cpp on the weights of a checkpoint, in a separate process, which its errors abort.

The process, `python -m bench.report.llama_cpp CHECKPOINT_DIR TOKENIZER_DIR THREADS`, reads JSON lines of a kind
of weights, streams and tokens, and answers each with a line: tokens per second at llama.cpp's best setting.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from bench.engine.llama_cpp import LlamaCpp, LlamaCppFloat32, installed
from model.errors import PipelineError
from model.export.gguf import reason_against
from model.modeling_rex import RexForCausalLM
from model.system.commands import ending_with_parent, finding_modules
from model.text.tokenizer import load_tokenizer
from model.weights.loading import load_model

KINDS: dict[str, type[LlamaCpp]] = {"Q8_0": LlamaCpp, "F32": LlamaCppFloat32}
MOST_STREAMS = 256
"""llama.cpp's own limit."""


def reason_to_leave_out(model: RexForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Why a report has no figures of llama.cpp, in one line; empty if it has."""
    if not installed():
        return "not installed; `pip install llama-cpp-python`, which needs a C++ compiler, adds it"
    if model.device.type != "cpu":
        return f"computes on the processor, and this report is of {model.device.type}"
    return reason_against(model.config, tokenizer) or ""


class LlamaCppProcess:
    """llama.cpp in a process."""

    def __init__(self, process: "subprocess.Popen[str]", errors: Any) -> None:
        self._process, self._errors = process, errors

    @classmethod
    @contextmanager
    def running(cls, checkpoint_dir: Path, tokenizer_dir: Path, threads: int) -> Iterator["LlamaCppProcess"]:
        """Start it, and end it with the block. threads: most of them."""
        command = [sys.executable, "-m", "bench.report.llama_cpp", str(checkpoint_dir), str(tokenizer_dir)]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                ending_with_parent([*command, str(threads)]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=finding_modules(),
            ) as process,
        ):
            yield cls(process, errors)  # leaving closes its input, which ends it

    def decode(self, kind: str, streams: int, tokens: int) -> float:
        """Tokens per second of equal streams, each up to `tokens` tokens. Raises PipelineError if it has ended."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps([kind, streams, tokens]) + "\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (OSError, ValueError):
            with suppress(OSError):  # what it did not read would be written again on closing
                self._process.stdin.close()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            reason = said[-1] if said else f"exit status {self._process.wait()}"
            raise PipelineError(f"llama.cpp ended: {reason}") from None


def main() -> None:
    """Answer the workloads that standard input names."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.llama_cpp", description=main.__doc__)
    parser.add_argument("checkpoint_dir", type=Path, help="directory of the trained checkpoint")
    parser.add_argument("tokenizer_dir", type=Path, help="directory of its tokenizer")
    parser.add_argument("threads", type=int, help="most threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.checkpoint_dir), load_tokenizer(arguments.tokenizer_dir)
    contenders = {kind: contender(model, tokenizer) for kind, contender in KINDS.items()}
    for line in sys.stdin:
        kind, streams, tokens = json.loads(line)
        print(contenders[kind].from_one_token(streams, tokens), flush=True)


if __name__ == "__main__":
    main()
