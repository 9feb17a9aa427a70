"""Python wrapper of the compiled library: models, sessions, and forward passes over segments of slots.

    model = NativeModel(load_model(path))
    session = NativeSession(model, slots=16)
    logits_RV, best_R, highest_R = session.step([Segment(slot=0, start=0, ids=ids, wanted=1)])

Inputs and outputs are NumPy arrays; ctypes releases the GIL during a pass. `engine/rex_native.h` documents the
interface, and `build.py` compiles the library. REX_NATIVE_INSTRUCTIONS in the environment selects an instruction set
other than the CPU's best.

Shapes: R rows of logits, V vocabulary.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.errors import PipelineError
from model.native.build import LIBRARY
from model.weights.int8 import QuantizedMatrix, TiedInt8Head, precision_name

ABI = 8
INSTRUCTIONS = ("portable", "avx2", "avxvnni", "avx512", "amx", "dotprod")
"""Instruction sets, in the order of their numbers in the library; of those that a CPU has, the last is the fastest."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
"""Numbers of the types in the library; uint8 holds two int4 weights."""
LIBRARY_VARIABLE, INSTRUCTIONS_VARIABLE = "REX_NATIVE_LIBRARY", "REX_NATIVE_INSTRUCTIONS"
PAGE_TOKENS = 64
"""PAGE of kernels.h: the tokens of one page of the cache."""
ACTIVATION_LEVELS = 127
"""Activations of int8 and int4 layers go from -127 to 127: no kernel here saturates, unlike FBGEMM's
(`model/weights/int8.py`).
"""
_ERROR_SIZE = 256
_HEAD_UNIT = 16
"""Heads are padded to a multiple of this, BLOCK in kernels.h."""


class _Config(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                *("layers", "hidden_size", "intermediate_size", "heads", "groups", "head_dim", "vocab_size"),
                *("context_length", "rotary_dim", "post_norm", "activation_levels", "instructions"),
            )
        ),
        ("eps", ctypes.c_float),
    ]


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("dtype", ctypes.c_int32)]


_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("input_norm", "post_attention_norm", "attention_branch_norm", "mlp_branch_norm", "query_norm", "key_norm")


class _Layer(ctypes.Structure):
    _fields_ = [*((name, _Matrix) for name in _MATRICES), *((name, ctypes.c_void_p) for name in _NORMS)]


class _Weights(ctypes.Structure):
    _fields_ = [
        *(("embedding", _Matrix), ("head", _Matrix), ("layers", ctypes.POINTER(_Layer))),
        *((name, ctypes.c_void_p) for name in ("final_norm", "cos", "sin")),
    ]


@dataclass(frozen=True)
class Segment:
    """Tokens `ids` after the first `start` positions of a slot; the last `wanted` of them get logits."""

    slot: int
    start: int
    ids: np.ndarray
    wanted: int


