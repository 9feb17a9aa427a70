"""A real MLflow server, and tiny models as versions of a registered model, the way the pipeline registers them."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_assets.artifacts.manifest import seal
from llm_assets.resources.tracked_run import TrackedRun
from llm_assets.versions.promotion import Contest
from model.generation.engine import Engine
from model.generation.requests import GenerationRequest, SamplingParameters, TextPiece
from model.settings import TokenizerSettings
from model.text.tokenizer import train_tokenizer
from tests.bento.running_service import GREEDY
from tests.e2e.workplace import BIN, REPO, free_port, stop, wait_for
from tests.support.paired_scores import compare_numbers
from tests.support.tiny import TEXT, tiny_model

CONTEXT = 4096


@contextmanager
def mlflow_server(folder: Path, *, as_make_ui: bool = False) -> Iterator[str]:
    """The address of a tracking server with its database and artifacts below `folder`.

    as_make_ui: started as `make ui` does; it keeps the artifacts in a folder that clients on this machine write to.
    """
    port, log = free_port(), folder / "mlflow.log"
    command = [str(BIN / "mlflow"), "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    if as_make_ui:
        command = [str(BIN / "python"), "-m", "llm_assets.instance.mlflow_server", "127.0.0.1", str(port)]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=REPO,
            env={**os.environ, **quiet, "LLM_ASSETS_VAR": str(folder)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def save_version(directory: Path, *, seed: int, vocab_size: int) -> str:
    """A sealed model directory; returns how the model continues `GREEDY`."""
    tokenizer = train_tokenizer(TokenizerSettings(vocab_size=vocab_size, sequence_length=96), [TEXT] * 8)
    model = tiny_model(tokenizer, seed=seed, max_position_embeddings=CONTEXT)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    provenance = {"experiment": "tiny", "config": {}, "code_version": "1", "upstream": {}, "dagster_run_id": "none"}
    seal(directory, asset="quantized_model", mlflow_run_id=None, **provenance)
    engine = Engine(model, tokenizer)
    request = GenerationRequest(
        engine.encode(GREEDY["prompt"]), GREEDY["max_tokens"], SamplingParameters(temperature=0), ignore_eos=True
    )
    text = "".join(event.text for event in engine.submit(request) if isinstance(event, TextPiece))
    engine.stop()
    return text


class Registered:
    """The registered model `name` of a server."""

    def __init__(self, uri: str, name: str) -> None:
        from mlflow import MlflowClient

        self.name, self.client = name, MlflowClient(uri, uri)
        self._experiment = self.client.create_experiment(name)
        self._score = 9.0

    def promote(self, directory: Path) -> str:
        """Make a directory a version that is better than all before; its number."""
        run_id, self._score = self.client.create_run(self._experiment).info.run_id, self._score - 1
        run = TrackedRun(self.client, run_id, "", warn=_refuse)
        run.register(
            self.name,
            directory,
            asset="quantized_model",
            bits_per_byte=self._score,
            evaluation_text="text",
            candidate=True,
            contest=Contest(lambda champion: compare_numbers(1.0, 2.0)),
        )
        return str(self.client.get_model_version_by_alias(self.name, "champion").version)

    def point_to(self, version: str) -> None:
        """Let another version be champion."""
        self.client.set_registered_model_alias(self.name, "champion", version)


def _refuse(message: str) -> None:
    raise AssertionError(message)
