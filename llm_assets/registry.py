"""The registry of stages: one entry for each asset, read by everything that lists or orders them.

The definitions, jobs, checks, manifests and `python -m llm_assets.latest` read it, so that a new stage is one entry
here and one module in `llm_assets/assets/`. Plain data: imports no Dagster and none of the modules it names.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.containers.container import IMAGE_GB

SOURCE_TEXT = "source_text"
"""The external asset that represents the source text of a corpus (`experiments/observed.py`)."""
QUANTIZATION_ERROR, QUANTIZATION_WARNING = 0.05, 0.02
"""Relative loss in bits per byte above which a quantized model is refused, or warned about."""
SHARED_WARNING = 0.1
"""Share of the validation split's text in the training split above which a corpus is warned about."""


@dataclass(frozen=True)
class StageSpec:
    """One stage of the pipeline: the asset `name`.

    upstream: assets that it is made from. settings: groups of the experiment's settings that it reads itself.
    external: other assets that it reads and that no stage makes.
    checks: description by check name; all block. preload: modules that its steps import, loaded once per run.
    code: folders besides `model/` whose code determines its output.
    module: where the asset of this name is defined; empty: `llm_assets.assets.<name>`.
    eager: whether automation materializes it once its upstream is newer (`llm_assets/jobs/automation.py`).
    """

    name: str
    description: str
    group: str
    kinds: tuple[str, ...]
    code_version: str
    settings: tuple[str, ...] = ()
    external: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    checks: Mapping[str, str] = field(default_factory=dict)
    pool: str | None = None
    preload: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    module: str = ""
    eager: bool = False


PIPELINE = (
    StageSpec(
        "corpus",
        "Documents as Parquet shards (id, text, source, split): cleaned, exact duplicates dropped, split by their "
        "content. From local files, URLs, a Hugging Face dataset or, by default, the Python standard library of the "
        "interpreter.",
        group="data",
        kinds=("parquet", "python"),
        code_version="1",
        settings=("corpus",),
        external=(SOURCE_TEXT,),
        checks={
            "splits_are_disjoint": "Both splits hold documents, and none is in both.",
            "splits_share_little_text": f"At most {SHARED_WARNING:.0%} of the validation split's runs of 64 characters "
            "occur in the training split (else a warning). Counts near-duplicates if `rensa` is installed.",
        },
    ),
    StageSpec(
        "tokenized_dataset",
        "A tokenizer trained on the train split, and both splits as memory-mapped tokens with document boundaries. "
        "Holds the bytes that each token stands for, so that bits per byte are exact.",
        group="data",
        kinds=("huggingface", "numpy"),
        code_version="1",
        settings=("tokenizer",),
        upstream=("corpus",),
        checks={"round_trip_is_exact": "Decoding gives back the bytes of the documents."},
    ),
    StageSpec(
        "trained_checkpoint",
        "`RexForCausalLM` in safetensors with its tokenizer, code, model card, curves and samples. A run that was "
        "killed, retried or executed again continues at its last checkpoint.",
        group="model",
        kinds=("pytorch", "huggingface"),
        code_version="3",
        settings=("model", "training"),
        upstream=("tokenized_dataset",),
        checks={
            "beats_baselines": "The loss is finite, and bits per byte are below those of a uniform distribution over "
            "tokens (else an error) and of token frequencies (else a warning).",
            "trains_soundly": "At the end of the training gradients change, every parameter has moved, and the "
            "validation loss is below that of token frequencies (else a warning, and the model is not a "
            "candidate for champion).",
        },
        pool="device",
        preload=("model.training.train",),
    ),
    StageSpec(
        "quantized_model",
        "The checkpoint's weights in int8 or int4 (or unchanged, method `none`), with the measured loss in quality.",
        group="model",
        kinds=("pytorch",),
        eager=True,
        code_version="1",
        settings=("quantization",),
        upstream=("trained_checkpoint", "tokenized_dataset"),
        checks={
            "keeps_quality": f"Bits per byte are at most {QUANTIZATION_ERROR:.0%} above full precision's (else an "
            f"error), or {QUANTIZATION_WARNING:.0%} (else a warning)."
        },
        preload=("model.quantization",),
    ),
    StageSpec(
        "exported_model",
        "The checkpoint for other engines: GLM-4 or Llama layout in safetensors, int8 in the compressed-tensors "
        "layout, GGUF in full precision and Q8_0 (in Q4_0 too if the quantized model is int4), an Ollama Modelfile, a "
        "model card and checksums. Each installed engine is checked to run the same model; `certificates.json` has the "
        "comparisons.",
        group="release",
        kinds=("huggingface",),
        eager=True,
        code_version="2",
        upstream=("trained_checkpoint", "quantized_model", "tokenized_dataset"),
        checks={
            "is_the_same_model": "Token ids, chat templates and greedy continuations are equal, log-probabilities and "
            "bits per byte within stated bounds, in stock transformers and, if they are installed, with int8 weights "
            "in compressed-tensors and in llama.cpp."
        },
        pool="device",
        preload=("model.export.certified",),
    ),
    StageSpec(
        "benchmark_report",
        "Quality, speed and memory of both models, in the engine that serves and plainly with and without KV cache, "
        "and the exported model in other engines: JSON, Markdown and plots.",
        group="release",
        kinds=("pytorch", "markdown"),
        eager=True,
        code_version="3",
        settings=("benchmark",),
        upstream=("trained_checkpoint", "quantized_model", "exported_model", "tokenized_dataset"),
        checks={
            "is_fit_for_release": "The KV cache makes decoding faster, bits per byte are not above the champion's by "
            "more than chance, and the exported model agrees with the checkpoint (else a warning)."
        },
        pool="device",
        preload=("bench.report.report",),
        code=("bench/report",),
    ),
    StageSpec(
        "packaged_bento",
        "The served model in BentoML's model store, and a Bento built from `bento/`, both versioned by their content. "
        "The artifact is `bento.json`: the tags, their sizes and the command that serves the Bento.",
        group="release",
        kinds=("bentoml",),
        eager=True,
        code_version="1",
        settings=("serving",),
        upstream=("trained_checkpoint", "quantized_model", "benchmark_report"),
        checks={"is_in_store": "The Bento and its model are in BentoML's stores."},
    ),
)
"""The stages of `llm_pipeline` in topological order."""

