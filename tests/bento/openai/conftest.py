"""OpenAI's client on a real port, for the `service` of each file."""

from collections.abc import Iterator

import openai
import pytest

from tests.bento.openai_service import IS_VLLM, Service, on_a_port

NOT_OVER_VLLM = {
    "test_embeddings.py": "the engine vllm embeds no text",
    "test_similarity.py": "the engine vllm embeds no text",
    "test_langchain_embeds": "the engine vllm embeds no text",
    "test_texts_of_a_knowledge_base_are_embedded": "the engine vllm embeds no text",
    "test_node_clients.py": "its programs embed texts, which the engine vllm does not",
    "test_lm_eval.py": "its server runs this project's engine",
    "test_gateway.py": "its replicas would share one process of vLLM",
    "test_tokens_may_be_written_with_a_decimal_point": "it embeds tokens as well",
    "test_a_client_that_times_out_has_its_request_cancelled": "it slows a step of this project's engine",
    "test_a_stream_that_is_left_early_is_cancelled": "it slows a step of this project's engine",
    "test_a_failure_in_mid_stream_is_an_api_error_with_its_code": "it breaks a step of this project's engine",
}
"""With REX_TEST_ENGINE=vllm all tests run but these files and tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Over vLLM each test may start a process."""
    for item in items if IS_VLLM else ():
        item.add_marker("processes")
        if reason := NOT_OVER_VLLM.get(item.path.name) or NOT_OVER_VLLM.get(item.name.split("[")[0]):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with on_a_port(service.app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made
