"""Credentials of an object store stay in the environment: no file, record or object of a run holds them."""

import json

import pytest

from tests.e2e.workplace import new_workplace
from tests.support.s3 import KEYS, Server, with_s3

pytestmark = [*with_s3, pytest.mark.e2e]
STAGES = "corpus,tokenized_dataset,trained_checkpoint"


def test_no_file_and_no_object_of_a_run_holds_the_secret_whether_it_succeeds_or_fails(
    server: Server, root: str, tmp_path, monkeypatch
) -> None:
    import s3fs

    workplace = new_workplace(tmp_path / "place")
    for name, part in (("ARTIFACTS", "artifacts"), ("CHECKPOINTS", "checkpoints")):
        monkeypatch.setenv(f"LLM_ASSETS_{name}", f"{root}/{part}")

    def materialize(*overrides: str) -> str:
        config = {"resources": {"hydra": {"config": {"overrides": list(overrides)}}}}
        command = ["dagster", "asset", "materialize", "-m", "llm_assets.definitions", "--partition", "smoke"]
        done = workplace.run(*command, "--select", STAGES, "--config-json", json.dumps(config))
        (tmp_path / "place" / f"printed {overrides}").write_text(done.stdout)
        return done.stdout

    short = ["training.max_steps=12", "training.save_steps=4"]
    assert "RUN_SUCCESS" in materialize(*short)
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    objects = files.find(root)
    assert any("trained_checkpoint" in name for name in objects)
    held = [name for name in objects if KEYS[1].encode() in files.cat_file(name)]
    server.kill()
    assert "RUN_FAILURE" in materialize(*short, "corpus.max_bytes=500000")
    server.start()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"runs.db", "mlflow.db"} <= {path.name for path in written}
    held += [str(path) for path in written if KEYS[1].encode() in path.read_bytes()]
    assert held == []
