"""The generation service for BentoML.

    bentoml serve NAME:VERSION                                              a Bento of the BentoML store
    REX_MODEL=/path/to/model bentoml serve bento.service:RexService         from the source, in the repository
    bentoml build bento.service:RexService --name N --version V --arg model=TAG --arg device=cpu -o tag

The options are the fields of `bento.options.BentoArgs`; a variable REX_<NAME> overrides each when the service starts.
API keys: `bento/http/auth.py`. A failing start (a missing device, model or file, an open address without a key) ends
with one line and exit status 1. SIGTERM drains: `bento/serving/admission.py`. The module has effects at import because
BentoML builds a service from decorators; `bentoml_internals.py` has the internals it needs.
"""

import asyncio
import gc
import logging
import os
import threading
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml
from bentoml.exceptions import BentoMLException
from bentoml.models import BentoModel
from starlette.types import ASGIApp, Receive, Scope, Send

from bento.api import MAX_CHOICES, create_app
from bento.bentoml_internals import end_service, listening_host, report_start_failures, uvicorn_server
from bento.errors import without_route
from bento.http.auth import HEALTH_PATHS, read_api_keys, refuse_open_address
from bento.http.descriptors import usable_connections
from bento.http.middleware import as_routed
from bento.http.protocol import ConnectionLimits, protocol_class
from bento.options import (
    BentoArgs,
    describe_variables,
    find_model,
    is_path,
    origins,
    refuse_for_vllm,
    refuse_without_champion,
    second_service,
    with_overrides,
)
from bento.serving.admission import drain_on_signal
from bento.serving.champion import ChampionWatcher, ModelRegistry
from bento.serving.loading import release_load_memory, start_engine
from bento.serving.models import Models
from bento.serving.shadow import ChallengerWatcher, Rollback, Shadow
from bento.telemetry.tracing import start_tracing
from model.artifact import read_origin
from model.errors import PipelineError
from model.generation.queue import usual_requests

if TYPE_CHECKING:
    from model.generation.engine import Engine

logger = logging.getLogger("bentoml.service")
PACKAGES = (
    "fastapi",
    "httptools",
    "llguidance",
    "numpy",
    "orjson",
    "prometheus-client",
    "safetensors",
    "tiktoken",
    "tokenizers",
    "transformers",
    "uvloop",
)
OPTIONAL_PACKAGES = ("opentelemetry-exporter-otlp-proto-http",)
PYTORCH = "2.13.0"


def is_installed(package: str) -> bool:
    """Whether this environment has an optional package, which the image then gets too."""
    with suppress(PackageNotFoundError):
        return bool(version(package))
    return package not in OPTIONAL_PACKAGES


args = bentoml.use_arguments(BentoArgs)
# Checked at import, so that `bentoml serve` and `bentoml build` end with one line: later, BentoML would look for a
# missing model in its cloud.
packed_model = None if not args.model or is_path(args.model) else str(BentoModel(args.model).tag)
packed_draft = None if not args.draft or is_path(args.draft) else str(BentoModel(args.draft).tag)
for packed in filter(None, (packed_model, packed_draft)):
    find_model(packed)
options = with_overrides(args)
refuse_without_champion(options)
refuse_for_vllm(options)
# With REX_CHAMPION, a packed model serves only until the first champion is loaded.
MODEL_DIR = find_model(options.model) if options.model or not options.champion else None
DRAFT_DIR = find_model(options.draft) if options.draft else None
REGISTRY = ModelRegistry(os.environ.get("MLFLOW_TRACKING_URI", "")) if options.champion else None
API_KEYS = read_api_keys()

MODEL_NAME = options.champion or (MODEL_DIR.name if MODEL_DIR and is_path(options.model) else options.model)
SERVED_NAMES = [name.strip() for name in options.served_model_name.split(",") if name.strip()]

