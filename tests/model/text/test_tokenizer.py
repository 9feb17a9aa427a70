import copy
import json
import random
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.errors import PipelineError
from model.progress import with_lines
from model.settings import CorpusSettings, TokenizerSettings
from model.text.sources import Sources
from model.text.tokenizer import (
    MAX_RUN_LENGTH,
    FastEncoder,
    even_sample,
    load_tokenizer,
    splits_as_gpt2,
    token_bytes,
    train_tokenizer,
)

KINDS = ("bpe", "char")
TRICKY = [
    "",
    "<|endoftext|>",
    "x<|pad|>y <|endoftext|><|endoftext|>\n",
    "<0x41><0x0A>",
    " " * 3000 + "x" + "\n" * 500 + "\t \t ",
    "don't we'LL they've I'm 's 've 'x",
    "日本語の文章、中文 한국어 ไทย العربية עברית",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 e\u0301 \u00e9 \u200b\u00a0\u2028\u0085\x00\x7f\ufeff\U0010ffff",
    "a" * 5000,
    "0123456789 ½ ² Ⅷ ١٢٣",
]


RUNS = {
    "letters": "a",
    "base64": "aZbYqT",
    "dna": "ACGTTGCA",
    "han": "漢字仮名",
    "thai": "ทีน้ำ",
    "digits": "1234567890",
    "fractions": "½",
    "punctuation": "=",
    "minified": "(){}[];",
    "spaces": " ",
    "newlines": "\n",
    "windows newlines": "\r\n",
    "tabs": "\t",
    "ideographic spaces": "\u3000",
    "combining marks": "\u0301\u0302",
    "zero width": "\u200b\u200d\ufeff",
    "nul": "\0",
    "emoji": "🙂👩\u200d👩",
    "private use": "\ue000\U0010ffff",
}
"""Runs of every kind that GPT-2's pattern matches without bound."""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    found = [data.decode() for source, data in Sources(CorpusSettings()) if source.startswith("json/")]
    return [*found, "naïve café 東京 東京 😀😀"]


@pytest.fixture(scope="module")
def tokenizers(texts: list[str]) -> dict[str, PreTrainedTokenizerFast]:
    return {kind: train_tokenizer(TokenizerSettings(kind=kind, vocab_size=700), texts) for kind in KINDS}


@pytest.fixture(scope="module")
def encoders(tokenizers: dict[str, PreTrainedTokenizerFast]) -> dict[str, FastEncoder]:
    return {kind: FastEncoder(tokenizer) for kind, tokenizer in tokenizers.items()}


def reference_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]


def decode(tokenizer: PreTrainedTokenizerFast, ids: npt.NDArray[np.integer]) -> bytes:
    stored = token_bytes(tokenizer)
    return b"".join(stored[number] for number in ids)


def check_equal_and_exact(tokenizer: PreTrainedTokenizerFast, encoder: FastEncoder, text: str) -> None:
    ids = encoder.encode(text)
    assert ids.tolist() == reference_ids(tokenizer, text)
    assert decode(tokenizer, ids) == text.encode()
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_encoder_gives_the_tokenizers_ids_on_its_own_text(kind, texts, tokenizers, encoders) -> None:
    for text in texts:
        check_equal_and_exact(tokenizers[kind], encoders[kind], text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_the_fast_encoder_gives_the_tokenizers_ids_on_tricky_text(kind, text, tokenizers, encoders) -> None:
    check_equal_and_exact(tokenizers[kind], encoders[kind], text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(
        st.one_of(
            st.text(max_size=20),
            st.text(alphabet="aeinrst_ \n\t'.()", max_size=40),
            st.sampled_from([*TRICKY, "def ", "self", "    ", "🙂", "漢字", "\r\n", "'ll"]),
        ),
        max_size=6,
    ).map("".join)
)
def test_the_fast_encoder_gives_the_tokenizers_ids_on_any_text(kind, text, tokenizers, encoders) -> None:
    check_equal_and_exact(tokenizers[kind], encoders[kind], text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=30).map(lambda text: text.encode() + b"\xf0\x9f" * 2)))
def test_every_byte_string_round_trips(kind, data, tokenizers, encoders) -> None:
    assert decode(tokenizers[kind], encoders[kind].encode_bytes(data)) == data


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_text_encode_as_text(kind, encoders, texts) -> None:
    assert encoders[kind].encode_bytes(texts[0].encode()).tolist() == encoders[kind].encode(texts[0]).tolist()


def test_a_run_of_spaces_that_the_regex_engine_gives_up_on_is_encoded(tokenizers, encoders) -> None:
    text = "a" + " " * 1_000_000 + "b"
    with pytest.raises(ValueError, match="stack"):
        encoders["bpe"]._tiktoken.encode_to_numpy(text)
    assert encoders["bpe"].encode(text).tolist() == reference_ids(tokenizers["bpe"], text)


