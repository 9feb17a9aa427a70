"""One experiment: all settings that determine the pipeline's results (`configs/experiment/`)."""

from dataclasses import dataclass, field
from typing import Any

from model.settings.architecture import ModelSettings
from model.settings.benchmark import BenchmarkSettings
from model.settings.compute import ComputeSettings
from model.settings.corpus import CorpusSettings
from model.settings.evaluation import EvaluationSettings
from model.settings.option import Settings, expect
from model.settings.quantization import QuantizationSettings
from model.settings.serving import ServingSettings
from model.settings.tokenizer import TokenizerSettings
from model.settings.training import TrainingSettings

GROUPS: dict[str, type[Settings]] = {
    settings.group: settings
    for settings in (
        CorpusSettings,
        TokenizerSettings,
        ModelSettings,
        TrainingSettings,
        QuantizationSettings,
        BenchmarkSettings,
        ServingSettings,
        ComputeSettings,
        EvaluationSettings,
    )
}
"""The settings class of each folder of `configs/`, in the order of the pipeline."""

_MAX_TOKENS_IN_A_PASS = 2**26


@dataclass
class ExperimentSettings:
    """One experiment: all settings that determine the pipeline's results (`configs/experiment/`)."""

    name: str
    description: str = ""
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        context = self.model.max_position_embeddings
        within_context = f"at most model.max_position_embeddings ({context})"
        length = self.tokenizer.sequence_length
        expect(length <= context, "tokenizer.sequence_length", length, within_context)
        for name in ("generated_tokens", "prefill_tokens"):
            longest = max(getattr(self.benchmark, name))
            expect(longest <= context, f"benchmark.{name}", longest, f"{within_context} tokens")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            windows = getattr(self.training, name)
            most = _MAX_TOKENS_IN_A_PASS // length
            expect(
                windows <= most, f"training.{name}", windows, f"at most {most:,} windows of {length:,} tokens in a pass"
            )
        self._check_shared_batch()
        is_local = self.compute.engine == "local" or not self.training.preferences
        expect(is_local, "compute.engine", self.compute.engine, "'local' for training.preferences")
        if self.compute.sharding != "none":
            self._check_sharding()

    def _check_shared_batch(self) -> None:
        processes = self.compute.processes * max(self.compute.nodes, 1)
        batch = self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps
        expect(
            batch % processes == 0,
            "compute.processes times compute.nodes",
            processes,
            f"a number that divides the {batch:,} windows of a step (training.per_device_train_batch_size times "
            "training.gradient_accumulation_steps)",
        )
        expect(
            processes == 1 or not self.model.attention_dropout,
            "model.attention_dropout",
            self.model.attention_dropout,
            f"0 for {processes} training processes, as each would drop other weights than one process does",
        )

    def _check_sharding(self) -> None:
        for name in ("torch_compile", "lora_rank", "distill_from"):
            value = getattr(self.training, name)
            expect(not value, f"training.{name}", value, f"none with compute.sharding {self.compute.sharding!r}")

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "ExperimentSettings":
        """The settings that `dataclasses.asdict` made a record of."""
        values: dict[str, Any] = {
            name: GROUPS[name](**value) if name in GROUPS else value for name, value in record.items()
        }
        return cls(**values)
