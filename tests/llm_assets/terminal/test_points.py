import json
from pathlib import Path

import pytest

from llm_assets.artifacts.store import ArtifactStore
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.terminal.points import Point, Sweep


@pytest.fixture
def sweep() -> Sweep:
    sweep = Sweep(["--multirun", "experiment=smoke", "training.seed=0,1,2"])
    for number, bits in enumerate([1.5, 1.4, None]):
        assert sweep.begin("smoke", [f"training.seed={number}"]) == number + 1
        if bits is None:
            sweep.fail()
        else:
            sweep.points[-1] = Point("smoke", [f"training.seed={number}"], bits, 1234.5, 2_500_000)
    return sweep


def test_the_table_names_the_best_point_and_the_failed_one(sweep: Sweep) -> None:
    common, *lines = sweep.as_text().splitlines()
    assert common == "all points: smoke"
    assert [line[0] for line in lines] == [" ", " ", "*", " "]
    assert lines[2].split() == ["*", "2", "1.4000", "1,234", "2.50", "training.seed=1"]
    assert lines[3].split()[:2] == ["3", "failed"]
    assert sweep.best and sweep.best.name == "smoke training.seed=1"


def test_long_points_stay_in_their_column_of_80_and_the_best_is_named_whole(
    var: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = "0.00123456789012345", "0.00234567890123456"
    points = [["training.max_steps=100", f"training.learning_rate={rate}", "training.optim=muon"] for rate in rates]
    points[1][2] = "training.optim=adamw"
    sweep = Sweep([])
    sweep.points = [Point("smoke", overrides, 1.5, 1.0, 1) for overrides in points]
    monkeypatch.setattr(Sweep, "_log", lambda *_: None)
    sweep.close()
    table, best = capsys.readouterr().out.strip("\n").split("\n\n")
    assert best.splitlines()[0] == f"best: smoke {' '.join(points[0])}"
    common, header, *rows = table.splitlines()
    assert common == "all points: smoke training.max_steps=100"
    column = header.index("point")
    assert [row[column:] for row in rows] == [word for overrides in points for word in overrides[1:]]
    assert [bool(row[:column].strip()) for row in rows] == [True, False] * 2
    assert max(map(len, table.splitlines())) <= 80


def test_the_table_is_kept_below_var_and_in_mlflow(
    sweep: Sweep, var: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    sweep.close()
    assert "best: smoke training.seed=1" in capsys.readouterr().out
    record = json.loads((var / "sweeps" / f"{sweep.name}.json").read_text())
    assert record["best"] == "smoke training.seed=1" and len(record["points"]) == 3
    assert "**`smoke training.seed=1`**" in (var / "sweeps" / f"{sweep.name}.md").read_text()
    client, experiment_id = MlflowTracking().client()
    (run,) = client.search_runs([experiment_id], f"tags.`rex.sweep` = '{sweep.name}'")
    assert run.data.metrics["bits_per_byte"] == 1.4
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {f"{sweep.name}.md", f"{sweep.name}.json"}


def test_of_equal_points_the_first_is_best_and_without_scores_there_is_no_table(
    var: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = Sweep([])
    sweep.begin("one")
    sweep.close()
    assert capsys.readouterr().out == "" and not var.exists()
    sweep.points = [Point("one", [], 1.5, 1.0, 1), Point("two", [], 1.5, 1.0, 1)]
    assert sweep.best is sweep.points[0]


@pytest.mark.parametrize(
    ("is_whole", "row"), [(True, ["1", "1.2500", "1,234", "3.20"]), (False, ["1", "1.2500", "-", "-"])]
)
def test_a_point_has_the_numbers_that_its_run_made(
    is_whole: bool, row: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "trained_checkpoint/summary.json": {"bits_per_byte": 1.25},
        "quantized_model/summary.json": {"bytes_after": 3_200_000},
        "benchmark_report/report.json": {"summary": {"decode_tokens_per_second": 1234.2}},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setattr(ArtifactStore, "load", lambda self, asset, experiment: tmp_path / asset)
    sweep = Sweep([])
    sweep.begin("smoke")
    assert sweep.finish("smoke", is_whole=is_whole) == 1.25
    assert sweep.as_text().splitlines()[-1].split() == ["*", *row, "smoke"]
