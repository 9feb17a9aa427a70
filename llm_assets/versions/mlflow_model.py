"""The files that let MLflow load a registered model, written beside the artifact's own: no weights are copied.

    mlflow.transformers.load_model("models:/rex-smoke@champion")        a transformers pipeline
    mlflow.pyfunc.load_model("models:/rex-smoke@champion").predict("def ", params={"max_new_tokens": 20})

    MLmodel, requirements.txt, python_env.yaml    MLflow's format of models, the flavors `transformers` and `pyfunc`
    components/tokenizer/                         a copy of the tokenizer, where the flavor expects it
    code/                                         the loader for `pyfunc` (`rex_predict.py`)
    quantized/, code/rex_model/                   of a quantized model: what transformers loads, and its modules

They are written directly, because MLflow's own `save_model` takes a model in memory and writes its weights again. A
checkpoint in full precision brings its code; the loader of quantized models and the modules of `model/` that it imports
travel as the package `rex_model`: another package may be called `model` there.

A version that was registered before these files were written gets them once it becomes champion or is shown
(`add_mlflow_model`).
"""

import json
import modulefinder
import platform
import re
import shutil
import tempfile
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml

from llm_assets.versions import rex_predict
from model.artifact import write_json
from model.progress import Log

if TYPE_CHECKING:
    from mlflow import MlflowClient

PACKAGE, CODE, QUANTIZED = "rex_model", "code", "quantized"
FOLDER = "model"
"""The folder of a version among the artifacts of its MLflow run."""
REQUIREMENTS = ("mlflow", "safetensors", "torch", "transformers")
PARAMETERS = (
    ("max_new_tokens", "integer", 64),
    ("do_sample", "boolean", False),
    ("temperature", "double", 1.0),
    ("top_k", "integer", 50),
    ("top_p", "double", 1.0),
)
"""Parameters of `predict`: name, MLflow's type, default. They are those of transformers' `generate`."""


def is_model(directory: Path) -> bool:
    """Whether a directory is a REX model with its tokenizer."""
    return (directory / "config.json").is_file() and (directory / "tokenizer_config.json").is_file()


def add_mlflow_model(client: "MlflowClient", name: str, number: str, log: Log) -> None:
    """Add these files to a version that has none; a failure is a line in `log`, as the service needs none of them."""
    try:
        run_id = client.get_model_version(name, number).run_id or ""
        paths = {file.path for file in client.list_artifacts(run_id, FOLDER)}
        if f"{FOLDER}/MLmodel" in paths or f"{FOLDER}/tokenizer_config.json" not in paths:
            return
        with tempfile.TemporaryDirectory(prefix="rex-version-") as folder:
            model_dir = Path(client.download_artifacts(run_id, FOLDER, folder))
            written = Path(folder) / "written"
            write_mlflow_model(model_dir, written, run_id=run_id)
            client.log_artifacts(run_id, str(written), FOLDER)
        log(f"{name} version {number}: added the files that `mlflow.pyfunc.load_model` needs")
    except Exception as error:  # noqa: BLE001 - a tracking store and an old model's files may raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        log(f"{name} version {number}: `mlflow.pyfunc.load_model` cannot load it ({reason}): train the model again")


def write_mlflow_model(model_dir: Path, into: Path, *, run_id: str) -> None:
    """Write to `into` what MLflow needs beside the files of `model_dir` to load them.

    run_id: of the MLflow run that holds the files. Raises PipelineError if `model_dir` is not a model's.
    """
    from model.quantization import TOKENIZER_FILES
    from model.weights import quantized_rex
    from model.weights.loading import read_method

    is_quantized = read_method(model_dir) != "none"
    tokenizer = into / "components" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (into / CODE).mkdir()
    shutil.copy(rex_predict.__file__, into / CODE)
    for path in (found for pattern in TOKENIZER_FILES for found in model_dir.glob(pattern)):
        shutil.copyfile(path, tokenizer / path.name)
    if is_quantized:
        modules = _modules(quantized_rex)
        package = modules["model"].parent
        targets = {name: into / CODE / PACKAGE / file.relative_to(package) for name, file in modules.items()}
        targets[quantized_rex.__name__] = into / QUANTIZED / f"{quantized_rex.MODULE}.py"
        for name, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_renamed(modules[name]), encoding="utf-8")
        write_json(into / QUANTIZED / "config.json", quantized_rex.CONFIG)
    requirements = [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]
    (into / "requirements.txt").write_text("\n".join(requirements) + "\n")
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (into / "python_env.yaml").write_text(yaml.safe_dump(environment))
    kind = json.loads((model_dir / "tokenizer_config.json").read_text()).get("tokenizer_class")
    described = {
        "artifact_path": "model",
        "flavors": {
            "python_function": {
                "loader_module": rex_predict.__name__.rpartition(".")[2],
                "python_version": platform.python_version(),
                "env": {"virtualenv": "python_env.yaml"},
                "code": CODE,
            },
            "transformers": {
                "task": "text-generation",
                "instance_type": "TextGenerationPipeline",
                "pipeline_model_type": "RexForCausalLM",
                "model_binary": QUANTIZED if is_quantized else ".",
                "components": ["tokenizer"],
                "tokenizer_type": kind or "PreTrainedTokenizerFast",
                "transformers_version": version("transformers"),
                **({"code": CODE} if is_quantized else {}),
            },
        },
        "mlflow_version": version("mlflow"),
        "model_uuid": uuid.uuid4().hex,
        "run_id": run_id,
        "signature": {name: json.dumps(value) for name, value in _signature().items()},
        "utc_time_created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }
    (into / "MLmodel").write_text(yaml.safe_dump(described))


def _signature() -> dict[str, Any]:
    """A text or a list of them in, as many texts out."""
    column = [{"type": "string", "required": True}]
    parameters = [{"name": name, "type": kind, "default": value, "shape": None} for name, kind, value in PARAMETERS]
    return {"inputs": column, "outputs": column, "params": parameters}


def _modules(start: ModuleType) -> dict[str, Path]:
    """The files of `model/` that a module imports, itself included and inside functions too, by module name."""
    root = Path(str(start.__file__)).parents[start.__name__.count(".")]
    finder = modulefinder.ModuleFinder(path=[str(root)])
    finder.import_hook(start.__name__)
    found = {name: Path(str(vars(module)["__file__"])) for name, module in finder.modules.items()}
    return {name: file for name, file in found.items() if name.split(".")[0] == "model"}


def _renamed(source: Path) -> str:
    """The text of a module of `model/` as one of PACKAGE."""
    text = source.read_text(encoding="utf-8")
    return re.sub(r"^(\s*(?:from|import) )model\b", rf"\1{PACKAGE}", text, flags=re.MULTILINE)
