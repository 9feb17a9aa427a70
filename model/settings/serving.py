"""How the generation service runs (`configs/serving/`)."""

from dataclasses import dataclass
from typing import Literal

from model.settings.option import Settings, option

_DAY_S = 86_400


@dataclass
class ServingSettings(Settings, group="serving"):
    """How the generation service runs (`configs/serving/`); fixed in the Bento, overridden at start by environment."""

    engine: Literal["rex", "vllm"] = option(
        "rex",
        "What generates the texts; vllm: vLLM in a separate process, for GPUs and large models, without embeddings.",
    )
    kv_cache: bool = option(
        True, "Keep keys and values of earlier tokens; false: recompute them for each token, for comparison."
    )
    quantized: bool = option(True, "Serve the quantized weights; false: those in full precision.")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Of activations, keys and values, and weights that are not quantized; auto: bfloat16 on a GPU that computes it "
        "fast, else as stored. Processors with AMX or AVX512-BF16 compute bfloat16 fast, too.",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU if there is one.")
    step: Literal["auto", "reference", "native", "graphs"] = option(
        "auto", "Implementation of the engine's step; auto: the fastest that runs the model on the serving machine."
    )
    max_batch_size: int = option(
        0,
        "Requests that generate at once; for each 16, one more whose answer has at most 64 tokens. 0: 16 on a "
        "processor, 64 on a GPU.",
        unit="requests",
        minimum=0,
        maximum=4096,
    )
    kv_cache_mib: int = option(
        0,
        "Most memory for keys and values: a request waits until its prompt and answer fit. 0: max_batch_size contexts, "
        "on a GPU in 45 % of its free memory at most.",
        unit="MiB",
        minimum=0,
        maximum=2**24,
    )
    prefill_chunk: int = option(
        256,
        "Tokens of a step with prefill, decoded ones included: bounds how long a prompt delays running texts. "
        "While several clients send requests: as many as take 5 ms, at least a sixteenth.",
        unit="tokens",
        above=0,
        maximum=2**20,
    )
    speculative_tokens: int = option(
        8,
        "Most tokens that a step proposes for a text, where it repeats itself, and checks at once: the text stays the "
        "same. Only with the step native; 0: none.",
        unit="tokens",
        minimum=0,
        maximum=16,
    )
    max_queue: int = option(
        128, "Most waiting requests; more are answered 429.", unit="requests", above=0, maximum=65_536
    )
    max_queue_tokens: int = option(
        262_144, "Most prompt tokens of waiting requests; more are answered 429.", unit="tokens", above=0, maximum=2**30
    )
    queue_timeout_s: float = option(
        60.0, "Time limit from a request's arrival to its start; then 503.", unit="seconds", above=0, maximum=_DAY_S
    )
    request_timeout_s: float = option(
        300.0,
        "Time limit from a request's arrival to its last token; then 504, or an error in the stream.",
        unit="seconds",
        above=0,
        maximum=_DAY_S,
    )
    step_timeout_s: float = option(
        60.0,
        "Time limit of one step of the model; a longer one counts as hung, and the engine restarts, once.",
        unit="seconds",
        above=0,
        maximum=_DAY_S,
    )
    drain_timeout_s: float = option(
        30.0, "Grace period of running requests after SIGTERM.", unit="seconds", minimum=0, maximum=_DAY_S
    )
    max_body_bytes: int = option(
        1_048_576, "Largest request body; a larger one is answered 413.", unit="bytes", above=0, maximum=2**30
    )
    cors_origins: str = option(
        "", "Websites whose pages may call the service, comma separated; * for all; empty: none."
    )
    allow_anonymous: bool = option(False, "Without API keys, accept every client, on all addresses.")
