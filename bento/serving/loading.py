"""Loads a model directory into a warmed-up engine. Imports torch inside functions, so that the routes start first."""

import gc
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bento.options import PREFIX, BentoArgs

if TYPE_CHECKING:
    from model.generation.engine import Engine

logger = logging.getLogger("bentoml.service")  # BentoML's log configuration shows loggers below `bentoml`


def start_engine(options: BentoArgs, model_dir: Path, draft_dir: Path | None = None) -> "Engine":
    """Load the model, and the draft model if there is one, and generate one token. Raises PipelineError for a wrong
    device, model or tokenizer.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("model").setLevel(logging.INFO)  # BentoML shows other loggers from WARNING on
    quantized = None if options.quantized == "auto" else options.quantized
    limits = {
        name: getattr(options, name)
        for name in (
            "max_batch_size",
            "kv_cache_mib",
            "prefill_chunk",
            "max_queue",
            "max_queue_tokens",
            "step_timeout_s",
        )
    }
    if options.engine == "vllm":
        engine = _vllm_engine(options, model_dir, quantized, limits)
    else:
        engine = _rex_engine(options, model_dir, draft_dir, quantized, limits)
    engine.warm_up()
    logger.info(
        "serving model=%s engine=%s step=%s precision=%s kv_cache=%s quantized=%s cache_tokens=%d",
        options.model,
        options.engine,
        engine.step_name,
        engine.precision,
        options.kv_cache,
        options.quantized,
        engine.stats().cache_capacity_tokens,
    )
    return engine


def _rex_engine(
    options: BentoArgs, model_dir: Path, draft_dir: Path | None, quantized: bool | None, limits: dict[str, Any]
) -> "Engine":
    import torch

    from model.generation.engine import Engine
    from model.generation.speculation.draft import load_draft
    from model.system.cpu import decoding_threads, usable_cores
    from model.system.devices import serving_dtype
    from model.text.tokenizer import load_tokenizer
    from model.weights.int8 import count_parameters
    from model.weights.loading import load_model

    torch.set_num_threads(options.threads or usable_cores())
    dtype = serving_dtype(options.precision, options.device)
    model = load_model(model_dir, device=options.device, quantized=quantized, dtype=dtype)
    tokenizer = load_tokenizer(model_dir)
    draft = load_draft(draft_dir, model, tokenizer) if draft_dir else None
    # Set before the engine's thread starts: a thread reads torch's number of threads once.
    threads = options.threads or usable_cores()
    torch.set_num_threads(options.threads or decoding_threads(count_parameters(model), threads))
    logger.info("loaded on %s, up to %d threads", model.device, threads)
    return Engine(
        model,
        tokenizer,
        kv_cache=options.kv_cache,
        step=options.step,
        threads=threads,
        speculative_tokens=options.speculative_tokens,
        draft=draft,
        **limits,
    )


def _vllm_engine(options: BentoArgs, model_dir: Path, quantized: bool | None, limits: dict[str, Any]) -> "Engine":
    import torch

    from model.errors import PipelineError
    from model.generation.vllm.engine import VllmEngine
    from model.system.devices import serving_dtype

    if not Path(options.vllm_python).is_file():
        raise PipelineError(
            f"{PREFIX}ENGINE is vllm, and {PREFIX}VLLM_PYTHON is {options.vllm_python!r}: expected the interpreter of "
            "an environment that has vLLM; `make vllm` makes .venv-vllm/bin/python"
        )
    return VllmEngine(
        model_dir,
        python=Path(options.vllm_python).absolute(),
        quantized=quantized,
        is_bfloat16=serving_dtype(options.precision, options.device) == torch.bfloat16,
        device=options.device,
        threads=options.threads,
        **limits,
    )


def release_load_memory() -> None:
    """Return memory that only loading needed, and exempt the remaining objects from garbage collection.

    A full collection scans the million objects of the imported libraries: a pause of 0.2 s for every stream.
    """
    gc.unfreeze()  # a former model is among the frozen objects
    gc.collect()
    gc.freeze()
    from model.system.allocator import trim

    trim()
