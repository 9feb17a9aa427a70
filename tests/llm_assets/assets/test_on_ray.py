"""Stages on Ray make the artifacts of one process: the same content hashes, and another attempt resumes."""

import dagster as dg

from llm_assets.artifacts.io_manager import DirectoryIOManager
from llm_assets.assets.corpus import corpus
from llm_assets.assets.tokenized_dataset import tokenized_dataset
from llm_assets.paths import var_dir
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from tests.model.system.test_cluster import with_ray
from tests.model.text.test_parts import write_sources


@with_ray
def test_artifacts_have_the_hashes_of_one_process(mlflow: MlflowTracking, var, tmp_path) -> None:
    folder = write_sources(tmp_path / "sources")
    own = ["corpus=files", f"corpus.paths=[{folder}/*]", "corpus.max_bytes=0", "corpus.shard_bytes=6000"]
    own += ["tokenizer.vocab_size=300", "tokenizer.sequence_length=32"]
    hashes = []
    for compute in (["compute=local"], ["compute=ray", "compute.processes=2"]):
        result = dg.materialize(
            [corpus, tokenized_dataset],
            partition_key="smoke",
            resources={
                "artifacts": DirectoryIOManager(),
                "hydra": HydraConfig(overrides=[*own, *compute], force=True),
                "mlflow": mlflow,
            },
        )
        assert result.success and len(result.get_asset_check_evaluations()) == 3
        store = DirectoryIOManager().store()
        manifests = [store.latest_manifest(asset, "smoke") for asset in ("corpus", "tokenized_dataset")]
        hashes.append([manifest.content_hash for manifest in manifests if manifest])
    assert len(hashes[0]) == 2 and hashes[0] == hashes[1]
    assert not [path for path in (var_dir() / "scratch").rglob("*") if path.is_file() and path.suffix != ".lock"]
