"""What `make ui` starts and refuses; `tests/e2e/test_ui.py` starts it."""

import socket
from pathlib import Path

import pytest

from bench.server import free_port
from llm_assets import ui
from llm_assets.instance.started_after import answers
from llm_assets.terminal import execute
from model.errors import PipelineError


def test_each_code_location_of_the_workspace_is_started(tmp_path: Path) -> None:
    assert ui.code_locations(ui.REPOSITORY / "workspace.yaml") == {"llm_assets": "llm_assets.definitions"}
    file = tmp_path / "workspace.yaml"
    file.write_text("load_from: [{python_module: a.b}, {python_module: {module_name: c, location_name: d}}]")
    assert ui.code_locations(file) == {"a.b": "a.b", "d": "c"}
    file.write_text("load_from: [{python_file: a.py}]")
    with pytest.raises(PipelineError, match=r"lists \{'python_file': 'a.py'\}: expected `python_module`"):
        ui.code_locations(file)


@pytest.mark.parametrize("wrong", ["taken", "same", "impossible", "no number", "empty"])
def test_a_port_that_cannot_be_used_is_one_line(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("LLM_ASSETS_VAR", str(tmp_path))
    monkeypatch.setattr(ui, "Server", None)  # nothing is started
    with socket.socket() as other, socket.socket() as free:
        other.bind(("127.0.0.1", 0))
        other.listen()
        free.bind(("127.0.0.1", 0))
        taken, port = (held.getsockname()[1] for held in (other, free))
        free.close()
        ports, says = {
            "taken": ((port, taken), f"MLflow cannot listen at 127.0.0.1:{taken} (Address already in use): end the"),
            "same": ((port, port), f"both pages have port {port}: expected two ports"),
            "impossible": ((70000, port), "UI_PORT=70000: expected a port from 1 to 65535 for Dagster's page"),
            "no number": (("abc", port), "UI_PORT=abc: expected a port from 1 to 65535 for Dagster's page"),
            "empty": ((port, ""), "MLFLOW_PORT=: expected a port from 1 to 65535 for MLflow's page"),
        }[wrong]
        assert ui.main(["--port", str(ports[0]), "--mlflow-port", str(ports[1])]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {says}")


def test_a_server_answers_at_a_socket_or_an_address(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp:
        tcp.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{tcp.getsockname()[1]}"
        assert not answers(path) and not answers(address)
        unix.bind(path)
        unix.listen()
        tcp.listen()
        assert answers(path) and answers(address)


def test_an_output_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("LLM_ASSETS_VAR", str(tmp_path / "file"))
    ports = ["--port", str(free_port()), "--mlflow-port", str(free_port())]
    for start in (lambda: ui.main(ports), lambda: execute.main(["smoke"])):
        assert start() == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert (
            line.startswith(f"error: {tmp_path / 'file'}/") and "cannot be written (Not a directory): expected" in line
        )


def test_an_experiment_that_is_none_is_refused_before_a_run_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute.main(["smokes"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no experiment 'smokes'") and line.endswith("did you mean 'smoke'?")
