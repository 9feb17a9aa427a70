"""Serves the champion of a registered model: a watcher follows its alias in MLflow.

A thread polls the tracking server for the version with the alias `champion`. A new champion is downloaded from the
server, verified against its manifest, loaded and warmed up beside the served model. Then new requests go to it; the
former model finishes its requests and is freed. So at most two models are in memory. An error is logged in one line and
leaves the served model in place.

A few calls of MLflow's REST API suffice; its client package would take more memory than the model.
"""

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from bentoml.exceptions import InvalidArgument

from bento.serving.models import Models, Served
from model.artifact import MANIFEST, read_origin, verify
from model.errors import PipelineError

if TYPE_CHECKING:
    import httpx

    from model.generation.engine import Engine

logger = logging.getLogger("bentoml.champion")  # BentoML's log configuration shows loggers below `bentoml`
ALIAS = "champion"
DECIDED, HISTORY, DECISION = "champion_decided", "champion_history", "champion_decision"
"""Tags of the registered model and of its versions, as `llm_assets/versions/promotion.py` has them."""
HISTORY_ENTRIES, MAX_REASON_LENGTH = 16, 160
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's error codes for a model that is not registered, and for one without the alias."""
TIMEOUT_S = 30.0
IDLE_CHECK_S = 0.1


@dataclass(frozen=True)
class Version:
    """One version of a registered model. source: where its files are, a URI of the tracking server's."""

    number: str
    source: str


class ModelRegistry:
    """A tracking server's registered models, over its REST API.

    uri: http or https. MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, are sent if
    set, as MLflow's own client does. Raises InvalidArgument, one line, for another URI.
    """

    def __init__(self, uri: str, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        if urlsplit(uri).scheme not in ("http", "https"):
            raise InvalidArgument(
                f"MLFLOW_TRACKING_URI is {uri!r}: expected http://HOST:PORT of an MLflow server, which REX_CHAMPION "
                "follows"
            )
        self._uri = uri.rstrip("/")
        self._user = environment.get("MLFLOW_TRACKING_USERNAME", "")
        self._password = environment.get("MLFLOW_TRACKING_PASSWORD", "")
        self._token = environment.get("MLFLOW_TRACKING_TOKEN", "")

    def champion(self, name: str) -> Version | None:
        """The champion; None if there is none. Raises httpx.HTTPError, PipelineError."""
        return self.find(name, ALIAS)

    def find(self, name: str, alias: str) -> Version | None:
        """The version with an alias; None if there is none. Raises httpx.HTTPError, PipelineError."""
        answer = self._client.get("/api/2.0/mlflow/registered-models/alias", params={"name": name, "alias": alias})
        if _error_code(answer) in NOT_THERE:
            return None
        answer.raise_for_status()
        found = answer.json()["model_version"]
        return Version(str(found["version"]), str(found.get("source", "")))

    def roll_back(self, name: str, withdrawn: Version, to: Version, reason: str) -> bool:
        """Make `to` champion in place of `withdrawn`, and record the decision as the pipeline records its own: in tags
        of both versions and in the model's history of champions. False if another version is champion by now.

        Raises httpx.HTTPError.
        """
        if self.champion(name) != withdrawn:
            return False
        model = self._client.get("/api/2.0/mlflow/registered-models/get", params={"name": name})
        model.raise_for_status()
        tags = {tag["key"]: tag["value"] for tag in model.json()["registered_model"].get("tags", [])}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"version": to.number, "at": now, "reason": f"rolled back by the service: {reason}"[:MAX_REASON_LENGTH]}
        history = json.dumps([*json.loads(tags.get(HISTORY, "[]")), entry][-HISTORY_ENTRIES:])
        decisions = {withdrawn.number: f"withdrawn by the service: {reason}", to.number: f"champion again: {reason}"}
        for number, decision in decisions.items():
            self._set("model-versions/set-tag", name=name, version=number, key=DECISION, value=decision)
        # The decision first, as in the pipeline: an alias that differs from it counts as set by hand.
        self._set("registered-models/set-tag", name=name, key=DECIDED, value=to.number)
        self._set("registered-models/alias", name=name, alias=ALIAS, version=to.number)
        self._set("registered-models/set-tag", name=name, key=HISTORY, value=history)
        return True

    def _set(self, path: str, **fields: str) -> None:
        self._client.post(f"/api/2.0/mlflow/{path}", json=fields).raise_for_status()

    def download(self, name: str, version: Version, folder: Path) -> Path:
        """Download the files of a version of `name` to a new directory below `folder` and verify them against its
        manifest. The server reads them, wherever it keeps them, so that this machine need not reach that place.

        Raises httpx.HTTPError if the server does not answer, PipelineError for missing or altered files.
        """
        incoming = Path(tempfile.mkdtemp(prefix="incoming-", dir=folder))
        self._fetch(name, version, MANIFEST, incoming)
        for file in _listed(incoming / MANIFEST):
            self._fetch(name, version, file, incoming)
        verify(incoming)
        return incoming.rename(folder / version.number)

    @cached_property
    def _client(self) -> "httpx.Client":
        import httpx  # only imported if a champion is watched

        return httpx.Client(
            base_url=self._uri,
            timeout=TIMEOUT_S,
            follow_redirects=True,
            auth=(self._user, self._password) if self._user else None,
            headers={"Authorization": f"Bearer {self._token}"} if self._token and not self._user else None,
        )

    def _fetch(self, name: str, version: Version, path: str, folder: Path) -> None:
        asked = {"name": name, "version": version.number, "path": path}
        with self._client.stream("GET", "/model-versions/get-artifact", params=asked) as answer:
            if answer.status_code == 404:
                raise PipelineError(
                    f"the tracking server does not find {path} of it at {version.source}: register the version again"
                )
            answer.raise_for_status()
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for chunk in answer.iter_bytes():
                    file.write(chunk)


