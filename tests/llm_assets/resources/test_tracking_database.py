import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from threading import Timer

import pytest

from llm_assets.resources import tracking_database
from llm_assets.resources.mlflow import MlflowTracking
from model.errors import PipelineError, TransientError

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture
def database(tracking_uri: str, tmp_path: Path) -> Path:
    """A database of its own, copied: making its tables takes seconds."""
    path = tmp_path / "here" / "mlflow.db"
    (path.parent / "mlartifacts").mkdir(
        parents=True
    )  # a moved database: its files came along, though none are logged yet
    shutil.copy(tracking_uri.removeprefix("sqlite:///"), path)
    return path


def tracking(path: Path) -> MlflowTracking:
    return MlflowTracking(tracking_uri=f"sqlite:///{path}")


def test_a_database_whose_making_was_killed_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    program = f"from mlflow import MlflowClient; MlflowClient('sqlite:///{path}')"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as making:
        while not (path.is_file() and path.stat().st_size):
            assert making.poll() is None
            time.sleep(0.001)
        making.kill()
    lines: list[str] = []
    client, experiment_id = tracking(path).client(lines.append)
    assert client.create_run(experiment_id).info.status == "RUNNING"
    assert "was incomplete" in lines[0] or not (tmp_path / "mlflow.db.broken").exists()


def test_a_process_killed_while_it_makes_the_database_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    program = f"from llm_assets.resources.mlflow import MlflowTracking; MlflowTracking(tracking_uri='sqlite:///{path}').client()"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as making:
        while not any(left.stat().st_size for left in tmp_path.glob(".mlflow.db.*")):
            assert making.poll() is None
            time.sleep(0.001)
        making.kill()
    assert not path.exists()
    tracking(path).client()
    assert {left.name for left in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_file_that_is_no_database_is_one_line_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("some other text " * 99)
    with pytest.raises(
        PipelineError, match=r"mlflow.db cannot be used .*: file is not a database; move it away"
    ) as refused:
        tracking(path).client()
    assert "\n" not in str(refused.value)
    assert path.read_text().startswith("some other text")


OLDER = "1b5f0d9ad7c1"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DROP TABLE runs", r"has no table runs, which MLflow [\d.]+ expects: restore .* or move it away"),
        ("DROP TABLE registered_models", "has no table registered_models, which"),
        ("ALTER TABLE runs DROP COLUMN entry_point_name", r"has no column runs\.entry_point_name, which"),
        ("DELETE FROM alembic_version", "has no schema version in table alembic_version, which"),
        (f"UPDATE alembic_version SET version_num = '{OLDER}'", f"{OLDER} of an older MLflow, .*: mlflow db upgrade "),
        ("UPDATE alembic_version SET version_num = 'future'", "schema future, MLflow .* expects .*: a newer MLflow"),
    ],
)
def test_a_database_of_another_schema_is_one_line_and_stays(database: Path, damage: str, said: str) -> None:
    client, experiment_id = tracking(database).client()
    client.create_run(experiment_id, tags={"kept": "yes"})
    with closing(sqlite3.connect(database)) as changed, changed:
        changed.execute(damage)
    before = database.read_bytes()
    with pytest.raises(PipelineError, match=said) as refused:
        tracking(database).client()
    assert "\n" not in str(refused.value) and str(database) in str(refused.value)
    assert not isinstance(refused.value, TransientError)  # a step is not tried again for it
    assert database.read_bytes() == before
    assert not database.with_name("mlflow.db.broken").exists()


def test_an_older_database_is_used_after_the_command_that_the_line_names(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    program = f"""
import sqlalchemy
from alembic import command
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base
uri = "sqlite:///{path}"
Base.metadata.create_all(sqlalchemy.create_engine(uri))
command.upgrade(_get_alembic_config(uri), {OLDER!r})
"""
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "INSERT INTO runs (run_uuid, user_id, status, start_time, lifecycle_stage, artifact_uri, experiment_id) "
            "VALUES ('old', 'me', 'FINISHED', 0, 'active', '/old', 0)"
        )
    with pytest.raises(PipelineError, match="of an older MLflow") as refused:
        tracking(path).client()
    command = str(refused.value).partition("run: ")[2].split()
    subprocess.run([sys.executable, "-m", *command], capture_output=True, check=True)
    client, _ = tracking(path).client()
    assert client.get_run("old").info.status == "FINISHED"


