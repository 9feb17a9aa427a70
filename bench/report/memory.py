"""Peak memory of decoding, each configuration in a separate process.

A process's peak never falls, so configurations cannot share one. `python -m bench.report.memory` imports once, then
forks a child for every configuration: the child loads the model, decodes and reports its peak.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.decode import decode, prompt
from model.errors import PipelineError
from model.system.commands import ending_with_parent, finding_modules
from model.system.memory import peak_resident_bytes
from model.weights.loading import load_model


@dataclass
class Configuration:
    """The model that a child process loads, and the length it decodes."""

    model: str
    """Name in the report."""
    model_dir: str
    cache: bool
    tokens: int
    device: str
    threads: int


def measure_peaks(configurations: list[Configuration]) -> list[dict[str, Any]]:
    """Each configuration with `peak_bytes` (resident set) and `baseline_bytes` (the same after the imports alone).

    On a GPU also `peak_gpu_bytes`, torch's peak allocation there. Raises PipelineError if a child fails.
    """
    request = json.dumps([asdict(configuration) for configuration in configurations])
    result = subprocess.run(
        ending_with_parent([sys.executable, "-m", "bench.report.memory", request]),
        capture_output=True,
        text=True,
        env=finding_modules(),
        check=False,
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise PipelineError(f"measuring peak memory failed: {reason}")
    measured: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return measured


def _run(configuration: Configuration) -> dict[str, Any]:
    """In the child: the peak of loading the model and decoding to `tokens`."""
    torch.set_num_threads(configuration.threads)
    baseline = peak_resident_bytes()
    model = load_model(Path(configuration.model_dir), device=configuration.device)
    if configuration.cache:
        decode(model, prompt(model), configuration.tokens, use_cache=True)
    else:
        # Without a cache a token's memory depends only on its position, so the last token gives the peak.
        decode(model, prompt(model, configuration.tokens), 1, use_cache=False)
    gpu = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    return {
        **asdict(configuration),
        "peak_bytes": peak_resident_bytes(),
        "baseline_bytes": baseline,
        "peak_gpu_bytes": gpu,
    }


def _run_in_a_fork(configuration: Configuration) -> dict[str, Any]:
    """Fork before torch has started a thread, as threads do not survive a fork."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read_end)
            with os.fdopen(write_end, "w") as pipe:
                json.dump(_run(configuration), pipe)
            status = 0
        except BaseException as error:  # noqa: BLE001  no exception may unwind into the parent's code
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(1)
    measured: dict[str, Any] = json.loads(answer)
    return measured


def main() -> None:
    """Measure the configurations given as JSON and print them with their peaks."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.memory", description=main.__doc__)
    parser.add_argument("configurations", help="a JSON list of configurations, as bench.report.memory.Configuration")
    arguments = parser.parse_args()
    configurations = [Configuration(**item) for item in json.loads(arguments.configurations)]
    print(json.dumps([_run_in_a_fork(configuration) for configuration in configurations]))


if __name__ == "__main__":
    main()
