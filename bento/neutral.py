"""Neutral values of unsupported fields: explicit defaults from other servers' clients, and labels.

An unsupported field is refused by name, unless its value would not change the answer. Null, an empty list and an empty
object are neutral for every field; other values are listed with their fields.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

TEXTS = {"input", "messages", "prompt"}
"""Fields with the text itself, on this route or another: an empty one is an error, null is an absent one."""
LABELS = {
    "cache_salt", "chat_id", "guided_decoding_backend", "id_slot", "keep_alive", "prompt_cache_retention",
    "reasoning_format", "request_id", "rid", "session_id", "slot_id", "speculative.n_max", "speculative.n_min",
    "speculative.p_min", "trace_id",
}  # fmt: skip
"""Labels of a request, cache hints, and choices that do not change the text."""
PENALTIES = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
"""Penalties, with the value that means off."""
SUBORDINATE: dict[str, tuple[str, ...]] = {
    "adaptive_decay": ("adaptive_target",),
    "dry_allowed_length": ("dry_multiplier",),
    "dry_base": ("dry_multiplier",),
    "dry_penalty_last_n": ("dry_multiplier",),
    "dry_sequence_breakers": ("dry_multiplier",),
    "dynatemp_exponent": ("dynatemp_range",),
    "mirostat_eta": ("mirostat",),
    "mirostat_tau": ("mirostat",),
    "penalize_nl": ("repeat_penalty", *PENALTIES),
    "repeat_last_n": ("repeat_penalty", *PENALTIES),
    "repetition_context_size": ("repeat_penalty", *PENALTIES),
    "xtc_threshold": ("xtc_probability",),
}
"""Unsupported fields that only say how other fields work: while those are off, any value has no effect."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # vLLM and SGLang, and the routers in front of them
    "do_sample": (True,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "return_cached_tokens_details": (False,),
    "return_meta_info": (False,),
    "return_prompt_text": (False,),
    "return_routed_experts": (False,),
    "stream_interval": (1,),
    "truncation_side": ("left",),
    "add_special_tokens": (True, False),  # the tokenizer has none to add
    "allowed_token_ids": (),
    "best_of": (1,),
    "cache_prompt": (True, False),  # common prefixes are always reused, and change no answer
    "data_parallel_rank": (0,),
    "detokenize": (True,),
    "early_stopping": (False,),
    "echo": (False,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "include_reasoning": (True, False),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logprob_start_len": (-1,),
    "no_stop_trim": (False,),
    "priority": (0,),
    "prompt_logprobs": (False,),
    "return_hidden_states": (False,),
    "return_logprob": (False,),
    "return_prompt_token_ids": (False,),
    "return_text_in_logprobs": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (True, False),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "stream_reasoning": (True, False),
    "top_logprobs_num": (0,),
    "use_beam_search": (False,),
    # llama.cpp, Ollama and pages in front of them
    "adaptive_target": (-1, -1.0),
    "context": (),
    "dry_multiplier": (0, 0.0),
    "enable_thinking": (False,),
    "format": ("",),
    "grammar": ("",),
    "grammar_lazy": (False,),
    "min_keep": (0,),
    "n_cmpl": (1,),
    "n_discard": (0,),
    "n_indent": (0,),
    "parse_tool_calls": (True,),
    "post_sampling_probs": (False,),
    "raw": (False,),
    "reasoning_in_content": (True, False),
    "return_tokens": (False,),
    "safe_prompt": (False,),
    "system": ("",),
    "t_max_predict_ms": (0, -1),
    "template": ("",),
    "think": (False,),
    "thinking": ({"type": "disabled"},),
    "thinking_forced_open": (False,),
    "top_a": (0, 0.0),
    "top_n_sigma": (-1, -1.0, 0, 0.0),
    "usage": ({"include": False},),
    "dynatemp_range": (0, 0.0),
    "mirostat": (0,),
    "n_keep": (0,),
    "n_probs": (0,),
    "repeat_penalty": (1, 1.0),
    "return_progress": (False,),
    "tfs_z": (1, 1.0),
    "timings_per_token": (False,),
    "typical_p": (1, 1.0),
    "xtc_probability": (0, 0.0),
    # Text Generation Inference
    "decoder_input_details": (False,),
    "details": (False,),
    "return_full_text": (False,),
    "watermark": (False,),
    # OpenAI
    "verbosity": ("medium",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "n": (1,),
    "parallel_tool_calls": (),
    "stream": (False,),
    "suffix": ("",),
}


EMPTY = [{"type": "null"}, {"type": "array", "maxItems": 0}, {"type": "object", "maxProperties": 0}]
"""JSON schemas of values that are neutral for every field."""


def document_neutral(schema: dict[str, Any]) -> None:
    """Document in a body's JSON schema that unknown fields may be empty; other neutral values are too many to list."""
    schema["additionalProperties"] = {"anyOf": EMPTY}


def is_neutral(name: str, value: Any, fields: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether this value of a field leaves every answer unchanged. fields: of the same object."""
    if name in TEXTS:
        return value is None
    if value is None or (isinstance(value, list | dict) and not value):
        return True
    if name in LABELS:
        return isinstance(value, str | int | float)
    if name in SUBORDINATE and isinstance(value, str | int | float | list):
        return all(_is_off(other, fields.get(other)) for other in SUBORDINATE[name])
    return any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(name, ()))


def _is_off(name: str, value: Any) -> bool:
    return value is None or value == PENALTIES.get(name) or is_neutral(name, value)
