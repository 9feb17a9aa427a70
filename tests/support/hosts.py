"""Hosts of a network on this machine: namespaces with their own addresses, names, processes and scratch disk.

They share this machine's file system, as the hosts of a cluster share one, and nothing else. A switch connects them
with each other and with this machine; `Network.cut` disconnects a host silently, as a pulled cable does.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import pytest

from tests.e2e.workplace import REPO

NAMESPACES = ["--net", "--uts", "--mount", "--pid"]
STARTS = 3
DOCUMENTED = {
    "RAY_grpc_client_keepalive_time_ms": "20000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}
"""What docs/deployment.md has the hosts of a cluster start with."""
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nsenter", "unshare"))),
    reason="network namespaces need root and Debian's iproute2 and util-linux",
)


def run(*command: str | Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}"


@dataclass(frozen=True)
class Host:
    """pid: of the first process in its namespaces; when it ends, the kernel ends all others."""

    name: str
    address: str
    pid: int
    port: str

    def inside(self, *command: str) -> list[str]:
        """The command that runs this one on the host."""
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, f"--wd={REPO}", "--", *command]

    def processes(self) -> list[str]:
        """Command lines of what runs there."""
        place, found = Path(f"/proc/{self.pid}/ns/net").readlink(), []
        for process in psutil.process_iter():
            try:
                if Path(f"/proc/{process.pid}/ns/net").readlink() == place:
                    found.append(" ".join(process.cmdline()))
            except (psutil.Error, OSError):
                continue  # it has ended
        return found


@dataclass(frozen=True)
class Network:
    """address: of this machine in it."""

    address: str
    switch: int
    hosts: list[Host]

    def cut(self, host: Host) -> None:
        """Drop everything between a host and the others."""
        self._on_switch("link", "set", host.port, "nomaster")

    def reconnect(self, host: Host) -> None:
        self._on_switch("link", "set", host.port, "master", "bridge")

    def _on_switch(self, *words: str) -> None:
        run("nsenter", "--target", str(self.switch), "--net", "ip", *words)


@contextmanager
def _namespaces(*options: str, script: str = "") -> Iterator[int]:
    """The process id of a shell in new namespaces. It ends with this process, however that ends: its input closes."""
    command = ["unshare", *options, "--fork", "--kill-child", "sh", "-ec", f"{script}\necho ready\nexec cat"]
    shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert shell.stdin and shell.stdout
    try:
        said = shell.stdout.readline().decode().strip()
        # What makes no namespace says so by its name; a script that fails is an error.
        if said.startswith("unshare:"):
            pytest.skip(f"this machine makes no namespaces: {said}")
        assert said == "ready", said
        yield psutil.Process(shell.pid).children()[0].pid
    finally:
        shell.stdin.close()
        shell.wait()


@contextmanager
def network(names: list[str], scratch: Path) -> Iterator[Network]:
    """A switch with one host for each name, and this machine. scratch: a folder that is a disk of its own on each."""
    subnet = f"10.212.{os.getpid() % 256}"
    link = f"rex{os.getpid()}"  # at most 15 characters
    addresses = {name: f"{subnet}.{number}" for number, name in enumerate(names, 1)}
    with tempfile.NamedTemporaryFile("w", prefix="rex-hosts-") as known, ExitStack() as stack:
        known.write("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
        known.flush()
        switch = stack.enter_context(_namespaces("--net"))
        made = Network(f"{subnet}.254", switch, [])
        made._on_switch("link", "add", "bridge", "type", "bridge")
        made._on_switch("link", "set", "bridge", "up")
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "machine", "netns", str(switch))
        made._on_switch("link", "set", "machine", "master", "bridge", "up")
        run("ip", "address", "add", f"{made.address}/24", "dev", link)
        run("ip", "link", "set", link, "up")
        for number, (name, address) in enumerate(addresses.items(), 1):
            script = f"hostname {name}\nmount --bind {known.name} /etc/hosts\n"
            script += f"mount -t tmpfs disk {scratch}\nmount -t tmpfs memory /dev/shm"
            options = [*NAMESPACES, "--mount-proc"]
            host = Host(name, address, stack.enter_context(_namespaces(*options, script=script)), f"port{number}")
            place = ["netns", str(host.pid)]
            run("ip", "link", "add", "eth0", *place, "type", "veth", "peer", "name", host.port, "netns", str(switch))
            made._on_switch("link", "set", host.port, "master", "bridge", "up")
            for words in (
                ["link", "set", "lo", "up"],
                ["address", "add", f"{address}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
                ["route", "add", "default", "via", made.address],  # Ray finds its own address by it
            ):
                run(*host.inside("ip", *words))
            made.hosts.append(host)
        yield made


class RayCluster:
    """Ray on the hosts of a network, each with one core; the first is the head.

    environment: of all its processes. scratch: folder of Ray's files, on each host's own disk.
    """

    port = 6379

    def __init__(self, hosts: list[Host], environment: Mapping[str, str], scratch: Path, logs: Path) -> None:
        self._hosts, self._scratch, self._logs = hosts, scratch, logs
        self._environment = {**environment, **DOCUMENTED, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.address = f"{hosts[0].address}:{self.port}"

    def __enter__(self) -> Self:
        for host in self._hosts:
            self.start(host)
        return self

    def start(self, host: Host) -> None:
        """Start the host's part, and wait until it runs. Ray gives up after 30 seconds, which a busy machine takes."""
        for _ in range(STARTS):
            if self._starts(host):
                return
        pytest.fail(f"Ray did not start on {host.name}: {self._log(host).read_text()[-3000:]}")

    def _log(self, host: Host) -> Path:
        return self._logs / f"ray-{host.name}.log"

    def _starts(self, host: Host) -> bool:
        is_head = host is self._hosts[0]
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block"]
        command += ["--head", f"--port={self.port}", "--include-dashboard=false"] if is_head else []
        command += [] if is_head else [f"--address={self.address}"]
        command += [f"--node-ip-address={host.address}", "--num-cpus=1", f"--temp-dir={self._scratch}"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        with self._log(host).open("wb") as log:
            started = subprocess.Popen(
                host.inside(*command), env=dict(self._environment), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self._running[host.name] = started
        ready_s = 0
        while ready_s < 3:  # the limit is the test's own
            try:
                started.wait(1)
                return False
            except subprocess.TimeoutExpired:
                ready_s += "block forever" in self._log(host).read_text()
        return True

    def stop(self, host: Host) -> None:
        """End the host's processes, as a power failure does."""
        run(*host.inside("sh", "-c", "kill -KILL -1"))  # all but the first one
        self._running.pop(host.name).wait()

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            self.stop(host)
