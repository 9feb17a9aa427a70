"""The Dagster webserver: what a person reads on its pages in a real browser, and runs launched and canceled as the UI
does it, over GraphQL, through the daemon's queue.
"""

import contextlib
import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.support.wait import WebDriverWait

from bench.containers.stack import LAUNCH, STATUS
from docs.screenshots import WAIT_S, boxes, lineage_address, partition_address, pictures, text_of
from llm_assets.artifacts.store import ArtifactStore
from llm_assets.experiments.partitions import NAME as PARTITIONS_NAME
from llm_assets.registry import PIPELINE
from tests.bento.page.browser import browser, missing, set_viewport
from tests.e2e.test_pipeline import mlflow_runs
from tests.e2e.workplace import BIN, REPO, free_port, new_workplace, stop, wait_for

pytestmark = pytest.mark.e2e

STEPS = 150
TRAINING = [f"training.max_steps={STEPS}"]  # seconds, so that it can be canceled in the middle

TO_CHECKPOINT = ("corpus", "tokenized_dataset", "trained_checkpoint")
PARTITIONS = """{
  assetNodes { assetKey { path } partitionKeys partitionStats { numPartitions numMaterialized numFailed } }
}"""
_OPEN = """
const found = [...document.querySelectorAll("*")].filter((box) => !box.children.length);
found.find((box) => box.textContent === arguments[0]).click();
"""
_PRESS = """
// Press what has this text; whether it was there.
const found = [...document.querySelectorAll("button *, [role=menuitem] *, div")].filter((box) => box.clientWidth);
const pressed = found.filter((box) => !box.children.length && box.textContent.trim() === arguments[0]).at(-1);
pressed?.click();
return Boolean(pressed);
"""
_ICONS = """
// Names of the icons beside a link.
const link = document.querySelector(`a[href="${arguments[0]}"]`);
return link && [...link.parentElement.querySelectorAll("[role=img]")].map((icon) => icon.ariaLabel);
"""
RUNS = "{ runsOrError { ... on Runs { results { runId } } } }"
BACKFILL = """mutation Backfill($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) { __typename ... on LaunchBackfillSuccess { backfillId } }
}"""
BACKFILL_STATUS = """query Backfill($id: String!) {
  partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } }
}"""
ADD_PARTITION = """mutation Add($name: String!, $partitions: String!) {
  addDynamicPartition(
    repositorySelector: {repositoryLocationName: "llm_assets", repositoryName: "__repository__"}
    partitionsDefName: $partitions, partitionKey: $name
  ) { __typename }
}"""
TERMINATE = "mutation Terminate($id: String!) { terminateRun(runId: $id) { __typename } }"


@pytest.fixture(scope="module")
def dagster(tmp_path_factory):
    """`dagster dev`: webserver, daemon and code location, with separate state."""
    workplace = new_workplace(tmp_path_factory.mktemp("webserver"))
    port, log = free_port(), workplace.root / "dagster.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(BIN / "dagster"), "dev", "--host", "127.0.0.1", "--port", str(port)],
            cwd=REPO,
            env=workplace.env,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/server_info", process, log)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield workplace, client
    finally:
        stop(process)


def ask(client: httpx.Client, query: str, **variables):
    answer = client.post("/graphql", json={"query": query, "variables": variables}).json()
    assert "errors" not in answer, answer
    return answer["data"]


def icons_of_link(driver: Chrome, address: str) -> list[str]:
    return list(WebDriverWait(driver, WAIT_S).until(lambda page: page.execute_script(_ICONS, address)))


def press(driver: Chrome, label: str) -> None:
    WebDriverWait(driver, WAIT_S).until(lambda page: page.execute_script(_PRESS, label))


def materialize_all(driver: Chrome, address: str, assets: int) -> None:
    """Open the dialog of the lineage page's first button and choose `smoke` in it."""
    driver.get(address)
    text_of(driver, "Materialize all")
    # A filtered page does not count.
    press(driver, f"Materialize all ({assets})…" if "~" not in address else "Materialize all…")
    text_of(driver, f"Launch runs to materialize {assets} assets")
    press(driver, "Select a partition or create one")
    text_of(driver, "Select all (1)")
    press(driver, "smoke")
    text_of(driver, "Launch 1 run")