@lru_cache
def open_library(path: Path | None = None) -> ctypes.CDLL | None:
    """The library at `path`, default REX_NATIVE_LIBRARY or next to this file; None if none loads."""
    path = path or Path(os.environ.get(LIBRARY_VARIABLE) or LIBRARY)
    try:
        library = ctypes.CDLL(str(path))
        if library.rex_abi() != ABI:
            return None
    except (OSError, AttributeError):
        return None
    pointer, whole, long, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "rex_supports": (whole, [whole]),
        "rex_model_create": (pointer, [ctypes.POINTER(_Config), ctypes.POINTER(_Weights), text]),
        "rex_model_bytes": (long, [pointer]),
        "rex_model_destroy": (None, [pointer]),
        "rex_session_create": (pointer, [pointer, whole, whole, long, whole, long, text]),
        "rex_session_destroy": (None, [pointer]),
        "rex_session_step": (whole, [pointer, whole, *[pointer] * 9, text]),
        "rex_session_decode": (whole, [pointer, whole, whole, *[pointer] * 6, text]),
        "rex_session_hidden": (whole, [pointer, whole, *[pointer] * 6, text]),
        "rex_session_copy_prefix": (whole, [pointer, whole, whole, whole, text]),
        "rex_session_truncate": (whole, [pointer, whole, whole, text]),
        "rex_session_cache_bytes": (long, [pointer]),
    }
    for name, (returned, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = returned, arguments
    return library


def available_instructions() -> list[str]:
    """Instruction sets that this CPU and the library support, the fastest last; empty without the library."""
    library = open_library()
    if library is None:
        return []
    return [name for number, name in enumerate(INSTRUCTIONS) if library.rex_supports(number)]


def choose_instructions(named: str | None = None) -> str:
    """`named`, else REX_NATIVE_INSTRUCTIONS, else the fastest. Raises PipelineError for an unavailable one."""
    available = available_instructions()
    wanted = named or os.environ.get(INSTRUCTIONS_VARIABLE)
    if wanted is None and available:
        return available[-1]
    if wanted not in available:
        raise PipelineError(
            f"instruction set {wanted!r} is not available: expected one of {', '.join(available) or 'none'}; "
            f"leave {INSTRUCTIONS_VARIABLE} unset for the fastest"
        )
    return wanted


def unsupported(model: PreTrainedModel) -> str | None:
    """Why the library cannot compute this model; None if it can."""
    if open_library() is None:
        return "the native library is not built: run python -m model.native.build, which needs a C++ compiler"
    if model.config.model_type != "rex":
        return f"it supports models of the type 'rex', not {model.config.model_type!r}"
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if any(isinstance(module, nn.Linear) and module.bias is not None for module in model.modules()):
        return "a linear layer has a bias"
    dtypes = {w.dtype for w in (_weight(model, name) for name in _matrix_names(model)) if w is not None}
    if dtypes == {torch.int8, torch.uint8}:
        if model.config.head_dim % _HEAD_UNIT:
            return f"int4 heads of {model.config.head_dim}: expected a multiple of {_HEAD_UNIT}"
    elif len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.int8}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"its layers are in {found}: expected one of float32, bfloat16, int8 and int4"
    return None


