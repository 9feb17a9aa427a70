"""What later stages measure of a version is recorded, and changes the champion where it speaks against it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm_assets.versions import promotion
from llm_assets.versions.measurements import PARITY, TASKS, in_words, measurements

Registry = Any  # conftest's


def parity(*differences: str) -> dict[str, str]:
    """The measurement of an export that two engines ran."""
    rows = [
        {"engine": "transformers 5.23", "file": "hf", "log_probability_difference": 1e-6, "differences": []},
        {"engine": "llama.cpp 1", "file": "a.gguf", "log_probability_difference": 0.1, "differences": differences},
    ]
    return {PARITY: written("certificates.json", {"certificates": rows, "left_out": []})[PARITY]}


def tasks(value: float, *, documents: int = 100, higher: bool | None = True, few: int = -1, **other: Any) -> dict:
    score = {"task": "piqa", "metric": "acc", "value": value, "stderr": 0.03, "documents": documents}
    found = {"lm-eval": "0.4", "scores": [{**score, "higher_is_better": higher, **other}]}
    return {TASKS: written("evaluation.json", found, few)[TASKS]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "artifact").mkdir()
    monkeypatch.chdir(tmp_path / "artifact")
    return tmp_path


def written(name: str, content: dict[str, Any], few: int = -1) -> dict[str, str]:
    """The measurements in an artifact that holds this file."""
    artifact = Path(name).absolute().parent
    for path in artifact.iterdir():
        path.unlink()
    (artifact / name).write_text(json.dumps(content))
    return measurements(artifact, few)


def evidence(registry: Registry, version: str) -> dict[str, Any]:
    return promotion.decision_of(registry.client.get_model_version(registry.name, version))


def two_versions(registry: Registry) -> None:
    registry.register(1.5, "one")
    registry.register(1.4, "two")
    assert registry.champion == "2"


def test_a_decision_says_what_is_not_measured_yet(registry: Registry) -> None:
    two_versions(registry)
    for version in "12":
        found = evidence(registry, version)
        assert found["parity"] == found["tasks"] == "not measured"


def test_a_champion_whose_export_differs_is_withdrawn_and_the_former_one_returns(registry: Registry) -> None:
    two_versions(registry)
    found = registry.measure("two", parity("greedy token 3 of 'code': 7, expected 9", "another"))
    assert registry.champion == "1"
    assert (
        found["decision"]
        == registry.decision("2")
        == (
            "withdrawn: its export differs from the checkpoint in 2 places: llama.cpp 1, a.gguf: "
            "greedy token 3 of 'code': 7, expected 9"
        )
    )
    assert found["parity"]["certificates"] == 2 and found["difference"] == pytest.approx(-0.1)
    last = promotion.history(registry.client, registry.name)[-1]
    assert last["version"] == "1" and last["reason"].startswith("version 2 was withdrawn: its export differs")
    registry.register(1.45, "three")  # better than the champion that returned
    assert registry.champion == "3"


def test_the_first_champion_is_withdrawn_without_a_successor_and_the_next_candidate_takes_over(
    registry: Registry,
) -> None:
    registry.register(1.5, "one")
    registry.measure("one", parity("a difference"))
    assert registry.champion is None
    registry.register(1.6, "two")
    assert registry.champion == "2"


def test_a_withdrawn_version_is_decided_on_again_once_its_export_agrees(registry: Registry) -> None:
    two_versions(registry)
    registry.measure("two", parity("a difference"))
    assert registry.champion == "1"
    registry.measure("two", parity(), bits=1.4)
    assert registry.champion == "2"
    assert registry.decision("2").startswith("promoted: 1.4000 bits per byte")
    assert evidence(registry, "2")["parity"]["differences"] == 0


@pytest.mark.parametrize(
    ("champions", "candidates", "stays", "words"),
    [
        (tasks, {"value": 0.43}, False, "1 of 1 worse"),  # 1.650 standard errors; 1.645 is the bound of 5 %
        (tasks, {"value": 0.431}, True, "0 of 1 worse"),
        (tasks, {"value": 0.9}, True, "0 of 1 worse"),
        (tasks, {"value": 0.9, "higher": False}, False, "1 of 1 worse"),
        (tasks, {"value": 0.1, "higher": None}, True, "0 of 1 worse"),
        (tasks, {"value": 0.1, "stderr": None}, True, "0 of 1 worse"),
        (tasks, {"value": 0.1, "documents": 50}, True, "measured, with other documents than the champion's"),
        (tasks, {"value": 0.1, "few": 5}, True, "measured, with other solved examples than the champion's"),
        (tasks, {"value": 0.1, "task": "arc"}, True, "measured, with other tasks than the champion's"),
        (None, {"value": 0.1}, True, "measured, but not the champion's"),
    ],
    ids=[
        "worse",
        "worse within chance",
        "better",
        "a loss",
        "no direction",
        "no standard error",
        "other documents",
        "other examples",
        "other tasks",
        "no scores of the champion",
    ],
)
def test_scores_on_the_same_tasks_may_not_be_worse_than_the_champions_by_more_than_chance(
    registry: Registry, champions: Any, candidates: dict[str, Any], stays: bool, words: str
) -> None:
    registry.register(1.5, "one")
    if champions:
        same = {"higher": candidates["higher"]} if "higher" in candidates else {}
        registry.measure("one", champions(0.5, **same))
    registry.register(1.4, "two")
    found = registry.measure("two", tasks(**candidates))
    assert registry.champion == ("2" if stays else "1")
    assert in_words(found)["tasks"] == words
    if not stays:
        assert found["decision"].startswith("withdrawn: it is worse on 1 of 1 scores of the same tasks: piqa acc 0.")
        assert re.search(r"the champion's 0\.5000, \d\.\d standard errors of the difference worse", found["decision"])


def test_the_more_scores_the_larger_the_bound_so_that_an_equal_model_is_seldom_called_worse(registry: Registry) -> None:
    def scored(**values: float) -> dict[str, str]:
        rows = [
            {"task": task, "metric": "acc", "value": value, "stderr": 0.03, "documents": 9, "higher_is_better": True}
            for task, value in values.items()
        ]
        return {TASKS: written("evaluation.json", {"lm-eval": "0.4", "scores": rows})[TASKS]}

    registry.register(1.5, "one")
    registry.measure("one", scored(a=0.5, b=0.5, c=0.5, d=0.5))
    registry.register(1.4, "two")
    found = registry.measure("two", scored(a=0.42, b=0.42, c=0.42, d=0.42))  # 1.9 standard errors, the bound is 2.2
    assert registry.champion == "2" and in_words(found)["tasks"] == "0 of 4 worse"
    found = registry.measure("two", scored(a=0.40, b=0.55, c=0.5, d=0.5))  # 2.4
    assert registry.champion == "1" and in_words(found)["tasks"] == "1 of 4 worse"


def test_a_champion_set_by_hand_stays_whatever_is_measured(registry: Registry) -> None:
    two_versions(registry)
    promotion.set_by_hand(registry.client, registry.name, "1", "it reads well")
    registry.measure("one", parity("a difference"))
    assert registry.champion == "1"
    assert registry.decision("1") == "promoted by hand: it reads well"
    assert any("it was set by hand and stays the champion" in line for line in registry.lines)
    assert evidence(registry, "1")["parity"]["differences"] == 1


def test_the_same_measurement_once_more_changes_nothing(registry: Registry) -> None:
    two_versions(registry)
    registry.measure("two", parity("a difference"))
    promotion.set_by_hand(registry.client, registry.name, "2", "the difference is known")
    registry.measure("two", parity("a difference"))
    assert registry.champion == "2"
    assert registry.decision("2") == "promoted by hand: the difference is known"


def test_measurements_of_what_is_not_registered_are_nothing(registry: Registry) -> None:
    registry.register(1.5, "one")
    assert registry.measure("another", parity("a difference")) == {}
    assert registry.champion == "1"
    assert written("certificates.json", {"certificates": [], "left_out": ["no engine"]}) == {}
