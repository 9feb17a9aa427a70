"""Where the work of a stage runs (`configs/compute/`); it decides nothing of what a stage makes."""

from dataclasses import dataclass
from typing import Literal

from model.settings.option import Settings, expect, option


@dataclass
class ComputeSettings(Settings, group="compute"):
    """Where the work of a stage runs (`configs/compute/`): results are the same up to the rounding of sums."""

    engine: Literal["local", "torchrun"] = option(
        "local", "local: in the step's own process; torchrun: training in `processes` on each of `nodes` hosts."
    )
    processes: int = option(
        1,
        "Training processes on each host, one for each GPU; they share out the batch of one process.",
        unit="processes",
        above=0,
        maximum=4096,
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
                expect(value == 1, f"compute.{name}", value, "1 for compute.engine 'local'; choose compute=torchrun")
        host, _, port = self.endpoint.rpartition(":")
        ok = not self.endpoint or (bool(host) and port.isdigit() and 0 < int(port) < 65_536)
        expect(ok, "compute.endpoint", self.endpoint, "HOST:PORT, such as node-0:29400")
