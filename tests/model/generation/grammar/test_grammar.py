"""Texts that follow a grammar, through the engine and each of its steps."""

import json
import re
import threading

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import PipelineError
from model.generation.engine import Engine
from model.generation.grammar.grammar import Kind, choice_grammar, one_line
from model.generation.requests import Finished, GenerationRequest, PromptScores, SamplingParameters, TextPiece
from tests.model.generation.engines import PROMPT, start
from tests.support.tiny import tiny_model

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ask(
    engine: Engine, kind: Kind, source: str, *, seed: int = 0, max_tokens: int = 80, **options
) -> GenerationRequest:
    sampling = options.pop("sampling", SamplingParameters(seed=seed))
    grammar = engine.compile_grammar(kind, source)
    return GenerationRequest(PROMPT, max_tokens, sampling, grammar=grammar, **options)


def answer(engine: Engine, request: GenerationRequest) -> tuple[str, Finished]:
    *pieces, last = engine.submit(request)
    assert isinstance(last, Finished)
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)), last


@pytest.mark.parametrize(
    "sampling",
    [SamplingParameters(temperature=0), *(SamplingParameters(seed=seed, top_k=2, top_p=0.9) for seed in (0, 1, 2))],
    ids=str,
)
def test_a_text_is_valid_under_its_schema_in_every_step(each_step, model, tokenizer, sampling):
    engine = start(model, tokenizer)
    try:
        text, last = answer(engine, ask(engine, "json", json.dumps(PERSON), sampling=sampling))
    finally:
        engine.stop()
    assert last.finish_reason == "stop" and last.stopped_by is None
    jsonschema_rs.validate(PERSON, json.loads(text))


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", r"[a-c]{4}\d|é+x", r"[a-c]{4}\d|é+x"),
        ("regex", "^ab$", "ab"),
        ("grammar", 'start: "a" b "c"\nb: /[0-9]/ | "(" b ")"', r"a\(*[0-9]\)*c"),
        ("grammar", 'root ::= "x" ("y" | "zz")', "x(y|zz)"),
        ("grammar", choice_grammar(["größer", 'a\n"b\\', "🦖"]), 'größer|a\n"b\\\\|🦖'),
        ("grammar", choice_grammar([f"{number}." for number in range(2_000)]), r"(0|1?[1-9]\d{0,2}|1[0-9]{3})\."),
    ],
)
def test_a_text_follows_expressions_and_grammars(engine, kind, source, pattern):
    for seed in range(10):
        text, last = answer(engine, ask(engine, kind, source, seed=seed))
        assert last.finish_reason == "length" or re.fullmatch(pattern, text), text


@st.composite
def schemas(draw, depth: int = 2):
    leaves = [
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
            st.integers(-50, 50),
            st.integers(0, 200),
        ),
        st.builds(
            lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
            st.integers(0, 2),
            st.integers(0, 3),
        ),
        st.builds(
            lambda values: {"enum": values},
            st.lists(st.one_of(st.text(max_size=4), st.integers(-9, 9), st.booleans()), min_size=1, max_size=3),
        ),
        st.builds(lambda value: {"const": value}, st.text(max_size=4)),
        st.sampled_from([{"type": "string", "pattern": "^[a-f]{1,4}$"}, {"type": "string", "format": "date"}]),
    ]  # fmt: skip
    if depth == 0:
        return draw(st.one_of(*leaves))
    inner = schemas(depth=depth - 1)
    kind = draw(st.sampled_from(["leaf", "array", "object", "anyOf"]))
    if kind == "array":
        low = draw(st.integers(0, 1))
        return {"type": "array", "items": draw(inner), "minItems": low, "maxItems": low + draw(st.integers(0, 2))}
    if kind == "object":
        properties = draw(st.dictionaries(st.text(max_size=3), inner, max_size=3))
        required = [name for name in properties if draw(st.booleans())]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "anyOf":
        return {"anyOf": draw(st.lists(inner, min_size=1, max_size=2))}
    return draw(st.one_of(*leaves))


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas(), seed=st.integers(0, 1000))
def test_texts_of_random_schemas_parse_and_are_valid(engine, schema, seed):
    text, last = answer(engine, ask(engine, "json", json.dumps(schema), seed=seed))
    assert last.finish_reason in ("stop", "length")
    if last.finish_reason == "stop":
        assert jsonschema_rs.is_valid(schema, json.loads(text)), (schema, text)


def test_an_unbounded_text_is_cut_off_by_its_tokens_and_was_right_so_far(engine):
    text, last = answer(engine, ask(engine, "regex", "[a-z]+", max_tokens=7))
    assert last.finish_reason == "length" and last.generated_tokens == 7 and re.fullmatch("[a-z]+", text)