class NativeModel:
    """A model's weights, packed for the CPU; the given model is not needed afterward.

    instructions: see `choose_instructions`. Raises PipelineError for a model that the library cannot compute.
    """

    def __init__(self, model: PreTrainedModel, *, instructions: str | None = None) -> None:
        reason = unsupported(model)
        if reason:
            raise PipelineError(f"the native step cannot run: {reason}; use the step 'reference'")
        library = open_library()
        assert library is not None
        self._library, config = library, model.config
        self.instructions = choose_instructions(instructions)
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.context_length: int = config.max_position_embeddings
        self.precision = precision_name(model)
        """Precision of the given model: "float32", "bfloat16", "int8" or "int4"; sums are float32 in all of them."""
        head = -(-config.head_dim // _HEAD_UNIT) * _HEAD_UNIT
        self.cached_numbers_per_token: int = 2 * config.num_hidden_layers * config.num_key_value_heads * head
        kept: list[Tensor] = []
        weights = _gather(model, kept)
        numbers = _Config(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.vocab_size,
            config.max_position_embeddings,
            config.rotary_dim,
            int(config.post_norm),
            ACTIVATION_LEVELS,
            INSTRUCTIONS.index(self.instructions),
            config.rms_norm_eps,
        )
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        self.handle = library.rex_model_create(ctypes.byref(numbers), ctypes.byref(weights), error)
        if not self.handle:
            raise PipelineError(f"the native step cannot take the model: {error.value.decode()}")
        del kept  # the library has its own copy

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return int(self._library.rex_model_bytes(self.handle))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.rex_model_destroy(self.handle)


class NativeSession:
    """A KV cache with slots, and compute threads; used by one thread at a time.

    shared_from: weights times rows of a pass: below it one thread computes the pass, from 80 times that on all do, and
    between the two whichever is faster at the time.
    cache_dtype: of keys and values, float32 or bfloat16; default float32 for a model in float32, else bfloat16.
    cache_tokens: most tokens over all slots, 0 for no limit; memory is allocated on demand.
    """

    def __init__(
        self,
        model: NativeModel,
        slots: int,
        *,
        threads: int = 1,
        shared_from: int = 0,
        cache_dtype: torch.dtype | None = None,
        cache_tokens: int = 0,
    ) -> None:
        self.model, self._library = model, model._library
        dtype = cache_dtype or (torch.float32 if model.precision == "float32" else torch.bfloat16)
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        self._handle = self._library.rex_session_create(
            model.handle, slots, DTYPES[dtype], cache_tokens, max(1, threads), shared_from, error
        )
        if not self._handle:
            raise PipelineError(f"the native step cannot start: {error.value.decode()}")
        self.bytes_per_token: int = model.cached_numbers_per_token * dtype.itemsize
        self._process = os.getpid()
        self._arguments = _Arguments(max(1, slots))
        self._logits_RV = np.empty((0, model.vocab_size), dtype=np.float32)

    def step(
        self, segments: Sequence[Segment], *, logits: bool = True
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """One pass: logits (R, V) float32 or None, and for each row the first index of the highest logit (R,) and its
        value (R,).

        Rows are in the order of the segments. The highest logit is NaN if any logit of the row is NaN. Running a
        segment again is harmless. Raises PipelineError for a segment that does not fit, and if memory or the cache's
        limit is exhausted.
        """
        table = [(s.slot, s.start, len(s.ids), s.wanted) for s in segments]
        logits_RV, chosen_R, highest_R = self.step_over(table, [s.ids for s in segments], logits=logits)
        return None if logits_RV is None else logits_RV.copy(), chosen_R, highest_R

    def step_over(
        self,
        table: Sequence[tuple[int, int, int, int]],
        ids: Sequence[np.ndarray],
        *,
        logits: bool,
        draws: np.ndarray | None = None,
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """As `step`, with logits that the next call overwrites. table: slot, start, length and wanted rows of each
        segment. ids: the tokens of each.

        draws: float64 (R, 5), the temperature, top-k, top-p, min-p and uniform number of each row: with a temperature
        above 0 it gets a sample in place of the first index of the highest logit.
        """
        rows = sum([row[3] for row in table])
        arguments = self._arguments
        if max(len(table), rows) > arguments.capacity:
            arguments = self._arguments = _Arguments(max(len(table), rows))
        tokens = _join(ids)
        logits_RV = self._logits(rows) if logits else None
        failed = self._library.rex_session_step(
            self._handle,
            len(table),
            *arguments.fill(table),
            tokens.ctypes.data,
            None if draws is None else draws.ctypes.data,
            None if logits_RV is None else logits_RV.ctypes.data,
            *arguments.results,
            arguments.error,
        )
        _check(failed, arguments.error)
        return logits_RV, arguments.chosen[:rows].copy(), arguments.highest[:rows].copy()

    def decode(
        self, texts: Sequence[tuple[int, int, int]], steps: int, draws: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`steps` passes over one token of each text, where each pass takes the tokens that the one before chose.

        texts: slot, start and first token of each. draws: float64 (steps, texts, 5), as of `step_over`. Returns the
        chosen tokens and the highest logits, shape (steps, texts).
        """
        rows, arguments = steps * len(texts), self._arguments
        if rows > arguments.capacity:
            arguments = self._arguments = _Arguments(rows)
        slots, starts, *_ = arguments.fill([(slot, start, 1, 1) for slot, start, _ in texts])
        tokens = np.array([token for *_, token in texts], dtype=np.int64)
        failed = self._library.rex_session_decode(
            self._handle,
            len(texts),
            steps,
            slots,
            starts,
            tokens.ctypes.data,
            None if draws is None else draws.ctypes.data,
            *arguments.results,
            arguments.error,
        )
        _check(failed, arguments.error)
        shape = (steps, len(texts))
        return arguments.chosen[:rows].reshape(shape).copy(), arguments.highest[:rows].reshape(shape).copy()

    def _logits(self, rows: int) -> np.ndarray:
        """Memory for logits (R, V), reused: blocks of tens of MB in many sizes leave gaps in the heap."""
        if len(self._logits_RV) < rows:
            # To a power of two, so that it grows a few times at most; the former one is freed first.
            self._logits_RV = np.empty((0, self.model.vocab_size), dtype=np.float32)
            self._logits_RV = np.empty((1 << (rows - 1).bit_length(), self.model.vocab_size), dtype=np.float32)
        return self._logits_RV[:rows]

    def hidden_states(self, segments: Sequence[Segment]) -> np.ndarray:
        """As `step`, but ends after the final norm: hidden states (R, D) float32 of the requested rows."""
        table, ids = _arrays(segments)
        hidden_RD = np.empty((int(table[3].sum()), self.model.hidden_size), dtype=np.float32)
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        failed = self._library.rex_session_hidden(
            self._handle,
            len(segments),
            *(row.ctypes.data for row in table),
            ids.ctypes.data,
            hidden_RD.ctypes.data,
            error,
        )
        _check(failed, error)
        return hidden_RD

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of slot `source` to `target`, sharing whole pages."""
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        _check(self._library.rex_session_copy_prefix(self._handle, source, target, tokens, error), error)

    def truncate(self, slot: int, tokens: int) -> None:
        """Drop a slot's tokens from position `tokens` on, and free pages that hold no others."""
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        _check(self._library.rex_session_truncate(self._handle, slot, tokens, error), error)

    @property
    def cache_bytes(self) -> int:
        """Memory of the slots' keys and values, bytes."""
        return int(self._library.rex_session_cache_bytes(self._handle))

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:  # as the interpreter ends, `os` may be gone
        # A forked process has the object, but not the threads, whose end would be waited for without end.
        if getattr(self, "_handle", None) and getattr(self, "_process", None) == getpid():
            self._library.rex_session_destroy(self._handle)


class _Arguments:
    """Memory for the arguments and results of a step of up to `capacity` segments and rows.

    Reused between steps: creating arrays and reading their addresses takes as long as a step of a small model.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._table = np.empty((4, capacity), dtype=np.int32)
        self._addresses = [row.ctypes.data for row in self._table]
        self.chosen, self.highest = np.empty(capacity, dtype=np.int32), np.empty(capacity, dtype=np.float32)
        self.results = (self.chosen.ctypes.data, self.highest.ctypes.data)
        self.error = ctypes.create_string_buffer(_ERROR_SIZE)

    def fill(self, table: Sequence[tuple[int, int, int, int]]) -> list[int]:
        """Addresses of the segments' slots, starts, lengths and wanted rows."""
        self._table[:, : len(table)] = list(zip(*table, strict=True))
        return self._addresses


def _arrays(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Slot, start, length and wanted rows of each segment, shape (4, segments), and the ids of all."""
    table = np.array([(s.slot, s.start, len(s.ids), s.wanted) for s in segments], dtype=np.int32).T.copy()
    return table, _join([s.ids for s in segments])


def _join(ids: Sequence[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(ids[0] if len(ids) == 1 else np.concatenate(ids), dtype=np.int64)


def _check(failed: int, error: Any) -> None:
    if failed:
        raise PipelineError(f"the native step failed: {error.value.decode()}")


def _matrix_names(model: PreTrainedModel) -> list[str]:
    layers = range(model.config.num_hidden_layers)
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    parts = [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    inside = [f"model.layers.{i}.{part}" for i in layers for part in parts]
    return ["model.embed_tokens", *inside, "lm_head"]


def _weight(model: PreTrainedModel, name: str) -> Any:
    """A layer's stored weight; None for a tied head."""
    module = model.get_submodule(name)
    if isinstance(module, TiedInt8Head):
        return None
    weight: Tensor = module.weight  # type: ignore[assignment]
    if name == "lm_head" and weight is model.get_submodule("model.embed_tokens").weight:
        return None
    return weight


def _gather(model: PreTrainedModel, kept: list[Tensor]) -> _Weights:
    """Addresses of all weights; `kept` holds temporary arrays until the library has read them."""

    def address(tensor: Tensor) -> int:
        kept.append(tensor.detach().contiguous())
        return kept[-1].data_ptr()

    def matrix(name: str) -> _Matrix:
        weight = _weight(model, name)
        if weight is None:
            return _Matrix()
        module = model.get_submodule(name)
        scale = address(module.weight_scale) if isinstance(module, QuantizedMatrix) else None
        return _Matrix(address(weight), scale, DTYPES[weight.dtype])

    def norm(name: str) -> int | None:
        module: Any = model.get_submodule(name)
        return None if isinstance(module, nn.Identity) else address(module.weight.float())

    config = model.config
    layers = (_Layer * config.num_hidden_layers)()
    names = _matrix_names(model)
    for i, layer in enumerate(layers):
        for field, name in zip(_MATRICES, names[1 + 7 * i :], strict=False):
            setattr(layer, field, matrix(name))
        norms = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
        for field, name in zip(_NORMS, (*norms, "self_attn.q_norm", "self_attn.k_norm"), strict=True):
            setattr(layer, field, norm(f"model.layers.{i}.{name}"))
    positions = torch.arange(config.max_position_embeddings)[None]
    with torch.inference_mode():
        cos, sin = model.get_submodule("model.rotary_emb")(torch.empty(0), positions)
    return _Weights(
        matrix("model.embed_tokens"), matrix("lm_head"), layers, norm("model.norm"), address(cos), address(sin)
    )
