"""The composed stack as a user has it: started, used from Dagster's page, taken down, started again."""

import re
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from bench.containers.stack import STATUS
from tests.bento.running_service import GREEDY
from tests.e2e.stack import Stack, composed, run
from tests.e2e.test_webserver import ask, ended, launch, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
TO_MODEL = ("corpus", "tokenized_dataset", "trained_checkpoint", "quantized_model")
ALL = (*TO_MODEL, "exported_model", "benchmark_report", "packaged_bento")
LONG_S = 500.0
"""A run takes a minute; many times that on a machine that has other work."""
STEPS = """
query Steps($id: ID!) { runOrError(runId: $id) { ... on Run { status stepStats { stepKey status } } } }"""
EVENTS = """
query Events($id: ID!) {
  logsForRun(runId: $id) { ... on EventConnection { events { ... on MessageEvent { message } } } }
}"""
RUNS = "query Runs { runsOrError { ... on Runs { results { runId status } } } }"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with composed(tmp_path_factory.mktemp("stack")) as made:
        made("up", "--detach")
        wait_until(lambda: not made.unhealthy())
        yield made


@pytest.fixture
def dagster(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.address("UI_PORT"), timeout=60) as client:
        yield client


def version(stack: Stack) -> str | None:
    return httpx.get(f"{stack.address('PORT')}/v1/models").json()["data"][0]["version"]


def generate(stack: Stack, port: str = "PORT") -> httpx.Response:
    return httpx.post(f"{stack.address(port)}/generate", json=GREEDY, timeout=60)


def step_status(client: httpx.Client, run_id: str, step: str) -> str | None:
    stats = ask(client, STEPS, id=run_id)["runOrError"]["stepStats"]
    return next((one["status"] for one in stats if one["stepKey"] == step), None)


def test_only_the_loopback_address_is_published_and_nothing_runs_as_root_for_long(stack: Stack) -> None:
    for service in ("generate", "webserver", "mlflow"):
        bindings = stack.inspect(service)["HostConfig"]["PortBindings"]
        assert {bound["HostIp"] for ports in bindings.values() for bound in ports} == {"127.0.0.1"}
    assert not stack.inspect("postgres")["HostConfig"]["PortBindings"]
    assert stack.inspect("generate")["HostConfig"]["ReadonlyRootfs"]
    for service in ("code", "generate"):
        assert run("docker", "exec", stack.container(service), "id", "-u").strip() == "10001"


def test_before_the_first_run_the_service_waits_for_a_champion(stack: Stack) -> None:
    assert generate(stack).status_code == 503
    assert "no champion of 'rex-smoke' yet" in generate(stack).json()["error"]["message"]


def test_a_run_from_the_page_ends_in_a_model_that_the_service_answers_with(stack: Stack, dagster: httpx.Client) -> None:
    assert ended(dagster, launch(dagster, [], ALL), LONG_S) == "SUCCESS"
    wait_until(lambda: version(stack) is not None)
    assert generate(stack).json()["text"]
    search = {"experiment_ids": [rex_experiment(stack)], "max_results": 100}
    runs = httpx.post(f"{stack.address('MLFLOW_PORT')}/api/2.0/mlflow/runs/search", json=search).json()["runs"]
    assert len(runs) == len(ALL) and {one["info"]["status"] for one in runs} == {"FINISHED"}


def rex_experiment(stack: Stack) -> str:
    address = f"{stack.address('MLFLOW_PORT')}/api/2.0/mlflow/experiments/get-by-name"
    return httpx.get(address, params={"experiment_name": "rex"}).json()["experiment"]["experiment_id"]


def test_a_killed_run_fails_and_frees_its_slot_and_the_next_champion_takes_over_under_load(
    stack: Stack, dagster: httpx.Client
) -> None:
    endless = launch(dagster, ["training.max_steps=100000"])
    wait_until(lambda: step_status(dagster, endless, "trained_checkpoint") == "IN_PROGRESS")
    better = launch(dagster, ["training.max_steps=120"], TO_MODEL)
    wait_until(lambda: "blocked by limit for pool device" in str(ask(dagster, EVENTS, id=better)))
    assert step_status(dagster, better, "trained_checkpoint") is None
    (worker,) = re.findall(r"parent process \(pid: (\d+)\)", str(ask(dagster, EVENTS, id=endless)))
    run("docker", "exec", stack.container("code"), "python3", "-c", f"import os; os.kill({worker}, 9)")
    assert ended(dagster, endless) == "FAILURE"

    statuses: list[int] = []
    is_over = threading.Event()

    def ask_again() -> None:
        while not is_over.wait(0.5):  # a client without a pause takes the processor that the run needs
            statuses.append(generate(stack).status_code)

    before, clients = version(stack), [threading.Thread(target=ask_again) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        assert ended(dagster, better, LONG_S) == "SUCCESS"
        wait_until(lambda: version(stack) != before)
    finally:
        is_over.set()
        for client in clients:
            client.join(60)
    assert set(statuses) == {200} and len(statuses) > 10


def test_history_and_model_survive_down_and_up_and_dead_runs_are_marked_failed(
    stack: Stack, dagster: httpx.Client
) -> None:
    dead = launch(dagster, ["training.max_steps=100000", "training.seed=1"])
    wait_until(lambda: ask(dagster, STATUS, id=dead)["runOrError"]["status"] == "STARTED")
    run("docker", "kill", stack.container("code"))
    known, champion = {one["runId"] for one in ask(dagster, RUNS)["runsOrError"]["results"]}, version(stack)
    stack("down", "--timeout", "20")
    stack("up", "--detach")
    wait_until(lambda: not stack.unhealthy())
    wait_until(lambda: version(stack) == champion)
    assert generate(stack).status_code == 200
    wait_until(lambda: ask(dagster, STATUS, id=dead)["runOrError"]["status"] == "FAILURE")
    assert {one["runId"] for one in ask(dagster, RUNS)["runsOrError"]["results"]} == known


def test_another_version_serves_beside_and_going_back_is_one_command(stack: Stack) -> None:
    previous = "rex-e2e:previous"
    run("docker", "tag", stack.settings["REX_IMAGE"], previous)
    try:
        stack("up", "--detach", "generate-previous", profile="previous", REX_PREVIOUS_IMAGE=previous)
        beside = f"{stack.address('PREVIOUS_PORT')}/readyz"
        wait_until(lambda: _status(beside) == 200)
        assert generate(stack, "PREVIOUS_PORT").json() == generate(stack).json()
        stack("up", "--detach", "--no-deps", "generate", REX_IMAGE=previous)
        wait_until(lambda: _status(f"{stack.address('PORT')}/readyz") == 200)
        assert stack.inspect("generate")["Config"]["Image"] == previous
        assert generate(stack).status_code == 200
    finally:
        stack("rm", "--stop", "--force", "generate", "generate-previous", profile="previous")
        subprocess.run(["docker", "rmi", previous], capture_output=True, check=False)


def _status(address: str) -> int:
    try:
        return httpx.get(address, timeout=5).status_code
    except httpx.TransportError:
        time.sleep(0.2)
        return 0
