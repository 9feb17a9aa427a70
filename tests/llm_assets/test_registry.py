import importlib

import pytest

from bench import orchestration
from llm_assets.artifacts.manifest import stage_config
from llm_assets.assets import load_asset
from llm_assets.experiments.compose import compose
from llm_assets.registry import EVALUATION, IMAGES, PIPELINE, model_name, settings_asset, settings_groups, stage_spec


def test_each_stage_comes_after_what_it_is_made_from() -> None:
    seen: set[str] = set()
    for stage in (*PIPELINE, *IMAGES, *EVALUATION):
        assert set(stage.upstream) <= seen, stage.name
        seen.add(stage.name)


@pytest.mark.parametrize("stage", (*PIPELINE, *IMAGES, *EVALUATION), ids=lambda stage: stage.name)
def test_an_asset_is_what_its_entry_says(stage) -> None:
    (spec,) = load_asset(stage).specs
    assert spec.key.path == [stage.name]
    settings = {settings_asset(group) for group in stage.settings}
    assert {dep.asset_key.path[-1] for dep in spec.deps} == {*stage.upstream, *stage.external, *settings}
    assert (spec.group_name, spec.code_version) == (stage.group, stage.code_version)
    assert {check.name for check in load_asset(stage).check_specs} == set(stage.checks)
    for module in stage.preload:
        importlib.import_module(module)


def test_a_stage_is_decided_by_its_own_settings_and_those_upstream() -> None:
    assert settings_groups("quantized_model") == ["corpus", "tokenizer", "model", "training", "quantization"]
    assert settings_groups("container_image_cpu") == settings_groups("packaged_bento")
    assert set(stage_config(compose("smoke"), "tokenized_dataset")) == {"corpus", "tokenizer"}


def test_an_entry_that_contradicts_its_asset_is_refused() -> None:
    from dataclasses import replace

    with pytest.raises(TypeError, match=r"tokenized_dataset takes \['corpus'\]: .* says \['packaged_bento'\]"):
        load_asset(replace(stage_spec("tokenized_dataset"), upstream=("packaged_bento",)))


def test_the_plain_scripts_of_the_benchmark_are_the_first_stages() -> None:
    names = [stage.name for stage in PIPELINE]
    assert list(orchestration.STAGES) == [name for name in names if name in orchestration.STAGES]


def test_a_model_has_one_name_that_bentoml_and_mlflow_take() -> None:
    from bentoml import Tag

    for experiment in ("stdlib_30m", "Llama-350M", "v1.2"):
        name = model_name(experiment)
        assert name == f"rex-{experiment.lower()}"
        assert Tag(name).name == name