# vLLM has a separate environment (vllm-gpu.txt); the service then only converts the weights.
computes_on_gpu = args.device == "cuda" and args.engine != "vllm"
# distro "": the default adds compilers and git, which wheels do not need. Versions are those of this environment.
image = bentoml.images.Image(
    base_image="python:3.11-slim", distro="", python_version="3.11", lock_python_packages=False
).python_packages(
    # PyPI's wheel is the CUDA build; the CPU build has its own index, which uv finds by UV_TORCH_BACKEND.
    f"torch=={PYTORCH}" if computes_on_gpu else f"torch=={PYTORCH}+cpu",
    *(f"{name}=={version(name)}" for name in (*PACKAGES, *OPTIONAL_PACKAGES) if is_installed(name)),
)
IMAGE_VARIABLES = {
    "BENTOML_DO_NOT_TRACK": "True",
    "HF_HUB_OFFLINE": "1",
    **({} if computes_on_gpu else {"UV_TORCH_BACKEND": "cpu"}),
}

app = create_app(
    model_name=(SERVED_NAMES or [MODEL_NAME])[0],
    aliases=[*SERVED_NAMES[1:], *([MODEL_NAME] if SERVED_NAMES else [])],
    request_timeout_s=options.request_timeout_s,
    max_body_bytes=options.max_body_bytes,
    queue_timeout_s=options.queue_timeout_s,
    receive_timeout_s=options.receive_timeout_s,
    clamp_max_tokens=options.clamp_max_tokens,
    max_choices=min(MAX_CHOICES, options.max_queue + (options.max_batch_size or usual_requests(options.device))),
    api_keys=API_KEYS,
    cors_origins=origins(options.cors_origins),
    compare_with=second_service(options.compare_with),
)
app.state.tracer = None


class OnlyOurRoutes:
    """Routes every path but health to our app, with its keys: BentoML's own pages check no key. It answers health
    under the exact path only.
    """

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        routed = as_routed(scope)
        if routed["path"] not in HEALTH_PATHS:
            await app(scope, receive, send)
        elif routed["method"] == "GET":
            await self._inner({**scope, "path": routed["path"]}, receive, send)
        else:
            refusal = without_route(routed["method"], routed["path"], 405, {"Allow": "GET, HEAD"})
            await refusal.response()(scope, receive, send)


