"""Dagster and MLflow on a real PostgreSQL server, with the composed stack's own instance."""

import subprocess
from collections.abc import Iterator

import dagster as dg
import pytest

from llm_assets.containers.prepare import EXAMPLE_PASSWORD, check_settings, mlflow_uri
from model.errors import PipelineError
from tests.e2e.workplace import BIN, REPO, Workplace
from tests.support.postgres import postgres_server

LIMIT = pytest.mark.timeout(1200)  # a busy machine takes minutes to make both databases and run two pipelines


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A user's state whose databases are prepared as the stack's are."""
    root = tmp_path_factory.mktemp("postgres")
    (root / "dagster").mkdir()
    (root / "dagster" / "dagster.yaml").write_bytes((REPO / "deploy" / "dagster.yaml").read_bytes())
    with postgres_server() as server:
        variables = {
            **server.env,
            "MLFLOW_TRACKING_URI": mlflow_uri(server.env),
            "DAGSTER_FILES": str(root / "files"),
        }
        made = Workplace(root, root / "bentoml", variables)
        done = made.run("python", "-m", "llm_assets.containers.prepare")
        assert done.returncode == 0, done.stdout
        assert "databases: dagster, mlflow created" in done.stdout
        yield made


@pytest.fixture(scope="module")
def two_runs(workplace: Workplace) -> list[tuple[int, str]]:
    """How two processes ended that materialized an asset at the same time, and what they said."""
    command = [str(BIN / "dagster"), "asset", "materialize", "-m", "llm_assets.definitions", "--select", "corpus"]
    processes = [
        subprocess.Popen(
            [*command, "--partition", "smoke"],
            cwd=REPO,
            env=workplace.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in processes]  # the limit is the test's own
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@LIMIT
@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_write_runs_and_events_at_once(
    workplace: Workplace, two_runs: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, said in two_runs:
        assert status == 0, said[-3000:]
    for name, value in workplace.variables.items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.from_config(str(workplace.root / "dagster")) as instance:
        assert [type(instance.run_storage).__module__.split(".")[0], instance.get_runs_count()] == [
            "dagster_postgres",
            2,
        ]
        assert {run.status for run in instance.get_runs()} == {dg.DagsterRunStatus.SUCCESS}
        records = instance.fetch_materializations(dg.AssetKey("corpus"), limit=10).records
        assert [record.partition_key for record in records] == ["smoke", "smoke"]
        assert instance.event_log_storage.get_pool_limits() == []
        assert instance.global_op_concurrency_default_limit == 1
    assert not (workplace.root / "dagster" / "history").exists()  # nothing went to SQLite


@LIMIT
@pytest.mark.slow
@pytest.mark.processes
def test_mlflow_has_one_experiment_and_both_runs(workplace: Workplace, two_runs: list[tuple[int, str]]) -> None:
    import mlflow

    client = mlflow.MlflowClient(workplace.variables["MLFLOW_TRACKING_URI"])
    (experiment,) = [one for one in client.search_experiments() if one.name == "rex"]
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert not (workplace.var / "mlflow.db").exists()


@LIMIT
@pytest.mark.slow
@pytest.mark.processes
def test_preparing_again_changes_nothing(workplace: Workplace) -> None:
    done = workplace.run("python", "-m", "llm_assets.containers.prepare")
    assert done.returncode == 0, done.stdout
    assert "databases: none created" in done.stdout


@LIMIT
@pytest.mark.slow
@pytest.mark.processes
def test_a_wrong_password_is_one_line(workplace: Workplace) -> None:
    guessing = Workplace(workplace.root, workplace.bentoml, {**workplace.variables, "POSTGRES_PASSWORD": "guessed"})
    done = guessing.run("python", "-m", "llm_assets.containers.prepare")
    assert done.returncode == 1
    assert (
        done.stdout.startswith("error: the database server refused the connection: ")
        and len(done.stdout.splitlines()) == 1
    )
    assert "guessed" not in done.stdout


@pytest.mark.parametrize(
    ("password", "name", "address", "says"),
    [
        ("", "REX_BIND", "127.0.0.1", "POSTGRES_PASSWORD is empty"),
        ("a b", "REX_BIND", "127.0.0.1", "POSTGRES_PASSWORD is empty or has a character"),
        (EXAMPLE_PASSWORD, "REX_BIND", "0.0.0.0", "the example's and REX_BIND is 0.0.0.0"),
        (EXAMPLE_PASSWORD, "REX_UI_BIND", "example.org", "the example's and REX_UI_BIND is example.org"),
    ],
)
def test_settings_that_the_stack_must_not_start_with(password: str, name: str, address: str, says: str) -> None:
    with pytest.raises(PipelineError, match=says) as refusal:
        check_settings({"POSTGRES_PASSWORD": password, name: address})
    assert password not in str(refusal.value) or not password


def test_a_service_that_others_reach_wants_a_key() -> None:
    open_to_all = {"POSTGRES_PASSWORD": "another-one", "REX_BIND": "0.0.0.0", "REX_ALLOW_ANONYMOUS": "true"}
    with pytest.raises(PipelineError, match="LLM_API_KEYS is empty"):
        check_settings(open_to_all)
    check_settings({**open_to_all, "LLM_API_KEYS": "a-key"})


@pytest.mark.parametrize("address", ["", "127.0.0.1", "::1", "localhost"])
def test_the_example_works_on_the_loopback_address(address: str) -> None:
    check_settings({"POSTGRES_PASSWORD": EXAMPLE_PASSWORD, "REX_BIND": address})
    check_settings({"POSTGRES_PASSWORD": "another-one", "REX_UI_BIND": "0.0.0.0"})
