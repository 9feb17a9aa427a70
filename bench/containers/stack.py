"""Costs of the composed stack: start time, and a run in it against the same run outside.

    python -m bench.containers.stack [--experiment smoke] [--rounds 3]

Needs a container engine with compose and the images of the stack (`make stack-image`; the tags in `.env`). The
benchmark starts a separate stack: its project, ports and volumes are new and removed at the end, as is the state of the
runs outside.

- up: seconds of `make up` until the stack is healthy, with empty volumes;
- in the stack: seconds from a launch on Dagster's webserver to the end of the run, every asset of `llm_pipeline`;
- outside: seconds of `make pipeline` while the stack is idle. The two take turns.

Prints a table, and a JSON line for machines.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.containers.image import run
from bench.server import free_port
from model.errors import PipelineError, ends_in_one_line

PROJECT = "rex-bench"
LAUNCH = """
mutation Launch($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on Error { message }
  }
}"""
STATUS = "query Status($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"


@contextmanager
def composed() -> Iterator[tuple[str, float]]:
    """Start a stack; yields the webserver's address and the seconds until the stack was healthy."""
    ports = {name: str(free_port()) for name in ("PORT", "UI_PORT", "MLFLOW_PORT")}
    settings = {"COMPOSE_PROJECT_NAME": PROJECT, "REX_CHAMPION": f"rex-{PROJECT}", **ports}
    started = time.monotonic()
    try:
        run("make", "up", **settings)
        yield f"http://127.0.0.1:{ports['UI_PORT']}", time.monotonic() - started
    finally:
        compose = ["docker", "compose"]
        if subprocess.run([*compose, "version"], capture_output=True, check=False).returncode:
            compose = ["docker-compose"]
        run(*compose, "down", "--volumes", **settings)


def ask(address: str, query: str, **variables: Any) -> Any:
    """The data of a GraphQL response."""
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{address}/graphql", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)
    if "errors" in found:
        raise PipelineError(f"Dagster's webserver refused: {found['errors'][0]['message']}")
    return found["data"]


def run_inside(address: str, experiment: str) -> float:
    """Seconds of a run launched on the webserver."""
    params = {
        "selector": {
            "repositoryLocationName": "llm_assets",
            "repositoryName": "__repository__",
            "pipelineName": "llm_pipeline",
        },
        "executionMetadata": {
            "tags": [
                {"key": "dagster/partition", "value": experiment},
                {"key": "rex/force", "value": "true"},
            ]
        },
    }
    started = time.monotonic()
    launched = ask(address, LAUNCH, params=params)["launchRun"]
    if launched["__typename"] != "LaunchRunSuccess":
        raise PipelineError(f"Dagster's webserver launched nothing: {launched}")
    while (status := ask(address, STATUS, id=launched["run"]["runId"])["runOrError"]["status"]) != "SUCCESS":
        if status in ("FAILURE", "CANCELED"):
            raise PipelineError(f"the run in the stack ended with {status}")
        time.sleep(0.5)
    return time.monotonic() - started


def run_outside(folder: Path, experiment: str) -> float:
    """Seconds of `make pipeline` with its state in `folder`."""
    state = {"LLM_ASSETS_VAR": str(folder / "var"), "BENTOML_HOME": str(folder / "bentoml")}
    started = time.monotonic()
    run("make", "pipeline", f"EXPERIMENT={experiment}", "FORCE=true", f"DAGSTER_HOME={folder / 'dagster'}", **state)
    return time.monotonic() - started


def measure(experiment: str, rounds: int) -> dict[str, Any]:
    """All timings in seconds; the first run of each kind is a warm-up and does not count."""
    inside, outside = [], []
    with tempfile.TemporaryDirectory() as folder, composed() as (address, up_s):
        print(f"up and healthy after {up_s:.1f} s", file=sys.stderr, flush=True)
        for number in range(rounds + 1):
            pair = run_inside(address, experiment), run_outside(Path(folder), experiment)
            print(f"round {number} of {rounds}: {pair[0]:.1f} and {pair[1]:.1f} s", file=sys.stderr, flush=True)
            if number:
                inside.append(pair[0])
                outside.append(pair[1])
    return {
        "up_s": up_s,
        "inside_s": inside,
        "outside_s": outside,
        "ratio": statistics.median(a / b for a, b in zip(inside, outside, strict=True)),
    }


@ends_in_one_line
def main() -> int:
    """Measure and print the table and the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m bench.containers.stack", description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", default="smoke")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one warm-up")
    arguments = parser.parse_args()
    result = measure(arguments.experiment, arguments.rounds)
    inside, outside = (statistics.median(result[name]) for name in ("inside_s", "outside_s"))
    print(f"make up to healthy           {result['up_s']:6.1f} s   at most 90 s")
    print(f"a run in the stack           {inside:6.1f} s")
    print(f"the same outside             {outside:6.1f} s")
    print(f"median of the rounds' ratios {result['ratio']:6.2f}     at most 1.3")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
