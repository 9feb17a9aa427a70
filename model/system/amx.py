"""Permission to use the tile registers of Intel's AMX, which Linux gives a process that asks.

Run in vLLM's environment as well, so nothing but torch is imported.
"""

import torch


def allow_amx() -> None:
    """Ask for the registers, where torch can: without, the first instruction that uses them ends the process by SIGILL.

    vLLM's attention in bfloat16 uses them and does not ask.
    """
    if hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()
