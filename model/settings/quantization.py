"""The weights that are served (`configs/quantization/`)."""

from dataclasses import dataclass
from typing import Literal

from model.settings.option import Settings, option


@dataclass
class QuantizationSettings(Settings, group="quantization"):
    """The weights that are served (`configs/quantization/`)."""

    method: Literal["int8", "int4", "none"] = option(
        "int8",
        "int8: weights with a scale for each output channel; int4: half the size, with a scale for each 32 inputs, and "
        "embedding and head in int8; none: the full-precision weights are served.",
    )
    evaluation_windows: int = option(
        32,
        "Validation windows for the loss in quality.",
        unit="windows",
        above=0,
        maximum=10**9,
    )
