"""Keeps stored links alive when Dagster's or MLflow's page has moved to another port.

The links between both pages are stored with runs and name the address of their day. Each run records the local
addresses that it writes into links (`remember`), in `var/page-addresses`; `make ui` redirects the former ones to the
current page (`redirect_former`). A browser keeps a link's fragment, such as `#/experiments/1`, through a redirect.

A redirect must not keep a page from its port: the `make ui` of another checkout takes it back (`release`), and so does
`curl -X RELEASE http://127.0.0.1:5000` for other programs.
"""

import http.client
import threading
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from llm_assets.paths import var_dir

DAGSTER, MLFLOW = "dagster", "mlflow"
LOCAL = ("127.0.0.1", "localhost")
RELEASE_S = 5.0
"""How long a redirect may take to close its port."""


def remember(page: str, address: str) -> None:
    """Record that links name this address of a page, if it is this machine's; an error of the disk is ignored."""
    line = f"{page} {address}"
    with suppress(OSError):
        if urlsplit(address).hostname in LOCAL and line not in _lines():
            _file().parent.mkdir(parents=True, exist_ok=True)
            with _file().open("a") as file:  # steps of several runs append at once
                file.write(line + "\n")


def redirect_former(current: Mapping[str, str]) -> list[ThreadingHTTPServer]:
    """Redirect each recorded address of a page to its current one, in threads; a port that is in use is left alone.

    current: the address of each page.
    """
    taken = {urlsplit(address).port for address in current.values()}
    servers = []
    for line in _lines():
        page, _, address = line.partition(" ")
        port = _port(address)
        if page in current and port and port not in taken:
            taken.add(port)
            with suppress(OSError):
                server = ThreadingHTTPServer((LOCAL[0], port), _redirecting(current[page]))
                threading.Thread(target=server.serve_forever, name=f"redirect {port}", daemon=True).start()
                servers.append(server)
    return servers


def release(port: int) -> bool:
    """Ask what listens at a port to close it; only a redirect knows this request and does. Returns whether it did."""
    connection = http.client.HTTPConnection(LOCAL[0], port, timeout=RELEASE_S)
    with suppress(OSError, http.client.HTTPException):
        connection.request("RELEASE", "/")
        return connection.getresponse().status == HTTPStatus.NO_CONTENT
    return False


def _port(address: str) -> int | None:
    try:
        return urlsplit(address).port
    except ValueError:
        return None


def _redirecting(target: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", target + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_RELEASE(self) -> None:
            self.server.shutdown()
            self.server.server_close()  # before the answer, as the port is free then
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing: the terminal shows two addresses."""

    return Handler


def _file() -> Path:
    return var_dir() / "page-addresses"


def _lines() -> list[str]:
    """The recorded lines, newest first."""
    return _file().read_text(errors="replace").splitlines()[::-1] if _file().is_file() else []
