from pathlib import Path
from typing import Any

import pytest

from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.resources.model_versions import register_version


class Registry:
    """One registered model, `rex-NAME`."""

    def __init__(self, mlflow: MlflowTracking, name: str, folder: Path) -> None:
        self.client, experiment_id = mlflow.client()
        self.run_id = self.client.create_run(experiment_id).info.run_id
        self.name, self.folder = f"rex-{name}", folder
        self.lines: list[str] = []
        (folder / "weights").write_text("weights")

    def register(self, bits: float, content: str = "", *, text: str = "a", asset: str = "quantized_model") -> str:
        return register_version(
            self.client,
            self.run_id,
            self.name,
            self.folder,
            asset=asset,
            bits_per_byte=bits,
            evaluation_text=text,
            candidate=True,
            content_hash=content,
            log=self.lines.append,
        )

    @property
    def champion(self) -> str | None:
        found = self.client.get_registered_model(self.name).aliases.get("champion")
        return str(found) if found else None

    def decision(self, version: str) -> str:
        return str(self.client.get_model_version(self.name, version).tags["champion_decision"])

    def set_by_hand(self, version: str) -> None:
        self.client.set_registered_model_alias(self.name, "champion", version)


@pytest.fixture
def registry(mlflow: MlflowTracking, request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    return Registry(mlflow, request.node.name[:60], tmp_path)


def test_the_same_content_is_registered_once(registry: Registry) -> None:
    assert [registry.register(1.5, "one"), registry.register(1.5, "one"), registry.register(1.4, "two")] == [
        "1",
        "1",
        "2",
    ]
    assert len(registry.client.search_model_versions(f"name = '{registry.name}'")) == 2
    assert any("version 1 has this content already" in line for line in registry.lines)


def test_an_equal_model_does_not_become_champion(registry: Registry) -> None:
    registry.register(1.5, "one")
    registry.register(1.5, "two")
    assert registry.champion == "1"
    assert registry.decision("2") == "not promoted: 1.5000 bits per byte, version 1 has 1.5000 on the same text"


def test_a_rollback_by_hand_is_not_undone_by_a_worse_training(registry: Registry) -> None:
    registry.register(1.6, "one")
    registry.register(1.5, "two")
    assert registry.champion == "2"
    registry.set_by_hand("1")
    registry.register(1.55, "three")  # better than what a person chose, worse than what they left
    registry.register(1.5, "two")  # the same training once more
    registry.register(1.2, "four", text="b")  # another text: the two cannot be compared
    assert registry.champion == "1"
    assert "a person set the champion (1)" in registry.decision("4")


def test_a_model_better_than_all_becomes_champion_by_a_recorded_decision(registry: Registry) -> None:
    registry.register(1.6, "one")
    registry.register(1.5, "two")
    registry.set_by_hand("1")
    registry.register(1.4, "three")
    assert registry.champion == "3"
    assert (
        registry.decision("3") == "promoted: 1.4000 bits per byte, the champion, version 1, has 1.6000 on the same text"
    )


def test_a_champion_removed_by_hand_stays_removed(registry: Registry) -> None:
    registry.register(1.6, "one")
    registry.client.delete_registered_model_alias(registry.name, "champion")
    registry.register(1.2, "two", text="b")
    assert registry.champion is None


def test_without_a_persons_choice_a_new_text_has_a_new_champion(registry: Registry) -> None:
    registry.register(1.5, "one")
    registry.register(1.9, "two", text="b")
    assert registry.champion == "2"


@pytest.mark.parametrize("bits", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_never_champion(registry: Registry, bits: float) -> None:
    registry.register(bits, "one")
    assert registry.champion is None


def test_versions_registered_under_the_old_name_of_the_tag_are_compared(registry: Registry) -> None:
    registry.register(1.5, "one")
    client: Any = registry.client
    client.delete_model_version_tag(registry.name, "1", "evaluation_text")
    client.set_model_version_tag(registry.name, "1", "yardstick", "a")
    registry.register(1.6, "two")
    assert registry.champion == "1"
