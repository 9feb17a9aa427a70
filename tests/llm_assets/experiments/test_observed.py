"""A changed option makes what reads it out of date, by name, as Dagster's page asks."""

import shutil
import sqlite3
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

# What Dagster's page shows: GraphQL's `staleStatus` and `staleCauses` call this class.
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleCause, StaleStatus
from dagster._core.loader import LoadingContextForTest
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster_graphql.schema import create_schema
from dagster_graphql.schema.asset_graph import GrapheneAssetNode

from llm_assets.experiments.compose import CONFIG_DIR
from llm_assets.experiments.observed import FIRST, changed_options, external_specs, source_uris
from llm_assets.experiments.partitions import NAME, enter, experiments, in_use
from llm_assets.instance import webserver
from llm_assets.jobs.automation import observed_settings
from llm_assets.resources.hydra import HydraConfig
from model.settings import GROUPS, CorpusSettings, options

pytestmark = pytest.mark.medium

EXPERIMENTS = {"smoke", "stdlib"}
GRAPH = "{ assetNodes { assetKey { path } isMaterializable staleStatus staleCauses { reason } } }"
"""The fields that the lineage page and its button "Materialize unsynced" ask for."""

NO_OUTPUT = {
    "compute_logs": {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
}
"""An instance that keeps none of what runs print, for which it would start processes."""


@dg.asset(partitions_def=experiments, deps=["source_text", "corpus_settings"])
def corpus(hydra: HydraConfig) -> None:
    pass


@dg.asset(partitions_def=experiments, deps=["model_settings", "training_settings", corpus])
def trained_checkpoint(hydra: HydraConfig) -> None:
    pass


defs = dg.Definitions([*external_specs(), corpus, trained_checkpoint], resources={"hydra": HydraConfig()})
"""What the webserver loads."""


class Location:
    """A code location of two assets and two experiments over a copy of `configs/`."""

    def __init__(self, configs: Path, instance: dg.DagsterInstance) -> None:
        self.configs, self.instance = configs, instance
        shutil.copytree(CONFIG_DIR, configs)
        for experiment in sorted(EXPERIMENTS):
            enter(instance, experiment)
        self.cursor: str | None = None

    def run(self, *overrides: str, experiment: str = "smoke") -> None:
        """Materialize both assets."""
        hydra = HydraConfig(config_dir=str(self.configs), overrides=list(overrides))
        assets = [*external_specs(), corpus, trained_checkpoint]
        assert dg.materialize(
            assets, partition_key=experiment, resources={"hydra": hydra}, instance=self.instance
        ).success

    def look(self) -> dg.SensorResult | dg.SkipReason:
        """One tick of the sensor, and what the daemon does with its result."""
        context = dg.build_sensor_context(
            self.instance, cursor=self.cursor, resources={"hydra": HydraConfig(config_dir=str(self.configs))}
        )
        found = observed_settings(context)
        assert isinstance(found, dg.SensorResult | dg.SkipReason)
        if isinstance(found, dg.SensorResult):
            self.cursor = found.cursor
            for event in found.asset_events:
                assert isinstance(event, dg.AssetObservation | dg.AssetMaterialization)
                self.instance.report_runless_asset_event(event)
            for request in found.dynamic_partitions_requests or ():
                if isinstance(request, dg.AddDynamicPartitionsRequest):
                    self.instance.add_dynamic_partitions(request.partitions_def_name, request.partition_keys)
                else:
                    for key in request.partition_keys:
                        self.instance.delete_dynamic_partition(request.partitions_def_name, key)
        return found

    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.configs / file).read_text()
        assert old in text
        (self.configs / file).write_text(text.replace(old, new))

    def causes(self, asset: str, experiment: str = "smoke") -> list[StaleCause]:
        """Why a partition is out of date; empty if it is fresh."""
        assets = [*external_specs(), corpus, trained_checkpoint]
        graph = dg.Definitions(assets, resources={"hydra": HydraConfig()}).resolve_asset_graph()
        resolver = CachingStaleStatusResolver(self.instance, graph, LoadingContextForTest(self.instance))
        found = list(resolver.get_stale_causes(dg.AssetKey(asset), experiment))
        status = resolver.get_status(dg.AssetKey(asset), experiment)
        assert (status == StaleStatus.STALE) == bool(found)
        return found

    def on_the_graph(self) -> dict[str, tuple[str, list[str]]]:
        """What the graph of `make ui` shows of each asset that has been made: its status, and why."""
        origin = InProcessCodeLocationOrigin(LoadableTargetOrigin(python_file=__file__, attribute="defs"))
        with WorkspaceProcessContext(self.instance, InProcessWorkspaceLoadTarget(origin)) as workspace:
            answer = create_schema().execute(GRAPH, context=workspace.create_request_context())
        assert answer.data and not answer.errors, answer
        return {
            node["assetKey"]["path"][-1]: (node["staleStatus"], [cause["reason"] for cause in node["staleCauses"]])
            for node in answer.data["assetNodes"]
            if node["isMaterializable"]
        }

    def newest(self, asset: str, experiment: str = "smoke") -> dg.AssetObservation:
        filtered = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[experiment])
        observation = self.instance.fetch_observations(filtered, limit=1).records[0].asset_observation
        assert observation
        return observation

    def shown(self, asset: str, experiment: str = "smoke") -> Mapping[str, Any]:
        """The metadata that the page of a partition shows."""
        filtered = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[experiment])
        event = self.instance.fetch_materializations(filtered, limit=1).records[0].asset_materialization
        assert event
        return event.metadata


