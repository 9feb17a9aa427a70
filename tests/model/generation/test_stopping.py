"""Stop strings are found wherever the pieces are cut, and no text is lost."""

import random

import pytest

from model.generation.stopping import StopStrings


def run(text: str, stops: list[str], cuts: random.Random) -> tuple[str, str | None]:
    search, kept, at = StopStrings(stops), "", 0
    while at < len(text):
        size = cuts.randint(1, 4)
        piece, stop = search.push(text[at : at + size])
        kept, at = kept + piece, at + size
        if stop is not None:
            return kept, stop
    return kept + search.flush(), None


@pytest.mark.parametrize("seed", range(200))
def test_the_text_before_the_first_stop_string_is_kept_however_it_comes(seed):
    numbers = random.Random(seed)
    text = "".join(numbers.choice("abc") for _ in range(30))
    stops = ["".join(numbers.choice("abc") for _ in range(numbers.randint(2, 6))) for _ in range(numbers.randint(1, 3))]
    kept, stop = run(text, stops, numbers)
    if stop is None:
        assert kept == text and not any(each in text for each in stops)
    else:
        assert text.startswith(kept + stop)
        # Nothing that ended before this one was overlooked.
        before = (kept + stop)[:-1]
        assert not any(each in before for each in stops)


def test_text_that_cannot_become_a_stop_string_is_not_held_back():
    search = StopStrings(["###"])
    assert [search.push(piece) for piece in ("a", "#", "b", "##", "#")] == [
        ("a", None),
        ("", None),
        ("#b", None),
        ("", None),
        ("", "###"),
    ]


def test_a_stop_string_that_may_not_stop_yet_is_text():
    search = StopStrings(["ab"])
    assert search.push("xab", may_stop=False) == ("xab", None)
    assert search.push("ab") == ("", "ab")
    assert search.push("aa", may_stop=False) == ("a", None)
    assert search.push("b") == ("", "ab")


def test_without_stop_strings_all_text_passes():
    search = StopStrings([])
    assert search.push("text") == ("text", None)
    assert search.flush() == ""