UP_TO_CHECKPOINT = tuple(
    itertools.takewhile(lambda name: name != "quantized_model", (stage.name for stage in PIPELINE))
)
"""The stages of `training_pipeline`."""

IMAGES = tuple(
    StageSpec(
        f"container_image_{device}",
        f"An image of the generation service for {device.upper()}s, tagged by its content. The artifact is "
        "`image.json` (tag, size, labels, the command that runs it) and the lock of its packages.",
        group="images",
        kinds=("docker",),
        code_version="1",
        upstream=("trained_checkpoint", "packaged_bento"),
        checks={
            "fits_the_device": "torch is a CUDA build and CUDA's libraries are present if and only if it is a GPU "
            "image; the user is not root.",
            "is_small": f"The image has at most {gigabytes} GB (else a warning).",
        },
        module="llm_assets.assets.container_image",
    )
    for device, gigabytes in IMAGE_GB.items()
)
"""Stages that need a container engine."""

EVALUATION = (
    StageSpec(
        "evaluation_report",
        "Scores of the trained or the quantized model on tasks of lm-eval, by name or from YAML files: JSON and "
        "Markdown.",
        group="release",
        kinds=("python", "markdown"),
        code_version="1",
        settings=("evaluation",),
        upstream=("trained_checkpoint", "quantized_model"),
        pool="device",
        code=("bench/report",),
    ),
)
"""Stages that need lm-eval."""

_BY_NAME = {stage.name: stage for stage in (*PIPELINE, *IMAGES, *EVALUATION)}


def stage_spec(name: str) -> StageSpec:
    """The entry of asset `name`. Raises KeyError."""
    return _BY_NAME[name]


def settings_asset(group: str) -> str:
    """The asset that represents a group of settings (`experiments/observed.py`)."""
    return f"{group}_settings"


def settings_groups(name: str) -> list[str]:
    """The groups of settings that determine asset `name`: its own and those of its upstream, in pipeline order."""
    spec = stage_spec(name)
    groups = [group for upstream in spec.upstream for group in settings_groups(upstream)]
    return list(dict.fromkeys([*groups, *spec.settings]))


def model_name(experiment: str) -> str:
    """The one name of an experiment's model: in MLflow's registry, BentoML's stores and as image repository.

    Lower case, as BentoML and container engines require.
    """
    return f"rex-{experiment.lower()}"