def launch(client: httpx.Client, overrides: list[str], assets: tuple[str, ...] = TO_CHECKPOINT) -> str:
    """Start a run of these assets of `smoke`; returns its id."""
    params = {
        "selector": {
            "repositoryLocationName": "llm_assets",
            "repositoryName": "__repository__",
            "pipelineName": "__ASSET_JOB",
            "assetSelection": [{"path": [name]} for name in assets],
        },
        "runConfigData": {"resources": {"hydra": {"config": {"overrides": overrides, "force": True}}}},
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": "smoke"}]},
    }
    started = ask(client, LAUNCH, params=params)["launchRun"]
    assert started["__typename"] == "LaunchRunSuccess", started
    return started["run"]["runId"]


def wait_until(condition, seconds: float = 400):
    """What the condition gives once it is true. seconds: a guard against a hang, on a busy machine too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(1.0)
    return pytest.fail(f"not reached within {seconds} s")


def ended(client: httpx.Client, run_id: str, seconds: float = 400) -> str:
    """Status of a run that has ended. seconds: a guard against a run that hangs, on a busy machine too."""

    def status():
        found = ask(client, STATUS, id=run_id)["runOrError"]["status"]
        return found if found in ("SUCCESS", "FAILURE", "CANCELED") else None

    return wait_until(status, seconds)


def training_status(workplace, run_id: str) -> str | None:
    if not (workplace.var / "mlflow.db").exists():
        return None
    for run in mlflow_runs(workplace):
        tags = run.data.tags
        if tags.get("dagster_run_id") == run_id and tags.get("dagster.asset") == "trained_checkpoint":
            return run.info.status
    return None


def processes(workplace) -> set[int]:
    """Ids of all processes that work on this state: their environment names its folder."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("LLM_ASSETS_VAR") == str(workplace.var):
                found.add(process.pid)
    return found


def test_a_run_from_the_ui_succeeds_and_is_finished_in_mlflow(dagster):
    workplace, client = dagster
    run_id = launch(client, TRAINING)
    assert ended(client, run_id) == "SUCCESS"
    assert training_status(workplace, run_id) == "FINISHED"


def test_the_graph_counts_the_experiments_that_have_run_and_no_others(dagster):
    _, client = dagster

    def partitions():
        nodes = ask(client, PARTITIONS)["assetNodes"]
        found = {node["assetKey"]["path"][-1]: node for node in nodes}
        return found if all(node["partitionKeys"] == ["smoke"] for node in nodes) else None

    # `settings`, the sensor, offers the default experiment until another has run; it looks every half minute.
    counted = {name: node["partitionStats"] for name, node in wait_until(partitions).items()}
    done = {"numPartitions": 1, "numMaterialized": 1, "numFailed": 0}
    assert [counted[name] for name in (*TO_CHECKPOINT, "source_text", "training_settings")] == [done] * 5
    assert counted["quantized_model"]["numMaterialized"] == 0


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_person_reads_names_numbers_and_pictures_on_the_pages(dagster, tmp_path):
    workplace, client = dagster
    address = str(client.base_url).rstrip("/")
    names = [stage.name for stage in PIPELINE]
    trained, corpus = (
        json.loads((workplace.latest(asset) / "summary.json").read_text()) for asset in ("trained_checkpoint", "corpus")
    )
    with browser(tmp_path / "profile") as driver:
        set_viewport(driver, 2600, 1250)
        driver.get(lineage_address(address))
        left = {name: box[0] for name, box in zip(names, boxes(driver, names), strict=True)}
        for stage in PIPELINE:
            assert all(left[upstream] < left[stage.name] for upstream in stage.upstream), left
        text_of(driver, "Materialize all", "source_text")
        set_viewport(driver, 1400, 2400)
        driver.get(partition_address(address, "trained_checkpoint", "smoke"))
        assert "training loss by step" in pictures(driver)
        text_of(driver, "bits per byte, validation split", f"{trained['bits_per_byte']:.4f}", "nats per token")
        driver.get(f"{address}/assets/trained_checkpoint?view=overview")
        text_of(driver, "Compute details")
        driver.execute_script(_OPEN, "Compute details")
        assert icons_of_link(driver, "/deployment/concurrency/device") == ["dynamic_feed"]  # and no warning
        driver.get(partition_address(address, "corpus", "smoke"))
        assert "bytes" in pictures(driver)
        text_of(driver, "mean document", f"{corpus['train_documents'] + corpus['validation_documents']:,}")
        driver.get(partition_address(address, "training_settings", "smoke"))
        text_of(driver, "changed", "learning_rate")
        driver.get(partition_address(address, "source_text", "smoke"))
        text_of(driver, "dagster/uri", "file://")


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_materialize_all_is_pressed_on_the_lineage_page_and_succeeds(dagster, tmp_path):
    _, client = dagster
    address = f"{str(client.base_url).rstrip('/')}/asset-groups"
    with browser(tmp_path / "profile") as driver:
        set_viewport(driver, 1500, 1000)
        materialize_all(driver, address, len(PIPELINE))
        # Two assets that are unchanged, so that the run takes seconds.
        materialize_all(driver, f"{address}~key:corpus or key:tokenized_dataset", 2)
        before = ask(client, RUNS)["runsOrError"]["results"]
        press(driver, "Launch 1 run")
        text_of(driver, "Launched run")
    runs = ask(client, RUNS)["runsOrError"]["results"]
    (run_id,) = {run["runId"] for run in runs} - {run["runId"] for run in before}
    assert ended(client, run_id) == "SUCCESS"


