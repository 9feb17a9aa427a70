"""The image that `make image` builds, run as the README says: what it holds, does, may, and how it ends."""

import json
import re
import shutil
import subprocess
import threading
import time
from dataclasses import replace

import httpx
import pytest
from openai import OpenAI

from bench.containers.image import HELD
from llm_assets.containers.context import prepare_context
from llm_assets.resources.bentos import BentoBuilder
from tests.e2e.engine import Container, docker, require_engine, start
from tests.e2e.test_pipeline import mlflow_runs
from tests.e2e.workplace import REPO, new_workplace

pytestmark = pytest.mark.e2e
# What the service holds in bytes beyond its weights and its cache, which are tiny here.
MEMORY = 450e6


@pytest.fixture(scope="module")
def workplace(smoke, tmp_path_factory):
    """The smoke pipeline's artifacts and tracking, copied: what the images add does not get into it."""
    copy = replace(new_workplace(tmp_path_factory.mktemp("images")), bentoml=smoke.bentoml)
    shutil.copytree(smoke.var / "artifacts", copy.var / "artifacts")
    shutil.copy(smoke.var / "mlflow.db", copy.var)
    return copy


def images() -> list[str]:
    return docker("images", "--format", "{{.Repository}}:{{.Tag}}").stdout.splitlines()


