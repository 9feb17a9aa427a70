"""A real S3 server, SeaweedFS, which tests start, slow, kill and start again."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

WEED = Path(sys.executable).with_name("weed")


def is_installed() -> bool:
    try:
        import s3fs  # noqa: F401
    except ImportError:
        return False
    return WEED.exists()


KEYS = ("writer", "not-a-real-secret")


class Server:
    """SeaweedFS on an address of this machine. Its files outlive it."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder, self.address = folder, address
        names = [
            f"{kind}{suffix}" for kind in ("master", "volume", "filer", "s3") for suffix in (".port", ".port.grpc")
        ]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        identity = {"name": "rex", "credentials": [{"accessKey": KEYS[0], "secretKey": KEYS[1]}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.ports['s3.port']}"

    def start(self) -> None:
        command = [WEED, "server", f"-ip={self.address}", f"-ip.bind={self.address}", f"-dir={self.folder}", "-s3"]
        command += [
            f"-s3.config={self.folder / 's3.json'}",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=30",
            "-s3.autoCreateBucket=false",
            # Fixed ports unless off: two servers could not run at once.
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        command += [f"-{name}={port}" for name, port in self.ports.items()]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        while not answers(self.url):
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def pause(self, seconds: float) -> None:
        """Stop answering for a while, as a server that is overloaded."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    @property
    def env(self) -> dict[str, str]:
        """What its clients need."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEYS[0],
            "AWS_SECRET_ACCESS_KEY": KEYS[1],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",
        }


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except urllib.error.HTTPError:
        return True  # it asks for credentials
    except OSError:
        return False
    return True


def wait_until_it_stores() -> None:
    """The server answers before it can store."""
    import s3fs

    fs, end_s = s3fs.S3FileSystem(), time.monotonic() + 60
    while True:
        try:
            fs.mkdirs("artifacts", exist_ok=True)
            fs.pipe_file("artifacts/ready", b"1")
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.2)
        else:
            return


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("s3"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def root(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address in a bucket that exists; credentials are in the environment only."""
    import s3fs

    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    wait_until_it_stores()
    return f"s3://artifacts/{uuid.uuid4().hex}"


with_s3 = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(not is_installed(), reason="the extra cluster (s3fs, SeaweedFS) is not installed: make cluster"),
]