def test_a_database_of_another_program_is_one_line_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE TABLE addresses (street)")
    before = path.read_bytes()
    with pytest.raises(PipelineError, match=r"mlflow.db has no .*, which MLflow .*: .* move it away") as refused:
        tracking(path).client()
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == before


def test_an_experiment_deleted_in_the_page_is_restored(database: Path) -> None:
    client, experiment_id = tracking(database).client()
    client.delete_experiment(experiment_id)
    lines: list[str] = []
    assert tracking(database).client(lines.append)[1] == experiment_id
    assert "was deleted: it is restored" in lines[0]
    assert client.get_experiment(experiment_id).lifecycle_stage == "active"


def test_a_run_waits_for_another_program_that_holds_the_database(database: Path) -> None:
    tracking(database).client()
    holder = f"import sqlite3, sys; sqlite3.connect({str(database)!r}).execute('BEGIN EXCLUSIVE'); "
    holder += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        Timer(7.0, other.kill).start()  # longer than SQLite's own wait
        client, experiment_id = tracking(database).client()
        assert other.wait() == -signal.SIGKILL
    assert client.create_run(experiment_id).info.status == "RUNNING"


def test_a_database_that_stays_locked_is_one_line(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_database, "WAIT_S", 0.0)
    other = sqlite3.connect(database)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(PipelineError, match="locked by another program"):
        tracking(database).client()
    other.close()


def test_a_moved_folder_keeps_its_history_and_writes_into_the_new_place(database: Path, tmp_path: Path) -> None:
    client, experiment_id = tracking(database).client()
    run = client.create_run(experiment_id).info
    (tmp_path / "loss.txt").write_text("1.5")
    client.log_artifact(run.run_id, str(tmp_path / "loss.txt"))
    client.create_registered_model("rex-moved")
    client.create_model_version("rex-moved", run.artifact_uri, run.run_id)
    shutil.move(tmp_path / "here", tmp_path / "there")
    program = f"""
from llm_assets.resources.mlflow import MlflowTracking
import mlflow
tracking = MlflowTracking(tracking_uri="sqlite:///{tmp_path / "there" / "mlflow.db"}")
client, experiment_id = tracking.client()
client.log_text({run.run_id!r}, "more", "more.txt")
client.log_text(client.create_run(experiment_id).info.run_id, "new", "new.txt")
files = sorted(file.path for file in client.list_artifacts({run.run_id!r}))
print(files, client.get_model_version("rex-moved", "1").source)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    place = (tmp_path / "there" / "mlartifacts").as_uri()
    assert done.stdout.strip() == f"['loss.txt', 'more.txt'] {place}/{run.run_id}/artifacts"
    assert not (tmp_path / "here").exists()


def test_a_copied_folder_leaves_the_first_one_alone(database: Path, tmp_path: Path) -> None:
    client, experiment_id = tracking(database).client()
    client.log_text(client.create_run(experiment_id).info.run_id, "text", "one.txt")
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    copy, experiment_id = tracking(tmp_path / "copy" / "mlflow.db").client()
    copy.log_text(copy.create_run(experiment_id).info.run_id, "text", "two.txt")
    assert [path.name for path in (tmp_path / "here").rglob("*.txt")] == ["one.txt"]
    assert sorted(path.name for path in (tmp_path / "copy").rglob("*.txt")) == ["one.txt", "two.txt"]


@pytest.mark.parametrize("exists", [False, True], ids=["empty", "with a database"])
def test_a_read_only_folder_is_one_line(database: Path, exists: bool) -> None:
    database.chmod(0o444) if exists else database.unlink()
    database.parent.chmod(0o555)
    program = "from llm_assets.resources.mlflow import MlflowTracking; MlflowTracking().client()"
    command = [sys.executable, "-c", program]
    if os.getuid() == 0:  # root may write all the same, unless it gives that right up
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    environment = {**os.environ, "LLM_ASSETS_VAR": str(database.parent), "MLFLOW_TRACKING_URI": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    database.parent.chmod(0o755)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("model.errors.PipelineError: the tracking store sqlite:///")
    assert str(database.parent) in last and "Permission denied" in last