def make_image(workplace) -> str:
    """The last line of `make image`."""
    done = subprocess.run(
        workplace.make("image", "EXPERIMENT=smoke"),
        cwd=REPO,
        env=workplace.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=580,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def image(workplace):
    """The tag that `make image` ends with; the image is removed at the end, unless it was there before."""
    require_engine()
    before = images()
    tag = make_image(workplace)
    yield tag
    if tag not in before:
        docker("rmi", tag)


@pytest.fixture(scope="module")
def container(image):
    """One container for all tests; the engine starts it again where it fails."""
    running = start(
        image, "--env", "REX_ALLOW_ANONYMOUS=true", "--restart", "on-failure", "--health-interval", "1s"
    )  # fmt: skip
    try:
        running.wait_until_ready()
        yield running
    finally:
        docker("rm", "--force", running.id)


def ask(container: Container, **body: object) -> dict:
    answer = httpx.post(f"{container.url}/generate", json={"prompt": "def ", "temperature": 0, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_image_is_labelled_and_small_and_has_cpu_torch_alone(workplace, image):
    assert re.fullmatch(r"rex-smoke:[0-9a-f]{16}-cpu", image)
    record = json.loads((workplace.latest("container_image_cpu") / "image.json").read_text())
    found = json.loads(docker("image", "inspect", image).stdout)[0]
    assert record["image"] == image and record["id"] == found["Id"]
    assert found["Size"] <= 1.7e9
    labels = found["Config"]["Labels"]
    for name in ("source", "revision", "version"):
        assert labels[f"org.opencontainers.image.{name}"]
    assert labels["rex.experiment"] == "smoke" and labels["rex.model"].startswith("rex-smoke:")
    assert found["Config"]["User"] not in ("", "0", "root")
    assert "/readyz" in " ".join(found["Config"]["Healthcheck"]["Test"])
    assert record["inside"]["torch"].endswith("+cpu") and not record["inside"]["cuda"]
    lock = (workplace.latest("container_image_cpu") / "requirements.txt").read_text().splitlines()
    packages = [line.split(" ")[0] for line in lock if "==" in line]
    assert len(packages) > 50 and len(re.findall(r"--hash=sha256:[0-9a-f]{64}", " ".join(lock))) >= len(packages)
    bill = json.loads((workplace.latest("container_image_cpu") / "sbom.cdx.json").read_text())
    held = {one["purl"].partition("?")[0]: one for one in bill["components"] if "purl" in one}
    assert {f"pkg:pypi/{one.replace('==', '@')}".replace("_", "-") for one in packages} <= {
        purl.replace("%2B", "+") for purl in held
    }
    system = [one for purl, one in held.items() if purl.startswith("pkg:deb/debian/")]
    assert len(system) > 50 and all("licenses" in one for one in [*system, *held.values()])


def test_an_unchanged_image_is_neither_made_nor_tracked_again_and_a_lost_one_is_made(workplace, image):
    def state() -> tuple[dict, int]:
        return workplace.manifest("container_image_cpu"), len(mlflow_runs(workplace))

    before = state()
    assert make_image(workplace) == image
    assert state() == before
    docker("tag", image, "rex-e2e:layers")  # keeps the layers, so that the build takes seconds
    docker("rmi", image)
    try:
        assert make_image(workplace) == image
    finally:
        docker("rmi", "rex-e2e:layers")
    assert image in images() and state()[1] == before[1] + 1


def test_it_generates_over_rest_and_for_the_openai_client(container):
    request = {"prompt": "import ", "max_tokens": 20, "temperature": 0.8, "seed": 7}
    whole = ask(container, **request)
    assert whole["text"]
    with httpx.stream("POST", f"{container.url}/generate", json={**request, "stream": True}, timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line).get("text", "") for line in lines[:-1]) == whole["text"]
    with OpenAI(base_url=f"{container.url}/v1", api_key="none") as client:
        (model,) = client.models.list()
        said = client.completions.create(model=model.id, prompt="import ", max_tokens=20, temperature=0.8, seed=7)
    assert said.choices[0].text == whole["text"]


def test_it_is_healthy(container):
    deadline = time.monotonic() + 60
    while (health := container.inspect()["State"]["Health"])["Status"] != "healthy":
        assert time.monotonic() < deadline, health
        time.sleep(0.2)


def test_it_may_do_nothing_but_serve(container):
    status = dict(
        line.split(":\t", 1) for line in container.python("print(open('/proc/1/status').read())").splitlines()
    )
    assert set(status["Uid"].split()) == {"10001"}
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    for path in ("/written", "/app/written", "/app/bento/written", "/app/packages/written"):
        refused = docker("exec", container.id, "python3", "-c", f"open({path!r}, 'w')")
        assert refused.returncode == 1 and "OSError" in refused.stdout, path


def test_no_compiler_and_no_package_cache_is_in_it(container):
    program = """
import os, shutil
print([name for name in ("gcc", "cc", "g++", "make", "uv") if shutil.which(name)])
print([path for path in ("/var/cache/apt/archives", "/tmp/.cache", "/app/packages/torch/include")
       if os.path.isdir(path) and [name for name in os.listdir(path) if name not in ("lock", "partial")]])
"""
    assert container.python(program).split("\n") == ["[]", "[]"]


def test_its_memory_is_bounded(container):
    processes, own, _ = map(int, container.python(HELD).split())
    assert processes >= 2
    assert 100e6 < own <= MEMORY


def test_it_comes_back_after_its_worker_is_killed(container):
    before = container.inspect()["State"]["StartedAt"]
    program = """
import glob, os, signal
for path in glob.glob("/proc/[0-9]*/cmdline"):
    if b"\\0--fd\\0" in open(path, "rb").read():
        os.kill(int(path.split("/")[2]), signal.SIGKILL)
"""
    container.python(program)
    deadline = time.monotonic() + 60
    while container.inspect()["State"]["StartedAt"] == before:
        assert time.monotonic() < deadline, container.log()[-2000:]
        time.sleep(0.2)
    container.wait_until_ready()
    assert container.inspect()["RestartCount"] == 1
    assert ask(container, max_tokens=4)["text"]


@pytest.fixture
def slow_container(image):
    """A container whose answers take long enough to be interrupted."""
    running = start(image, "--env", "REX_ALLOW_ANONYMOUS=true", "--env", "REX_STEP=reference")
    try:
        running.wait_until_ready()
        yield running
    finally:
        docker("rm", "--force", running.id)


def test_docker_stop_lets_a_running_request_finish(slow_container):
    container = slow_container
    answers: list[httpx.Response] = []
    body = {"model": "", "prompt": "def ", "n": 16, "max_tokens": 200, "ignore_eos": True}
    with httpx.Client(base_url=container.url, timeout=60) as client:
        body["model"] = client.get("/v1/models").json()["data"][0]["id"]
        asking = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=body)))
        asking.start()
        while "rex_num_requests_running" not in (text := httpx.get(f"{container.url}/metrics").text) or not re.search(
            r"^rex_num_requests_running(?:{.*})? [1-9]", text, re.MULTILINE
        ):
            assert asking.is_alive(), answers
        assert docker("stop", "--time", "40", container.id).returncode == 0
        asking.join(60)
    assert answers[0].status_code == 200, answers[0].text
    assert answers[0].json()["usage"]["completion_tokens"] == 16 * 200
    state = container.inspect()["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    assert re.search(r"draining: [1-9]\d* requests in flight", container.log())


def test_a_device_that_is_not_there_ends_the_start_in_one_line(image):
    done = docker("run", "--rm", "--env", "REX_DEVICE=cuda", "--env", "REX_ALLOW_ANONYMOUS=true", image)
    assert done.returncode == 1
    (error,) = [line for line in done.stdout.splitlines() if line.startswith("Error")]
    assert "'cuda'" in error and "sees no GPU" in error
    assert "Traceback" not in done.stdout


def test_the_gpu_image_is_laid_out_with_cuda_packages(smoke, tmp_path):
    packaged = json.loads((smoke.latest("packaged_bento") / "bento.json").read_text())
    context = prepare_context(tmp_path / "context", BentoBuilder(home=str(smoke.bentoml)), packaged, "smoke", "gpu")
    lock = context.lock.read_text().splitlines()
    assert any(line.startswith("nvidia-cudnn") for line in lock) and any(line.startswith("triton==") for line in lock)
    assert [line.split(" ")[0] for line in lock if line.startswith("torch==")] == ["torch==2.13.0"]
    description = (context.folder / "bento" / "bento.yaml").read_text()
    assert "device: cuda" in description
    dockerfile = (context.folder / "bento" / "src" / "bento" / "Dockerfile").read_text()
    assert dockerfile == (REPO / "bento" / "Dockerfile").read_text()
    assert (context.folder / "bento" / "models").is_dir()
