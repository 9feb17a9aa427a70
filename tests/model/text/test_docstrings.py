import pytest

from model.settings import CorpusSettings
from model.text.chat.template import turns_of
from model.text.docstrings import docstrings
from model.text.sources import Sources

SOURCE = '''
"""A module."""
class Stack(list, metaclass=M):
    """Last in,
    first out.

    More about it.
    """
    @cached
    async def pop(self, *, n: int = 1) -> "T":
        "Take the top."
    def push(self, item): return item
    def size(self):
        """   """
'''


def test_heads_and_first_paragraphs_of_what_is_documented():
    assert list(docstrings(SOURCE)) == [
        ("class Stack(list, metaclass=M):", "Last in,\nfirst out."),
        ("async def pop(self, *, n: int=1) -> 'T':", "Take the top."),
    ]


def test_the_standard_library_gives_conversations():
    sources = iter(Sources(CorpusSettings(source="docstrings")))
    for _, (source, data) in zip(range(50), sources, strict=False):
        (_, head), (_, answer) = turns_of(data.decode())
        assert source.endswith(".py") and head.startswith(("def ", "async def ", "class ")) and head.endswith(":")
        assert answer.strip()


def test_text_that_is_not_python_is_a_syntax_error():
    with pytest.raises(SyntaxError):
        list(docstrings("def :"))
