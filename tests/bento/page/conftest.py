"""The page, opened again for each test in one browser for each file."""

import threading
from collections.abc import Iterator

import pytest

from tests.bento.conftest import make_service
from tests.bento.page.browser import browser, set_viewport
from tests.bento.page.opened import WAIT_S, Page, listening
from tests.model.generation.engines import StepHook


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Page]:
    service, steps = make_service(), threading.Semaphore(0)

    def step(*_: object) -> None:
        assert steps.acquire(timeout=WAIT_S)

    StepHook(service.engine, before=step)
    try:
        with listening(service.app) as address, browser(tmp_path_factory.mktemp("profile")) as driver:
            yield Page(driver, service, address, steps)
            steps.release(10_000)
    finally:
        service.engine.stop()


@pytest.fixture
def page(served: Page) -> Iterator[Page]:
    set_viewport(served.driver, 1200, 900)
    while served.steps.acquire(blocking=False):
        pass
    served.open()
    yield served
    served.allow(10_000)
    served.wait(lambda: served.is_idle)