def _listed(manifest: Path) -> list[str]:
    """The files that a manifest lists. Raises PipelineError if it is invalid, or would write outside its folder."""
    try:
        names = list(json.loads(manifest.read_text())["files"])
    except (ValueError, KeyError, TypeError):
        raise PipelineError(f"its {MANIFEST} is not one: register the version again") from None
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise PipelineError(f"its {MANIFEST} lists {name!r}, which is outside the model's folder")
    return names


def _error_code(answer: "httpx.Response") -> str:
    try:
        body: Any = answer.json()
    except ValueError:
        return ""
    return str(body.get("error_code", "")) if isinstance(body, dict) else ""


class Trial(Protocol):
    """Observes a new champion."""

    def took_over(self, former: Version | None, new: Version) -> None:
        """A new champion serves from now on."""

    def check(self) -> None:
        """Called at each poll."""


class ChampionWatcher:
    """Keeps the champion of `name` serving, in its own thread.

    load: creates a warmed-up engine from a model directory and a version number. after_release: called
    after memory is freed. on_wait: receives the reason while no model is loaded. poll_s: seconds between polls.
    drain_s: most seconds for a former model's requests, whose own deadlines may end them sooner. rollback: tries each
    new champion, may restore the former one.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        name: str,
        models: Models,
        *,
        load: Callable[[Path, str], "Engine"],
        after_release: Callable[[], None],
        on_wait: Callable[[str], None],
        poll_s: float,
        drain_s: float,
        rollback: "Trial | None" = None,
    ) -> None:
        self._registry, self._name, self._models = registry, name, models
        self._load, self._after_release, self._on_wait = load, after_release, on_wait
        self._poll_s, self._drain_s = poll_s, drain_s
        self._rollback = rollback
        self._refused: Version | None = None
        self._serving: Version | None = None
        self._said = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="champion", daemon=True)

    def start(self) -> None:
        """Start polling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop polling. A model that is still loading will not take over."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._follow()
            self._stopping.wait(self._poll_s)

    def _follow(self) -> None:
        import httpx

        try:
            champion = self._registry.champion(self._name)
            if champion is None:
                self._say(f"there is no {ALIAS} of {self._name!r} yet: waiting for one")
            elif champion not in (self._serving, self._refused):
                self._take_over(champion)
            if self._rollback:
                self._rollback.check()
        except httpx.HTTPError as error:
            self._say(f"the tracking server does not answer ({one_line(error)}): retrying every {self._poll_s:g} s")
        except Exception as error:  # noqa: BLE001 - any failure must leave the served model in place
            self._say(f"the {ALIAS} of {self._name!r} cannot be followed: {one_line(error)}")

    def _take_over(self, champion: Version) -> None:
        import httpx

        started = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="rex-champion-") as folder:
                model_dir = self._registry.download(self._name, champion, Path(folder))
                engine, origin = self._load(model_dir, champion.number), read_origin(model_dir)
        except httpx.HTTPError:
            raise  # the next poll tries again
        except Exception as error:  # noqa: BLE001 - out of memory, for example
            self._refused = champion
            self._say(f"version {champion.number} of {self._name!r} cannot be loaded: {one_line(error)}")
            return
        if self._stopping.is_set():
            engine.stop()
            return
        former = self._models.serve(engine, champion.number, origin)
        if self._rollback:
            self._rollback.took_over(self._serving, champion)
        self._serving, self._refused = champion, None
        self._said = ""
        logger.info("version %s of %r serves, %.1f s after it was found", champion.number, self._name, _since(started))
        if former:
            self._drain(former)
            del former  # the last reference
        self._after_release()

    def _drain(self, former: Served) -> None:
        end = time.monotonic() + self._drain_s
        while former.under_way and time.monotonic() < end and not self._stopping.is_set():
            time.sleep(IDLE_CHECK_S)
        self._models.retire(former)
        logger.info("the former version%s has ended", f" {former.version}" if former.version else "")

    def _say(self, line: str) -> None:
        """Log a line once per occurrence of its reason, and show it to clients while no model is loaded."""
        if self._models.current is None:
            self._on_wait(line)
        if line != self._said:
            self._said = line
            logger.warning("%s", line)


def _since(started: float) -> float:
    return time.monotonic() - started


def one_line(error: BaseException) -> str:
    """An error's text in one line, or its kind."""
    return " ".join(str(error).split()) or type(error).__name__
