"""OpenAI's client on a real port, for the `service` of each file."""

import os
from collections.abc import Iterator

import openai
import pytest

from tests.bento.openai_service import Service, on_a_port


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Over vLLM each test starts a process."""
    if os.environ.get("REX_TEST_ENGINE") == "vllm":
        for item in items:
            item.add_marker("processes")


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with on_a_port(service.app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made
