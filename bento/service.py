"""The generation service as BentoML packs and runs it.

    bentoml serve NAME:VERSION                                              a Bento of the BentoML store
    REX_MODEL=/path/to/model bentoml serve bento.service:RexService         from the source, in the repository
    bentoml build bento.service:RexService --name N --version V --arg model=TAG --arg device=cpu -o tag

The options are the fields of `bento.options.BentoArgs`; a variable REX_<NAME> overrides each when the service starts.
A start that cannot work (a device, a model or a file that is not there) ends with one line and exit status 1.
"""

import atexit
import logging
import os
import signal
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml
from bentoml.models import BentoModel

from bento.api import create_app
from bento.options import BentoArgs, describe_variables, find_model, is_path, with_overrides
from model.errors import PipelineError

if TYPE_CHECKING:
    from model.generation.engine import Engine

logger = logging.getLogger("bentoml.service")
FAILURE_FILE = "REX_START_FAILURE_FILE"
PACKAGES = ("fastapi", "numpy", "prometheus-client", "safetensors", "tiktoken", "tokenizers", "transformers")
PYTORCH = "2.13.0"

args = bentoml.use_arguments(BentoArgs)
# Checked here, where `bentoml serve` and `bentoml build` still end with one line: later BentoML looks for a model that
# is not in the store on its cloud.
packed_model = None if not args.model or is_path(args.model) else str(BentoModel(args.model).tag)
if packed_model:
    find_model(packed_model)
options = with_overrides(args)
MODEL_DIR = find_model(options.model)

# distro "": the default adds compilers and git to the image, which wheels never need. Versions are those that run here.
image = bentoml.images.Image(
    base_image="python:3.11-slim", distro="", python_version="3.11", lock_python_packages=False
).python_packages(
    # PyPI's wheel is the CUDA build; the CPU build has its own index, which uv finds by UV_TORCH_BACKEND.
    f"torch=={PYTORCH}" if args.device == "cuda" else f"torch=={PYTORCH}+cpu",
    *(f"{name}=={version(name)}" for name in PACKAGES),
)
IMAGE_VARIABLES = {
    "BENTOML_DO_NOT_TRACK": "True",
    "HF_HUB_OFFLINE": "1",
    **({} if args.device == "cuda" else {"UV_TORCH_BACKEND": "cpu"}),
}

app = create_app(
    model_name=options.model if not is_path(options.model) else MODEL_DIR.name,
    request_timeout_s=options.request_timeout_s,
    max_body_bytes=options.max_body_bytes,
)


@bentoml.service(
    image=image,
    envs=[{"name": name, "value": value} for name, value in IMAGE_VARIABLES.items()],
    description=f"# REX text generation\n\nOpen `/docs` for the routes. Variables read at start:\n\n{describe_variables()}\n",
    workers=1,  # one model, one engine thread: a second worker would take the same cores and hold the weights again
    # BentoML's timeout only covers the time to the first byte; the engine keeps the deadline of the whole answer.
    traffic={"timeout": options.request_timeout_s + 30},
    metrics={"enabled": False},  # labels each path that anybody asks for; /metrics is our own
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(app)
class RexService:
    """Continues text with a REX language model."""

    if packed_model:
        model = BentoModel(packed_model)

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._failed = False
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

    @bentoml.on_shutdown
    def stop(self) -> None:
        """End the engine's thread."""
        if self._engine:
            self._engine.stop()

    def __is_ready__(self) -> bool:
        """Whether the model has answered and the engine lives: /readyz."""
        return self._engine is not None and self._engine.is_ready

    def __is_alive__(self) -> bool:
        """Whether the engine lives or is on its way: /livez."""
        return not self._failed and (self._engine is None or self._engine.is_alive)

    def _load(self) -> None:
        try:
            self._engine = app.state.engine = _start_engine(options, MODEL_DIR)
        except Exception as error:
            self._failed = True
            if not isinstance(error, PipelineError):
                logger.exception("loading the model failed")
            _end_service(str(error) or type(error).__name__)


def _start_engine(options: BentoArgs, model_dir: Path) -> "Engine":
    """Load the model and let it answer once. Raises PipelineError where device, model or tokenizer are not right."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from model.generation.engine import Engine
    from model.generation.threads import decoding_threads, usable_cores
    from model.int8 import count_parameters
    from model.loading import load_model
    from model.text.tokenizer import load_tokenizer

    torch.set_num_threads(options.threads or usable_cores())
    quantized = None if options.quantized == "auto" else options.quantized
    dtype = torch.bfloat16 if options.mixed_precision else None
    model = load_model(model_dir, device=options.device, quantized=quantized, dtype=dtype)
    # Before the engine's thread starts: a thread takes the number over once.
    torch.set_num_threads(options.threads or decoding_threads(count_parameters(model), usable_cores()))
    engine = Engine(model, load_tokenizer(model_dir), kv_cache=options.kv_cache, max_queue=options.max_queue)
    engine.warm_up()
    logger.info(
        "serving model=%s device=%s kv_cache=%s quantized=%s mixed_precision=%s threads=%d",
        options.model,
        model.device,
        options.kv_cache,
        options.quantized,
        options.mixed_precision,
        torch.get_num_threads(),
    )
    return engine


def _end_service(reason: str) -> None:
    """Say why to the parent process and ask it to end; without one (a test, another server) log it."""
    reason = " ".join(reason.split())
    parent, _, name = os.environ.get(FAILURE_FILE, "").partition(":")
    if parent != str(os.getppid()):
        logger.error("cannot serve: %s", reason)
        return
    Path(name).write_text(reason)
    os.kill(int(parent), signal.SIGTERM)
