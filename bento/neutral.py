"""Neutral values of unsupported fields: explicit defaults from other servers' clients, and labels.

An unsupported field is refused by name, unless its value would not change the answer. Null, an empty text, list or
object, and an object of neutral values are neutral for every field; other values are listed with their fields.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

TEXTS = {"input", "messages", "prompt"}
"""Fields that contain the text, on this route or another: an empty one is an error, null means absent."""
LABELS = {
    "cache_salt", "chat_id", "client_id", "conversation_id", "correlation_id", "extra_key", "guided_decoding_backend",
    "id_slot", "keep_alive", "litellm_call_id", "litellm_session_id", "litellm_trace_id", "main_gpu", "message_id",
    "num_batch", "num_gpu", "num_thread", "prompt_cache_isolation_key", "prompt_cache_retention", "reasoning_format",
    "request_id", "rid", "run_id", "session_id", "slot_id", "speculative.n_max", "speculative.n_min",
    "speculative.p_min", "sse_ping_interval", "thread_id", "trace_id", "user_id",
}  # fmt: skip
"""Labels of a request, cache hints, and choices that do not change the text."""
OBJECTS = {
    "cache_control", "chat_template_kwargs", "logit_bias", "metadata", "reasoning", "stream_options",
    "structured_outputs", "text",
}  # fmt: skip
LISTS = {
    "allowed_token_ids", "bad_words", "functions", "guided_choice", "include", "stop", "stop_sequences",
    "stop_token_ids", "tools",
}  # fmt: skip
NOT_EMPTY = {"instructions", "modalities", "response_format", "tool_choice"}
"""Supported fields for which an empty list or object has no effect, by their JSON type: languages such as PHP write an
empty object as []. The fields of the last set have no empty value: it means absent.
"""
EXTRAS = ("enable_", "include_", "return_", "show_", "use_")
"""Prefixes of the names of switches that enable a feature: false is neutral for all of them."""
PENALTIES = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
"""Penalties, with the value that means off."""
SUBORDINATE: dict[str, tuple[str, ...]] = {
    "adaptive_decay": ("adaptive_target",),
    "dry_allowed_length": ("dry_multiplier",),
    "dry_base": ("dry_multiplier",),
    "dry_penalty_last_n": ("dry_multiplier",),
    "dry_sequence_breakers": ("dry_multiplier",),
    "dry_range": ("dry_multiplier",),
    "dynatemp_exponent": ("dynatemp_range", "dynamic_temperature"),
    "dynatemp_high": ("dynamic_temperature",),
    "dynatemp_low": ("dynamic_temperature",),
    "mirostat_eta": ("mirostat",),
    "mirostat_tau": ("mirostat",),
    "penalize_nl": ("repeat_penalty", *PENALTIES),
    "repeat_last_n": ("repeat_penalty", *PENALTIES),
    "rep_pen_range": ("rep_pen",),
    "rep_pen_slope": ("rep_pen",),
    "repetition_context_size": ("repeat_penalty", *PENALTIES),
    "repetition_penalty_range": ("repeat_penalty", *PENALTIES),
    "smoothing_curve": ("smoothing_factor",),
    "xtc_threshold": ("xtc_probability",),
}
"""Unsupported fields that only say how other fields work: while those are off, any value has no effect."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # Parameters that most routes support, on those that do not
    **{name: (value,) for name, value in PENALTIES.items()},
    "ignore_eos": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "top_k": (0, -1),
    # vLLM and SGLang, and the routers in front of them
    "do_sample": (True,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
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
    "flat_logprobs": (False,),
    "endianness": ("native", "little"),
    "include_reasoning": (True, False),
    "length_penalty": (1,),
    "logprob_start_len": (-1,),
    "no_stop_trim": (False,),
    "priority": (0,),
    "prompt_logprobs": (False,),
    "separate_reasoning": (True, False),
    "skip_special_tokens": (True,),
    "skip_reading_prefix_cache": (True, False),
    "spaces_between_special_tokens": (True, False),
    "stream_reasoning": (True, False),
    "thinking_token_budget": (0,),
    "top_logprobs_num": (0,),
    # llama.cpp, Ollama and pages in front of them
    "adaptive_target": (-1,),
    "backend_sampling": (True, False),
    "context": (),
    "dry_multiplier": (0,),
    "grammar_lazy": (False,),
    "min_keep": (0,),
    "n_cmpl": (1,),
    "n_discard": (0,),
    "n_indent": (0,),
    "parse_tool_calls": (True,),
    "post_sampling_probs": (False,),
    "raw": (False,),
    "reasoning_budget": (0, -1),
    "reasoning_budget_tokens": (0, -1),
    "reasoning_in_content": (True, False),
    "safe_prompt": (False,),
    "t_max_predict_ms": (0, -1),
    "think": (False,),
    "thinking": ({"type": "disabled"},),
    "thinking_forced_open": (False,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "usage": ({"include": False},),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "n_keep": (0,),
    "n_probs": (0,),
    "repeat_penalty": (1,),
    "tfs_z": (1,),
    "timings_per_token": (False,),
    "typ_p": (1,),
    "typical_p": (1,),
    "verbose": (False,),
    "xtc_probability": (0,),
    "low_vram": (True, False),  # of a server's memory
    "max_thinking_tokens": (0,),
    "numa": (True, False),
    "thinking_budget": (0,),
    "thinking_budget_tokens": (0, -1),
    "use_mlock": (True, False),
    "use_mmap": (True, False),
    "web_search": (False,),
    # Parts of routers' objects: kv_transfer_params, session_params, provider
    "allow_fallbacks": (True, False),  # of a router to other servers
    "data_collection": ("allow", "deny"),  # nothing is kept
    "do_remote_decode": (False,),
    "do_remote_prefill": (False,),
    "enabled": (False,),
    "effort": ("none",),
    "exclude": (True, False),
    "require_parameters": (True, False),  # an unsupported one is refused anyway
    "route": ("fallback",),
    "sort": ("price", "throughput", "latency"),
    # Text Generation Inference
    "decoder_input_details": (False,),
    "details": (False,),
    "top_n_tokens": (0,),
    "watermark": (False,),
    # KoboldCpp, ExLlama and text-generation-webui
    "add_bos_token": (True, False),
    "auto_max_new_tokens": (False,),
    "ban_eos_token": (False,),
    "dynamic_temperature": (False,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "max_tokens_second": (0,),
    "no_repeat_ngram_size": (0,),
    "nsigma": (0,),
    "penalty_alpha": (0,),
    "rep_pen": (1,),
    "sampler_seed": (-1,),
    "skew": (0,),
    "smoothing_factor": (0,),
    "temperature_last": (False,),
    "tfs": (1,),
    "typical": (1,),
    # Services with OpenAI's API, and prompt caches of Anthropic's
    "cache_control": ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"}, {"type": "ephemeral", "ttl": "1h"}),
    "citation_options": ("disabled",),
    "defer_loading": (False,),
    "deferred": (False,),
    "disable_search": (True,),
    "disable_tool_validation": (False,),
    "eager_input_streaming": (True, False),
    "mask_sensitive_info": (False,),
    "partial": (False,),
    "perf_metrics_in_response": (False,),
    "prefix": (False,),
    "preserve_thinking": (False,),
    "raw_output": (False,),
    "reasoning_split": (False,),
    "search_parameters": ({"mode": "off"},),
    "speed": ("standard",),
    "tool_stream": (False,),
    # OpenAI
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "tool_choice": ("none",),
    "verbosity": ("medium",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "n": (1,),
    "parallel_tool_calls": (),
    "stream": (False,),
}


EMPTY_OBJECTS = [{"type": "array", "maxItems": 0}, {"type": "object", "maxProperties": 0}]


def _empty(depth: int) -> list[dict[str, Any]]:
    plain: list[dict[str, Any]] = [{"type": "null"}, {"type": "string", "maxLength": 0}, *EMPTY_OBJECTS]
    return [*plain, {"type": "object", "additionalProperties": {"anyOf": _empty(depth - 1)}}] if depth else plain


EMPTY = _empty(2)
"""JSON schemas of values that are neutral for every field; a schema has to end, so objects nest two deep."""


def document_neutral(schema: dict[str, Any]) -> None:
    """Document empty values in a body's JSON schema; other neutral values are too many to list."""
    schema["additionalProperties"] = {"anyOf": EMPTY}
    for name, field in schema.get("properties", {}).items():
        if name in OBJECTS | LISTS | NOT_EMPTY and "anyOf" in field:
            field["anyOf"] = [*field["anyOf"], *EMPTY_OBJECTS]


def is_neutral(name: str, value: Any, fields: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether this value of a field leaves every answer unchanged. fields: of the same object."""
    if name in TEXTS:
        return value is None
    if value is None or (isinstance(value, str | list | dict) and not value):
        return True
    if name in LABELS:
        return isinstance(value, str | int | float)
    if name in SUBORDINATE and isinstance(value, str | int | float | list):
        return all(_is_off(other, fields.get(other)) for other in SUBORDINATE[name])
    if value is False and name.startswith(EXTRAS):
        return True
    if any(_is_same(value, neutral) for neutral in NEUTRAL.get(name, ())):
        return True
    return isinstance(value, dict) and all(is_neutral(inner, one, value) for inner, one in value.items())


def without_confusion(name: str, value: Any) -> Any:
    """A supported field's value; an empty list or object is converted to the field's type."""
    if value not in ([], {}):
        return value
    if name in OBJECTS:
        return {}
    if name in LISTS:
        return []
    return None if name in NOT_EMPTY else value


def _is_same(value: Any, neutral: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, and true is not a number."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _is_off(name: str, value: Any) -> bool:
    return value is None or value == PENALTIES.get(name) or is_neutral(name, value)
