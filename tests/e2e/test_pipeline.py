"""The `smoke` pipeline through the real CLI: what it leaves behind, and what a mistake leaves untouched."""

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
import yaml

# What Dagster's page shows: GraphQL's `staleStatus` calls this class.
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from docs.screenshots import text_of
from llm_assets.definitions import build_defs
from llm_assets.experiments.observed import external_specs
from llm_assets.jobs.automation import observed_settings
from llm_assets.origin import find_origin
from llm_assets.resources.hydra import HydraConfig
from llm_assets.stage.metadata import NAME_CHARACTERS, ROW_CHARACTERS, rounded
from model.artifact import verify
from model.errors import PipelineError
from tests.bento.page.browser import browser, missing, set_viewport
from tests.e2e.workplace import BIN, REPO, CommandLine, Workplace, free_port, stop
from tests.support.documented import PAGES, blocks, documented_commands
from tests.support.documented_runs import Reads, way_of

pytestmark = pytest.mark.e2e
ASSETS = [
    "corpus",
    "tokenized_dataset",
    "trained_checkpoint",
    "quantized_model",
    "exported_model",
    "benchmark_report",
    "packaged_bento",
]
_CUT = """
// Columns that scroll sideways: the width of each, and of what is in it.
await document.fonts.ready;
const columns = [...document.querySelectorAll("*")].filter((box) => box.clientWidth > 300);
const scrolling = columns.filter((box) => ["auto", "scroll"].includes(getComputedStyle(box).overflowX));
const wide = scrolling.filter((box) => box.scrollWidth > box.clientWidth);
return wide.map((box) => [box.clientWidth, box.scrollWidth, box.innerText]);
"""


@pytest.fixture(scope="module")
def dagster(smoke):
    commands = CommandLine(smoke)
    yield commands
    commands.close()


def mlflow_client(workplace: Workplace):
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{workplace.var / 'mlflow.db'}")


def mlflow_runs(workplace: Workplace) -> list:
    client = mlflow_client(workplace)
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def test_nothing_is_out_of_date_after_the_run_and_a_look_at_the_files(smoke):
    defs = build_defs()
    with dg.DagsterInstance.from_config(str(smoke.root / "dagster")) as instance:
        observed = observed_settings(dg.build_sensor_context(instance, resources={"hydra": HydraConfig()}))
        assert isinstance(observed, dg.SensorResult) and not observed.asset_events
        resolver = CachingStaleStatusResolver(instance, defs.resolve_asset_graph(), LoadingContextForTest(instance))
        status = {asset: resolver.get_status(dg.AssetKey(asset), "smoke") for asset in ASSETS}
    assert status == dict.fromkeys(ASSETS, StaleStatus.FRESH)


@pytest.mark.parametrize("asset", ASSETS)
def test_every_asset_is_a_complete_artifact_that_names_its_sources(smoke, asset):
    verify(smoke.latest(asset))
    manifest = smoke.manifest(asset)
    for upstream, version in manifest["upstream"].items():
        assert smoke.manifest(upstream)["content_hash"] == version
    assert bool(manifest["upstream"]) == (asset != "corpus")


def test_the_report_holds_numbers_tables_and_both_plots(smoke):
    report = smoke.latest("benchmark_report")
    assert json.loads((report / "report.json").read_text())["schema_version"]
    markdown = (report / "report.md").read_text()
    assert "kv_cache.png" in markdown and "model_benchmark_comparison.png" in markdown
    for name in ("kv_cache.png", "model_benchmark_comparison.png"):
        assert (report / name).read_bytes().startswith(b"\x89PNG")


