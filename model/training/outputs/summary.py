"""Results and costs of a training."""

from dataclasses import dataclass, field


@dataclass
class TrainingSummary:
    """Results and cost of a training."""

    parameters: int
    steps: int
    tokens: int
    """Tokens trained on, repeated ones counted each time."""
    seconds: float
    """Wall time of the training loop, evaluations included, over all attempts of a resumed run."""
    tokens_per_second: float
    """Seconds in optimizer steps, without evaluation and saving."""
    model_flops_per_second: float
    """tokens_per_second times `flops_per_token`."""
    model_flops_utilization: float
    """model_flops_per_second as a share of `matmul_peak_flops`, 0 to 1."""
    matmul_peak_flops: float
    """FLOP/s of a matrix product in the training's precision, measured at its start, summed over processes."""
    train_loss: float
    """Mean over the last logged steps, nats per token."""
    validation_loss: float
    """Loss of the saved weights on the whole validation split, nats per token."""
    bits_per_byte: float
    best_step: int
    resumed_from_step: int
    """Number of resumes; 0 for an uninterrupted run."""
    peak_memory_bytes: int
    precision: str
    device: str
    warnings: list[str]
    """Health warnings that held at the end, one line each (health.py); empty for a healthy training."""
    samples: dict[str, str]
    """Continuations by prompt."""
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of a mixture, loss, bits per byte and bytes of the validation split by source."""
    preferences: dict[str, float] = field(default_factory=dict)
    """Of preference tuning, the number of pairs, and accuracy, margin and loss of those held out."""
