"""The pipeline on two hosts: Ray over both, artifacts and MLflow's files on S3, Dagster and MLflow on Postgres.

The hosts are network namespaces with one core each; the servers run on this machine, the third place of their network.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import pytest

from llm_assets.containers.prepare import mlflow_uri
from model.training.checkpoints.local import COMMITTED
from tests.e2e.workplace import BIN, REPO, Workplace, free_port, new_workplace, stop, wait_for
from tests.model.system.test_cluster import with_ray
from tests.model.training.launch.test_distributed import assert_same_curve
from tests.support.hosts import Host, Network, RayCluster, needs_root, network
from tests.support.postgres import postgres_server
from tests.support.s3 import Server, wait_until_it_stores, with_s3

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, needs_root, *with_s3, pytest.mark.timeout(2400)]
SHARDS = ["corpus=files", f"corpus.paths=[{REPO}/model/**/*.py]", "corpus.max_bytes=0"]
SHARDS += ["corpus.shard_bytes=6000", "corpus.document_bytes=3000"]
TRAINING = ["training.max_steps=60", "training.save_steps=10", "training.precision=float32"]
"""Overrides of `smoke`: tasks and steps enough to lose a host among them."""
DIVIDED = ["corpus", "tokenized_dataset", "trained_checkpoint", "quantized_model"]


@dataclass
class Site:
    """Two hosts and what runs on them. variables: of all clients of the servers."""

    network: Network
    cluster: RayCluster
    variables: dict[str, str]
    folder: Path

    def workplace(self, name: str) -> Workplace:
        """A new user's state in the folder that the hosts share, whose artifacts are on S3."""
        made = new_workplace(self.folder / name)
        (made.root / "dagster" / "dagster.yaml").write_bytes((REPO / "deploy" / "dagster.yaml").read_bytes())
        places = {"LLM_ASSETS_ARTIFACTS": f"s3://artifacts/{name}", "DAGSTER_FILES": str(made.root / "files")}
        return replace(made, variables={**self.variables, **places})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with ExitStack() as stack:
        # The path of a socket has at most 107 bytes.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-")))
        hosts = stack.enter_context(network(["one", "two"], scratch))
        s3 = Server(folder, hosts.address)
        s3.start()
        stack.callback(s3.kill)
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in s3.env.items():
            patched.setenv(name, value)
        wait_until_it_stores()
        postgres = stack.enter_context(postgres_server(hosts.address))
        variables = {**s3.env, **postgres.env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
        site = Site(hosts, RayCluster(hosts.hosts, {**os.environ, **variables}, scratch, folder), variables, folder)
        done = site.workplace("prepared").run("python", "-m", "llm_assets.containers.prepare")
        assert done.returncode == 0, done.stdout
        variables["MLFLOW_TRACKING_URI"] = stack.enter_context(tracking(site, mlflow_uri(postgres.env)))
        stack.enter_context(site.cluster)
        yield site


@contextmanager
def tracking(site: Site, database: str) -> Iterator[str]:
    """The address of an MLflow server whose files are on S3."""
    port, log = free_port(), site.folder / "mlflow.log"
    command = [str(BIN / "mlflow"), "server", "--host", site.network.address, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", "s3://artifacts/mlflow"]
    environment = {**os.environ, "MLFLOW_S3_ENDPOINT_URL": site.variables["AWS_ENDPOINT_URL"]}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        address = f"http://{site.network.address}:{port}"
        wait_for(f"{address}/health", server, log)
        yield address
    finally:
        stop(server)


def pipeline(*overrides: str) -> list[str]:
    return ["python", "-m", "llm_assets.sweep", "experiment=smoke", *SHARDS, *TRAINING, *overrides]


def first_stages(*overrides: str) -> list[str]:
    """What materializes the assets whose work is divided, and the model that they lead to."""
    config = {"resources": {"hydra": {"config": {"overrides": [*SHARDS, *TRAINING, *overrides]}}}}
    command = ["dagster", "asset", "materialize", "-m", "llm_assets.definitions", "--partition", "smoke"]
    return [*command, "--select", ",".join(DIVIDED), "--config-json", json.dumps(config)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """What one host makes, with as many training processes."""
    workplace = new_workplace(tmp_path_factory.mktemp("local"))
    done = workplace.run(*first_stages("compute=torchrun", "compute.processes=2"))
    assert done.returncode == 0, done.stdout[-3000:]
    return workplace


def on_both(site: Site, workplace: Workplace, what: Callable[..., list[str]], each: Callable[[], None]) -> str:
    """Run `what` from the first host, and return what it says. each: called while it runs."""
    program, *arguments = what("compute=ray", f"compute.address={site.cluster.address}", "compute.processes=2")
    command = site.network.hosts[0].inside(str(BIN / program), *arguments)
    log = workplace.root / "pipeline.log"
    with log.open("w") as out:
        run = subprocess.Popen(command, cwd=REPO, env=workplace.env, stdout=out, stderr=out)
    try:
        while run.poll() is None:  # the limit is the test's own
            each()
            time.sleep(0.02)
    finally:
        run.terminate()
        run.wait(120)
    assert run.returncode == 0, log.read_text()[-3000:]
    return log.read_text()


def manifest(site: Site, workplace: Workplace, asset: str) -> dict:
    import s3fs

    folder = f"{workplace.variables['LLM_ASSETS_ARTIFACTS']}/{asset}/smoke"
    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    return json.loads(fs.cat_file(f"{folder}/{fs.cat_file(f'{folder}/LATEST').decode().strip()}/manifest.json"))


def curve(workplace: Workplace) -> list[dict[str, float]]:
    (found,) = (workplace.var / "cache").rglob("trained_checkpoint/smoke/*/curves.json")
    return json.loads(found.read_text())


def local_curve(local: Workplace) -> list[dict[str, float]]:
    return json.loads((local.latest("trained_checkpoint") / "curves.json").read_text())


def found(workplace: Workplace, pattern: str) -> list[str]:
    """Scratch files of a running pipeline."""
    return glob(f"{workplace.var}/scratch/{pattern}")  # noqa: PTH207 - pathlib's fails when a folder goes meanwhile


def roles(host: Host) -> set[str]:
    """What of the pipeline's tasks and training a host runs at this moment."""
    names = ["ray::read", "ray::write", "ray::encode_shard", "model.training.launch.worker"]
    return {name for line in host.processes() for name in names if name in line}


@with_ray
def test_two_hosts_make_the_artifacts_of_one(site: Site, local: Workplace) -> None:
    workplace, seen = site.workplace("both"), {host.name: set[str]() for host in site.network.hosts}

    def look() -> None:
        for host in site.network.hosts:
            seen[host.name] |= roles(host)

    on_both(site, workplace, pipeline, look)
    assert all({"ray::encode_shard", "model.training.launch.worker"} <= found for found in seen.values()), seen
    for asset in ("corpus", "tokenized_dataset"):
        assert manifest(site, workplace, asset)["content_hash"] == local.manifest(asset)["content_hash"]
    for asset in ("trained_checkpoint", "quantized_model"):
        ours, theirs = manifest(site, workplace, asset)["files"], local.manifest(asset)["files"]
        weights = [name for name in theirs if name.endswith(".safetensors")]
        assert weights and [ours[name] for name in weights] == [theirs[name] for name in weights]


@pytest.fixture
def cut_off(site: Site) -> Iterator[Callable[[], None]]:
    """Takes the second host off the network; later it comes back, as a host that was started again."""
    _, two = site.network.hosts
    cut: list[float] = []

    def take() -> None:
        if not cut:
            cut.append(time.monotonic())
            site.network.cut(two)

    yield take
    assert cut
    print(f"{time.monotonic() - cut[0]:.0f} s from the cut to the end")
    site.network.reconnect(two)
    site.cluster.stop(two)
    site.cluster.start(two)


def assert_same_text(site: Site, workplace: Workplace, local: Workplace) -> None:
    for asset in ("corpus", "tokenized_dataset"):
        assert manifest(site, workplace, asset)["content_hash"] == local.manifest(asset)["content_hash"]


@with_ray
def test_a_host_that_is_cut_off_while_it_tokenizes_costs_no_byte(
    site: Site, local: Workplace, cut_off: Callable[[], None]
) -> None:
    workplace, two = site.workplace("tokenizing"), site.network.hosts[1]

    def cut() -> None:
        done = found(workplace, "tokenized_dataset/smoke/*/*/*/*/tokens.*")
        if done and "ray::encode_shard" in roles(two):
            cut_off()

    assert "1 of 2 processes start" in on_both(site, workplace, first_stages, cut)
    assert_same_text(site, workplace, local)
    assert_same_curve(curve(workplace), local_curve(local))


@with_ray
def test_a_host_that_is_cut_off_while_it_trains_costs_the_steps_since_the_last_checkpoint(
    site: Site, local: Workplace, cut_off: Callable[[], None]
) -> None:
    workplace = site.workplace("training")

    def cut() -> None:
        if found(workplace, f"trained_checkpoint/smoke/*/*/checkpoint-*/{COMMITTED}"):
            cut_off()

    assert "1 of 2 start at the last checkpoint" in on_both(site, workplace, first_stages, cut)
    assert_same_text(site, workplace, local)
    assert_same_curve(curve(workplace), local_curve(local))
