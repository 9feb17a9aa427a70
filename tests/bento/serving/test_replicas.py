"""Two replicas behind a gateway follow one champion: real servers, a real registry, requests that never stop coming."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.bento.openai.clients.test_gateway import running_gateway
from tests.bento.running_service import Server, serve
from tests.bento.serving.registry import Registered, mlflow_server, save_version
from tests.bento.serving.test_champion import NAME, Load
from tests.bento.test_lifecycle import wait_until


def version(server: Server) -> str:
    return httpx.get(f"{server.url}/v1/models").json()["data"][0]["version"]


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[tuple[Registered, str]]:
    with mlflow_server(tmp_path) as uri:
        yield Registered(uri, NAME), uri


@pytest.mark.e2e
def test_a_promotion_over_replicas_under_load_fails_no_request(registered: tuple[Registered, str], tmp_path: Path):
    models, uri = registered
    directories = [tmp_path / "first", tmp_path / "second"]
    first, second = (
        save_version(directory, seed=seed, vocab_size=size)
        for seed, (directory, size) in enumerate(zip(directories, (280, 270), strict=True))
    )
    models.promote(directories[0])
    champion = {"REX_CHAMPION": NAME, "MLFLOW_TRACKING_URI": uri, "REX_CHAMPION_POLL_S": "0.2"}
    with ExitStack() as stack:
        replicas = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            replicas.append(stack.enter_context(serve(tmp_path / name, None, **champion)))
        urls = [replica.url for replica in replicas]
        loads = []
        for policy in ("round_robin", "cache_aware"):
            url = stack.enter_context(running_gateway("smg", urls, tmp_path / f"{policy}.log", policy))
            loads.append(stack.enter_context(Load(url)))
        for load in loads:
            wait_until(lambda load=load: load.answers[200, first] > 5)
        assert models.promote(directories[1]) == "2"
        wait_until(lambda: [version(replica) for replica in replicas] == ["2", "2"])
        for load in loads:
            wait_until(lambda load=load: load.answers[200, second] > 5)
            load.is_over = True
        assert all(replica.metrics()["rex_generation_tokens_total"] > 0 for replica in replicas)
    for load in loads:
        assert set(load.answers) == {(200, first), (200, second)}
