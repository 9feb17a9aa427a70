import json
from typing import Any

import pytest

from llm_assets import champion
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.versions import promotion
from llm_assets.versions.promotion import NO_CONTEST

Registry = Any  # conftest's


def test_the_same_content_is_registered_once(registry: Registry) -> None:
    assert [registry.register(1.5, "one"), registry.register(1.5, "one"), registry.register(1.4, "two")] == [
        "1",
        "1",
        "2",
    ]
    assert len(registry.client.search_model_versions(f"name = '{registry.name}'")) == 2
    assert any("version 1 already has this content" in line for line in registry.lines)


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
    assert "the champion (1) was set by hand" in registry.decision("4")


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


def test_a_better_score_within_chance_does_not_move_the_champion(registry: Registry) -> None:
    registry.register(1.5, "one")
    registry.register(1.49, "two", noise=0.2)
    assert registry.champion == "1"
    assert registry.decision("2").startswith(
        "not promoted: 1.4900 bits per byte, the champion, version 1, has 1.5000 on the same text; 95% interval of the "
        "difference: -0."
    )
    assert "to +0." in registry.decision("2")


def test_the_numbers_of_a_decision_are_on_the_version(registry: Registry) -> None:
    registry.register(1.5, "one")
    registry.register(1.4, "two")
    version = registry.client.get_model_version(registry.name, "2")
    evidence = json.loads(version.tags["champion_evidence"])
    assert (evidence["champion"], evidence["pieces"], evidence["unit"]) == ("1", 32, "pieces")
    assert evidence["difference"] == pytest.approx(-0.1) and evidence["low"] <= evidence["high"] < 0
    assert promotion.decision_of(version)["decision"] == registry.decision("2")


def test_a_champion_of_another_text_is_scored_again_and_may_stay(registry: Registry) -> None:
    registry.register(1.5, "one")
    registry.register(1.9, "two", text="b", noise=500.0)  # on text b the champion is far behind, but by chance
    assert registry.champion == "1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"objections": ["its check keeps_quality has a warning"]}, "its check keeps_quality has a warning"),
        ({"latency_ratio": 1.31, "most_latency_ratio": 1.2}, "takes 1.31 times the champion's time per token (at most"),
        ({"contest": NO_CONTEST}, "the champion, version 1, cannot be scored (no text to score both on); `python -m"),
    ],
    ids=["a check that warns", "too slow", "no text"],
)
def test_a_better_model_is_not_promoted_against_an_objection(
    registry: Registry, arguments: dict[str, Any], says: str
) -> None:
    registry.register(1.5, "one")
    registry.register(1.4, "two", **arguments)
    assert registry.champion == "1"
    assert says in registry.decision("2")


def test_a_model_within_the_bound_of_latency_is_promoted(registry: Registry) -> None:
    registry.register(1.5, "one")
    registry.register(1.4, "two", latency_ratio=1.1, most_latency_ratio=1.2)
    assert registry.champion == "2"


@pytest.fixture
def command(registry: Registry, mlflow: MlflowTracking, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry that `python -m llm_assets.champion` finds, as the one of an experiment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.tracking_uri)
    return registry


def run_command(command: Registry, *arguments: str) -> int:
    action, *rest = arguments
    return champion.main([action, command.name.removeprefix("rex-"), *rest])


def test_promotion_and_rollback_by_hand_are_recorded_and_stay(
    command: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    for bits, content in [(1.5, "one"), (1.4, "two"), (1.45, "three")]:
        command.register(bits, content)
    assert command.champion == "2"
    assert run_command(command, "promote", "3", "--reason", "reads better") == 0
    assert (command.champion, command.decision("3")) == ("3", "promoted by hand: reads better")
    assert run_command(command, "rollback", "--reason", "reads worse") == 0
    assert (command.champion, command.decision("2")) == ("2", "promoted by hand: reads worse")
    assert run_command(command, "rollback", "1", "--reason", "further back") == 0
    command.register(1.42, "four")
    assert command.champion == "1"  # a person left version 2, which is better than version 4
    capsys.readouterr()
    assert run_command(command, "show") == 0
    shown = capsys.readouterr().out
    assert f"{command.name}: version 1 is champion" in shown and "*   1  quantized_model" in shown
    reasons = [entry["reason"] for entry in promotion.history(command.client, command.name)]
    assert reasons[2:] == ["by hand: reads better", "by hand: reads worse", "by hand: further back"]
    assert [entry["version"] for entry in promotion.history(command.client, command.name)] == ["1", "2", "3", "2", "1"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["promote", "7", "--reason", "x"], "has no version 7: expected one of 1"),
        (["promote", "1", "--reason", "x"], "is already the champion: nothing was changed"),
        (["promote", "1", "--reason", " "], "--reason is empty: expected why"),
        (["rollback", "--reason", "x"], "has had no champion before version 1: name the version"),
    ],
    ids=["no version", "the champion", "no reason", "no champion before"],
)
def test_a_mistake_by_hand_is_one_line_and_changes_nothing(
    command: Registry, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    command.register(1.5, "one")
    assert run_command(command, *arguments) == 1
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert command.champion == "1"


def test_an_experiment_without_models_is_named(command: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert champion.main(["show", "nothing"]) == 1
    assert "no registered model rex-nothing" in capsys.readouterr().err
