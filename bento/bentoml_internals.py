"""The private parts of BentoML and uvicorn that this service uses, all in one place.

Tested with bentoml 1.4.40 and uvicorn 0.54.0. `tests/bento/test_service.py` and `test_lifecycle.py` cover each:

- BentoML hands its worker the listening socket as the option `--fd` of the worker's command line;
- BentoML's worker runs `uvicorn.Server`, whose method `handle_exit` handles SIGTERM, and gives it no other options than
  the keep-alive timeout and the grace period;
- BentoML restarts a worker whenever it ends, so only the parent process can end the service;
- the path of the model store is in `BentoMLContainer`;
- its package contains a copy of Swagger UI.
"""

import atexit
import os
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import uvicorn

FAILURE_FILE = "REX_START_FAILURE_FILE"


def listening_host() -> str:
    """The address of this worker's socket, which reflects BentoML's command line, configuration and variables.

    Empty if there is none: in a test, or under another server.
    """
    with suppress(ValueError, IndexError, OSError):
        descriptor = int(sys.argv[sys.argv.index("--fd") + 1])
        with socket.socket(fileno=os.dup(descriptor)) as listening:
            name = listening.getsockname()
            return name[0] if isinstance(name, tuple) else ""
    return ""


def uvicorn_server() -> uvicorn.Server | None:
    """The server that handles this process's SIGTERM; None if another program runs the app."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if isinstance(server, uvicorn.Server) else None


def model_store() -> str:
    """The folder of BentoML's model store, for messages."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    return str(BentoMLContainer.model_store.get()._path)


def swagger_ui_file(name: str) -> Path:
    """A file of Swagger UI, from BentoML's package."""
    import bentoml._internal.server

    return Path(bentoml._internal.server.__path__[0]) / "static_content" / name


def report_start_failures() -> None:
    """Called in the parent before the worker starts: create a file for the reason of a failed start.

    BentoML would restart such a worker forever. At the parent's exit a reason in the file is printed as one line, with
    status 1.
    """
    handle, name = tempfile.mkstemp(prefix="rex-start-")
    os.close(handle)
    os.environ[FAILURE_FILE] = f"{os.getpid()}:{name}"

    def report() -> None:
        reason = Path(name).read_text()
        Path(name).unlink()
        if reason:
            sys.stdout.flush()
            print(f"Error: {reason}", file=sys.stderr, flush=True)
            os._exit(1)

    atexit.register(report)


def end_service(reason: str) -> bool:
    """In the worker: pass `reason` to the parent process and end it. False if no parent waits for reasons."""
    parent, _, name = os.environ.get(FAILURE_FILE, "").partition(":")
    if parent != str(os.getppid()):
        return False
    Path(name).write_text(reason)
    os.kill(int(parent), signal.SIGTERM)
    return True
