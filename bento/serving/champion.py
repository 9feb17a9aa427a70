"""The champion of a registered model: which version of it serves is decided in MLflow, and this follows.

A thread asks the tracking server now and then which version has the alias `champion`. Another than the one that serves
is downloaded through the server's artifact proxy, checked against its own manifest, loaded and warmed up beside the one
that serves, and only then do new requests get it; the former one finishes what it began, is stopped and freed. So two
models are in memory for that long, and never three. What goes wrong is one line in the log and changes nothing.

Three calls of MLflow's REST API are all that is needed; its client package would take more memory than the model.
"""

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from bentoml.exceptions import InvalidArgument

from bento.serving.models import Models, Served
from model.artifact import MANIFEST, verify
from model.errors import PipelineError

if TYPE_CHECKING:
    import httpx

    from model.generation.engine import Engine

logger = logging.getLogger("bentoml.champion")  # the name decides that the server's log shows it
ALIAS = "champion"
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's errors for a model that nobody registered, and for one without the alias."""
TIMEOUT_S = 30.0
IDLE_CHECK_S = 0.1


@dataclass(frozen=True)
class Version:
    """One version of a registered model. source: where its files are, a URI of the tracking server's."""

    number: str
    source: str


class Registry:
    """A tracking server, asked over its REST API.

    uri: http or https. MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, are sent along
    where set, as MLflow's own client does. Raises InvalidArgument, one line, for another URI.
    """

    def __init__(self, uri: str, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        if urlsplit(uri).scheme not in ("http", "https"):
            raise InvalidArgument(
                f"MLFLOW_TRACKING_URI is {uri!r}: expected http://HOST:PORT of an MLflow server, which REX_CHAMPION follows"
            )
        self._uri = uri.rstrip("/")
        self._user = environment.get("MLFLOW_TRACKING_USERNAME", "")
        self._password = environment.get("MLFLOW_TRACKING_PASSWORD", "")
        self._token = environment.get("MLFLOW_TRACKING_TOKEN", "")

    def champion(self, name: str) -> Version | None:
        """The version with the alias, None where there is none. Raises httpx.HTTPError, PipelineError."""
        answer = self._client.get("/api/2.0/mlflow/registered-models/alias", params={"name": name, "alias": ALIAS})
        if _error_code(answer) in NOT_THERE:
            return None
        answer.raise_for_status()
        found = answer.json()["model_version"]
        return Version(str(found["version"]), str(found.get("source", "")))

    def download(self, version: Version, folder: Path) -> Path:
        """A new directory below `folder` with the version's files, whole and as its manifest says.

        Raises httpx.HTTPError where the server does not answer, PipelineError for files that are not right.
        """
        source = urlsplit(version.source)
        if source.scheme != "mlflow-artifacts":
            raise PipelineError(
                f"its files are at {version.source!r}, which the server does not hand out: expected mlflow-artifacts:/...; "
                "start it with --artifacts-destination"
            )
        root = source.path.strip("/")
        incoming = Path(tempfile.mkdtemp(prefix="incoming-", dir=folder))
        self._fetch(f"{root}/{MANIFEST}", incoming / MANIFEST)
        for name in _listed(incoming / MANIFEST):
            (incoming / name).parent.mkdir(parents=True, exist_ok=True)
            self._fetch(f"{root}/{name}", incoming / name)
        verify(incoming)
        return incoming.rename(folder / version.number)

    @cached_property
    def _client(self) -> "httpx.Client":
        import httpx  # where nothing is followed it costs nothing

        return httpx.Client(
            base_url=self._uri,
            timeout=TIMEOUT_S,
            follow_redirects=True,
            auth=(self._user, self._password) if self._user else None,
            headers={"Authorization": f"Bearer {self._token}"} if self._token and not self._user else None,
        )

    def _fetch(self, path: str, target: Path) -> None:
        with self._client.stream("GET", f"/api/2.0/mlflow-artifacts/artifacts/{quote(path)}") as answer:
            if answer.status_code == 404:
                raise PipelineError(f"the server has no {path}: register the version again")
            answer.raise_for_status()
            with target.open("wb") as file:
                for chunk in answer.iter_bytes():
                    file.write(chunk)


def _listed(manifest: Path) -> list[str]:
    """The files that a manifest lists. Raises PipelineError where it is none, or would write outside its folder."""
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


class Follower:
    """Keeps the champion of `name` serving, in a thread of its own.

    load: an engine, warm, from a model's directory and a version's number. settle: called when memory became free.
    waits: told what is missing while there is no model. poll_s: seconds from one question to the next.
    drain_s: most seconds that a former model has to finish; its requests' own deadlines end them sooner.
    """

    def __init__(
        self,
        registry: Registry,
        name: str,
        models: Models,
        *,
        load: Callable[[Path, str], "Engine"],
        settle: Callable[[], None],
        waits: Callable[[str], None],
        poll_s: float,
        drain_s: float,
    ) -> None:
        self._registry, self._name, self._models = registry, name, models
        self._load, self._settle, self._waits = load, settle, waits
        self._poll_s, self._drain_s = poll_s, drain_s
        self._refused: Version | None = None
        self._serving: Version | None = None
        self._said = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="champion", daemon=True)

    def start(self) -> None:
        """Ask for the first time now."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more. A model that is being loaded does not take over."""
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
        except httpx.HTTPError as error:
            self._say(
                f"the tracking server does not answer ({_one_line(error)}): asking again every {self._poll_s:g} s"
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, what serves goes on
            self._say(f"the {ALIAS} of {self._name!r} cannot be followed: {_one_line(error)}")

    def _take_over(self, champion: Version) -> None:
        import httpx

        started = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="rex-champion-") as folder:
                engine = self._load(self._registry.download(champion, Path(folder)), champion.number)
        except httpx.HTTPError:
            raise  # to be asked again
        except Exception as error:  # noqa: BLE001 - an out of memory, say
            self._refused = champion
            self._say(f"version {champion.number} of {self._name!r} cannot be loaded: {_one_line(error)}")
            return
        if self._stopping.is_set():
            engine.stop()
            return
        former, self._serving, self._refused = self._models.serve(engine, champion.number), champion, None
        self._said = ""
        logger.info("version %s of %r serves, %.1f s after it was found", champion.number, self._name, _since(started))
        if former:
            self._drain(former)
            del former  # the last reference
        self._settle()

    def _drain(self, former: Served) -> None:
        end = time.monotonic() + self._drain_s
        while former.under_way and time.monotonic() < end and not self._stopping.is_set():
            time.sleep(IDLE_CHECK_S)
        self._models.retire(former)
        logger.info("the former version%s has ended", f" {former.version}" if former.version else "")

    def _say(self, line: str) -> None:
        """Log a line once, however often its reason is met; tell it to those who ask while there is no model."""
        if self._models.current is None:
            self._waits(line)
        if line != self._said:
            self._said = line
            logger.warning("%s", line)


def _since(started: float) -> float:
    return time.monotonic() - started


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
