"""Loads a model directory into a warmed-up engine. Imports torch inside functions, so that the routes start first."""

import gc
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from bento.options import BentoArgs

if TYPE_CHECKING:
    from model.generation.engine import Engine

logger = logging.getLogger("bentoml.service")  # BentoML's log configuration shows loggers below `bentoml`


def start_engine(options: BentoArgs, model_dir: Path) -> "Engine":
    """Load the model and generate one token. Raises PipelineError for a wrong device, model or tokenizer."""
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
    # Set before the engine's thread starts: a thread reads torch's number of threads once.
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
        step=options.step,
        step_timeout_s=options.step_timeout_s,
    )
    engine.warm_up()
    logger.info(
        "serving model=%s device=%s step=%s kv_cache=%s quantized=%s mixed_precision=%s threads=%d cache_tokens=%d",
        options.model,
        model.device,
        engine.step_name,
        options.kv_cache,
        options.quantized,
        options.mixed_precision,
        torch.get_num_threads(),
        engine.stats().cache_capacity_tokens,
    )
    return engine


def release_load_memory() -> None:
    """Return memory that only loading needed, and exempt the remaining objects from garbage collection.

    A full collection scans the million objects of the imported libraries: a pause of 0.2 s for every stream.
    """
    gc.unfreeze()  # a former model is among the frozen objects
    gc.collect()
    gc.freeze()
    from model.system.allocator import trim

    trim()
