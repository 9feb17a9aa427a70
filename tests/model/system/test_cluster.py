"""Tokenizing and training on Ray, which is an extra: real tasks and actors on one Ray that this file starts."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from model.errors import PipelineError
from model.settings import ComputeSettings, CorpusSettings, ExperimentSettings
from model.system.cluster import connected
from model.system.tasks import tasks
from model.text.corpus import build_corpus
from model.text.overlap import find_overlap
from model.text.parts import in_tasks
from model.text.shards import by_shards
from model.text.tokens import build_tokenized_dataset
from model.training.checkpoints import local as checkpoints
from model.training.launch.cluster import fitting
from model.training.launch.start import launch
from tests.model.system.ray_tasks import die, die_once, double
from tests.model.text.test_parts import write_sources
from tests.model.training.launch.test_distributed import REPO, assert_same_curve, curve
from tests.model.training.launch.tiny import one_process
from tests.model.training.tiny import TOKENIZER, make_dataset
from tests.support.s3 import free_ports

RAY = ComputeSettings(engine="ray", processes=2)


def is_installed() -> bool:
    try:
        import ray  # noqa: F401
    except ImportError:
        return False
    return True


needs_ray = pytest.mark.skipif(not is_installed(), reason="the extra ray (200 MB) is not installed: make cluster")


def with_ray(test: Any) -> Any:
    return pytest.mark.slow(pytest.mark.processes(needs_ray(test)))


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    """A Ray with two cores, which all tests use that start none."""
    with connected(RAY):
        yield


@with_ray
def test_a_task_is_repeated_after_its_process_died_and_its_error_is_one_line(running: None, tmp_path: Path) -> None:
    with tasks(RAY) as apply:
        assert apply
        assert list(apply(double, range(7))) == [0, 2, 4, 6, 8, 10, 12]
        assert list(apply(die_once, [tmp_path / "died"])) == [1]
        with pytest.raises(PipelineError, match=r"^7 is not doubled here$"):
            list(apply(double, [6, 7]))
        with pytest.raises(RuntimeError, match=r"^the task of shard 3 died 4 times: "):
            list(apply(die, ["shard 3"]))


@with_ray
def test_tasks_write_the_files_of_one_process(running: None, dataset_dir: Path, tmp_path: Path) -> None:
    corpus, sources = dataset_dir.parent / "corpus", write_sources(tmp_path / "sources")
    settings = CorpusSettings(source="files", paths=[str(sources / "*")], shard_bytes=6_000)
    build_corpus(settings, tmp_path / "corpus of one")
    with tasks(RAY) as apply:
        assert apply
        build_tokenized_dataset(TOKENIZER, corpus, tmp_path / "tokens", encode=by_shards(apply, tmp_path / "scratch"))
        build_corpus(settings, tmp_path / "corpus", write=in_tasks(apply, tmp_path / "scratch"))
        found = find_overlap(tmp_path / "corpus", apply=apply, scratch_dir=tmp_path)
        (sources / "0.jsonl.gz").write_bytes(b"no gzip")
        with pytest.raises(PipelineError, match=r"0.jsonl.gz, line 1: broken gzip file"):
            build_corpus(settings, tmp_path / "broken", write=in_tasks(apply, tmp_path / "scratch"))
    assert files(tmp_path / "tokens") == files(dataset_dir)
    assert files(tmp_path / "corpus") == files(tmp_path / "corpus of one")
    assert found == find_overlap(tmp_path / "corpus of one") and found.train_documents > 100


@with_ray
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_step_that_ends_early_leaves_no_process_of_its_tasks(number: signal.Signals, tmp_path: Path) -> None:
    program = (
        "import time\nfrom pathlib import Path\nfrom model.settings import ComputeSettings\n"
        "from model.system.tasks import tasks\n"
        "def wait(mark):\n    Path(mark).touch()\n    time.sleep(600)\n"
        "def main():\n    with tasks(ComputeSettings(engine='ray', processes=2)) as apply:\n"
        f"        list(apply(wait, [{str(tmp_path / 'one')!r}, {str(tmp_path / 'two')!r}]))\n"
        "import signal\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\nmain()\n"
    )
    step = psutil.Popen([sys.executable, "-c", program], cwd=REPO, stderr=subprocess.DEVNULL)
    while not ((tmp_path / "one").exists() and (tmp_path / "two").exists()):  # the limit is the test's own
        assert step.poll() is None
        time.sleep(0.1)
    started = step.children(recursive=True)
    step.send_signal(number)
    step.wait(120)
    _, alive = psutil.wait_procs(started, timeout=120)
    assert len(started) > 3 and alive == []


@with_ray
def test_actors_make_the_model_of_one_process_though_one_of_them_is_killed(
    running: None, dataset_dir: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    log: list[str] = []
    scratch = tmp_path / "scratch"

    def kill_a_worker(step: int, metrics: dict[str, float]) -> None:
        if checkpoints.steps_saved(scratch) and not killed:
            killed.append(max(process.pid for process in workers(scratch)))
            os.kill(killed[0], signal.SIGKILL)

    summary = launch(on_ray(2), dataset_dir, tmp_path / "output", scratch, log=log.append, on_metrics=kill_a_worker)
    assert killed and summary.steps == 60 and summary.resumed_from_step
    assert sum("2 of 2 start at the last checkpoint" in line for line in log) == 1
    launch(one_process(), dataset_dir, tmp_path / "one", tmp_path / "scratch of one")
    assert_same_curve(curve(tmp_path / "output"), curve(tmp_path / "one"))
    assert workers(scratch) == []


@with_ray
def test_more_processes_than_the_cluster_holds_are_one_line(running: None, dataset_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"compute.processes is 4: the hosts of the Ray cluster hold 2 with 1 CPU"):
        launch(on_ray(4), dataset_dir, tmp_path / "output", tmp_path / "scratch")


@with_ray
def test_a_killed_step_leaves_no_process_of_its_ray_and_of_its_training(dataset_dir: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    program = str(REPO / "tests" / "model" / "training" / "launch" / "launcher.py")
    launcher = psutil.Popen(
        [sys.executable, program, str(dataset_dir), str(tmp_path / "output"), str(scratch), "ray"],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stderr=subprocess.DEVNULL,
    )
    while len(workers(scratch)) < 2:  # the limit is the test's own
        assert launcher.poll() is None
        time.sleep(0.1)
    started = launcher.children(recursive=True)
    assert any("raylet" in process.name() for process in started)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(started, timeout=120)
    assert alive == [] and workers(scratch) == []


STEP = """
from model.settings import ComputeSettings
from model.system.tasks import tasks
with tasks(ComputeSettings(engine="ray", processes=1)) as apply:
    import ray
    print(list(apply(lambda item: 2 * item, [1])), ray.get_runtime_context().gcs_address, flush=True)
