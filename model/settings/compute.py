"""Where the work of a stage runs (`configs/compute/`); it does not affect a stage's result."""

from dataclasses import dataclass
from typing import Literal

from model.settings.option import Settings, expect, option

Sharding = Literal["none", "fsdp2"]


@dataclass
class ComputeSettings(Settings, group="compute"):
    """Where the work of a stage runs (`configs/compute/`): results are the same up to the rounding of sums."""

    engine: Literal["local", "torchrun", "ray"] = option(
        "local",
        "local: in the step's own process; torchrun: training in `processes` on each of `nodes` hosts; ray: corpus, "
        "tokens and scores on tasks in many tasks, and training in `processes`, on Ray.",
    )
    processes: int = option(
        1,
        "Training processes, one for each GPU, which divide the batch of one process among them: on each host with "
        "torchrun, in all with ray. Without an address, Ray starts with as many cores.",
        unit="processes",
        above=0,
        maximum=4096,
    )
    sharding: Sharding = option(
        "none",
        "none: each training process holds the whole model; fsdp2: GPUs divide parameters, gradients and optimizer "
        "state among them, and checkpoints are written in parts.",
    )
    nodes: int = option(
        1,
        "Hosts that train together, with one shared file system; 0: as SLURM_NNODES or PET_NNODES says, else 1.",
        unit="hosts",
        minimum=0,
        maximum=65_536,
    )
    endpoint: str = option(
        "",
        "HOST:PORT on one of several hosts, free there and reached from all, where they meet; empty: that of "
        "MASTER_ADDR and MASTER_PORT.",
    )
    address: str = option(
        "",
        "HOST:PORT of a Ray cluster that this host is part of, or auto; ray://HOST:PORT from outside of it; empty: Ray "
        "starts on this machine with the first step that needs it and ends with the run.",
    )
    gpus_per_process: float = option(
        0.0,
        "GPUs that Ray reserves for each process of a training, and for each task that scores; 0: on CPUs.",
        unit="GPUs",
        minimum=0,
        maximum=64,
    )
    restarts: int = option(
        1,
        "Times that all processes start again at the last checkpoint after one of them died.",
        unit="restarts",
        minimum=0,
        maximum=1000,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "local":
            for name in ("processes", "nodes"):
                value = getattr(self, name)
                wanted = "1 for compute.engine 'local'; choose compute=torchrun or compute=ray"
                expect(value == 1, f"compute.{name}", value, wanted)
            wanted = "'none' for compute.engine 'local'; choose compute=torchrun or compute=ray"
            expect(self.sharding == "none", "compute.sharding", self.sharding, wanted)
        if self.engine == "ray":
            expect(self.nodes == 1, "compute.nodes", self.nodes, "1 for compute.engine 'ray', which knows its hosts")
        if self.engine != "torchrun":
            expect(not self.endpoint, "compute.endpoint", self.endpoint, "none: it is for compute.engine 'torchrun'")
        if self.engine != "ray":
            for name in ("address", "gpus_per_process"):
                value = getattr(self, name)
                expect(not value, f"compute.{name}", value, "none: it is for compute.engine 'ray'")
        host, _, port = self.endpoint.rpartition(":")
        ok = not self.endpoint or (bool(host) and port.isdigit() and 0 < int(port) < 65_536)
        expect(ok, "compute.endpoint", self.endpoint, "HOST:PORT, such as node-0:29400")