@bentoml.service(
    image=image,
    envs=[{"name": name, "value": value} for name, value in IMAGE_VARIABLES.items()],
    description="# REX text generation\n\nOpen `/docs` for the routes. Variables read at start:\n\n"
    f"{describe_variables()}\n",
    workers=1,  # a second worker would compete for the cores and duplicate the weights
    # BentoML's default is every address. In a container the published ports decide which clients can connect.
    http={"host": "0.0.0.0" if "BENTOML_CONTAINERIZED" in os.environ else "127.0.0.1"},
    # BentoML's timeout ends at the first byte; the engine enforces the deadline of the whole answer.
    traffic={"timeout": options.request_timeout_s + 30},
    metrics={"enabled": False},  # BentoML uses each requested path as a label; telemetry/metrics.py has ours
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": ".*"},  # one span per chunk of a stream; ours: telemetry/tracing.py
)
@bentoml.asgi_app(app)
class RexService:
    """Continues text with a REX language model."""

    if packed_model:
        model = BentoModel(packed_model)
    if packed_draft:
        draft = BentoModel(packed_draft)

    def __init__(self) -> None:
        self._watchers: list[ChampionWatcher | ChallengerWatcher] = []
        try:
            refuse_open_address(listening_host(), API_KEYS, allow_anonymous=options.allow_anonymous)
            app.state.tracer = start_tracing()
        except BentoMLException as error:
            app.state.admission.has_failed = True
            _end_service(str(error))
            return
        # In a thread, so that /livez and /readyz answer while the model loads.
        threading.Thread(target=self._load, name="model-loading", daemon=True).start()

    @bentoml.on_deployment
    @staticmethod
    def watch_for_failure() -> None:
        """In the parent process, before the worker starts."""
        report_start_failures()

    @bentoml.on_startup
    async def configure_server(self) -> None:
        """In the server's event loop, before the first connection: set the protocol and the SIGTERM handler."""
        if server := uvicorn_server():
            server.config.http_protocol_class = protocol_class(  # type: ignore[assignment]
                ConnectionLimits(
                    receive_timeout_s=min(options.receive_timeout_s, options.request_timeout_s),
                    keep_alive_s=options.keep_alive_s,
                    max_connections=usable_connections(options.max_connections),
                )
            )

        async def cancel() -> None:
            await asyncio.to_thread(app.state.models.stop)

        drain_on_signal(app.state.admission, options.drain_timeout_s, cancel)

    @bentoml.on_shutdown
    def stop(self) -> None:
        """End the engines' threads and flush the last spans."""
        for watcher in self._watchers:
            watcher.stop()
        app.state.models.stop()
        if app.state.tracer:
            app.state.tracer.stop()

    async def __is_ready__(self) -> bool:
        """/readyz: whether the model has generated a token and new requests are accepted."""
        served = app.state.models.current
        return served is not None and served.engine.is_ready and not app.state.admission.is_draining

    async def __is_alive__(self) -> bool:
        """/livez: whether the engine runs, starts or restarts. False is final."""
        served = app.state.models.current
        return not app.state.admission.has_failed and (served is None or served.engine.is_alive)

    def _load(self) -> None:
        gc.disable()  # garbage collection takes a sixth of the time of the imports
        try:
            if MODEL_DIR:
                engine = start_engine(options, MODEL_DIR, DRAFT_DIR)
                release_load_memory()
                app.state.models.serve(engine, _packed_version(), read_origin(MODEL_DIR))
                logger.info("API keys: %d", len(API_KEYS))
        except Exception as error:
            app.state.admission.has_failed = True
            if not isinstance(error, PipelineError):
                logger.exception("loading the model failed")
            _end_service(str(error) or type(error).__name__)
            return
        finally:
            gc.enable()
        app.openapi()  # building it at the first request would block the event loop for 0.2 s
        if REGISTRY:
            self._watchers = _watch(REGISTRY)
            for watcher in self._watchers:
                watcher.start()


RexService.add_asgi_middleware(OnlyOurRoutes)  # type: ignore[attr-defined]


def _watch(registry: ModelRegistry) -> list[ChampionWatcher | ChallengerWatcher]:
    """A watcher that loads each champion with the options of a packed model, and one for challengers if a shadow phase
    is configured.
    """

    def load(model_dir: Path, version: str) -> "Engine":
        return start_engine(options.model_copy(update={"model": f"{options.champion}/{version}"}), model_dir, DRAFT_DIR)

    def wait(reason: str) -> None:
        app.state.admission.waits_for = reason

    models: Models = app.state.models
    if options.rollback_window_s:
        models.rollback = Rollback(
            registry,
            options.champion,
            window_s=options.rollback_window_s,
            max_error_rate=options.rollback_max_error_rate,
            max_slowdown=options.rollback_max_slowdown,
            min_generations=options.rollback_min_generations,
        )
    champion = ChampionWatcher(
        registry,
        options.champion,
        models,
        load=load,
        after_release=release_load_memory,
        on_wait=wait,
        poll_s=options.champion_poll_s,
        drain_s=options.request_timeout_s + options.drain_timeout_s,
        rollback=models.rollback,
    )
    if not options.shadow_share:
        return [champion]
    models.shadow = Shadow(options.shadow_share, options.shadow_window_s)
    return [
        champion,
        ChallengerWatcher(
            registry,
            options.champion,
            models.shadow,
            load=load,
            poll_s=options.champion_poll_s,
            report_s=options.shadow_window_s,
        ),
    ]


def _packed_version() -> str | None:
    return None if is_path(options.model) else options.model.partition(":")[2]


def _end_service(reason: str) -> None:
    """End the whole service with `reason`; under a server other than BentoML's, log it."""
    reason = " ".join(reason.split())
    if not end_service(reason):
        logger.error("cannot serve: %s", reason)
