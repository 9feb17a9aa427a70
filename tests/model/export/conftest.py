"""Held-out text and its tokenizer, for the engines' comparisons."""

import json
from pathlib import Path

import pytest

from model.settings import CorpusSettings, TokenizerSettings
from model.text.chat.template import add_marks
from model.text.corpus import build_corpus
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset, build_tokenized_dataset
from tests.model.export.exports import Made, Source, make
from tests.support.tiny import CONTEXT


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("text")
    texts = [
        f"def f{n}(x):\n    return 'naïve größe' + {n * n}  # it's  東京 {chr(0x3400 + n)}\n" * 3 for n in range(300)
    ]
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_corpus(CorpusSettings(source="files", paths=[str(path)]), folder / "corpus")
    settings = TokenizerSettings(kind="bpe", vocab_size=320, sequence_length=CONTEXT)
    build_tokenized_dataset(settings, folder / "corpus", folder / "tokens")
    tokenizer = load_tokenizer(folder / "tokens" / "tokenizer")
    add_marks(tokenizer)
    return tokenizer, TokenDataset(folder / "tokens", "validation", CONTEXT)


@pytest.fixture
def glm4(source: Source, tmp_path: Path) -> Made:
    return make(source, tmp_path, post_norm=True)
