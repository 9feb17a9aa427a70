import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from llm_assets.stage import metadata as ui_metadata


@dataclass
class Summary:
    tokens: int
    loss: float
    name: str
    splits: dict[str, int]


def test_numbers_are_those_that_can_be_plotted() -> None:
    summary = Summary(tokens=3, loss=float("nan"), name="x", splits={"train": 2})
    assert ui_metadata.numbers(summary) == {"tokens": 3, "splits/train": 2}
    assert ui_metadata.numbers({"a": {"b": 1.5}, "c": [1]}) == {"a/b": 1.5}


def test_a_table_keeps_the_types_of_its_columns() -> None:
    table = ui_metadata.table([{"split": "train", "tokens": 3, "share": 0.5, "ok": True, "path": Path("x")}])
    assert [(column.name, column.type) for column in table.schema.columns] == [
        ("split", "string"),
        ("tokens", "int"),
        ("share", "float"),
        ("ok", "bool"),
        ("path", "string"),
    ]
    assert table.records[0].data["path"] == "x"


def test_numbers_of_a_table_are_rounded() -> None:
    table = ui_metadata.table([{"difference": 1.720494806e-06, "speed": 123456.7, "nothing": float("nan")}])
    assert str(table.records[0].data) == str({"difference": 1.7205e-06, "speed": 123460, "nothing": float("nan")})


def test_a_picture_travels_in_the_event_and_a_large_one_is_made_to_fit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    for side in (20, 900):
        Image.fromarray(noise[:side, :side]).save(tmp_path / "plot.png")
        text = str(ui_metadata.picture(tmp_path / "plot.png").value)
        encoded = text.removeprefix("![plot](data:image/png;base64,").removesuffix(")")
        content = base64.b64decode(encoded, validate=True)
        assert len(content) <= ui_metadata.PICTURE_BYTES
        assert Image.open(io.BytesIO(content)).format == "PNG"


def test_a_block_holds_text_that_has_fences_and_is_cut_when_long() -> None:
    assert ui_metadata.fenced("a\n```\nb") == "````\na\n```\nb\n````"
    assert len(ui_metadata.fenced("x" * 100_000)) < 21_000


def test_a_sample_keeps_its_characters_and_fits_into_the_page() -> None:
    lines = ui_metadata.wrapped("x" * 100 + "\n\nend").split("\n")
    assert [len(line) for line in lines] == [42, 42, 16, 0, 3]
    assert "".join(lines) == "x" * 100 + "end"


def test_a_token_of_whitespace_is_visible() -> None:
    shown = {" ": '" "', "\n\t": '"\\n\\t"', "é": '"é"', "a\\xff": '"a\\xff"'}
    assert {token: ui_metadata.quoted(token) for token in shown} == shown


def test_samples_show_prompt_and_continuation_together() -> None:
    assert ui_metadata.samples({"def ": "main():"}).value == "```\ndef main():\n```"


def test_numbers_are_rounded_to_what_a_person_reads() -> None:
    found = ui_metadata.numbers(
        {"loss": 3.8842917, "flops": 24008666772.003574, "share": 0.034876998416049694, "tokens": 123456789}
    )
    assert found == {"loss": 3.8843, "flops": 24009000000, "share": 0.034877, "tokens": 123456789}
    assert [ui_metadata.size(count) for count in (12, 1234, 6_543_210, 123_456_789)] == [
        "12 bytes",
        "1.2 kB",
        "6.5 MB",
        "123 MB",
    ]


def test_pictures_are_small_enough_to_be_shown_inline() -> None:
    import re
    from urllib.parse import unquote
    from xml.etree import ElementTree

    curve = ui_metadata.line("loss", [(step, 9.0 / (1 + step)) for step in range(5000)])
    chart = ui_metadata.bars("tokens per second", {f"model & {n} <x>": 1234.5 * n for n in range(1, 6)}, " tokens/s")
    for picture, shapes in ((curve, "polyline"), (chart, "rect")):
        text = str(picture.value)
        assert len(text) <= ui_metadata.INLINE_CHARACTERS, len(text)
        found = re.fullmatch(r"!\[[^\]]+\]\(data:image/svg\+xml,([^ ()\"]+)\)", text)
        assert found, text
        root = ElementTree.fromstring(unquote(found[1]))
        assert root.findall(f".//{{http://www.w3.org/2000/svg}}{shapes}")
    assert "1.23k tokens/s" in unquote(str(chart.value))
    assert "step 0: 9<" in unquote(str(curve.value)) and "step 5k: 0.0018<" in unquote(str(curve.value))
    assert ">144 kB<" in unquote(str(ui_metadata.bars("bytes", {"weights": 144488}, "bytes").value))


def test_a_curve_without_points_says_so() -> None:
    assert "too few for a curve" in str(ui_metadata.line("loss", [(0, float("nan"))]).value)


def test_a_summary_is_a_table_with_units() -> None:
    assert str(ui_metadata.summary(train_text="1.2 MB").value) == "| | |\n|---|---:|\n| train text | 1.2 MB |"
    assert "| llama.cpp q8_0 | 1 |" in str(ui_metadata.summary(**{"llama.cpp q8_0": "1"}).value)