def test_checkpoint_and_champion_load_in_a_process_that_has_only_transformers_and_mlflow(smoke, tmp_path):
    program = """
import sys, torch
sys.path[:] = [p for p in sys.path if p not in ("", sys.argv[2])]
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not type(model).__module__.startswith("model."), type(model).__module__
ids = tokenizer("def ", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=8, do_sample=False)
print(out.shape[1] > ids.shape[1], model.lm_head.weight is model.model.embed_tokens.weight)
from mlflow import pyfunc, transformers as flavor
champion = "models:/rex-smoke@champion"
pipeline = flavor.load_model(champion)
assert "rex_model.weights.int8" in sys.modules and "model" not in sys.modules
text = pipeline("def ", max_new_tokens=8, do_sample=False)[0]["generated_text"]
print(len(text) > 4, pyfunc.load_model(champion).predict("def ", params={"max_new_tokens": 8}) == [text])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(smoke.latest("trained_checkpoint")), str(REPO)],
        cwd=tmp_path,
        env={
            **smoke.env,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{smoke.var / 'mlflow.db'}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True"] * 4, done.stderr[-3000:]


def test_mlflow_has_one_finished_run_an_asset_with_params_metrics_and_models(smoke):
    runs = mlflow_runs(smoke)
    by_asset = {run.data.tags["dagster.asset"]: run for run in runs if "dagster.asset" in run.data.tags}
    assert set(by_asset) == set(ASSETS)
    training = by_asset["trained_checkpoint"]
    assert training.data.params["training.max_steps"] == "60"
    history = mlflow_client(smoke).get_metric_history(training.info.run_id, "loss")
    assert len(history) > 3 and history[-1].value < history[0].value
    client = mlflow_client(smoke)
    assert len(client.search_model_versions("name='rex-smoke'")) == 2
    champion = client.get_model_version_by_alias("rex-smoke", "champion")
    evidence = json.loads(champion.tags["champion_evidence"])
    assert evidence["parity"]["certificates"] and not evidence["parity"]["differences"]
    assert evidence["tasks"] == "not measured"


def test_the_run_of_make_pipeline_is_of_the_location_whose_runs_the_home_page_shows(smoke):
    with dg.DagsterInstance.from_config(str(smoke.root / "dagster")) as instance:
        origins = {run.job_name: run.remote_job_origin for run in instance.get_runs()}
    (location,) = yaml.safe_load((REPO / "workspace.yaml").read_text())["load_from"]
    selector = origins["llm_pipeline"].repository_origin.get_selector()
    assert selector.location_name == location["python_module"]["location_name"]
    assert selector.repository_name == "__repository__"


def test_a_part_of_the_pipeline_is_materialized_by_name_and_gives_the_same_bits(smoke, dagster):
    before = {asset: smoke.manifest(asset)["content_hash"] for asset in ASSETS if asset != "benchmark_report"}
    result = dagster.run(
        "asset", "materialize", "-m", "llm_assets.definitions",
        "--select", "trained_checkpoint+", "--partition", "smoke",
        "--config-json", '{"resources": {"hydra": {"config": {"force": true}}}}',
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    assert {asset: smoke.manifest(asset)["content_hash"] for asset in before} == before
    assert result.stdout.count("unchanged: ") == 4  # all but the report, whose timings are new


def test_an_unchanged_pipeline_is_neither_computed_nor_registered_again(smoke, dagster):
    before = {asset: smoke.manifest(asset) for asset in ASSETS}
    runs = len(mlflow_runs(smoke))
    result = dagster.run(
        "job", "execute", "-m", "llm_assets.definitions", "-j", "llm_pipeline",
        "--tags", '{"dagster/partition": "smoke"}',
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    assert result.stdout.count("unchanged: ") == len(ASSETS)
    assert {asset: smoke.manifest(asset) for asset in before} == before
    assert len(mlflow_runs(smoke)) == runs
    assert len(mlflow_client(smoke).search_model_versions("name='rex-smoke'")) == 2


@pytest.mark.parametrize(
    ("asset", "overrides", "says"),
    [
        ("corpus", ["corpus=files", "corpus.paths=[/nowhere/*.txt]"], "/nowhere/*.txt"),
        ("tokenized_dataset", ["tokenizer.vocab_size=60000"], "vocab_size"),
        ("trained_checkpoint", ["tokenizer.vocab_size=600"], "vocab_size"),
        ("trained_checkpoint", ["training.muon_learning_rate=1e30", "training.max_grad_norm=0"], "step"),
        ("corpus", ["training.max_step=1"], "max_step"),
    ],
    ids=["no file", "vocabulary too large", "upstream of another config", "loss becomes NaN", "unknown option"],
)
def test_a_mistake_fails_in_one_line_and_leaves_the_last_good_artifact(smoke, dagster, asset, overrides, says):
    before = {name: smoke.latest(name) for name in ASSETS}
    config = {"resources": {"hydra": {"config": {"overrides": overrides}}}}
    result = dagster.run(
        "asset", "materialize", "-m", "llm_assets.definitions", "--select", asset,
        "--partition", "smoke", "--config-json", json.dumps(config),
    )  # fmt: skip
    assert result.returncode != 0
    assert says in result.stdout, result.stdout[-3000:]
    for name, path in before.items():
        assert smoke.latest(name) == path
        verify(path)


def test_a_failed_run_is_failed_in_mlflow(smoke):
    runs = mlflow_runs(smoke)
    statuses = {run.info.status for run in runs}
    assert statuses == {"FINISHED", "FAILED"}, [(run.info.run_name, run.info.status) for run in runs]


def test_an_unknown_experiment_names_the_known_ones(dagster):
    result = dagster.run(
        "job", "execute", "-m", "llm_assets.definitions", "-j", "llm_pipeline",
        "--tags", '{"dagster/partition": "smokes"}',
    )  # fmt: skip
    assert result.returncode != 0
    assert "smokes" in result.stdout and "shakespeare_char" in result.stdout


def test_the_newest_artifacts_and_the_command_that_serves_them_are_named(smoke):
    said = smoke.run("python", "-m", "llm_assets.latest", "smoke").stdout
    tag = smoke.run("python", "-m", "llm_assets.latest", "smoke", "--bento").stdout.strip()
    assert str(smoke.latest("benchmark_report") / "report.md") in said
    assert f"bentoml serve {tag}" in said and tag.startswith("rex-smoke:")
    lost = replace(smoke, bentoml=smoke.root).run("python", "-m", "llm_assets.latest", "smoke", "--bento")
    assert lost.returncode == 1
    assert lost.stdout.startswith(f"error: no Bento {tag} in {smoke.root}") and len(lost.stdout.splitlines()) == 1
    missing = smoke.run("python", "-m", "llm_assets.latest", "stdlib_30m")
    assert missing.returncode == 1
    assert missing.stdout.startswith("error: no corpus of experiment 'stdlib_30m'")


def test_the_origin_of_an_answer_is_found_by_its_fingerprint(smoke: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ASSETS_VAR", str(smoke.var))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expected = smoke.manifest("quantized_model")
    for version in ("2", expected["content_hash"][:16]):
        found = find_origin("smoke", f"fp_{version}_native_int8")
        assert (found.pop("model"), found.pop("version")) == ("rex-smoke", "2")
        # The runs are those that registered the content: a forced one made it again.
        for name in ("experiment", "asset", "content_hash", "upstream", "config"):
            assert found[name] == expected[name]
        assert found["upstream"]["tokenized_dataset"] and found["config"]["training"] and found["mlflow_run_id"]
    with pytest.raises(PipelineError, match=r"^'fp_99_native_int8' is not of a registered version of rex-smoke"):
        find_origin("smoke", "fp_99_native_int8")


def is_reading(command: str) -> bool:
    found = way_of(command)
    return bool(found) and isinstance(found[1], Reads)


def test_the_documented_commands_that_read_an_experiment_work(smoke: Workplace, tmp_path: Path) -> None:
    """As they stand, but for the experiment, which is `smoke`, and the folders CHECKPOINT and OUT."""
    found = {command for page in PAGES for command in documented_commands(page) if is_reading(command)}
    places = {"stdlib": "smoke", "EXPERIMENT": "smoke", "CHECKPOINT": str(smoke.latest("trained_checkpoint"))}
    # A set: some differ only in these names.
    commands = sorted({tuple(places.get(word, word) for word in shlex.split(command)) for command in found})
    assert len(commands) > 6

    def run(number: int) -> subprocess.CompletedProcess[str]:
        out = str(tmp_path / str(number))
        return smoke.run(*(out if word == "OUT" else word for word in commands[number]))

    with ThreadPoolExecutor(3) as pool:
        for command, done in zip(commands, pool.map(run, range(len(commands))), strict=True):
            assert done.returncode == 0 and done.stdout.strip(), (command, done.stdout[-2000:])


def test_the_documented_use_of_an_export_works(smoke: Workplace) -> None:
    """The lines of the README that change to the export and that load it with transformers, in one shell."""
    lines = "".join(blocks(REPO / "README.md", "sh")).splitlines()
    use = [line.replace("stdlib", "smoke") for line in lines if line.startswith(("cd ", "python -c "))]
    assert len(use) == 2
    environment = {**smoke.env, "PATH": f"{BIN}:{smoke.env['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(use)], cwd=REPO, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "def main(" in done.stdout, done.stdout + done.stderr


def test_no_summary_and_no_name_is_cut_by_the_page_of_its_asset(smoke):
    with dg.DagsterInstance.from_config(str(smoke.root / "dagster")) as instance:
        for asset in ASSETS:
            event = instance.get_latest_materialization_event(dg.AssetKey(asset))
            assert event and event.asset_materialization
            metadata = event.asset_materialization.metadata
            assert "summary" in metadata, asset
            longest = max(map(len, metadata))
            assert longest <= NAME_CHARACTERS, (asset, max(metadata, key=len))
            for shown in (metadata[name].value for name in ("summary", "champion_evidence") if name in metadata):
                rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in shown.splitlines()[2:]]
                widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
                assert longest + sum(widths) <= ROW_CHARACTERS, (asset, rows)


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_no_asset_page_is_wider_than_a_common_screen_and_mlflow_opens_on_the_results(smoke, tmp_path):
    port, mlflow_port = free_port(), free_port()
    command = [sys.executable, "-m", "llm_assets.ui", "--port", str(port), "--mlflow-port", str(mlflow_port)]
    process = subprocess.Popen(command, cwd=REPO, env=smoke.env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline(), (smoke.var / "ui" / "dagster.log").read_text()[-3000:]
        with browser(tmp_path / "profile") as driver:
            set_viewport(driver, 1440, 1300)
            for name in [*ASSETS, *(spec.key.to_user_string() for spec in external_specs())]:
                driver.get(f"http://127.0.0.1:{port}/assets/{name}?view=overview")
                # Markdown is drawn last.
                text_of(driver, "in MLflow" if name in ASSETS else "meanings" if "settings" in name else "license")
                assert driver.execute_script(_CUT) == [], name
            driver.get(f"http://127.0.0.1:{mlflow_port}")
            trained = json.loads((smoke.latest("trained_checkpoint") / "summary.json").read_text())
            text_of(driver, "smoke trained_", "bits_per_byte", str(rounded(trained["bits_per_byte"])))
    finally:
        stop(process)
