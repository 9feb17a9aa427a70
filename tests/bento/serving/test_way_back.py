"""Errors of a model under real traffic: in the shadow phase and as champion, with the tracking server of `make ui`."""

from pathlib import Path

import httpx
import pytest
import torch

from llm_assets.artifacts.manifest import seal
from llm_assets.versions.promotion import history
from model.modeling_rex import RexForCausalLM
from tests.bento.running_service import serve
from tests.bento.serving.registry import Registered, mlflow_server, save_version
from tests.bento.test_lifecycle import wait_until

pytestmark = pytest.mark.e2e
NAME = "rex-tiny"


def save_diverged(directory: Path, like: Path) -> None:
    """A version that loads and answers the service's own first request, and fails on every text."""
    model = RexForCausalLM.from_pretrained(like)
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.eos_token_id] = 0
        for projection in (model.model.layers[0].self_attn.v_proj, model.model.layers[0].self_attn.o_proj):
            projection.weight *= 1e30
    directory.mkdir()
    for file in like.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "manifest.json").unlink()
    model.save_pretrained(directory)
    provenance = {"experiment": "tiny", "config": {}, "code_version": "1", "upstream": {}, "dagster_run_id": "none"}
    seal(directory, asset="quantized_model", mlflow_run_id=None, **provenance)


def test_a_version_that_fails_is_seen_in_the_shadow_phase_and_withdrawn_as_champion(tmp_path):
    sound, diverged, altered = (tmp_path / name for name in ("sound", "diverged", "altered"))
    text = save_version(sound, seed=0, vocab_size=280)
    save_diverged(diverged, sound)
    save_version(altered, seed=1, vocab_size=280)
    with mlflow_server(tmp_path, as_make_ui=True) as uri:
        registered = Registered(uri, NAME)
        assert [registered.promote(folder) for folder in (sound, diverged, altered)] == ["1", "2", "3"]
        registered.point_to("1")
        files = Path(registered.client.get_model_version(NAME, "3").source)
        assert files.is_relative_to(tmp_path)  # a folder, which the service reads through the server
        with serve(
            tmp_path,
            None,
            REX_CHAMPION=NAME,
            MLFLOW_TRACKING_URI=uri,
            REX_CHAMPION_POLL_S="0.2",
            REX_SHADOW_SHARE="1",
            REX_ROLLBACK_WINDOW_S="300",
            REX_ROLLBACK_MIN_GENERATIONS="4",
        ) as server:

            def version() -> str:
                return httpx.get(f"{server.url}/v1/models").json()["data"][0]["version"]

            def failed_copies() -> float:
                return server.metrics().get('rex_shadow_generations_total{model="challenger",outcome="failed"}', 0)

            # In the shadow phase every copy fails, and no client notices.
            registered.client.set_registered_model_alias(NAME, "challenger", "2")
            wait_until(lambda: "version 2 of 'rex-tiny' answers copies" in server.log)
            assert {server.ask(ignore_eos=True).json()["text"] for _ in range(3)} == {text}
            wait_until(lambda: failed_copies() == 3)

            # As champion it fails clients until the bound is exceeded; then the former version is champion again.
            registered.point_to("2")
            wait_until(lambda: version() == "2")
            assert [server.ask().status_code for _ in range(4)] == [500] * 4
            wait_until(lambda: version() == "1")
            assert server.ask(ignore_eos=True).json()["text"] == text
            reason = "4 of 4 generations failed within 300 s"
            newest = history(registered.client, NAME)[-1]
            assert newest["version"] == "1" and reason in newest["reason"]
            assert reason in server.log and "version 1 of 'rex-tiny' is champion again" in server.log

            # A challenger whose file was altered is one line.
            weights = files / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-4] + b"evil")
            registered.client.set_registered_model_alias(NAME, "challenger", "3")
            wait_until(lambda: "the challenger of 'rex-tiny' cannot be followed" in server.log)
            assert "model.safetensors was altered" in server.log
            assert server.ask(ignore_eos=True).json()["text"] == text