"""
RUN = """
import subprocess, sys, time
from model.system.run_ray import share_in_this_process_tree
share_in_this_process_tree()
for _ in range(2):
    subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
print("done", flush=True)
time.sleep(600)
"""


@with_ray
def test_the_steps_of_a_run_share_a_ray_that_ends_with_the_killed_run() -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a socket's path has at most 107 bytes
        environment = {**os.environ, "TMPDIR": folder, "PYTHONPATH": str(REPO)}
        command = [sys.executable, "-c", RUN, STEP]
        run = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)
        assert run.stdout
        first, second, done = (run.stdout.readline().strip() for _ in range(3))
        assert first.startswith("[2] ") and first == second and done == "done"
        (held,) = Path(folder).glob("rex-ray-*-1")
        holder = psutil.Process(int(held.read_text().split()[0]))
        started = [holder, *holder.children(recursive=True)]
        assert any("raylet" in process.name() for process in started)
        run.kill()
        run.wait()
        _, alive = psutil.wait_procs(started, timeout=60)
        assert alive == [] and not held.exists()


@contextmanager
def cluster_of_one_host(log: Path) -> Iterator[tuple[list[str], dict[str, str], Path]]:
    """A Ray with two cores that runs by itself: its addresses from within and from outside, what clients have in their
    environment, and the folder of its logs.
    """
    port, client_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a socket's path has at most 107 bytes
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
        environment = {**os.environ, **variables, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        command = ["start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}"]
        command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client_port}"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]  # any, as the others are any
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
        with log.open("wb") as out:
            head = psutil.Popen([*ray, *command], cwd=REPO, env=environment, stdout=out, stderr=out)
        try:
            while "block forever" not in log.read_text():  # the limit is the test's own
                assert head.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
            addresses = [f"127.0.0.1:{port}", f"ray://127.0.0.1:{client_port}"]
            yield addresses, variables, Path(folder, "session_latest", "logs")
        finally:
            started = head.children(recursive=True)
            head.terminate()
            psutil.wait_procs([head, *started], timeout=60)
            for process in started:
                if process.is_running():
                    process.kill()


@with_ray
def test_tasks_run_on_a_cluster_that_is_there_from_within_and_from_outside(tmp_path: Path) -> None:
    with cluster_of_one_host(tmp_path / "log") as (addresses, variables, _):
        for address in addresses:
            program = (
                "from model.settings import ComputeSettings\nfrom model.system.tasks import tasks\n"
                f"with tasks(ComputeSettings(engine='ray', address={address!r})) as apply:\n"
                "    print(list(apply(lambda item: 2 * item, [1, 2, 3])))\n"
            )
            done = subprocess.run(
                [sys.executable, "-c", program],
                cwd=REPO,
                env={**os.environ, **variables},
                capture_output=True,
                text=True,
                check=False,
            )
            assert "[2, 4, 6]" in done.stdout, done.stderr[-3000:]


# -- what needs no Ray ------------------------------------------------------------------------------------------------


def test_without_ray_its_choice_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(PipelineError, match=r"the package ray is not installed: run pip install '.\[ray\]', or"),
        connected(RAY),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nodes": 2}, "compute.nodes is 2: expected 1 for compute.engine 'ray'"),
        ({"processes": 0}, "compute.processes is 0: expected a number greater than 0"),
        ({"gpus_per_process": -1}, "compute.gpus_per_process is -1: expected 0 or more"),
        ({"endpoint": "a:1"}, "compute.endpoint is 'a:1': expected none: it is for compute.engine 'torchrun'"),
        ({"engine": "torchrun", "address": "a:1"}, "compute.address is 'a:1': expected none: it is for compute.engine"),
        ({"engine": "local", "processes": 1, "gpus_per_process": 1}, "compute.gpus_per_process is 1: expected none"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PipelineError) as error:
        replace(RAY, **options)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("processes", "room", "number"), [(2, 2, 2), (2, 1, 1), (8, 7, 4), (6, 5, 3), (6, 100, 6), (3, 2, 1), (4, 0, 0)]
)
def test_fewer_processes_share_out_the_same_batch(processes: int, room: int, number: int) -> None:
    assert fitting(processes, room) == number


def on_ray(processes: int) -> ExperimentSettings:
    return replace(one_process(), compute=replace(RAY, processes=processes))


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def workers(scratch: Path) -> list[psutil.Process]:
    """Living training processes in `scratch`."""
    return [
        process
        for process in psutil.process_iter()
        if (line := command(process)) and "launch.worker" in line and str(scratch) in line
    ]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