def test_merges_that_skip_a_token_fall_back_to_the_tokenizer(tokenizers) -> None:
    config = json.loads(tokenizers["bpe"].backend_tokenizer.to_str())
    config["model"]["merges"].pop()
    backend = type(tokenizers["bpe"].backend_tokenizer).from_str(json.dumps(config))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")
    last = token_bytes(tokenizer)[-1].decode()
    ids = FastEncoder(tokenizer).encode(f"{last}\n{last}")
    assert ids.tolist() == reference_ids(tokenizer, f"{last}\n{last}")
    assert len(tokenizer) - 1 not in ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_comes_back_the_same(kind, tokenizers, texts, tmp_path: Path) -> None:
    tokenizers[kind].save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded(texts[0], verbose=False)["input_ids"] == tokenizers[kind](texts[0], verbose=False)["input_ids"]
        assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
        assert (loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (0, 1, 1024)
        assert loaded.decode(loaded("a , b . n't")["input_ids"]) == "a , b . n't"
        assert token_bytes(loaded) == token_bytes(tokenizers[kind])


def pre_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def gpt2s(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same vocabulary with GPT-2's own pre-tokenizer, as artifacts of before the bound have it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


def test_the_pre_tokenizer_is_gpt2s_up_to_its_bound(tokenizers, texts) -> None:
    tokenizer = tokenizers["bpe"].backend_tokenizer
    gpt2 = gpt2s(tokenizers["bpe"]).backend_tokenizer
    edges = [kind * n + "x" for kind in RUNS.values() for n in range(1, MAX_RUN_LENGTH // len(kind), 17)]
    edges += [" " + "a" * MAX_RUN_LENGTH + " b", " " * MAX_RUN_LENGTH + "x", "x" + " " * MAX_RUN_LENGTH]
    for text in [*texts, *edges, *(text for text in TRICKY if len(text) < MAX_RUN_LENGTH)]:
        assert pre_tokens(tokenizer, text) == pre_tokens(gpt2, text)
    config = json.loads(tokenizer.to_str())
    assert splits_as_gpt2(tokenizer) and splits_as_gpt2(gpt2) and not splits_as_gpt2(Tokenizer(models.BPE()))
    assert config["normalizer"] is None and config["post_processor"]["special_tokens"] == {}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_of_any_kind_costs_in_proportion_to_its_length(kind, tokenizers, encoders) -> None:
    tokenizer, encoder = tokenizers["bpe"], encoders["bpe"]
    run = (RUNS[kind] * 8 * MAX_RUN_LENGTH)[: 8 * MAX_RUN_LENGTH]
    for text in (
        run,
        f"def x{run}y = 1\n",
        run + " ",
        f"東京 {run}.",
        run[:MAX_RUN_LENGTH] + "x",
        run[: MAX_RUN_LENGTH + 1] + "1",
    ):
        assert max(map(len, split_characters(tokenizer, text))) <= MAX_RUN_LENGTH + 1
        check_equal_and_exact(tokenizer, encoder, text)
        assert gpt2s(tokenizer).decode(encoder.encode(text)) == text
    assert len(encoder.encode(run * 8)) == 8 * len(encoder.encode(run))


@pytest.mark.parametrize("kind", RUNS)
def test_training_learns_from_no_run_longer_than_the_bound(kind) -> None:
    """Work is pairs per pre-token: no pre-token is longer than the bound, however long the document."""
    text = "the cat and the other cat " + RUNS[kind] * (40_000 // len(RUNS[kind]))
    with pytest.raises(PipelineError, match="set it to") as raised:
        train_tokenizer(TokenizerSettings(vocab_size=2**20), [text])
    reached = int(str(raised.value).split("set it to ")[1].split(" ")[0])
    trained = train_tokenizer(TokenizerSettings(vocab_size=reached), [text])
    assert max(map(len, split_characters(trained, text))) <= MAX_RUN_LENGTH + 1
    assert max(map(len, token_bytes(trained))) <= (MAX_RUN_LENGTH + 1) * 4


def split_characters(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The text of each pre-token, which joined are the text."""
    pieces = [text[start:end] for _, (start, end) in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert "".join(pieces) == text
    return pieces


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(
                ["a", "é", "漢", "7", "½", "=", "_", "\u0301", "\u200b", " ", "\n", "\u3000", "、", "\t", "🙂"]
            ),
            st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257, 300, 513]),
        ),
        max_size=6,
    )
)
def test_runs_of_every_length_side_by_side_are_encoded_as_the_tokenizer_does(parts, tokenizers, encoders) -> None:
    check_equal_and_exact(tokenizers["bpe"], encoders["bpe"], "".join(kind * n for kind, n in parts))


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_a_tokenizer_without_the_bound_goes_on_as_it_was(text, tokenizers, tmp_path: Path) -> None:
    gpt2s(tokenizers["bpe"]).save_pretrained(tmp_path)
    old = load_tokenizer(tmp_path)
    check_equal_and_exact(old, FastEncoder(old), text)


def test_a_tokenizer_that_splits_in_another_way_is_followed(tokenizers) -> None:
    other = gpt2s(tokenizers["bpe"])
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    check_equal_and_exact(other, FastEncoder(other), "x = 1000 0000\n" * 3)


def test_long_training_says_that_it_goes_on() -> None:
    logged: list[str] = []
    assert with_lines(lambda: time.sleep(0.2) or 7, logged.append, "learning", every_s=0.02) == 7
    assert logged and logged[0] == "learning, 0:00 so far"
    with pytest.raises(PipelineError, match="no text"):
        with_lines(lambda: (_ for _ in ()).throw(PipelineError("no text")), logged.append, "learning")


def test_training_is_deterministic(tokenizers, texts) -> None:
    again = train_tokenizer(TokenizerSettings(vocab_size=700), texts)
    assert again.backend_tokenizer.to_str() == tokenizers["bpe"].backend_tokenizer.to_str()


def test_every_byte_has_a_token_and_specials_stand_for_none(tokenizers) -> None:
    for kind, tokenizer in tokenizers.items():
        spelled = token_bytes(tokenizer)
        assert len(spelled) == len(tokenizer) and spelled[:2] == [b"", b""]
        assert all(spelled[2:]), kind
        assert {bytes([byte]) for byte in range(256)} <= set(spelled)
    assert len(tokenizers["bpe"]) == 700


def test_every_character_of_the_text_is_one_token(tokenizers, encoders, texts) -> None:
    characters = sorted(set("".join(texts)))
    assert len(tokenizers["char"]) == 2 + 256 + len(characters)
    assert len(encoders["char"].encode("".join(characters))) == len(characters)
    assert len(encoders["char"].encode("語")) == 3


def test_a_vocabulary_larger_than_the_text_allows_says_what_it_reached() -> None:
    text = "the cat and the other cat"
    with pytest.raises(PipelineError, match=r"vocab_size is 4,096, but .* only gives 2\d\d tokens") as raised:
        train_tokenizer(TokenizerSettings(vocab_size=4096), [text])
    reached = int(str(raised.value).split("set it to ")[1].split(" ")[0])
    assert len(train_tokenizer(TokenizerSettings(vocab_size=reached), [text])) == reached


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"no tokenizer\.json in "):
        load_tokenizer(tmp_path)


def test_a_sample_is_spread_evenly_and_stays_within_its_bytes() -> None:
    source = random.Random(0)
    documents = [chr(0x4E00 + number) * source.randint(1, 400) for number in range(500)]
    total = sum(len(text.encode()) for text in documents)
    sample = list(even_sample(documents, total, total // 10))
    assert 0.9 * total / 10 < sum(len(text.encode()) for text in sample) <= total // 10
    places = np.array([ord(text[0]) - 0x4E00 for text in sample])
    assert np.histogram(places, bins=5, range=(0, 500))[0].min() >= 5
    assert list(even_sample(documents, total, 0)) == documents == list(even_sample(documents, total, total))


def test_one_long_document_is_sampled_throughout() -> None:
    text = "".join(chr(0x100 + number) * 65_536 for number in range(20))
    sample = "".join(even_sample([text], len(text.encode()), len(text.encode()) // 4))
    assert [ord(character) - 0x100 for character in sorted(set(sample))] == [0, 4, 8, 12, 16]


def of_characters() -> Tokenizer:
    """As Llama 2 has it: pieces of characters, with bytes for those that are unknown."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, [("\u2581", "a")], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "kind"),
    [
        (Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), "Unigram"),
        (Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "WordPiece"),
        (of_characters(), "BPE of characters"),
    ],
    ids=["unigram", "wordpiece", "llama2"],
)
def test_a_pretrained_tokenizer_of_another_kind_is_one_line(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a").save_pretrained(tmp_path)
    with pytest.raises(
        PipelineError, match=rf"^tokenizer.path is .*: its tokenizer is {kind}: expected byte-level BPE"
    ):
        train_tokenizer(TokenizerSettings(kind="pretrained", path=str(tmp_path)), [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pretrained_tokenizer_of_this_project_is_taken_as_it_is(tokenizers, tmp_path: Path, kind: str) -> None:
    tokenizers[kind].save_pretrained(tmp_path)
    taken = train_tokenizer(TokenizerSettings(kind="pretrained", path=str(tmp_path)), [])
    assert taken.get_vocab() == tokenizers[kind].get_vocab()


def test_a_damaged_pretrained_tokenizer_is_one_line_that_names_the_option(tokenizers, tmp_path: Path) -> None:
    tokenizers["bpe"].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(PipelineError, match=r"^tokenizer\.path is .*tokenizer\.json is not JSON"):
        train_tokenizer(TokenizerSettings(kind="pretrained", path=str(tmp_path)), [])


def test_tokens_added_as_plain_texts_stand_for_those(tokenizers) -> None:
    made = copy.deepcopy(tokenizers["bpe"])
    made.add_tokens(["    ", "<a b>", "日本", "<tool_call>"])
    text = "x    y <a b> 日本<tool_call>\n"
    ids = FastEncoder(made).encode(text).tolist()
    assert ids == made.encode(text, add_special_tokens=False)
    assert {len(made) - 4, len(made) - 3, len(made) - 2, len(made) - 1} <= set(ids)
    known = token_bytes(made)
    assert b"".join(known[number] for number in ids).decode() == text == made.decode(ids)
