"""`make ui` as a person and as a script start it: two addresses, and no process left when it ends."""

import os
import pty
import signal
import subprocess
import time
import urllib.request

import psutil
import pytest

from tests.e2e.workplace import BIN, REPO, free_port, new_workplace, wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The first start makes MLflow's tables, which takes seconds."""
    return new_workplace(tmp_path_factory.mktemp("ui"))


def processes(workplace) -> set[psutil.Process]:
    """All processes that work on this state: their environment names its folder."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("LLM_ASSETS_VAR") == str(workplace.var):
                found.add(process)
        except psutil.Error:
            continue
    return found


def end_the_page_at(port: int, workplace) -> None:
    """Kill the server that listens at this port, as a machine without memory does."""
    for process in processes(workplace):
        if port in {found.laddr.port for found in process.net_connections() if found.status == psutil.CONN_LISTEN}:
            process.kill()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda sent: sent.name)
def test_make_ui_prints_two_addresses_and_leaves_no_process(workplace, sent):
    ports = free_port(), free_port()
    make = ["make", "--no-print-directory", "--old-file=.venv/.installed", "ui", f"UI_PORT={ports[0]}"]
    make += [f"MLFLOW_PORT={ports[1]}", f"BIN={BIN}", f"DAGSTER_HOME={workplace.root / 'dagster'}"]
    ui = subprocess.Popen(
        # As `script &` starts it: SIGINT is ignored.
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *make],
        cwd=REPO,
        env={**workplace.env, "MLFLOW_UI_URL": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert ui.stdout
    lines = [ui.stdout.readline() for _ in range(2)]
    assert lines == [f"Dagster  http://127.0.0.1:{ports[0]}\n", f"MLflow   http://127.0.0.1:{ports[1]}\n"]
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30) as page:
            opened = page.read().decode()
    assert 'location.replace("#/experiments/1/runs")' in opened  # MLflow's page opens on the runs
    if sent == signal.SIGTERM:
        end_the_page_at(ports[1], workplace)
        assert "killed by SIGKILL" in ui.stdout.readline()
        wait_for(f"http://127.0.0.1:{ports[1]}", ui, workplace.var / "ui" / "mlflow.log")  # it is started again
        ui.send_signal(sent)
    else:
        os.killpg(ui.pid, sent)
        if sent == signal.SIGHUP:  # a terminal that closes sends more than one signal
            os.killpg(ui.pid, signal.SIGTERM)
    ui.wait(60)
    deadline = time.monotonic() + 30
    while processes(workplace) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes(workplace)


def test_make_ui_ends_with_the_terminal_whose_session_make_leads(workplace):
    """As under `ssh -t HOST make ui`: the closed terminal sends a signal to make alone."""
    make = workplace.make("ui", f"UI_PORT={free_port()}", f"MLFLOW_PORT={free_port()}")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if these tests run under nohup, and inherited
        os.chdir(REPO)
        os.execvpe(make[0], make, {**workplace.env, "MLFLOW_UI_URL": ""})
    printed = b""
    while printed.count(b"\n") < 2:
        printed += os.read(terminal, 1024)
    os.close(terminal)
    deadline = time.monotonic() + 60
    while processes(workplace) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes(workplace)
    os.waitpid(pid, 0)