def test_a_cancelled_run_leaves_no_process_and_the_next_one_goes_on_to_the_same_bits(dagster):
    workplace, client = dagster
    before, running = workplace.latest("trained_checkpoint"), processes(workplace)
    run_id = launch(client, TRAINING)
    wait_until(lambda: list(workplace.var.glob("scratch/trained_checkpoint/*/*/*/checkpoint-*/committed")))
    assert training_status(workplace, run_id) == "RUNNING"
    ask(client, TERMINATE, id=run_id)
    assert ended(client, run_id) == "CANCELED"
    assert training_status(workplace, run_id) == "KILLED"
    wait_until(lambda: processes(workplace) <= running, seconds=30)
    assert workplace.latest("trained_checkpoint") == before
    # The content hash is over weights, loss curve and everything else: an uninterrupted run has the same.
    again = launch(client, TRAINING)
    assert ended(client, again) == "SUCCESS"
    assert workplace.manifest("trained_checkpoint")["dagster_run_id"] == again
    assert workplace.latest("trained_checkpoint") == before
    run = next(
        run
        for run in mlflow_runs(workplace)
        if run.info.run_id == workplace.manifest("trained_checkpoint")["mlflow_run_id"]
    )
    assert 0 < run.data.metrics["resumed_from_step"] < STEPS


def test_a_backfill_of_two_experiments_and_a_sweep_of_one_of_them_run_at_once(dagster):
    workplace, client = dagster
    before = {run["runId"] for run in ask(client, RUNS)["runsOrError"]["results"]}
    for name in ("smoke", "stdlib"):
        ask(client, ADD_PARTITION, name=name, partitions=PARTITIONS_NAME)
    sizes = (300_000, 400_000)
    sweep = ["--job", "corpus_job", "--multirun", "experiment=smoke", f"corpus.max_bytes={sizes[0]},{sizes[1]}"]
    with ThreadPoolExecutor(1) as pool:
        swept = pool.submit(workplace.run, "python", "-m", "llm_assets.sweep", *sweep)
        params = {"assetSelection": [{"path": ["corpus"]}], "partitionNames": ["smoke", "stdlib"]}
        params["tags"] = [{"key": "rex/force", "value": "true"}]
        found = ask(client, BACKFILL, params=params)["launchPartitionBackfill"]
        assert found["__typename"] == "LaunchBackfillSuccess", found

        def status():
            answer = ask(client, BACKFILL_STATUS, id=found["backfillId"])["partitionBackfillOrError"]["status"]
            return answer if answer.startswith(("COMPLETED", "FAILED")) else None

        assert wait_until(status, 400) == "COMPLETED_SUCCESS"
        done = swept.result()
    assert done.returncode == 0, done.stdout
    runs = {run["runId"] for run in ask(client, RUNS)["runsOrError"]["results"]} - before
    assert len(runs) == 4 and {ended(client, run_id) for run_id in runs} == {"SUCCESS"}
    # Each experiment's newest version is whole, and of one of the runs, whichever came last.
    store = ArtifactStore(str(workplace.var / "artifacts"), workplace.var / "cache")
    for experiment in ("smoke", "stdlib"):
        manifest = store.latest_manifest("corpus", experiment)
        assert manifest and manifest.dagster_run_id in runs
        assert store.load("corpus", experiment) == workplace.latest("corpus", experiment)
