"""A link that was stored with a former port leads to the page at its present one."""

import socket
import threading
import urllib.error
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llm_assets.page_links import DAGSTER, MLFLOW, redirect_former, release, remember
from llm_assets.ui import usable_port
from tests.e2e.workplace import free_port

Pipeline = Any  # conftest's


class NotFollowed(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def location(url: str) -> str:
    """Where an address redirects to."""
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.build_opener(NotFollowed).open(url, timeout=10)
    assert answer.value.code == 302
    return str(answer.value.headers["Location"])


def test_the_links_of_a_run_lead_to_the_pages_after_both_have_moved(
    pipeline: Pipeline, var: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dagster, mlflow = free_port(), free_port()
    monkeypatch.setenv("LLM_ASSETS_DAGSTER_URL", f"http://127.0.0.1:{dagster}")
    monkeypatch.setenv("MLFLOW_UI_URL", f"http://localhost:{mlflow}")
    assert pipeline.run().success
    now = {DAGSTER: "http://127.0.0.1:1", MLFLOW: "http://127.0.0.1:2"}
    servers = redirect_former(now)
    try:
        assert location(f"http://127.0.0.1:{dagster}/runs/1?a=b") == "http://127.0.0.1:1/runs/1?a=b"
        assert location(f"http://localhost:{mlflow}/") == "http://127.0.0.1:2/"
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
    assert len((var / "page-addresses").read_text().splitlines()) == 2


def test_current_ports_foreign_hosts_and_ports_in_use_are_left_alone(var: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        for address in (
            f"http://127.0.0.1:{used.getsockname()[1]}",
            "http://mlflow.example.org:81",
            "http://127.0.0.1:7",
        ):
            remember(MLFLOW, address)
        assert redirect_former({MLFLOW: "http://127.0.0.1:7", DAGSTER: "http://127.0.0.1:8"}) == []
    assert "example.org" not in (var / "page-addresses").read_text()


def test_a_redirect_gives_way_to_the_page_of_another_checkout_and_no_other_server_does(var: Path) -> None:
    port = free_port()
    remember(MLFLOW, f"http://127.0.0.1:{port}")
    (redirect,) = redirect_former({MLFLOW: "http://127.0.0.1:1"})
    try:
        assert location(f"http://127.0.0.1:{port}/") == "http://127.0.0.1:1/"
        assert usable_port("127.0.0.1", str(port), "MLflow", "MLFLOW_PORT") == port
        with socket.create_server(("127.0.0.1", port)):
            pass
    finally:
        redirect.server_close()
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as foreign:
        threading.Thread(target=foreign.serve_forever, daemon=True).start()
        assert not release(foreign.server_address[1])
        foreign.shutdown()


def test_a_damaged_record_is_passed_over(var: Path) -> None:
    var.mkdir()
    (var / "page-addresses").write_bytes(b"\xff\nmlflow\nmlflow http://127.0.0.1:port\nother http://127.0.0.1:9\n")
    assert redirect_former({MLFLOW: "http://127.0.0.1:7"}) == []
