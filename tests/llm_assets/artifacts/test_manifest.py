import json
from pathlib import Path

import pytest

from llm_assets.artifacts.manifest import Manifest, assert_compatible, config_hash, seal, stage_config
from llm_assets.experiments.compose import compose
from model.errors import PipelineError

pytestmark = pytest.mark.medium


def sealed(directory: Path, asset: str = "corpus", overrides: tuple[str, ...] = (), **fields: object) -> Manifest:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "data.txt").write_text(f"content of {asset}")
    values: dict = {
        "asset": asset,
        "experiment": "smoke",
        "config": stage_config(compose("smoke", overrides), asset),
        "code_version": "1",
        "upstream": {},
        "mlflow_run_id": None,
        "dagster_run_id": "a",
    }
    return seal(directory, **(values | fields))


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = sealed(tmp_path / "one", upstream={"corpus": "abc"}, failed_checks=["is_good"])
    assert Manifest.read(tmp_path / "one") == manifest
    assert manifest.size == len("content of corpus")


def test_the_run_and_the_time_do_not_change_the_content_hash(tmp_path: Path) -> None:
    one = sealed(tmp_path / "one", dagster_run_id="a", mlflow_run_id="m", code_version="1")
    two = sealed(tmp_path / "two", dagster_run_id="b", mlflow_run_id=None, code_version="2")
    assert one.content_hash == two.content_hash
    (tmp_path / "two" / "data.txt").write_text("other")
    assert seal_again(tmp_path / "two").content_hash != one.content_hash


def seal_again(directory: Path) -> Manifest:
    (directory / "manifest.json").unlink()
    return seal(
        directory,
        asset="corpus",
        experiment="smoke",
        config={},
        code_version="1",
        upstream={},
        mlflow_run_id=None,
        dagster_run_id="",
    )


def test_an_empty_directory_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="is empty"):
        seal_again_empty = tmp_path / "empty"
        seal_again_empty.mkdir()
        (seal_again_empty / "manifest.json").touch()
        seal_again(seal_again_empty)


@pytest.mark.parametrize(
    ("asset", "decides", "does_not"),
    [
        ("corpus", "corpus.max_bytes=7777777", "tokenizer.vocab_size=300"),
        ("tokenized_dataset", "tokenizer.vocab_size=300", "model.rms_norm_eps=1e-6"),
        ("trained_checkpoint", "training.seed=9", "quantization.evaluation_windows=3"),
        ("quantized_model", "quantization.evaluation_windows=3", "benchmark.repeats=9"),
        ("benchmark_report", "benchmark.repeats=9", "serving.max_queue=9"),
        ("packaged_bento", "serving.max_queue=9", "description=other"),
    ],
)
def test_an_asset_is_decided_by_its_own_groups_and_those_upstream(asset: str, decides: str, does_not: str) -> None:
    def decided(*overrides: str) -> str:
        return config_hash(stage_config(compose("smoke", overrides), asset))

    assert decided(decides) != decided()
    assert decided(does_not) == decided()


def test_an_upstream_made_with_other_settings_is_refused_with_both_values_and_the_command(tmp_path: Path) -> None:
    manifest = sealed(tmp_path / "one", "tokenized_dataset", ("tokenizer.vocab_size=300",))
    overrides = ["tokenizer.vocab_size=400"]
    with pytest.raises(PipelineError) as refused:
        assert_compatible([manifest], compose("smoke", overrides), "smoke", overrides)
    message = str(refused.value)
    assert "tokenizer.vocab_size=300 (this run: 400)" in message
    assert "--select 'tokenized_dataset+' --partition smoke" in message
    assert json.dumps(overrides) in message
    assert "\n" not in message


def test_only_the_first_differences_are_named(tmp_path: Path) -> None:
    changed = ["max_bytes=1000", "document_bytes=10", "shard_bytes=99", "license=MIT"]
    manifest = sealed(tmp_path / "one", "corpus", tuple(f"corpus.{option}" for option in changed))
    with pytest.raises(PipelineError, match="and 1 more"):
        assert_compatible([manifest], compose("smoke"), "smoke")


def test_settings_that_do_not_decide_the_upstream_are_no_difference(tmp_path: Path) -> None:
    manifest = sealed(tmp_path / "one", "corpus")
    assert_compatible([manifest], compose("smoke", ["training.seed=5", "tokenizer.vocab_size=300"]), "smoke")


def test_an_upstream_of_another_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="belongs to experiment 'smoke', this run to 'stdlib'"):
        assert_compatible([sealed(tmp_path / "one")], compose("stdlib"), "stdlib")


def test_a_checkpoint_of_an_older_dataset_is_refused_beside_the_new_one(tmp_path: Path) -> None:
    dataset = sealed(tmp_path / "dataset", "tokenized_dataset")
    checkpoint = sealed(tmp_path / "checkpoint", "trained_checkpoint", upstream={"tokenized_dataset": "0" * 64})
    with pytest.raises(
        PipelineError, match=r"trained_checkpoint of 'smoke' was made from tokenized_dataset 0{16}, the"
    ):
        assert_compatible([dataset, checkpoint], compose("smoke"), "smoke")


@pytest.mark.parametrize("text", ["{", "{}", '{"schema_version": 1}', "[]"])
def test_a_broken_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(PipelineError, match=r"manifest\.json is not a manifest"):
        Manifest.read(tmp_path)


def test_a_manifest_of_a_later_schema_is_refused(tmp_path: Path) -> None:
    manifest = sealed(tmp_path)
    text = manifest.to_json().replace('"schema_version": 1', '"schema_version": 2')
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(PipelineError, match="schema version 2, this code reads 1"):
        Manifest.read(tmp_path)


def test_a_checkpoint_named_by_experiment_is_recorded_without_the_place_of_this_machine(tmp_path: Path) -> None:
    version = "0123456789abcdef"
    places = [f"/{place}/var/artifacts/trained_checkpoint/stdlib/{version}" for place in ("old/place", "new")]
    overrides = [(f"training.init_from={place}", "tokenizer=pretrained", f"tokenizer.path={place}") for place in places]
    before, after = (stage_config(compose("smoke", options), "trained_checkpoint") for options in overrides)
    assert before == after
    assert before["training"]["init_from"] == f"trained_checkpoint/stdlib/{version}"
    # As earlier versions recorded it.
    config = {**before, "training": {**before["training"], "init_from": places[0]}}
    old = sealed(tmp_path / "old", "trained_checkpoint", config=config)
    assert old.config["training"]["init_from"] == places[0]
    assert_compatible([Manifest.read(tmp_path / "old")], compose("smoke", overrides[1]), "smoke")
