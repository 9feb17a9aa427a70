"""The processes of a training on a Ray cluster: one actor for each, which runs `worker.py` in a child process.

The child gets the signals, threads and environment that torchrun would give it, and its standard input closes when the
actor ends: it has time to save when Ray kills the actor. Ray Train is not used: its reports copy each checkpoint once
per process, and it restarts processes that have no time to save.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.errors import PipelineError
from model.progress import Log
from model.settings import ComputeSettings
from model.system.cluster import connected
from model.system.lifeline import GRACE_S, Presence
from model.training.launch.job import worker_environment

WAIT_S = 300.0
"""Longest wait for a cluster to have room for the processes of a training."""


LOST = (2, 3)
"""Ray's reasons for the end of a host: unexpected, and preempted (`NodeDeathInfo.Reason`)."""
LOST_S = 120.0
"""Longest time until Ray ends on a host that is cut off, twice its own (`gcs_rpc_server_reconnect_timeout_s`)."""


class Host:
    """The actor of one process."""

    def address(self) -> tuple[str, int]:
        """The address of this host, and a port that is free on it."""
        import socket

        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run(self, job: str, environment: dict[str, str]) -> int:
        """Run the worker to its end, and return its status."""
        command = [sys.executable, "-m", "model.training.launch.worker", "--end-with-input", job]
        with subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **environment}) as worker:
            return worker.wait()


class RayProcesses:
    """The processes of a training. `poll` and `returncode` are those of a `subprocess.Popen`."""

    def __init__(
        self,
        ray: Any,
        job: Path,
        compute: ComputeSettings,
        presence: Presence,
        log: Log,
        before_restart: Callable[[], None],
    ) -> None:
        """before_restart: called when a process has failed; an error that it raises ends the training."""
        self._ray, self._job, self._compute, self._presence, self._log = ray, job, compute, presence, log
        self._before_restart = before_restart
        self._group: Any = None
        self._hosts: list[Any] = []
        self._running: list[Any] = []
        self._restarts = 0
        self.returncode: int | None = None
        self._needed = {"CPU": 1.0} | ({"GPU": compute.gpus_per_process} if compute.gpus_per_process else {})
        room = self._room()
        processes = fitting(compute.processes, room)
        if room < compute.processes and not (processes and self._has_lost_hosts()):
            each = " and ".join(f"{amount:g} {name}" for name, amount in self._needed.items())
            raise PipelineError(
                f"compute.processes is {compute.processes}: the hosts of the Ray cluster hold {room} with {each} each; "
                "lower it, or add hosts"
            )
        if processes < compute.processes:
            log(f"the Ray cluster has lost hosts: {processes} of {compute.processes} processes start")
        self._start(processes)

    def _room(self) -> int:
        """Processes that the living hosts hold, whatever else runs there."""
        return sum(
            min(int(node["Resources"].get(name, 0) / amount) for name, amount in self._needed.items())
            for node in self._ray.nodes()
            if node["Alive"]
        )

    def _has_lost_hosts(self) -> bool:
        """Whether a host has left the cluster that neither it nor an autoscaler took off."""
        return any(not node["Alive"] and node["DeathReason"] in LOST for node in self._ray.nodes())

    def _start(self, processes: int) -> None:
        ray, compute = self._ray, self._compute
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._group = ray.util.placement_group([self._needed] * processes, strategy="PACK")
        if not self._group.wait(WAIT_S):
            raise PipelineError(
                f"compute.processes is {compute.processes}: the Ray cluster had no room for {processes} in "
                f"{WAIT_S:g} s; wait until others have ended, or lower it"
            )
        self._hosts = [
            ray.remote(Host)
            .options(
                num_cpus=1,
                num_gpus=compute.gpus_per_process,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, rank),
            )
            .remote()
            for rank in range(processes)
        ]
        host, port = ray.get(self._hosts[0].address.remote())
        shared = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        # Each process sees only its own GPUs, as if it were alone on its host.
        shared |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        if not compute.address:
            shared |= worker_environment(processes)
        self._running = [
            actor.run.remote(str(self._job), {**shared, "RANK": str(rank)}) for rank, actor in enumerate(self._hosts)
        ]

    def poll(self) -> int | None:
        """The status once all have ended; None before. If one dies, all start again, `compute.restarts` times."""
        done, self._running = self._ray.wait(self._running, num_returns=len(self._running), timeout=0)
        for result in done:
            try:
                status = self._ray.get(result)
            except self._ray.exceptions.RayError:  # the actor or its host died
                status = 1
            if status:
                return self._restart(status)
        if not self._running:
            self.returncode = 0
        return self.returncode

    def _restart(self, status: int) -> int | None:
        self._before_restart()
        self.end()
        # Those of a host that was cut off end once its Ray has missed the head for a minute, and may then save.
        all_ended = self._restarts < self._compute.restarts and self._presence.wait_for_none(LOST_S + 2 * GRACE_S)
        processes = fitting(self._compute.processes, self._room())
        if not all_ended or not processes:
            self.returncode = status
            return status
        self._restarts += 1
        self._log(
            f"a training process ended with status {status}: {processes} of {self._compute.processes} start at the "
            "last checkpoint"
        )
        self._start(processes)
        return None

    def end(self) -> None:
        """Kill the actors, whose workers then save and end."""
        for actor in self._hosts:
            self._ray.kill(actor)
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
        self._hosts, self._running, self._group = [], [], None


def fitting(processes: int, room: int) -> int:
    """The most processes, at most `room`, that can divide the batch of `processes`; 0 if there is no room."""
    return next((number for number in range(min(processes, room), 0, -1) if processes % number == 0), 0)


@contextmanager
def ray_processes(
    job: Path, compute: ComputeSettings, presence: Presence, log: Log, before_restart: Callable[[], None]
) -> Iterator[RayProcesses]:
    """The processes of a training on the Ray of `compute`; when the block ends they end, with time to save.

    Raises PipelineError if the cluster has no room for them, and what `connected` raises.
    """
    with connected(compute) as ray:
        processes = RayProcesses(ray, job, compute, presence, log, before_restart)
        try:
            yield processes
        finally:
            processes.end()
            presence.wait_for_none(2 * GRACE_S)
