from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench.tokenizing import check_ids, compare_speed, main
from model.errors import PipelineError


@pytest.mark.processes
def test_both_sides_give_equal_ids_and_a_difference_is_refused(tmp_path: Path) -> None:
    result = compare_speed(0.4, 1, 600, tmp_path)
    assert result["bytes"] == 400_000 and result["tokens"] > 100_000
    (only,) = result["rounds"]
    assert result["median_ratio"] == only["ratio"] == only["datasets_map_s"] / only["ours_s"]

    class Mapped(list):  # what datasets.map returned, with one id changed below
        def with_format(self, _: str) -> "Mapped":
            return self

    tokens = np.fromfile(tmp_path / "ours.bin", np.uint16)
    offsets = np.load(tmp_path / "ours.documents.npy")
    mapped = Mapped({"input_ids": tokens[start : stop - 1].copy()} for start, stop in pairwise(offsets))
    assert check_ids(tmp_path / "ours", mapped) == result["tokens"]
    mapped[3]["input_ids"][-1] += 1
    with pytest.raises(PipelineError, match="document 3: ids differ"):
        check_ids(tmp_path / "ours", mapped)


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--megabytes" in capsys.readouterr().out
