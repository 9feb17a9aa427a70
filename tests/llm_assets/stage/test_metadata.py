import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from llm_assets.stage import metadata as show


@dataclass
class Summary:
    tokens: int
    loss: float
    name: str
    splits: dict[str, int]


def test_numbers_are_those_that_can_be_plotted() -> None:
    summary = Summary(tokens=3, loss=float("nan"), name="x", splits={"train": 2})
    assert show.numbers(summary) == {"tokens": 3, "splits/train": 2}
    assert show.numbers({"a": {"b": 1.5}, "c": [1]}) == {"a/b": 1.5}


def test_a_table_keeps_the_types_of_its_columns() -> None:
    table = show.table([{"split": "train", "tokens": 3, "share": 0.5, "ok": True, "path": Path("x")}])
    assert [(column.name, column.type) for column in table.schema.columns] == [
        ("split", "string"),
        ("tokens", "int"),
        ("share", "float"),
        ("ok", "bool"),
        ("path", "string"),
    ]
    assert table.records[0].data["path"] == "x"


def test_a_picture_travels_in_the_event_and_a_large_one_is_made_to_fit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    for side in (20, 900):
        Image.fromarray(noise[:side, :side]).save(tmp_path / "plot.png")
        text = str(show.picture(tmp_path / "plot.png").value)
        encoded = text.removeprefix("![plot](data:image/png;base64,").removesuffix(")")
        content = base64.b64decode(encoded, validate=True)
        assert len(content) <= show.PICTURE_BYTES
        assert Image.open(io.BytesIO(content)).format == "PNG"


def test_a_block_holds_text_that_has_fences_and_is_cut_when_long() -> None:
    assert show.fenced("a\n```\nb") == "````\na\n```\nb\n````"
    assert len(show.fenced("x" * 100_000)) < 21_000


def test_samples_show_prompt_and_continuation_together() -> None:
    assert show.samples({"def ": "main():"}).value == "```\ndef main():\n```"