def test_the_end_of_text_token_ends_it_where_the_grammar_allows_and_nowhere_else(tokenizer):
    model = tiny_model(tokenizer, stops=True)
    engine = start(model, tokenizer, end_of_text_ids=None)
    bias = SamplingParameters(temperature=0, logit_bias={tokenizer.eos_token_id: 100.0})
    try:
        text, last = answer(engine, ask(engine, "regex", "[ab]{5,50}", sampling=bias))
        assert re.fullmatch("[ab]{5,50}", text) and last.finish_reason == "stop"
        assert len(text) < 50  # it took the token, once it was allowed
        text, last = answer(engine, ask(engine, "regex", "[ab]{5,20}", sampling=bias, ignore_eos=True))
        assert len(text) == 20 and last.finish_reason == "stop"
        text, last = answer(engine, ask(engine, "regex", "[ab]{0,20}", sampling=bias, min_tokens=8))
        assert len(text) >= 8
    finally:
        engine.stop()


def test_a_seed_gives_the_same_text_whatever_else_runs_and_from_a_cached_prefix(engine):
    prompt = PROMPT * 8
    requests = [
        GenerationRequest(
            prompt, 40, SamplingParameters(seed=s), grammar=engine.compile_grammar("json", json.dumps(PERSON))
        )
        for s in range(8)
    ]  # fmt: skip
    alone = [answer(engine, request)[0] for request in requests]
    together = [engine.submit(request) for request in requests]
    for text, generation in zip(alone, together, strict=True):
        assert "".join(event.text for event in generation if isinstance(event, TextPiece)) == text
    assert engine.stats().cached_tokens_total > 0


def test_log_probabilities_are_the_models_before_the_grammar(engine):
    request = ask(engine, "regex", "[ab]{3}", sampling=SamplingParameters(temperature=0), logprobs=2)
    pieces = [event for event in engine.submit(request) if isinstance(event, TextPiece)]
    tokens = [token for piece in pieces for token in piece.token_ids]
    mine = [score.logprob for piece in pieces for score in piece.logprobs]
    whole = engine.submit(GenerationRequest([*PROMPT, *tokens], 0, prompt_logprobs=0))
    (scores,) = [event for event in whole if isinstance(event, PromptScores)]
    expected = [score.logprob for score in scores.logprobs[len(PROMPT) :] if score]
    assert mine == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("json", '{"type": "objekt"}', "objekt"),
        ("json", '{"$ref": "#/$defs/gone"}', "gone"),
        ("json", '{"$ref": "http://127.0.0.1:9/x"}', "retriev"),
        ("json", '{"$ref": "#"}', "no text"),
        ("json", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json", '{"const": 12345678901234567890}', "#/const has an integer beyond 2^53"),
        ("json", '{"properties": {"a": {"enum": [1, [-9007199254740993]]}}}', "#/properties/a/enum has an integer"),
        ("json", '{"type": "string", "x-guidance": {"lenient": true}, "uniqueItems": true}', "uniqueItems"),
        ("json", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ("json", '{"type": "string", "minLength": 3, "maxLength": 2}', "minLength"),
        ("json", "[1]", ""),
        ("regex", "(", "unclosed group"),
        ("regex", "(?!a)b", "look-around"),
        ("grammar", "start: missing", "missing"),
        ("grammar", "%%%", ""),
        ("grammar", "root ::= missing", "missing"),
        ("grammar", "::=", ""),
    ],
)
def test_what_cannot_be_enforced_is_refused_in_one_line(engine, kind, source, reason):
    with pytest.raises(PipelineError) as caught:
        engine.compile_grammar(kind, source)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and str(caught.value)


def test_a_grammar_too_costly_for_a_token_ends_its_own_request_alone(engine):
    other = engine.submit(GenerationRequest(PROMPT, 60, SamplingParameters(temperature=0)))
    text, last = answer(
        engine, ask(engine, "grammar", 'start: e\ne: e e e | e e | "a" | "b"', max_tokens=90, min_tokens=90)
    )
    assert last.finish_reason == "error" and set(text) <= {"a", "b"}
    assert last.is_refusal and "simplify" in str(last.error)
    *_, end = other
    assert end.finish_reason == "length"


def test_grammars_compile_in_many_threads_and_are_kept(engine):
    made = []
    source = json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(50)}})
    threads = [threading.Thread(target=lambda: made.append(engine.compile_grammar("json", source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 and engine.compiled_grammar("json", source) in made
    assert engine.compiled_grammar("json", source + " ") is None


def test_a_reason_of_many_lines_becomes_one():
    assert one_line("regex parse error:\n  (\n  ^\nerror: unclosed group\n 1 | x") == "unclosed group"
    assert one_line("a\nb") == "a" and one_line("") == ""
