"""Neutral values of unsupported fields: explicit defaults from other servers' clients, and labels.

An unsupported field is refused by name, unless its value would not change the answer. Null, an empty list and an empty
object are neutral for every field; other values are listed with their fields.
"""

from typing import Any

TEXTS = {"context", "input", "messages", "prompt"}
"""Fields with the text itself, on this route or another: an empty one is an error."""
LABELS = {
    "cache_salt", "guided_decoding_backend", "keep_alive", "prompt_cache_retention", "request_id", "rid",
}  # fmt: skip
"""Labels of a request, cache hints, and choices that do not change the text."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # vLLM and SGLang, and the routers in front of them
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
    "dry_multiplier": (0, 0.0),
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
    # OpenAI
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


def is_neutral(name: str, value: Any) -> bool:
    """Whether this value of a field leaves every answer unchanged."""
    if name in TEXTS:
        return False
    if value is None or (isinstance(value, list | dict) and not value):
        return True
    if name in LABELS:
        return isinstance(value, str | int | float)
    return any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(name, ()))
