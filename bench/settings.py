"""Settings for a measurement from the files of `configs/`, so that it measures exactly an experiment's settings."""

from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Settings = TypeVar("Settings")


def read_settings(kind: type[Settings], file: str) -> Settings:
    """The dataclass `kind` with the values of `configs/FILE`."""
    merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.load(CONFIGS / file))
    settings: Settings = OmegaConf.to_object(merged)  # type: ignore[assignment]
    return settings
