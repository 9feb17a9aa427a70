"""The typed settings of every stage: one dataclass per group of `configs/`, ranges checked where a value enters.

Text, unit, default and range of an option are declared in its field here, and nowhere else (`option.py`). Hydra
composes `configs/` into `ExperimentSettings`; unknown keys and wrong types are refused there.
"""

from model.settings.architecture import ModelSettings
from model.settings.benchmark import BenchmarkSettings
from model.settings.compute import ComputeSettings
from model.settings.corpus import CorpusSettings
from model.settings.evaluation import EvaluationSettings
from model.settings.experiment import GROUPS, ExperimentSettings
from model.settings.option import Option, Settings, options
from model.settings.quantization import QuantizationSettings
from model.settings.serving import ServingSettings
from model.settings.tokenizer import TokenizerSettings
from model.settings.training import TrainingSettings

__all__ = [
    "GROUPS",
    "BenchmarkSettings",
    "ComputeSettings",
    "CorpusSettings",
    "EvaluationSettings",
    "ExperimentSettings",
    "ModelSettings",
    "Option",
    "QuantizationSettings",
    "ServingSettings",
    "Settings",
    "TokenizerSettings",
    "TrainingSettings",
    "options",
]
