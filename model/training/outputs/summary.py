"""What a training made and what it cost."""

from dataclasses import dataclass


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
    """In optimizer steps: without evaluating and saving."""
    model_flops_per_second: float
    """tokens_per_second times `flops_per_token`."""
    model_flops_utilization: float
    """model_flops_per_second as a share of `matmul_peak_flops`, 0 to 1."""
    matmul_peak_flops: float
    """FLOP/s of a matrix product in the training's precision, measured at its start, summed over processes."""
    train_loss: float
    """Mean over the last logged steps, nats per token."""
    validation_loss: float
    """Of the weights that are kept, on the whole validation split, nats per token."""
    bits_per_byte: float
    best_step: int
    resumed_from_step: int
    """0 for a run in one go."""
    peak_memory_bytes: int
    precision: str
    device: str
    warnings: list[str]
    """What was still wrong with the training at its end, one line each (health.py); empty for a sound one."""
    samples: dict[str, str]
    """Prompt to the model's continuation."""
