"""The generation engine against its alternatives, in one interleaved run.

    python -m bench.engine [MODEL_DIR] [--shape 2m 30m 125m] [--against transformers llama.cpp vllm] [--rounds 5]

Without a directory it uses models with random weights, which do not change the speed: the shape of the `stdlib_30m`
experiment, or those of --shape. Decoding ignores end-of-text; it is greedy, but for the streams named sampled. Against
llama.cpp (`llama_cpp.py` says how to install it), int8 is compared with Q8_0, int4 with Q4_0 and float32 with F32;
against vLLM (`make vllm`) float32 with float32:

- one stream and eight up to 128 tokens, greedy and sampled (temperature 0.8, top-k 40, top-p 0.95), one up to 1,024:
  tokens per second from the first token on;
- prefill of a prompt of 900 tokens: its tokens per second;
- sixteen ragged streams, prompts of 448 to 576 tokens, each stream sending its next request after an answer, 48
  requests in total: answer tokens per second, prompts included in the time. Answers are even (uniform, 32 to 128),
  where padding costs least, or long-tailed, as in real traffic (exponential, 80 tokens on average, 365 at most).

Each contender has its own process, as its users would run it: OpenMP puts waiting threads to sleep at once if all pools
of a process together have more threads than there are cores. Prints a table of medians and ratios and a JSON line for
machines.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from bench.engine.comparison import PAIRS, WORKLOADS, choose_pairs, measure
from bench.engine.workloads import SHAPES
from bench.hardware import describe
from model.errors import ends_in_one_line
from model.system.cpu import usable_cores
from model.weights.loading import load_model


@ends_in_one_line
def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.split("\n")[0])  # type: ignore
    parser.add_argument("model_dir", type=Path, nargs="?", help="a checkpoint; default: random weights")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["30m"], help="of random weights")
    parser.add_argument(
        "--against", nargs="+", choices=list(PAIRS), help="default: all that are installed, except reference"
    )
    parser.add_argument("--precision", choices=["float32", "int8", "int4"], help="of the engine alone; default: all")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds that count (default: 5)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="most threads (default: usable cores)")
    arguments = parser.parse_args()
    pairs = choose_pairs(arguments.against, arguments.precision, arguments.workloads)
    if arguments.model_dir:
        load_model(arguments.model_dir)  # report a bad directory here, once, rather than in five processes
    for model in [arguments.model_dir] if arguments.model_dir else arguments.shape:
        found = measure(
            model, pairs, arguments.rounds, arguments.threads, lambda line: print(line, file=sys.stderr, flush=True)
        )
        print(f"\n{model}\n\n| run | tokens/s |\n|---|---:|")
        for name, speed in found["tokens_per_second"].items():
            print(f"| {name} | {speed:,.0f} |")
        print("\n| ratio | median of the rounds | lowest and highest |\n|---|---:|---:|")
        for name, ratio in found["ratios"].items():
            low, high = found["ratio_ranges"][name]
            print(f"| {name} | {ratio:.2f} | {low:.2f} to {high:.2f} |")
        for kind, note in found["notes"].items():
            print(f"\n{kind}: {note}")
        print("\n" + json.dumps({"model": str(model), **found, "hardware": describe(torch.device("cpu"))}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
