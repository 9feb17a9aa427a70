"""Runs a command of another package once servers answer that it needs; meanwhile it is imported.

    python -m llm_assets.instance.started_after /tmp/code.sock llm_assets.instance.webserver:main --port 3001 ...
    python -m llm_assets.instance.started_after /tmp/code.sock,127.0.0.1:3001 dagster-daemon run ...

`llm_assets/ui.py` starts Dagster's processes this way, all at once: each imports for seconds. `dagster dev` starts them
one after the other, and stays as a further process of 150 MB.
"""

import socket
import sys
import time
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points

WAIT_S, POLL_EVERY_S = 180.0, 0.05


def answers(address: str) -> bool:
    """Whether a server accepts connections at HOST:PORT, or at the path of a Unix socket."""
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        if port.isdigit():
            socket.create_connection((host, int(port)), timeout=1).close()
        else:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(address)
        return True
    return False


def main() -> None:
    """Import the command, by its name or as MODULE:FUNCTION, wait, and run it. Raises TimeoutError after WAIT_S."""
    addresses, name, *options = sys.argv[1:]
    (script,) = entry_points(group="console_scripts", name=name) or [EntryPoint(name, name, "")]
    command = script.load()
    started = time.monotonic()
    for address in addresses.split(","):
        while not answers(address):
            if time.monotonic() - started > WAIT_S:
                raise TimeoutError(f"no answer at {address} within {WAIT_S:.0f} s")
            time.sleep(POLL_EVERY_S)
    sys.argv[:] = [name, *options]
    sys.exit(command())


if __name__ == "__main__":
    main()
