"""The generation service as BentoML packs and runs it.

    bentoml serve NAME:VERSION                                              a Bento of the BentoML store
    REX_MODEL=/path/to/model bentoml serve bento.service:RexService         from the source, in the repository
    bentoml build bento.service:RexService --name N --version V --arg model=TAG --arg device=cpu -o tag

The options are the fields of `bento.options.BentoArgs`; a variable REX_<NAME> overrides each when the service starts.
API keys: `bento/http/auth.py`. A start that cannot work (a device, a model or a file that is not there, an open address
without a key) ends with one line and exit status 1. SIGTERM drains: `bento/serving/admission.py`.
"""

import asyncio
import atexit
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
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
from bento.http.auth import HEALTH_PATHS, read_api_keys, refuse_open_address
from bento.options import BentoArgs, describe_variables, find_model, is_path, origins, with_overrides
from bento.serving.admission import drain_on_signal
from bento.serving.champion import Follower, Registry
from bento.telemetry.tracing import start_tracing
from model.errors import PipelineError

if TYPE_CHECKING:
    from model.generation.engine import Engine

logger = logging.getLogger("bentoml.service")
FAILURE_FILE = "REX_START_FAILURE_FILE"
PACKAGES = (
    "fastapi",
    "httptools",
    "numpy",
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
    """Whether this environment has an optional package; the image then has it as well."""
    with suppress(PackageNotFoundError):
        return bool(version(package))
    return package not in OPTIONAL_PACKAGES


args = bentoml.use_arguments(BentoArgs)
# Checked here, where `bentoml serve` and `bentoml build` still end with one line: later BentoML looks for a model that
# is not in the store on its cloud.
packed_model = None if not args.model or is_path(args.model) else str(BentoModel(args.model).tag)
if packed_model:
    find_model(packed_model)
options = with_overrides(args)
# With a champion to follow, a packed model only serves until the first one has come.
MODEL_DIR = find_model(options.model) if options.model or not options.champion else None
REGISTRY = Registry(os.environ.get("MLFLOW_TRACKING_URI", "")) if options.champion else None
API_KEYS = read_api_keys()

# distro "": the default adds compilers and git to the image, which wheels never need. Versions are those that run here.
image = bentoml.images.Image(
    base_image="python:3.11-slim", distro="", python_version="3.11", lock_python_packages=False
).python_packages(
    # PyPI's wheel is the CUDA build; the CPU build has its own index, which uv finds by UV_TORCH_BACKEND.
    f"torch=={PYTORCH}" if args.device == "cuda" else f"torch=={PYTORCH}+cpu",
    *(f"{name}=={version(name)}" for name in (*PACKAGES, *OPTIONAL_PACKAGES) if is_installed(name)),
)
IMAGE_VARIABLES = {
    "BENTOML_DO_NOT_TRACK": "True",
    "HF_HUB_OFFLINE": "1",
    **({} if args.device == "cuda" else {"UV_TORCH_BACKEND": "cpu"}),
}

app = create_app(
    model_name=options.champion or (MODEL_DIR.name if MODEL_DIR and is_path(options.model) else options.model),
    request_timeout_s=options.request_timeout_s,
    max_body_bytes=options.max_body_bytes,
    queue_timeout_s=options.queue_timeout_s,
    max_choices=min(MAX_CHOICES, options.max_queue),
    api_keys=API_KEYS,
    cors_origins=origins(options.cors_origins),
)
app.state.tracer = None


class OnlyOurRoutes:
    """Leaves health to BentoML and gives everything else to our app, keys and all: BentoML's own pages know no key."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        is_ours = scope["type"] == "http" and scope["path"] not in HEALTH_PATHS
        await (app if is_ours else self._inner)(scope, receive, send)


@bentoml.service(
    image=image,
    envs=[{"name": name, "value": value} for name, value in IMAGE_VARIABLES.items()],
    description=f"# REX text generation\n\nOpen `/docs` for the routes. Variables read at start:\n\n{describe_variables()}\n",
    workers=1,  # one model, one engine thread: a second worker would take the same cores and hold the weights again
    # BentoML's own default is every address. In a container the host decides which ports others reach.
    http={"host": "0.0.0.0" if "BENTOML_CONTAINERIZED" in os.environ else "127.0.0.1"},
    # BentoML's timeout only covers the time to the first byte; the engine keeps the deadline of the whole answer.
    traffic={"timeout": options.request_timeout_s + 30},
    metrics={"enabled": False},  # labels each path that anybody asks for; /metrics is our own
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": ".*"},  # one span for each chunk of a stream; ours are in bento/telemetry/tracing.py
)
@bentoml.asgi_app(app)
class RexService:
    """Continues text with a REX language model."""

    if packed_model:
        model = BentoModel(packed_model)

    def __init__(self) -> None:
        self._follower: Follower | None = None
        try:
            refuse_open_address(_listening_host(), API_KEYS, allow_anonymous=options.allow_anonymous)
            app.state.tracer = start_tracing()
        except BentoMLException as error:
            app.state.admission.has_failed = True
            _end_service(str(error))
            return
        # In a thread, so that /livez and /readyz answer while a large model loads.
        threading.Thread(target=self._load, name="model-loading", daemon=True).start()

    @bentoml.on_deployment
    @staticmethod
    def watch_for_failure() -> None:
        """In the parent process, before the worker starts: agree on where the worker says why it cannot start.

        BentoML starts a worker that ends again and again; this ends the whole with the reason and exit status 1.
        """
        handle, name = tempfile.mkstemp(prefix="rex-start-")
        os.close(handle)
        os.environ[FAILURE_FILE] = f"{os.getpid()}:{name}"

        def report() -> None:
            reason = Path(name).read_text()
            Path(name).unlink()
            if reason:
                sys.stdout.flush()
                print(f"Error: {reason}", file=sys.stderr, flush=True)
                os._exit(1)

        atexit.register(report)

    @bentoml.on_startup
    async def drain_when_asked(self) -> None:
        """In the server's event loop, before it takes requests: SIGTERM lets running ones finish."""

        async def cancel() -> None:
            await asyncio.to_thread(app.state.models.stop)

        drain_on_signal(app.state.admission, options.drain_timeout_s, cancel)

    @bentoml.on_shutdown
    def stop(self) -> None:
        """End the engines' threads; hand over the last spans."""
        if self._follower:
            self._follower.stop()
        app.state.models.stop()
        if app.state.tracer:
            app.state.tracer.stop()

    async def __is_ready__(self) -> bool:
        """Whether the model has answered and new requests are taken: /readyz."""
        served = app.state.models.current
        return served is not None and served.engine.is_ready and not app.state.admission.is_draining

    async def __is_alive__(self) -> bool:
        """Whether the engine lives or is on its way: /livez. False is final."""
        served = app.state.models.current
        return not app.state.admission.has_failed and (served is None or served.engine.is_alive)

    def _load(self) -> None:
        gc.disable()  # a sixth of the time that importing the libraries takes
        try:
            if MODEL_DIR:
                engine = _start_engine(options, MODEL_DIR)
                _settle()
                app.state.models.serve(engine, _packed_version())
        except Exception as error:
            app.state.admission.has_failed = True
            if not isinstance(error, PipelineError):
                logger.exception("loading the model failed")
            _end_service(str(error) or type(error).__name__)
            return
        finally:
            gc.enable()
        if REGISTRY:
            self._follower = _follow(REGISTRY)
            self._follower.start()


RexService.add_asgi_middleware(OnlyOurRoutes)  # type: ignore[attr-defined]


def _listening_host() -> str:
    """The address of the socket that BentoML gave this worker: command line, configuration and variables all end there.

    Empty where there is none: a test, or another server around the app.
    """
    with suppress(ValueError, IndexError, OSError):
        descriptor = int(sys.argv[sys.argv.index("--fd") + 1])
        with socket.socket(fileno=os.dup(descriptor)) as listening:
            name = listening.getsockname()
            return name[0] if isinstance(name, tuple) else ""
    return ""


def _start_engine(options: BentoArgs, model_dir: Path) -> "Engine":
    """Load the model and let it answer once. Raises PipelineError where device, model or tokenizer are not right."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("model").setLevel(logging.INFO)  # BentoML shows other loggers from WARNING on
    import torch

    from model.generation.engine import Engine
    from model.system.cpu import decoding_threads, usable_cores
    from model.text.tokenizer import load_tokenizer
    from model.weights.int8 import count_parameters
    from model.weights.loading import load_model

    torch.set_num_threads(options.threads or usable_cores())
    quantized = None if options.quantized == "auto" else options.quantized
    dtype = torch.bfloat16 if options.mixed_precision else None
    model = load_model(model_dir, device=options.device, quantized=quantized, dtype=dtype)
    # Before the engine's thread starts: a thread takes the number over once.
    torch.set_num_threads(options.threads or decoding_threads(count_parameters(model), usable_cores()))
    engine = Engine(
        model,
        load_tokenizer(model_dir),
        kv_cache=options.kv_cache,
        max_batch_size=options.max_batch_size,
        kv_cache_mib=options.kv_cache_mib,
        prefill_chunk=options.prefill_chunk,
        max_queue=options.max_queue,
        max_queue_tokens=options.max_queue_tokens,
        step_timeout_s=options.step_timeout_s,
    )
    engine.warm_up()
    logger.info(
        "serving model=%s device=%s step=%s kv_cache=%s quantized=%s mixed_precision=%s threads=%d cache_tokens=%d "
        "api_keys=%d",
        options.model,
        model.device,
        engine.step_name,
        options.kv_cache,
        options.quantized,
        options.mixed_precision,
        torch.get_num_threads(),
        engine.stats().cache_capacity_tokens,
        len(API_KEYS),
    )
    return engine


def _follow(registry: Registry) -> Follower:
    """Let the champion serve from now on, with the options that a packed model has."""

    def load(model_dir: Path, version: str) -> "Engine":
        return _start_engine(options.model_copy(update={"model": f"{options.champion}/{version}"}), model_dir)

    def wait(reason: str) -> None:
        app.state.admission.waits_for = reason

    return Follower(
        registry,
        options.champion,
        app.state.models,
        load=load,
        settle=_settle,
        waits=wait,
        poll_s=options.champion_poll_s,
        drain_s=options.request_timeout_s + options.drain_timeout_s,
    )


def _packed_version() -> str | None:
    return None if is_path(options.model) else options.model.partition(":")[2]


def _settle() -> None:
    """Give back the memory that only loading needed, and let the garbage collector pass over what stays.

    A whole collection looks at the million objects of the imported libraries: 0.2 s in which nobody gets a token.
    """
    gc.unfreeze()  # a former model is among what stayed
    gc.collect()
    gc.freeze()
    from model.system.allocator import trim

    trim()


def _end_service(reason: str) -> None:
    """Say why to the parent process and ask it to end; without one (a test, another server) log it."""
    reason = " ".join(reason.split())
    parent, _, name = os.environ.get(FAILURE_FILE, "").partition(":")
    if parent != str(os.getppid()):
        logger.error("cannot serve: %s", reason)
        return
    Path(name).write_text(reason)
    os.kill(int(parent), signal.SIGTERM)
