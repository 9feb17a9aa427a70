"""The address of a file's `service` on a real port."""

from collections.abc import Iterator

import pytest

from bento.http.protocol import ConnectionLimits
from tests.bento.http.wire import host_and_port
from tests.bento.openai_service import Service, on_a_port

LIMITS = ConnectionLimits(receive_timeout_s=1.0, keep_alive_s=60.0, max_connections=1000)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[tuple[str, int]]:
    with on_a_port(service.app, LIMITS) as url:
        yield host_and_port(url)
