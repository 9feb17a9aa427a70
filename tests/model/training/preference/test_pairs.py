import gzip
import json
from pathlib import Path

import pytest

from model.errors import PipelineError
from model.settings import TokenizerSettings
from model.text.chat.template import Turn
from model.text.tokenizer import train_tokenizer
from model.training.preference.pairs import PreferenceEncoder, preference, read_preferences

QUESTION = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"}]


def line(**fields: object) -> bytes:
    return json.dumps({"prompt": "why?", "chosen": "because", "rejected": "no", **fields}).encode()


def test_texts_and_messages_are_read_and_a_prompt_inside_the_answers_is_left_out():
    assert preference(line(), "x").prompt == (Turn("user", "why?"),)
    said = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    for answers in (said, {name: [*QUESTION, *messages] for name, messages in said.items()}):
        pair = preference(line(prompt=QUESTION, **answers), "x")
        assert pair.prompt == (Turn("system", "be kind"), Turn("user", "why?"))
        assert (pair.chosen, pair.rejected) == ("chosen", "rejected")


def test_pairs_of_one_prompt_are_held_out_together_and_about_a_tenth_are():
    pairs = [preference(line(prompt=f"why {number}?"), "x") for number in range(500)]
    others = [preference(line(prompt=f"why {number}?", chosen="yes"), "x") for number in range(500)]
    assert [pair.is_held_out for pair in pairs] == [pair.is_held_out for pair in others]
    assert 20 < sum(pair.is_held_out for pair in pairs) < 90


def test_plain_and_compressed_lines_are_read_in_order(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(line(chosen="1") + b"\n\n" + line(chosen="2") + b"\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line(chosen="3")))
    assert [pair.chosen for pair in read_preferences([str(tmp_path / "*")])] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", r"a.jsonl, line 2 is not JSON in UTF-8"),
        (b"\xff", r"line 2 is not JSON in UTF-8"),
        (b"[1]", r"line 2 is a JSON list; expected one object a line"),
        (b'{"prompt": "a", "chosen": "b"}', r"line 2 has no field 'rejected'; found: chosen, prompt; expected prompt"),
        (line(chosen=3), r"line 2, chosen is a number; expected text, or a list of messages"),
        (line(chosen="no"), r"line 2: chosen and rejected are equal; expected two different answers"),
        (
            line(prompt=[{"role": "judge", "content": "a"}]),
            r"prompt, message 1 has the role 'judge'; expected one of sys",
        ),
        (line(prompt=[{"role": "user"}]), r"prompt, message 1: content is missing"),
        (line(prompt=[]), r"line 2, prompt: expected a question"),
        (line(prompt=[{"role": "assistant", "content": "a"}]), r"line 2, prompt: expected a question"),
        (line(chosen=QUESTION), r"line 2, chosen: 2 messages, the last of user; expected one of the assistant"),
        (line(rejected=[]), r"line 2, rejected: 0 messages, the last of no role"),
    ],
)
def test_a_line_that_is_no_preference_is_named_in_one_line(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "a.jsonl").write_bytes(line() + b"\n" + data + b"\n")
    with pytest.raises(PipelineError, match=message) as caught:
        list(read_preferences([str(tmp_path / "a.jsonl")]))
    assert "\n" not in str(caught.value)


def test_files_of_another_kind_and_broken_ones_are_named(tmp_path: Path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(PipelineError, match=r"a.csv in training.preferences is not a .jsonl"):
        list(read_preferences([str(tmp_path / "a.csv")]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line() + b"\n" + line())[:-9])
    with pytest.raises(PipelineError, match=r"b.jsonl.gz, line \d: broken gzip file"):
        list(read_preferences([str(tmp_path / "b.jsonl.gz")]))


@pytest.mark.parametrize("chat", [True, False])
def test_pairs_are_encoded_as_conversations_are_and_cannot_forge_turns(chat: bool):
    text = "why? because no. be kind <|user|> " * 30
    tokenizer = train_tokenizer(TokenizerSettings(vocab_size=270, sequence_length=64, chat=chat), [text])
    encoder = PreferenceEncoder(tokenizer, 64)
    pair = preference(line(prompt=QUESTION, chosen="be <|user|> kind"), "x")
    ids = encoder.encode(pair)
    if chat:
        turns = [{"role": turn.role, "content": turn.content} for turn in pair.prompt]
        shown = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(ids["prompt_ids"]) == shown
        assert tokenizer.convert_tokens_to_ids("<|user|>") not in ids["chosen_ids"]
    else:
        assert tokenizer.decode(ids["prompt_ids"]) == "be kindwhy?"
    assert tokenizer.decode(ids["chosen_ids"][:-1]) == "be <|user|> kind"
    assert ids["chosen_ids"][-1] == ids["rejected_ids"][-1] == tokenizer.eos_token_id
    assert encoder.cut == 0


def test_what_is_longer_than_the_window_loses_the_start_of_its_prompt_and_then_the_end_of_its_answers():
    tokenizer = train_tokenizer(TokenizerSettings(vocab_size=260, sequence_length=64), ["abc" * 30])
    encoder = PreferenceEncoder(tokenizer, 40)
    whole = {"prompt": "q" * 30, "chosen": "c" * 5, "rejected": "r" * 20}
    ids = encoder.encode(preference(line(**whole), "x"))
    assert [len(ids[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [19, 6, 21]
    ids = encoder.encode(preference(line(**{**whole, "rejected": "r" * 50}), "x"))
    assert [len(ids[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [10, 6, 30]
    ids = encoder.encode(preference(line(prompt="q", chosen="c", rejected="r" * 50), "x"))
    assert [len(ids[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [1, 2, 39]
    assert encoder.cut == 3
