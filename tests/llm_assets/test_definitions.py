import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from llm_assets.artifacts.io_manager import DirectoryIOManager
from llm_assets.definitions import ASSETS, build_defs, defs
from llm_assets.experiments.compose import DEFAULT_EXPERIMENT, experiment_names
from llm_assets.experiments.observed import external_specs
from llm_assets.experiments.partitions import ExperimentPartitions, experiments, in_use
from llm_assets.jobs import jobs
from llm_assets.resources.hydra import HydraConfig
from model.settings import GROUPS, options


@pytest.mark.processes
def test_importing_the_definitions_imports_nothing_heavy() -> None:
    program = (
        "import sys, llm_assets.definitions; "
        "print([name for name in ('torch', 'transformers', 'mlflow', 'bentoml', 'datasets', 'matplotlib', 'numpy') "
        "if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()
        == "[]"
    )


def test_the_code_location_loads_with_every_job() -> None:
    repository = defs().get_repository_def()
    repository.load_all_definitions()
    names = {asset.key.path[-1] for asset in ASSETS}
    assert {job.name for job in repository.get_all_jobs()} >= {"llm_pipeline", *(f"{name}_job" for name in names)}
    pipeline = repository.get_job("llm_pipeline")
    assert {key.path[-1] for key in pipeline.asset_layer.executable_asset_keys} == names
    assert pipeline.run_tags["dagster/partition"] == DEFAULT_EXPERIMENT
    training = repository.get_job("training_pipeline")
    keys = training.asset_layer.executable_asset_keys
    assert {key.path[-1] for key in keys} == {"corpus", "tokenized_dataset", "trained_checkpoint"}


@pytest.mark.parametrize("asset", ASSETS, ids=lambda asset: asset.key.path[-1])
def test_every_asset_says_what_it_is(asset: dg.AssetsDefinition) -> None:
    (spec,) = asset.specs
    assert spec.group_name in {"data", "model", "release"}
    assert spec.kinds
    assert spec.owners == ["team:llm"]
    assert spec.code_version
    assert spec.description
    assert asset.partitions_def == experiments
    (reference,) = spec.metadata["dagster/code_references"].code_references
    assert f"def {asset.key.path[-1]}(" in Path(reference.file_path).read_text()


def test_each_asset_is_made_from_the_ones_that_the_design_names() -> None:
    made = {asset.key for asset in ASSETS}
    upstream = {
        asset.key.path[-1]: {
            dep.asset_key.path[-1] for spec in asset.specs for dep in spec.deps if dep.asset_key in made
        }
        for asset in ASSETS
    }
    assert upstream == {
        "corpus": set(),
        "tokenized_dataset": {"corpus"},
        "trained_checkpoint": {"tokenized_dataset"},
        "quantized_model": {"trained_checkpoint", "tokenized_dataset"},
        "exported_model": {"trained_checkpoint", "quantized_model", "tokenized_dataset"},
        "benchmark_report": {"trained_checkpoint", "quantized_model", "exported_model", "tokenized_dataset"},
        "packaged_bento": {"trained_checkpoint", "quantized_model", "benchmark_report"},
    }


def test_each_asset_depends_on_the_text_and_the_settings_that_it_reads_and_on_no_others() -> None:
    made = {asset.key for asset in ASSETS}
    settings = {
        asset.key.path[-1]: {dep.asset_key.path[-1] for spec in asset.specs for dep in spec.deps}
        - {key.path[-1] for key in made}
        for asset in ASSETS
    }
    assert settings == {
        "corpus": {"corpus_settings", "source_text"},
        "tokenized_dataset": {"tokenizer_settings"},
        "trained_checkpoint": {"model_settings", "training_settings"},
        "quantized_model": {"quantization_settings"},
        "exported_model": set(),
        "benchmark_report": {"benchmark_settings"},
        "packaged_bento": {"serving_settings"},
    }
    external = {spec.key.path[-1]: spec for spec in external_specs()}
    assert set(external) == set().union(*settings.values())
    assert all(spec.partitions_def == experiments and spec.description for spec in external.values())


def test_every_experiment_is_a_valid_partition_and_nothing_else_is() -> None:
    assert all(experiments.has_partition_key(name) for name in experiment_names())
    assert not experiments.has_partition_key("smke")
    assert DEFAULT_EXPERIMENT in experiment_names()


def test_a_run_makes_its_experiment_a_partition_and_one_that_is_not_an_experiment_none(var: Path) -> None:
    @dg.asset(partitions_def=experiments)
    def first(hydra: HydraConfig) -> int:
        return 1

    @dg.asset(partitions_def=experiments)
    def second(hydra: HydraConfig, first: int) -> int:
        return first

    job = dg.define_asset_job("job", selection=dg.AssetSelection.assets("first", "second"))
    resolved = dg.Definitions([first, second], jobs=[job], resources={"hydra": HydraConfig()}).resolve_job_def("job")
    with dg.DagsterInstance.ephemeral() as instance:
        assert in_use(instance) == []
        for experiment, succeeds in (("smoke", True), ("smke", False), ("stdlib", True), ("smoke", True)):
            result = resolved.execute_in_process(
                instance=instance, tags={"dagster/partition": experiment}, raise_on_error=False
            )
            assert result.success == succeeds
        assert in_use(instance) == ["smoke", "stdlib"]
        assert instance.get_materialized_partitions(dg.AssetKey("second")) == {"smoke", "stdlib"}


def test_the_launchpad_lists_every_option_with_its_text_values_and_default() -> None:
    job = defs().resolve_job_def("llm_pipeline")
    resources = job.run_config_schema.config_type.fields["resources"]
    overrides = resources.config_type.fields["hydra"].config_type.fields["config"].config_type.fields["overrides"]
    lines = str(overrides.description).split("\n")
    for kind in GROUPS.values():
        for item in options(kind):
            (line,) = [line for line in lines if line.startswith(f"- `{item.full_name}`: ")]
            assert item.text in line and item.allowed in line and line.endswith(f"Default: {item.default_text}.")


def test_no_resource_needs_a_configuration_to_be_typed() -> None:
    assert dg.validate_run_config(defs().resolve_job_def("llm_pipeline"), {})["resources"]["hydra"]


def test_a_resource_can_be_replaced() -> None:
    mine = DirectoryIOManager(keep_versions=7)
    assert build_defs({"artifacts": mine}).resources["artifacts"] is mine


def test_the_number_of_concurrent_steps_is_fixed() -> None:
    assert jobs.MAX_CONCURRENT_STEPS == 2
    assert defs().executor is jobs.executor


@pytest.mark.parametrize("selected", ["first", "second"])
def test_an_unknown_experiment_is_one_line_that_lists_the_experiments(selected: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    for name in ("smoke", "stdlib"):
        (tmp_path / "experiment" / f"{name}.yaml").touch()
    partitions = ExperimentPartitions(tmp_path)

    @dg.asset(partitions_def=partitions)
    def first() -> int:
        return 1

    @dg.asset(partitions_def=partitions)
    def second(first: int) -> int:
        return first

    job = dg.define_asset_job("job", selection=dg.AssetSelection.assets(selected))
    resolved = dg.Definitions(assets=[first, second], jobs=[job]).resolve_job_def("job")
    result = resolved.execute_in_process(tags={"dagster/partition": "smke"}, raise_on_error=False)
    assert not result.success
    (error,) = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    assert "no experiment 'smke' in" in str(error)
    assert "expected one of ['smoke', 'stdlib']" in str(error)
