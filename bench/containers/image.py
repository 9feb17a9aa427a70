"""Costs of the container image: build time, size, start time and memory.

    python -m bench.containers.image [--experiment smoke] [--device cpu] [--rounds 3]

Needs a container engine and a packaged Bento of the experiment (`make pipeline EXPERIMENT=smoke`). `make image` builds
the image once; then the image is removed by name and built again, timed: a warm build, with packages in uv's cache and
layers in the engine's. Then each round runs a container with the documented options and no network except the loopback
address.

- ready: seconds from `docker run` to a /readyz of 200;
- memory: anonymous memory of the container's processes, MB, which the kernel cannot reclaim, when the service is ready
  and after 16 texts, minus the weights (the bytes of the model's safetensors files) and the KV cache. Mapped library
  files are reported separately; the kernel can drop their pages.

Prints a table, and a JSON line for machines.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from bench.containers.container import HARDENED, IMAGE_GB
from model.errors import PipelineError, ends_in_one_line
from model.system import commands

MB = 1e6
POLL_EVERY_S = 2.0
"""Seconds between polls of a starting container's state: polling in every iteration slowed the start."""
REPOSITORY = Path(__file__).resolve().parents[2]
# Run by the image's Python inside the container: number of processes, anonymous bytes and mapped-file bytes, shared
# pages counted once.
HELD = """
import contextlib, glob, os, re
own, texts = f"/proc/{os.getpid()}/smaps_rollup", []
for path in glob.glob("/proc/[0-9]*/smaps_rollup"):
    with contextlib.suppress(OSError):  # a process that ends, such as that of a health check
        texts += [open(path).read()] if path != own else []
def held(kind):
    return sum(int(re.search(f"^Pss_{kind}: +([0-9]+) kB", text, re.M)[1]) * 1024 for text in texts)
print(len(texts), held("Anon") + held("Shmem"), held("File"))
"""
# Run the same way: bytes of the weights, and KV cache bytes of one token.
MODEL = """
import glob, json, os
(folder,) = {os.path.dirname(path) for path in glob.glob("/app/bento/models/*/*/config.json")}
config = json.load(open(os.path.join(folder, "config.json")))
weights = sum(os.path.getsize(path) for path in glob.glob(os.path.join(folder, "*.safetensors")))
print(weights, 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])
"""


def run(*command: str, **variables: str) -> str:
    """Standard output of a command run with additional environment variables. Raises PipelineError with its last output
    if it fails.
    """
    environment = {**os.environ, **variables}
    return commands.run(command, " ".join(command[:3]), cwd=str(REPOSITORY), environment=environment)


def build(experiment: str, device: str) -> tuple[str, float]:
    """The tag that `make image` prints last, and its seconds."""
    started = time.monotonic()
    printed = run("make", "--no-print-directory", "image", f"EXPERIMENT={experiment}", f"DEVICE={device}")
    return printed.splitlines()[-1], time.monotonic() - started


def start(tag: str, port: int) -> tuple[str, float]:
    """A container of the image, and the seconds until it was ready."""
    started = time.monotonic()
    container = run(
        "docker", "run", "--detach", "--publish", f"127.0.0.1:{port}:3000", *HARDENED, "--memory", "2g",
        "--env", "REX_ALLOW_ANONYMOUS=true", tag,
    ).strip()  # fmt: skip
    polled = started
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return container, time.monotonic() - started
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
        if time.monotonic() - polled < POLL_EVERY_S:
            continue
        polled = time.monotonic()
        if run("docker", "inspect", "--format", "{{.State.Status}}", container).strip() == "exited":
            raise PipelineError(f"the container of {tag} ended: see docker logs {container[:12]}")


def held(container: str) -> tuple[int, int]:
    """Memory of a container's processes in bytes: anonymous, and mapped files."""
    _, own, mapped = map(int, run("docker", "exec", container, "python3", "-c", HELD).split())
    return own, mapped


def measure(tag: str, port: int) -> dict[str, float]:
    """One round: start a container, request 16 texts, remove it."""
    container, ready = start(tag, port)
    try:
        weights, per_token = map(int, run("docker", "exec", container, "python3", "-c", MODEL).split())
        log = run("sh", "-c", f"docker logs {container} 2>&1")
        tokens = re.search(r"cache_tokens=(\d+)", log)
        assert tokens is not None
        weights_and_cache = weights + per_token * int(tokens[1])
        at_first, mapped = held(container)
        model = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30))["data"][0]["id"]
        body = {"model": model, "prompt": "def ", "n": 16, "max_tokens": 64, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=120).read()
        return {
            "ready_s": ready,
            "memory_mb": (at_first - weights_and_cache) / MB,
            "memory_after_texts_mb": (held(container)[0] - weights_and_cache) / MB,
            "mapped_files_mb": mapped / MB,
            "weights_and_cache_mb": weights_and_cache / MB,
        }
    finally:
        run("docker", "rm", "--force", container)


def table(result: dict[str, Any]) -> str:
    """The figures as a table with their targets."""
    limit = IMAGE_GB[result["device"]]
    rows = [
        ("make image, warm", f"{result['build_s']:.0f} s", "at most 60 s"),
        ("size", f"{result['image_bytes'] / 1e9:.2f} GB", f"at most {limit} GB"),
        ("docker run to ready", f"{result['ready_s']:.1f} s", "at most 8 s"),
        ("memory over weights and cache, ready", f"{result['memory_mb']:.0f} MB", "at most 450 MB"),
        ("the same after 16 texts", f"{result['memory_after_texts_mb']:.0f} MB", ""),
        ("mapped files of libraries", f"{result['mapped_files_mb']:.0f} MB", ""),
        ("weights and cache", f"{result['weights_and_cache_mb']:.0f} MB", ""),
    ]
    return "\n".join(f"{what:40} {value:>10}   {goal}" for what, value, goal in rows)


@ends_in_one_line
def main() -> int:
    """Measure and print the table and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m bench.containers.image", description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", default="smoke")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=13_300, help="free port of this machine")
    arguments = parser.parse_args()
    tag, _ = build(arguments.experiment, arguments.device)
    run("docker", "rmi", "--no-prune", tag)
    tag, seconds = build(arguments.experiment, arguments.device)
    rounds = [measure(tag, arguments.port) for _ in range(arguments.rounds)]
    result = {
        "device": arguments.device,
        "image": tag,
        "image_bytes": int(run("docker", "image", "inspect", "--format", "{{.Size}}", tag)),
        "build_s": seconds,
        **{name: statistics.median(one[name] for one in rounds) for name in rounds[0]},
    }
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
