"""The OpenAPI document is complete and true: its examples work, and it describes every answer."""

import re
from collections.abc import Callable

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from starlette.testclient import TestClient

from bento.api import create_app
from tests.bento.openai_service import CHAT_TEMPLATE, GOOD, MODEL, running_service

GENERATING = ["/v1/completions", "/v1/chat/completions", "/generate", "/generate_text", "/generate_text_without_prompt"]


@pytest.fixture(scope="module")
def service():
    with running_service(chat_template=CHAT_TEMPLATE) as running:
        yield running


@pytest.fixture(scope="module")
def document(service):
    return TestClient(service.app).get("/openapi.json").json()


# Tests are collected for each route before there is an engine: the document needs none.
APP = create_app(model_name=MODEL, request_timeout_s=60, max_body_bytes=2**20)
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


def keeps_to_the_document(method: str, path: str) -> Callable:
    """A test of one operation: no request that the document allows or forbids breaks the server."""

    @(pytest.mark.slow if path == "/v1/chat/completions" else pytest.mark.medium)
    @schema.include(method=method, path=path).parametrize()
    @settings(
        max_examples=12,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def test(case, service):
        APP.state.models.serve(service.engine)
        # Content may be refused for more than a schema can say (a prompt that does not fit), so a 400 is always right.
        answer = case.call_and_validate(
            excluded_checks=[schemathesis.checks.positive_data_acceptance, schemathesis.checks.unsupported_method]
        )
        assert answer.status_code < 500

    return test


# Schemathesis gives the tests of all operations one name, under which pytest-xdist would run one of them.
OPERATIONS = [found.ok() for found in schema.get_all_operations()]
for _operation in OPERATIONS:
    _name = f"test_{_operation.method}{re.sub(r'[^a-z0-9]+', '_', _operation.path)}_keeps_to_the_document"
    globals()[_name] = keeps_to_the_document(_operation.method, _operation.path)


def test_the_operations_of_the_document_have_tests(document):
    described = {(method, path) for path, operations in document["paths"].items() for method in operations}
    assert {(operation.method, operation.path) for operation in OPERATIONS} == described != set()


def test_every_answer_of_every_route_has_a_body_in_the_document(document):
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                assert response["description"] and "schema" in response["content"]["application/json"], (path, status)
                if status != "200":
                    reference = response["content"]["application/json"]["schema"]["$ref"]
                    assert reference == "#/components/schemas/ErrorResponse"


def test_routes_name_every_status_that_they_can_answer(document):
    common = {"200", "400", "401", "413", "500", "503"}
    for path in GENERATING:
        expected = common | {"429", "504"} | ({"404"} if path.startswith("/v1") else set())
        assert set(document["paths"][path]["post"]["responses"]) == expected, path
    for path in ("/tokenize", "/detokenize"):
        assert set(document["paths"][path]["post"]["responses"]) == common | {"404"}
    assert set(document["paths"]["/v1/models"]["get"]["responses"]) == {"200", "401", "500"}
    assert set(document["paths"]["/v1/models/{model}"]["get"]["responses"]) == {"200", "401", "404", "500"}


def test_routes_that_stream_say_so(document):
    for path in ("/v1/completions", "/v1/chat/completions", "/generate"):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
        assert "[DONE]" in content["text/event-stream"]["example"]


def test_every_field_of_a_request_is_described(document):
    for name, described in document["components"]["schemas"].items():
        if name.endswith("Request"):
            for field, about in described["properties"].items():
                assert about.get("description"), (name, field)


def test_a_request_made_of_the_examples_alone_works(document, service):
    for path, operations in document["paths"].items():
        if "post" in operations:
            reference = operations["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            fields = document["components"]["schemas"][reference.rsplit("/", 1)[1]]["properties"]
            body = {name: about["examples"][0] for name, about in fields.items() if "examples" in about}
            assert body
            answer = service.post(path, **body)
            assert answer.status_code == 200, (path, body, answer.text)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/detokenize"])
def test_answers_match_the_openapi_document(document, service, path):
    more = {"/v1/completions": {"logprobs": 2, "echo": True, "return_token_ids": True, "n": 2}}
    more["/v1/chat/completions"] = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "n": 2}
    for body in (GOOD[path], {**GOOD[path], **more.get(path, {})}):
        reference = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        described = {**reference, "components": document["components"]}
        jsonschema_rs.validate(described, service.post(path, **body).json())


def test_the_pages_for_people_are_served(service):
    assert TestClient(service.app).get("/docs").status_code == 200
