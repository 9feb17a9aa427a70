"""llama.cpp in this process, through the C interface of the package `llama-cpp-python`, on the same weights as GGUF.

    pip install llama-cpp-python

compiles llama.cpp for this machine; LLAMA_CPP_LIB_PATH in the environment names a folder with another build. Each
workload runs at its best setting, found before the measured rounds: flash attention with float16 keys and values, or
none with bfloat16; one thread or all.
"""

import ctypes
import importlib
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from bench.engine.workloads import RAGGED_STREAMS, SAMPLED, Contender, small_tokenizer
from model.errors import PipelineError
from model.export.gguf import write_gguf
from model.modeling_rex import RexForCausalLM

PACKAGE = "llama_cpp"
BATCH, MICRO_BATCH = 2_048, 512
CELLS = 256
"""Tokens by which a stream's part of the context grows."""
F16, BF16, F32 = 1, 30, 0
"""ggml's type numbers for keys and values."""


def installed() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def describe() -> str:
    """Release of the build and the CPU features it uses."""
    llama_cpp = importlib.import_module(PACKAGE)
    features = llama_cpp.llama_print_system_info().decode()
    return f"llama-cpp-python {llama_cpp.__version__}, {features.strip(' |')}"


@dataclass(frozen=True)
class Setting:
    """How llama.cpp runs a workload."""

    threads: int
    flash_attention: bool

    def __str__(self) -> str:
        return f"threads {self.threads}, flash attention {'on' if self.flash_attention else 'off'}"


