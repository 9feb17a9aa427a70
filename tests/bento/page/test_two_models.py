"""The page in a real browser with two models side by side: champion and challenger, or two services."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from bento.api import create_app
from bento.serving.shadow import Shadow
from tests.bento.conftest import Service, make_service
from tests.bento.openai_service import CHAT_TEMPLATE
from tests.bento.page.browser import missing, requested, set_viewport
from tests.bento.page.opened import Page, listening

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture
def other() -> Iterator[Service]:
    """A second model with other weights, whose vocabulary is the first one's."""
    made = make_service(seed=1, cors_origins=["*"])
    yield made
    made.opened.set()
    made.engine.stop()


def compare(page: Page, name: str) -> None:
    """Show both models, the second by this name, and generate."""
    page.driver.refresh()
    page.wait(lambda: name in page.text("compare-hint"))
    page.fill(prompt="def main", max_tokens="6", temperature="0")
    page["compare"].click()
    page.allow(300)
    page["generate"].click()
    page.wait(lambda: not page.is_busy and page.text("tokens") == page.text("tokens-2") == "6")


def greedy(service: Service) -> str:
    body = {"prompt": "def main", "max_tokens": 6, "temperature": 0}
    return str(TestClient(service.app).post("/v1/completions", json=body).json()["choices"][0]["text"])


def test_champion_and_challenger_answer_side_by_side(page, other):
    assert not page["compare"].is_enabled() and not page["result-2"].is_displayed()
    models = page.service.app.state.models
    models.shadow = Shadow(0.0, 60)
    models.shadow.serve(other.engine, "7")
    try:
        compare(page, "rex-tiny@challenger")
    finally:
        models.shadow = None
    assert [page.text("result-title"), page.text("result-title-2")] == ["rex-tiny:1", "rex-tiny@challenger"]
    page.allow(100)
    texts = [greedy(page.service), greedy(other)]
    assert [page.text("generated"), page.text("generated-2")] == texts and texts[0] != texts[1]
    left, right = page["output"].rect, page["output-2"].rect
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert "compare=true" in page.driver.current_url and page.complaints == []
    set_viewport(page.driver, 390, 700, phone=True)
    above, below = page["output"].rect, page["output-2"].rect
    assert below["y"] > above["y"] and below["x"] == above["x"]


def test_a_second_service_answers_too_and_each_error_names_its_service(page, other):
    page.allow(100)
    with listening(other.app) as second:
        app = create_app(model_name="rex-tiny:1", request_timeout_s=60, max_body_bytes=4096, compare_with=second)
        app.state.models.serve(page.service.engine)
        with listening(app) as address:
            both = replace(page, address=address)
            both.open()
            other.app.state.models.name = "other:2"
            compare(both, "other:2")
            assert both.text("generated-2") == greedy(other) and both.complaints == []
            hosts = {one.removeprefix(second).removeprefix(address) for one in requested(both.driver)}
            assert not [one for one in hosts if "//" in one]
            other.app.state.models.name = "renamed:3"
            both["generate"].click()
            both.wait(lambda: both["error"].is_displayed())
            assert both.text("error").startswith("other:2: model 'other:2' is not served")
            assert both.text("status").startswith("As many") and both.text("status-2") == "Failed."
            both.driver.get("about:blank")  # no connection of the browser keeps the servers


def test_each_of_two_models_has_its_own_conversation(page, other, monkeypatch):
    models = page.service.app.state.models
    for engine in (page.service.engine, other.engine):
        monkeypatch.setattr(engine.tokenizer, "chat_template", CHAT_TEMPLATE)
    models.shadow = Shadow(0.0, 60)
    models.shadow.serve(other.engine, "7")
    try:
        page.driver.refresh()
        page.wait(lambda: "challenger" in page.text("compare-hint"))
        page.fill(max_tokens="3", temperature="0")
        page["compare"].click()
        page.allow(300)
        said: list[list[str]] = []
        for turn in ("first", "second"):
            page.fill(prompt=turn)
            page["generate"].click()
            page.wait(lambda: not page.is_busy and not page["prompt"].get_property("value"))
            said.append([page.text("generated"), page.text("generated-2")])
    finally:
        models.shadow = None
    for at, suffix in enumerate(("", "-2")):
        given = page.text(f"given{suffix}")
        assert given == f"You: first\n\nModel: {said[0][at]}\n\nYou: second\n\nModel: "