@pytest.fixture
def location(tmp_path: Path, var: Path) -> Iterator[Location]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Location(tmp_path / "configs", instance)


def test_a_changed_option_makes_what_reads_it_out_of_date_and_is_named(location: Location) -> None:
    location.run()
    location.run(experiment="stdlib")
    location.look()
    assert not location.causes("corpus") and not location.causes("trained_checkpoint")

    location.edit("experiment/smoke.yaml", "description:", "training:\n  learning_rate: 0.05\ndescription:")
    location.look()
    (cause,) = location.causes("trained_checkpoint")
    assert cause.dependency and cause.dependency.asset_key == dg.AssetKey("training_settings")
    assert cause.dependency.partition_key == "smoke"
    assert cause.reason == "has a new dependency data version"
    assert not location.causes("corpus")
    assert not location.causes("trained_checkpoint", "stdlib")
    changed = "training.learning_rate is 0.05, was 0.01"
    assert location.newest("training_settings").description == changed
    assert location.newest("training_settings").metadata["changed"].value == changed

    location.run()
    assert not location.causes("trained_checkpoint")


def test_the_graph_shows_what_is_out_of_date_in_any_experiment_and_names_every_option_since_it_was_made(
    tmp_path: Path, var: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = Location(tmp_path / "configs", dg.DagsterInstance.local_temp(str(tmp_path), overrides=NO_OUTPUT))
    monkeypatch.setattr(GrapheneAssetNode, "resolve_staleStatus", webserver.resolve_status)
    monkeypatch.setattr(GrapheneAssetNode, "resolve_staleCauses", webserver.resolve_causes)
    location.run()
    location.run(experiment="stdlib")
    location.look()
    assert location.on_the_graph() == {"corpus": ("FRESH", []), "trained_checkpoint": ("FRESH", [])}

    for value in ("0.05", "0.07"):
        before = "description:" if value == "0.05" else "  learning_rate: 0.05\n"
        after = "training:\n  learning_rate: 0.05\ndescription:" if value == "0.05" else "  learning_rate: 0.07\n"
        location.edit("experiment/smoke.yaml", before, after)
        location.look()
    why = "has a new data version for smoke: training.learning_rate is 0.07, was 0.01"
    assert location.on_the_graph() == {"corpus": ("FRESH", []), "trained_checkpoint": ("STALE", [why])}

    location.run()
    assert location.on_the_graph()["trained_checkpoint"] == ("FRESH", [])


def test_what_was_made_with_overrides_is_out_of_date_by_the_files(location: Location) -> None:
    location.run("corpus.max_bytes=999999")
    assert not location.causes("corpus")
    location.look()
    (cause,) = location.causes("corpus")
    assert cause.dependency and cause.dependency.asset_key == dg.AssetKey("corpus_settings")
    assert (location.newest("corpus_settings").description or "").endswith(", was 999999")
    assert not location.causes("trained_checkpoint")


def test_an_option_set_back_leaves_nothing_out_of_date(location: Location) -> None:
    location.run()
    changes = ("description:", "training:\n  learning_rate: 0.05\ndescription:")
    for old, new in (changes, changes[::-1]):
        location.edit("experiment/smoke.yaml", old, new)
        location.look()
    assert not location.causes("trained_checkpoint")


def test_nothing_is_composed_or_reported_while_nothing_changes(location: Location) -> None:
    first = location.look()
    assert isinstance(first, dg.SensorResult)
    assert {event.partition for event in first.asset_events} == EXPERIMENTS
    second = location.look()
    assert isinstance(second, dg.SensorResult) and not second.asset_events
    assert isinstance(location.look(), dg.SkipReason)


def test_a_mistake_in_one_experiment_does_not_hide_the_others(location: Location) -> None:
    location.edit("experiment/smoke.yaml", "description:", "training:\n  no_such_option: 1\ndescription:")
    found = location.look()
    assert isinstance(found, dg.SensorResult)
    seen = {event.partition for event in found.asset_events}
    assert seen == {"stdlib"}


def test_the_page_of_a_settings_asset_shows_each_option_with_its_value(location: Location) -> None:
    location.run("training.max_steps=77")
    shown = location.shown("training_settings")
    rows = {record.data["option"]: record.data["value"] for record in shown["options"].records}
    assert rows["max_steps"] == "77"
    assert set(rows) == {item.name for item in options(GROUPS["training"])}
    assert shown["changed"].value == FIRST
    location.look()
    assert location.shown("training_settings")["changed"].value == "training.max_steps is 60, was 77"


def test_the_source_text_is_shown_by_its_address_and_another_address_makes_the_corpus_out_of_date(
    location: Location, tmp_path: Path
) -> None:
    location.run()
    assert location.shown("source_text")["dagster/uri"].value == Path(sysconfig.get_path("stdlib")).as_uri()
    assert location.shown("source_text")["license"].value == "PSF-2.0"
    assert not location.causes("corpus")
    location.edit(
        "experiment/smoke.yaml", "description:", f"corpus:\n  source: files\n  paths: [{tmp_path}/*.txt]\ndescription:"
    )
    location.look()
    causes = {str(cause.dependency.asset_key.path[-1]) for cause in location.causes("corpus") if cause.dependency}
    assert causes == {"corpus_settings", "source_text"}
    assert location.shown("source_text")["dagster/uri"].value == f"file://{tmp_path}/*.txt"


@pytest.mark.parametrize(
    ("settings", "uris"),
    [
        ({"source": "docstrings"}, [Path(sysconfig.get_path("stdlib")).as_uri()]),
        ({"source": "files", "paths": ["s3://b/*.gz", "/data/a b.txt"]}, ["s3://b/*.gz", "file:///data/a b.txt"]),
        ({"source": "files", "paths": ["data/*.txt"]}, [f"file://{Path.cwd()}/data/*.txt"]),
        ({"source": "huggingface", "dataset": "org/name"}, ["hf://datasets/org/name"]),
        ({"source": "huggingface", "dataset": "configs"}, [(Path.cwd() / "configs").as_uri()]),
    ],
    ids=["docstrings", "files and URLs", "a relative path", "a dataset", "a local dataset"],
)
def test_every_kind_of_source_has_an_address(settings: dict[str, Any], uris: list[str]) -> None:
    assert source_uris(CorpusSettings(**settings)) == uris


def test_a_mistyped_partition_leaves_the_page_and_its_neighbors_stay(location: Location) -> None:
    enter(location.instance, "smke")
    location.look()
    assert set(in_use(location.instance)) == EXPERIMENTS
    assert isinstance(location.look(), dg.SensorResult) and isinstance(location.look(), dg.SkipReason)


def test_an_experiment_that_was_made_while_partitions_were_static_becomes_a_partition(location: Location) -> None:
    location.run()
    for experiment in EXPERIMENTS:
        location.instance.delete_dynamic_partition(NAME, experiment)
    location.look()
    assert in_use(location.instance) == ["smoke"]


def test_before_the_first_run_the_default_experiment_is_offered_and_it_leaves_when_another_has_run(
    location: Location,
) -> None:
    for experiment in EXPERIMENTS:
        location.instance.delete_dynamic_partition(NAME, experiment)
    location.look()
    assert in_use(location.instance) == ["stdlib"]
    location.run()
    location.look()
    assert in_use(location.instance) == ["smoke"]
    enter(location.instance, "stdlib")  # as "Add a partition" in the UI: it stays, however long until its first run
    for _ in range(2):
        location.look()
    assert in_use(location.instance) == ["smoke", "stdlib"]
    location.run(experiment="stdlib")
    enter(location.instance, "stdlib_chat")
    location.look()
    assert in_use(location.instance) == ["smoke", "stdlib", "stdlib_chat"]


def test_the_default_experiment_stays_if_a_person_adds_it_after_another_has_run(location: Location) -> None:
    location.instance.delete_dynamic_partition(NAME, "stdlib")
    location.run()
    location.look()
    assert in_use(location.instance) == ["smoke"]
    enter(location.instance, "stdlib")
    for _ in range(2):
        location.look()
    assert in_use(location.instance) == ["smoke", "stdlib"]


def test_a_new_file_is_offered_before_its_first_run_and_leaves_with_its_file(
    location: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "config_dir", location.configs)
    mine = location.configs / "experiment" / "mine.yaml"
    location.run()
    location.look()
    shutil.copy(location.configs / "experiment" / "smoke.yaml", mine)
    found = location.look()
    assert isinstance(found, dg.SensorResult)
    assert set(in_use(location.instance)) == {"smoke", "mine"}
    assert "mine" in {event.partition for event in found.asset_events}
    location.look()
    assert "mine" in in_use(location.instance)  # though it has not run
    mine.unlink()
    location.look()
    assert in_use(location.instance) == ["smoke"]


def test_options_that_came_and_went_are_named_too() -> None:
    before = {"training": {"max_steps": 1, "old": True}}
    now = {"training": {"max_steps": 2, "new": "a"}}
    assert changed_options(before, now) == [
        "training.max_steps is 2, was 1",
        "training.new is 'a', was not an option",
        "training.old is no longer an option",
    ]


def test_a_refused_observation_costs_a_run_nothing(
    location: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(dg.DagsterInstance, "report_runless_asset_event", refused)
    location.run()
    assert "the settings are not shown as observed: database is locked" in caplog.text
