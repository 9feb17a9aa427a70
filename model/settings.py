"""The typed settings of every stage: one dataclass per group of `configs/`, ranges checked where a value enters.

Hydra composes `configs/` into `ExperimentSettings` (unknown keys and wrong types are refused there); `__post_init__`
refuses values that no run could use. Each YAML file says what an option is, its unit and its default; a field that is
not explained there is explained here. No torch, no Hydra: importing this module is cheap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from model.errors import PipelineError


def _check(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise PipelineError(f"{name} is {value!r}: expected {expected}")


def _positive(group: str, settings: object, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(settings, name)
        _check(value > 0, f"{group}.{name}", value, "a number greater than 0")


@dataclass
class CorpusSettings:
    """Where documents come from and how they are split (`configs/corpus/`)."""

    source: Literal["stdlib", "docstrings", "files", "huggingface"] = "stdlib"
    paths: list[str] = field(default_factory=list)
    text_field: str = "text"
    response_field: str = ""
    dataset: str = ""
    dataset_config: str | None = None
    dataset_split: str = "train"
    document_bytes: int = 0
    split_by: Literal["hash", "position"] = "hash"
    validation_fraction: float = 0.1
    max_bytes: int = 0
    shard_bytes: int = 67_108_864
    licence: str = "unknown"

    @property
    def holds_conversations(self) -> bool:
        """Whether documents are prompts with responses, of which a part would be worth nothing."""
        return self.source == "docstrings" or bool(self.response_field)

    def __post_init__(self) -> None:
        _check(
            0 < self.validation_fraction < 1,
            "corpus.validation_fraction",
            self.validation_fraction,
            "a fraction between 0 and 1",
        )
        for name in ("document_bytes", "max_bytes"):
            _check(getattr(self, name) >= 0, f"corpus.{name}", getattr(self, name), "0 (no limit) or more bytes")
        _positive("corpus", self, ["shard_bytes"])
        if self.source == "files":
            _check(bool(self.paths), "corpus.paths", self.paths, "at least one path, glob or URL for source 'files'")
        if self.response_field:
            _check(self.source == "files", "corpus.response_field", self.response_field, "source 'files' (JSON Lines)")
        if self.source == "huggingface":
            _check(bool(self.dataset), "corpus.dataset", self.dataset, "a data set's name for source 'huggingface'")


@dataclass
class TokenizerSettings:
    """The vocabulary and the length of a window (`configs/tokenizer/`)."""

    kind: Literal["bpe", "char", "pretrained"] = "bpe"
    path: str = ""
    chat: bool = False
    vocab_size: int = 4096
    training_bytes: int = 33_554_432
    sequence_length: int = 1024

    def __post_init__(self) -> None:
        if self.kind == "bpe":
            _check(
                self.vocab_size >= 258, "tokenizer.vocab_size", self.vocab_size, "at least 258 (256 bytes, 2 specials)"
            )
        if self.kind == "pretrained":
            _check(bool(self.path), "tokenizer.path", self.path, "a checkpoint's folder for kind 'pretrained'")
        _check(self.training_bytes >= 0, "tokenizer.training_bytes", self.training_bytes, "0 (all of it) or more bytes")
        _check(self.sequence_length >= 8, "tokenizer.sequence_length", self.sequence_length, "at least 8 tokens")


@dataclass
class ModelSettings:
    """The shape of REX, with Hugging Face's field names (`configs/model/`)."""

    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    post_norm: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        _positive(
            "model",
            self,
            [
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "max_position_embeddings",
                "rope_theta",
                "rms_norm_eps",
                "initializer_range",
            ],
        )
        if self.head_dim is None:
            _check(
                self.hidden_size % self.num_attention_heads == 0,
                "model.hidden_size",
                self.hidden_size,
                f"a multiple of model.num_attention_heads ({self.num_attention_heads}), or set model.head_dim",
            )
        _check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "model.num_attention_heads",
            self.num_attention_heads,
            f"a multiple of model.num_key_value_heads ({self.num_key_value_heads})",
        )
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        _check(head_dim % 2 == 0, "model.head_dim", head_dim, "an even number, as rotary embeddings turn pairs")
        _check(0 <= self.attention_dropout < 1, "model.attention_dropout", self.attention_dropout, "0 to below 1")


