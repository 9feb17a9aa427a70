"""Text leaves in whole characters, and the pieces joined are the decoding of the whole."""

import random

from model.generation.detokenizer import Detokenizer
from model.text.tokenizer import token_bytes
from tests.support.tiny import TEXT, tiny_tokenizer

BYTES = [bytes([byte]) for byte in range(256)]


def pieces(data: bytes, vocabulary: list[bytes] = BYTES) -> list[str]:
    detokenizer = Detokenizer(vocabulary)
    return [*(detokenizer.push(byte) for byte in data), detokenizer.flush()]


def test_a_character_of_several_bytes_comes_out_once_it_is_complete():
    assert pieces("a🦖b".encode()) == ["a", "", "", "", "🦖", "b", ""]


def test_an_incomplete_character_at_the_end_becomes_the_replacement_character():
    assert pieces("né".encode()[:-1]) == ["n", "", "\ufffd"]


def test_any_bytes_decode_as_they_do_in_one_go():
    noise = random.Random(0)
    for _ in range(300):
        data = bytes(noise.choices([0x41, 0x80, 0xBF, 0xC3, 0xE2, 0x82, 0xF0, 0x9F, 0xED, 0xFF], k=12))
        assert "".join(pieces(data)) == data.decode("utf-8", "replace")


def test_the_tokenizers_own_decoding_is_reproduced_without_special_tokens():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.eos_token_id, *tokenizer.encode(TEXT), tokenizer.pad_token_id]
    detokenizer = Detokenizer(token_bytes(tokenizer))
    text = "".join([*(detokenizer.push(token) for token in ids), detokenizer.flush()])
    assert text == tokenizer.decode(ids, skip_special_tokens=True) == TEXT


def test_ids_beyond_the_tokenizer_stand_for_nothing():
    assert pieces(b"ab", vocabulary=BYTES[:98]) == ["a", "", ""]