class LlamaCpp(Contender):
    """llama.cpp, Q8_0."""

    kind, without_flash = "q8_0", BF16

    def __init__(self, model: RexForCausalLM, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        super().__init__(model)
        llama_cpp = importlib.import_module(PACKAGE)
        self._library = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # keeps the table readable; ctypes holds no reference
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self._file = tempfile.TemporaryDirectory()
        path = Path(self._file.name) / "model.gguf"
        # llama.cpp requires a token for each row of the embedding; the benchmark feeds ids, never text.
        padded = _padded(tokenizer or small_tokenizer(), self._vocab_size)
        write_gguf(model, padded, path, self.kind, name="bench")
        self._weights = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._weights:
            raise PipelineError("llama.cpp cannot load the exported model")
        self._context: Any = None
        self._open: tuple[Setting, int, int] | None = None
        threads = sorted({1, torch.get_num_threads()})
        self._settings = [Setting(n, flash) for n, flash in product(threads, (True, False))]
        self.best: dict[str, Setting] = {}
        """The fastest setting by kind of work."""
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for part in (
            llama_cpp.llama_sampler_init_top_k(SAMPLED.top_k),
            llama_cpp.llama_sampler_init_top_p(SAMPLED.top_p, 1),
            llama_cpp.llama_sampler_init_temp(SAMPLED.temperature),
            llama_cpp.llama_sampler_init_dist(0),
        ):
            llama_cpp.llama_sampler_chain_add(self._sampler, part)
        self._ids, self._positions, self._wanted, self._slots = self._views()

    def prefill(self) -> float:
        """Tokens of a prompt of 900 over the time to its answer's first token."""
        return self._at_best("prefill", self._prefill)

    def decode(self, streams: int, prompt_tokens: int, answer_tokens: int) -> float:
        """Equal streams."""
        sampled = "sampled " if self._is_sampled else ""
        work = f"{streams} {sampled}streams at {prompt_tokens + answer_tokens}"
        return self._at_best(work, lambda: self._decode(streams, prompt_tokens, answer_tokens))

    def _ragged(self, answer_tokens: list[int]) -> float:
        return self._at_best("ragged", lambda: self._continuous(answer_tokens))

    def _at_best(self, work: str, run: Callable[[], float]) -> float:
        """Run at the best setting for this work, which its first call finds."""
        if work not in self.best:
            found = {}
            for setting in self._settings:
                self._setting = setting
                run()  # the first pass of a context allocates
                found[setting] = run()
            self.best[work] = max(found, key=lambda setting: found[setting])
        self._setting = self.best[work]
        return run()

    def _prefill(self) -> float:
        (prompt,) = self._prompts([900])
        self._start(1, 1_024)
        started = time.perf_counter()
        self._compute([(0, 0, prompt)])
        return len(prompt) / (time.perf_counter() - started)

    def _decode(self, streams: int, prompt_tokens: int, answer_tokens: int) -> float:
        self._start(streams, CELLS * math.ceil((prompt_tokens + answer_tokens) / CELLS))
        tokens = [
            self._compute([(stream, 0, prompt)])[0]
            for stream, prompt in enumerate(self._prompts([prompt_tokens] * streams))
        ]
        seconds = []
        for position in range(prompt_tokens, prompt_tokens + answer_tokens - 1):
            started = time.perf_counter()
            tokens = self._compute([(stream, position, [token]) for stream, token in enumerate(tokens)])
            seconds.append(time.perf_counter() - started)
        return streams / statistics.mean(seconds)

    def _continuous(self, answer_tokens: list[int]) -> float:
        """Continuous batching: requests join when a slot is free and the step has room, whole prompts at a time."""
        waiting = list(zip(self._prompts(self._prompt_tokens[: len(answer_tokens)]), answer_tokens, strict=True))
        self._start(RAGGED_STREAMS, 768)
        memory = self._library.llama_get_memory(self._context)
        running: dict[int, list[int]] = {}  # slot: position, token, remaining tokens
        started = time.perf_counter()
        while waiting or running:
            segments = [(slot, position, [token]) for slot, (position, token, _) in running.items()]
            free = [slot for slot in range(RAGGED_STREAMS) if slot not in running]
            left = MICRO_BATCH
            while waiting and free and (left == MICRO_BATCH or len(waiting[0][0]) <= left):
                prompt, count = waiting.pop(0)
                left -= len(prompt)
                slot = free.pop(0)
                segments.append((slot, 0, prompt))
                running[slot] = [len(prompt) - 1, 0, count]
            for (slot, _, _), token in zip(segments, self._compute(segments), strict=True):
                state = running[slot]
                state[:] = [state[0] + 1, token, state[2] - 1]
                if not state[2]:
                    del running[slot]
                    self._library.llama_memory_seq_rm(memory, slot, -1, -1)
        return sum(answer_tokens) / (time.perf_counter() - started)

    def _start(self, streams: int, tokens: int) -> None:
        """An empty context for `streams` streams of the given length."""
        if self._open == (self._setting, streams, tokens):
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)
            return
        if self._context:
            self._library.llama_free(self._context)
        wanted = self._library.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = streams * tokens, streams
        wanted.n_batch, wanted.n_ubatch = BATCH, MICRO_BATCH
        wanted.n_threads = wanted.n_threads_batch = self._setting.threads
        wanted.flash_attn_type = int(self._setting.flash_attention)
        wanted.type_k = wanted.type_v = F16 if self._setting.flash_attention else self.without_flash
        wanted.no_perf = True
        self._context = self._library.llama_init_from_model(self._weights, wanted)
        if not self._context:
            raise PipelineError(f"llama.cpp cannot create a context with {self._setting}")
        self._open = (self._setting, streams, tokens)

    def _views(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The batch's arrays as NumPy views, so that filling them costs llama.cpp almost nothing."""
        batch, as_array = self._batch, np.ctypeslib.as_array
        slots = np.zeros(BATCH, dtype=np.int32)
        for i in range(BATCH):
            batch.n_seq_id[i] = 1
            batch.seq_id[i] = ctypes.cast(slots.ctypes.data + 4 * i, ctypes.POINTER(ctypes.c_int32))
        views = [as_array(pointer, (BATCH,)) for pointer in (batch.token, batch.pos, batch.logits)]
        return views[0], views[1], views[2], slots

    def _compute(self, segments: list[tuple[int, int, list[int]]]) -> list[int]:
        """One pass over segments (slot, start, ids), and the next token of each."""
        at, ends = 0, []
        for slot, start, ids in segments:
            end = at + len(ids)
            self._ids[at:end] = ids
            self._positions[at:end] = range(start, start + len(ids)) if len(ids) > 1 else start
            self._slots[at:end], self._wanted[at:end] = slot, 0
            self._wanted[end - 1] = 1
            ends.append(end - 1)
            at = end
        self._batch.n_tokens = at
        failed = self._library.llama_decode(self._context, self._batch)
        if failed:
            raise PipelineError(f"llama.cpp's step failed with {failed}")
        if self._is_sampled:
            return [self._library.llama_sampler_sample(self._sampler, self._context, end) for end in ends]
        logits = self._library.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(logits, (len(ends), self._vocab_size))
        return [int(token) for token in rows.argmax(axis=1)]


class LlamaCppFloat32(LlamaCpp):
    """llama.cpp, F32 weights; keys and values in float32 without flash attention."""

    kind, without_flash = "full", F32


class LlamaCppInt4(LlamaCpp):
    """llama.cpp, Q4_0 with embedding and head in Q8_0."""

    kind = "q4_0"


def _padded(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer, filled with placeholder tokens up to the size of the model's vocabulary."""
    tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), vocab_size)])
    return tokenizer