@dataclass
class TrainingSettings:
    """How the model is trained (`configs/training/`); names are those of transformers.TrainingArguments."""

    max_steps: int = 500
    per_device_train_batch_size: int = 2
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    optim: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 1e-2
    muon_learning_rate: float = 2e-2
    muon_momentum: float = 0.95
    newton_schulz_steps: int = 5
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    z_loss: float = 0.0
    init_from: str = ""
    distill_from: str = ""
    distill_weight: float = 0.5
    distill_temperature: float = 1.0
    distill_top_k: int = 0
    warmup_steps: int = 20
    decay_fraction: float = 0.4
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    torch_compile: bool = False
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_steps: int = 100
    eval_windows: int = 64
    early_stopping_patience: int = 0
    save_steps: int = 100
    save_total_limit: int = 2
    logging_steps: int = 10
    seed: int = 0
    sample_prompts: list[str] = field(default_factory=lambda: ["def", "class", "import"])
    sample_tokens: int = 96
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _positive(
            "training",
            self,
            [
                "max_steps",
                "per_device_train_batch_size",
                "per_device_eval_batch_size",
                "gradient_accumulation_steps",
                "learning_rate",
                "muon_learning_rate",
                "newton_schulz_steps",
                "distill_temperature",
                "eval_steps",
                "eval_windows",
                "save_steps",
                "save_total_limit",
                "logging_steps",
            ],
        )
        for name in (
            "weight_decay",
            "max_grad_norm",
            "z_loss",
            "distill_top_k",
            "warmup_steps",
            "early_stopping_patience",
            "sample_tokens",
            "seed",
        ):
            _check(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "0 or more")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            _check(0 <= getattr(self, name) < 1, f"training.{name}", getattr(self, name), "0 to below 1")
        _check(0 <= self.distill_weight <= 1, "training.distill_weight", self.distill_weight, "a fraction, 0 to 1")
        _check(0 <= self.decay_fraction <= 1, "training.decay_fraction", self.decay_fraction, "a fraction, 0 to 1")
        _check(
            self.warmup_steps <= self.max_steps,
            "training.warmup_steps",
            self.warmup_steps,
            f"at most training.max_steps ({self.max_steps})",
        )


@dataclass
class QuantizationSettings:
    """The weights that are served (`configs/quantization/`)."""

    method: Literal["int8", "none"] = "int8"
    evaluation_windows: int = 32

    def __post_init__(self) -> None:
        _positive("quantization", self, ["evaluation_windows"])


@dataclass
class BenchmarkSettings:
    """What the report measures (`configs/benchmark/`)."""

    generated_tokens: list[int] = field(default_factory=lambda: [64, 256, 1024])
    prefill_tokens: list[int] = field(default_factory=lambda: [64, 256, 1000])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 8])
    batch_tokens: int = 64
    repeats: int = 3
    quality_windows: int = 64

    def __post_init__(self) -> None:
        _positive("benchmark", self, ["batch_tokens", "repeats", "quality_windows"])
        for name in ("generated_tokens", "prefill_tokens", "batch_sizes"):
            values = getattr(self, name)
            _check(bool(values) and min(values) > 0, f"benchmark.{name}", values, "a list of numbers greater than 0")


@dataclass
class ServingSettings:
    """How the generation service runs (`configs/serving/`); fixed in the Bento, overridden at start by environment."""

    kv_cache: bool = True
    quantized: bool = True
    mixed_precision: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_batch_size: int = 16
    kv_cache_mib: int = 0
    prefill_chunk: int = 256
    max_queue: int = 16
    max_queue_tokens: int = 65_536
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 300.0
    step_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    max_body_bytes: int = 1_048_576
    cors_origins: str = ""
    allow_anonymous: bool = False

    def __post_init__(self) -> None:
        positive = ["max_batch_size", "prefill_chunk", "max_queue", "max_queue_tokens", "max_body_bytes"]
        positive += ["queue_timeout_s", "request_timeout_s", "step_timeout_s"]
        _positive("serving", self, positive)
        _check(self.kv_cache_mib >= 0, "serving.kv_cache_mib", self.kv_cache_mib, "0 (as max_batch_size needs) or MiB")
        _check(self.drain_timeout_s >= 0, "serving.drain_timeout_s", self.drain_timeout_s, "0 or more seconds")


@dataclass
class ExperimentSettings:
    """One experiment: everything that decides what the pipeline makes (`configs/experiment/`)."""

    name: str
    description: str = ""
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)

    def __post_init__(self) -> None:
        _check(
            self.tokenizer.sequence_length <= self.model.max_position_embeddings,
            "tokenizer.sequence_length",
            self.tokenizer.sequence_length,
            f"at most model.max_position_embeddings ({self.model.max_position_embeddings})",
        )
        for name in ("generated_tokens", "prefill_tokens"):
            longest = max(getattr(self.benchmark, name))
            _check(
                longest <= self.model.max_position_embeddings,
                f"benchmark.{name}",
                longest,
                f"at most model.max_position_embeddings ({self.model.max_position_embeddings}) tokens",
            )
