"""A registered model as a user of MLflow loads it, by name and alias.

`tests/e2e/test_pipeline.py` loads one in a process that has only MLflow and transformers.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import pyfunc
from mlflow import transformers as flavor
from transformers import AutoTokenizer

from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.versions import register
from llm_assets.versions.mlflow_model import write_mlflow_model
from llm_assets.versions.promotion import set_by_hand
from llm_assets.versions.register import register_version
from model.progress import silent
from model.quantization import _write_model
from model.weights.loading import load_model, read_method
from model.weights.quantized_rex import RexForCausalLM
from tests.support.tiny import save_tiny_model

PROMPT, TOKENS = "def main", 6

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(params=["none", "int8", "int4"])
def model_dir(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> Path:
    """A directory as `quantized_model` writes it."""
    directory = tmp_path / "model"
    directory.mkdir()
    _write_model(request.param, checkpoint, directory)
    return directory


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The warnings of MLflow and transformers, which print them past pytest."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("mlflow", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def register_model(tracking: MlflowTracking, name: str, directory: Path, *, candidate: bool = True) -> None:
    client, experiment_id = tracking.client()
    register_version(
        client,
        client.create_run(experiment_id).info.run_id,
        name,
        directory,
        asset="quantized_model",
        bits_per_byte=1.5,
        evaluation_text="a",
        candidate=candidate,
        content_hash="one",
        log=silent,
    )


def continuation(directory: Path) -> str:
    """The prompt and its greedy continuation by the project's own loader."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), load_model(directory)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return str(tokenizer.decode(model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0]))


def test_the_champion_generates_by_name_in_both_of_mlflows_flavors(
    mlflow: MlflowTracking, tracking_uri: str, model_dir: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    name = f"rex-{mlflow.experiment}"
    register_model(mlflow, name, model_dir)
    uri, expected = f"models:/{name}@champion", continuation(model_dir)
    assert expected.startswith(PROMPT) and expected != PROMPT
    pipeline = flavor.load_model(uri)
    assert pipeline(PROMPT, max_new_tokens=TOKENS, do_sample=False)[0]["generated_text"] == expected
    ids = torch.arange(5)[None]
    assert torch.equal(pipeline.model(ids).logits, load_model(model_dir)(ids).logits)
    loaded = pyfunc.load_model(uri)
    said.clear()
    assert loaded.predict([PROMPT, PROMPT], params={"max_new_tokens": TOKENS}) == [expected, expected]
    assert loaded.predict(PROMPT)[0].startswith(expected)
    assert not said


def test_a_version_without_mlflows_files_loads_once_it_is_champion(
    mlflow: MlflowTracking,
    tracking_uri: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    name = f"rex-{mlflow.experiment}"
    monkeypatch.setattr(register, "is_model", lambda _: False)  # as releases before these files registered a model
    register_model(mlflow, name, checkpoint, candidate=False)
    client, _ = mlflow.client()
    set_by_hand(client, name, "1", "it reads well", log=print)
    assert capsys.readouterr().out == f"{name} version 1: added the files that `mlflow.pyfunc.load_model` needs\n"
    loaded = pyfunc.load_model(f"models:/{name}@champion")
    assert loaded.predict(PROMPT, params={"max_new_tokens": TOKENS}) == [continuation(checkpoint)]


def test_a_version_that_cannot_be_completed_is_named_and_becomes_champion(
    mlflow: MlflowTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer_config.json").write_text("no JSON")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(register, "is_model", lambda _: False)
    name = f"rex-{mlflow.experiment}"
    register_model(mlflow, name, tmp_path, candidate=False)
    client, _ = mlflow.client()
    set_by_hand(client, name, "1", "it reads well", log=print)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name} version 1: `mlflow.pyfunc.load_model` cannot load it (")
    assert line.endswith("): train the model again")
    assert str(client.get_model_version_by_alias(name, "champion").version) == "1"


def test_a_version_loads_after_its_folder_has_moved(
    tracking_uri: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shutil.copy(tracking_uri.removeprefix("sqlite:///"), here / "mlflow.db")  # with its tables, which take seconds
    register_model(
        MlflowTracking(tracking_uri=f"sqlite:///{here}/mlflow.db", experiment="moved"), "rex-moved", checkpoint
    )
    here.rename(there)
    uri = f"sqlite:///{there}/mlflow.db"
    MlflowTracking(tracking_uri=uri, experiment="moved").client()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    loaded = pyfunc.load_model("models:/rex-moved@champion")
    assert loaded.predict(PROMPT, params={"max_new_tokens": TOKENS}) == [continuation(checkpoint)]


def test_weights_are_kept_once_and_only_quantized_models_bring_code(model_dir: Path, tmp_path: Path) -> None:
    write_mlflow_model(model_dir, tmp_path / "written", run_id="one")
    written = {path.relative_to(tmp_path / "written") for path in (tmp_path / "written").rglob("*") if path.is_file()}
    assert not [path for path in written if path.suffix == ".safetensors"]
    code = {path for path in written if path.suffix == ".py"}
    assert Path("code/rex_predict.py") in code
    assert (len(code) > 1) == (read_method(model_dir) != "none")


def test_a_quantized_model_takes_a_dtype_and_refuses_what_it_cannot_honor(checkpoint: Path, tmp_path: Path) -> None:
    _write_model("int8", checkpoint, tmp_path)
    folder = str(tmp_path / "quantized")
    assert RexForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, revision=None).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="dtype alone, not attn_implementation"):
        RexForCausalLM.from_pretrained(folder, attn_implementation="eager")
