"""The engine with vLLM in place of the steps: the same queue, deadlines, restart and events (`model/generation`).

For GPUs and large models. vLLM needs a separate environment (`make vllm` makes one); a model directory is
converted to the layout that it reads. Constraints (forms of the text, bad_words, allowed tokens) are computed here and
passed on as masks. Embeddings, and sampling parameters beyond vLLM's range, are refused by name.
"""

import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig

from model.artifact import read_json
from model.errors import PipelineError
from model.export.compressed_tensors import write_compressed_tensors
from model.generation.engine import Engine
from model.generation.queue import usual_requests
from model.generation.requests import GenerationRequest, UnsupportedValue
from model.generation.steps.cache import bytes_per_token
from model.generation.vllm.process import VllmProcess
from model.generation.vllm.scheduler import VllmScheduler
from model.system.cpu import usable_cores
from model.text.tokenizer import load_tokenizer
from model.weights.export import CLASSES, export_model
from model.weights.loading import load_model, read_generation_config, read_method

BLOCK_TOKENS = 32
"""Tokens of a block of vLLM's cache, which later prompts reuse whole; processors need a multiple of 32."""
RANGES = {"temperature": (0.0, 2.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0)}
"""Smallest and largest values of the sampling parameters that vLLM bounds."""


class VllmEngine(Engine):
    """Generates text with vLLM in a separate process.

    model_dir: a REX model, or an export (`hf`, `compressed-tensors`) with its tokenizer.
    python: the interpreter of the environment that has vLLM.
    quantized: as `load_model`; int8 weights are computed in bfloat16 on a CPU. is_bfloat16: activations, and weights
    that are not int8. device: "auto", "cpu" or "cuda"; vLLM is built for one of them. threads: of a CPU; 0: all cores.
    limits: of `Engine`. Raises PipelineError, one line, for a model or device that vLLM cannot serve.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        python: Path,
        quantized: bool | None = None,
        is_bfloat16: bool = False,
        device: str = "auto",
        threads: int = 0,
        worker: str | None = None,
        **limits: Any,
    ) -> None:
        self._device, self._threads, self._python, self._worker = device, threads, python, worker
        self._folder = tempfile.TemporaryDirectory(prefix="rex-vllm-")
        try:
            self._model_dir = readable_model(model_dir, Path(self._folder.name), quantized)
            config = AutoConfig.from_pretrained(self._model_dir, trust_remote_code=False)
            self._is_int8 = getattr(config, "quantization_config", None) is not None
            dtype = torch.bfloat16 if is_bfloat16 or self._is_int8 else torch.float32
            path = model_dir if (model_dir / "generation_config.json").is_file() else None
            described = SimpleNamespace(
                config=config,
                dtype=dtype,
                device=torch.device("cpu"),  # of this process: what keys and values take is vLLM's to know
                generation_config=path and read_generation_config(path),
            )
            limits["max_batch_size"] = limits.get("max_batch_size") or usual_requests(device)
            super().__init__(described, load_tokenizer(model_dir), **limits)  # type: ignore[arg-type]
        except BaseException:
            self._folder.cleanup()
            raise

    @property
    def process_id(self) -> int | None:
        """Of vLLM's process, None while it does not run."""
        return self._process.pid

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after its current step, then vLLM's process."""
        super().stop(timeout_s)
        self._process.close()
        self._folder.cleanup()

    @property
    def _process(self) -> VllmProcess:
        process: Any = self._step  # it takes the place of a step, whose name, precision and renewal the engine reads
        assert isinstance(process, VllmProcess)
        return process

    def _check(self, request: GenerationRequest) -> None:
        super()._check(request)
        if request.embedding is not None:
            raise UnsupportedValue("embedding: the engine vllm does not offer it; serve the model with engine rex")
        for name, (least, most) in RANGES.items():
            value = getattr(request.sampling, name)
            if not least <= value <= most:
                raise UnsupportedValue(
                    f"{name} is {value:g}: the engine vllm takes {least:g} to {most:g}; serve the model with engine rex"
                )

    def _create_step(self, model: Any, name: str) -> Any:
        """Start vLLM and wait until it has loaded the model. Raises PipelineError."""
        dtype = str(model.dtype).removeprefix("torch.")
        token_bytes = bytes_per_token(model.config, model.dtype)
        # Whole blocks for each request, and one that vLLM keeps empty.
        blocks = math.ceil(self._cache_tokens / BLOCK_TOKENS) + self._slots + 1
        cache_bytes = blocks * BLOCK_TOKENS * token_bytes
        process = VllmProcess(
            self._python,
            self._model_dir,
            {
                "dtype": dtype,
                # One token more than the model's context: see `worker.py`.
                "max_model_len": self.context_length + 1,
                "max_num_seqs": self._slots,
                "max_num_batched_tokens": max(self._prefill_chunk, self._slots),
                "block_size": BLOCK_TOKENS,
                "kv_cache_memory_bytes": cache_bytes,
                "max_logprobs": -1,  # as many as the vocabulary has
                "seed": 0,
            },
            variables={"OMP_NUM_THREADS": str(self._threads or usable_cores())},
            precision=f"int8, {dtype}" if self._is_int8 else dtype,
            bytes_per_token=token_bytes,
            **({"worker": self._worker} if self._worker else {}),
        )
        try:
            process.start()
            if self._device not in ("auto", process.device):
                raise PipelineError(f"device is {self._device!r}, and this vLLM is built for {process.device!r}")
        except BaseException:
            process.close()
            raise
        return process

    def _new_scheduler(self) -> Any:
        return VllmScheduler(
            self._process,
            self._queue,
            slots=self._slots,
            vocab_size=self.vocab_size,
            token_bytes=self.token_bytes,
            end_of_text_ids=self.end_of_text_ids,
        )


def readable_model(model_dir: Path, folder: Path, quantized: bool | None) -> Path:
    """The model in a layout that vLLM reads: an export as it is, a REX model converted to `folder`."""
    if not (model_dir / "config.json").is_file():
        raise PipelineError(f"no config.json in {model_dir}: expected a model directory")
    if read_json(model_dir / "config.json", "make the model again").get("model_type") in list(CLASSES):
        if quantized is not None:
            raise PipelineError(
                f"quantized is {quantized}, and {model_dir} is an export, served as it is: set it to auto"
            )
        return model_dir
    method = read_method(model_dir)
    if method == "int4" and quantized is not False:
        raise PipelineError(
            f"{model_dir} has int4 weights, which the engine vllm does not read: set quantized to false for full "
            "precision, or export the checkpoint"
        )
    model = load_model(model_dir, quantized=False)
    if quantized or (quantized is None and method == "int8"):
        write_compressed_tensors(model, folder)
    else:
        export_model(model).save_pretrained(folder)
    return folder
