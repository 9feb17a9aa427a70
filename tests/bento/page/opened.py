"""The service's page as tests have it open: in a browser, with the real routes and an engine that steps singly."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI
from selenium.webdriver import Chrome
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.bento.conftest import Service
from tests.bento.page.browser import requested

WAIT_S = 30


@dataclass
class Page:
    """The page in a browser, the service behind it, and a gate that lets the model take single steps."""

    driver: Chrome
    service: Service
    address: str
    steps: threading.Semaphore

    def open(self) -> None:
        self.driver.get(self.address)
        self.driver.execute_script("sessionStorage.clear()")
        requested(self.driver)
        self.driver.get(self.address)

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return str(self[name].get_property("textContent"))

    def fill(self, **fields: str) -> None:
        if self["options"].get_attribute("open") is None:
            self["options"].find_element(By.TAG_NAME, "summary").click()
        for name, value in fields.items():
            self[name].clear()
            self[name].send_keys(value)

    def allow(self, steps: int) -> None:
        self.steps.release(steps)

    def wait(self, condition) -> None:
        WebDriverWait(self.driver, WAIT_S, poll_frequency=0.05).until(lambda _: condition())

    def press(self, *keys: str) -> None:
        *held, last = keys
        actions = ActionChains(self.driver)
        for key in held:
            actions.key_down(key)
        actions.send_keys(last)
        for key in held:
            actions.key_up(key)
        actions.perform()

    @property
    def focused(self) -> str:
        return str(self.driver.switch_to.active_element.get_attribute("id"))

    @property
    def is_idle(self) -> bool:
        """Whether the engine has nothing to do."""
        stats = self.service.engine.stats()
        return stats.running == stats.waiting == 0

    @property
    def is_busy(self) -> bool:
        """Whether the page says that it generates."""
        return self["output"].get_attribute("aria-busy") == "true"

    @property
    def complaints(self) -> list[str]:
        """What the browser's console says of scripts and of the page's policy."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["source"] != "network"]


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The app behind a real server; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
