"""Grammars with a part that no finite text matches are refused before a text begins; all others are left alone."""

import json
import re

import pytest

from model.errors import PipelineError
from model.generation.grammar.finite import check_lark, check_schema
from tests.model.generation.grammar.test_grammar import answer, ask

NODE = {"$ref": "#/$defs/node"}


def endless(**properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties)}


ENDLESS_SCHEMAS = {
    "itself": {"$ref": "#"},
    "itself in allOf": {"allOf": [{"$ref": "#"}]},
    "itself as a property": endless(c={"$ref": "#"}),
    "an optional property that is itself": {"type": "object", "properties": {"c": {"$ref": "#/properties/c"}}},
    "a property that requires itself": endless(c={"$ref": "#/properties/c"}),
    "itself as each item": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "itself as the first item": {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
    "itself under any name": {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["x"]},
    "itself under a name of a pattern": {
        "type": "object", "patternProperties": {"^x": {"$ref": "#"}}, "additionalProperties": False, "required": ["x"]
    },
    "each other": {"$defs": {"a": endless(b={"$ref": "#/$defs/b"}), "b": endless(a={"$ref": "#/$defs/a"})},
                   "$ref": "#/$defs/a"},
    "by an anchor": endless(a={"$anchor": "n", **endless(b={"$ref": "#n"})}),
    "by an address": {"$id": "http://example.org/a/b", **endless(c={"$ref": "b"})},
    "by a name with signs": {"definitions": {"x/y %": endless(c={"$ref": "#/definitions/x~1y%20%25"})},
                             "$ref": "#/definitions/x~1y%20%25"},
    "in every alternative": {"anyOf": [endless(c={"$ref": "#"}), endless(d={"$ref": "#"})]},
    "in one alternative": {"anyOf": [endless(c={"$ref": "#/anyOf/0"}), {"type": "integer"}]},
    "deep inside": endless(list={"type": "array", "items": endless(n=NODE)}) | {"$defs": {"node": endless(n=NODE)}},
}  # fmt: skip
FINITE_SCHEMAS = {
    "an optional itself": {"type": "object", "properties": {"c": {"$ref": "#"}}, "additionalProperties": False},
    "items": {"type": "array", "items": {"$ref": "#"}},
    "a list's next node": {
        "$defs": {"node": endless(value={"type": "integer"}, next={"anyOf": [NODE, {"type": "null"}]})},
        **NODE,
    },
    "a tree": {"$defs": {"node": endless(children={"type": "array", "items": NODE})}, **NODE},
    "an alternative": {"anyOf": [{"$ref": "#"}, {"type": "integer"}]},
    "null beside it": {"type": ["object", "null"], "properties": {"c": {"$ref": "#"}}, "required": ["c"]},
    "endless definitions that nothing uses": {"definitions": {"t": {"$ref": "#/definitions/t"}}, "type": "integer"},
    "a property of that name": endless(**{"$ref": {"type": "string"}}),
    "another name of a pattern": {
        "type": "object", "patternProperties": {"^x": {"$ref": "#"}}, "required": ["y"],
        "additionalProperties": {"type": "null"},
    },
}  # fmt: skip


@pytest.mark.parametrize("schema", ENDLESS_SCHEMAS.values(), ids=ENDLESS_SCHEMAS)
def test_a_schema_that_requires_itself_is_refused_before_a_text_begins(engine, schema):
    for kind, source in (
        ("json", json.dumps(schema)),
        ("grammar", f"start: %json {json.dumps(schema)}"),
        ("calls", f'start: "x" rest\nrest: %json {json.dumps(schema)}'),
    ):
        with pytest.raises(PipelineError, match="no text is ever complete under #"):
            engine.compile_grammar(kind, source)


@pytest.mark.parametrize("schema", FINITE_SCHEMAS.values(), ids=FINITE_SCHEMAS)
def test_other_recursive_schemas_have_texts(engine, schema):
    engine.compile_grammar("json", json.dumps(schema))
    text, last = answer(engine, ask(engine, "json", json.dumps({**schema, "x-guidance": {}}), max_tokens=60))
    assert last.finish_reason in ("stop", "length"), (text, last)


@pytest.mark.parametrize(
    "source",
    [
        'start: "a" start',
        'start: "b" x\nx: "a" x',
        'start: "b" x?\nx: "a" x | y\ny: x',
        'start: "b" [x]\nx: "a" x',
        'start: "b" a\na: a | a a',
        'start: x{2,3}\n// a note\nx: ("a" | x)+ x -> name',
        'start: x | "b"\n\nx: /[a-z]/ x\n   | "c" x~2',
        'root ::= "a" root',
        'root ::= "x" b\nb ::= b',
    ],
)
def test_a_rule_that_requires_itself_is_refused_before_a_text_begins(engine, source):
    with pytest.raises(PipelineError, match="no text is ever complete in the rule"):
        engine.compile_grammar("grammar", source)


@pytest.mark.parametrize(
    "source",
    [
        'start: "b" x?\nx: "a" x | "c"',
        'start: "b" x* ["c"]\nx: "a" x? | B\nB: /[0-9]/',
        'start: "(" start ")" | "x"',
        'start: "b"\nunused: "a" unused',
        'start: x{0,3} "b"\nx: "a"{2} | x "c"',
        r'start: "a" %json {"type": "boolean"} | "b" /[\/]:|x/ "//"',
        '%llguidance {}\nstart[capture]: a_b | C\na_b: C "\\""\nC: /x/ & /[a-z]/',
        'root ::= "x" (b | "c"){2,3} [a-z]+ | "\\n" b?\nb ::= "a" b | [^"\\\\] # note\n',
    ],
)
def test_other_grammars_have_texts(engine, source):
    text, last = answer(engine, ask(engine, "grammar", source, max_tokens=30))
    assert text and last.finish_reason in ("stop", "length"), last


def test_large_recursive_schemas_and_grammars_are_decided_fast(engine):
    count = 2000
    chain = {f"n{i}": {"$ref": f"#/$defs/n{i + 1}"} for i in range(count)}
    check_schema(json.dumps({"$defs": {**chain, f"n{count}": {"type": "null"}}, "$ref": "#/$defs/n0"}))
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(count))
    check_lark(f'start: r0\n{rules}\nr{count}: "x"')
    with pytest.raises(PipelineError):
        check_lark(f"start: r0\n{rules}\nr{count}: r0")
    check_lark("start: " + "(" * 60_000)  # not read here, and refused by the compiler


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ('start: "q" A\nA: /a/ & /b/', "A"),
        ('start: "q" A | "r"\nA: /[^\\s\\S]/', "A"),
        ('start: "q" (/[a-z]/ | B)\nB: C /x/\nC: "y" /[a&&b]/', "B"),
        ('start: x* "q"\nx: A D | "z"\nA: /a+/\nD: "b" ~2 & /b/\n   | (/c/ & /d/)', "D"),
        ('start: "q" /[0-9]+/ /(?i:\\P{Any})/ "x"', "/(?i:\\P{Any})/"),
        ('start: a "x" b\na: /[a-z]/\nb[lazy]: /[^\\w\\W]x/', "/[^\\w\\W]x/"),
        ('%import common.INT\nstart: "q" INT N\nN: INT & /[a-z]+/', "N"),
    ],
)
def test_a_terminal_that_no_text_matches_is_refused_by_name_before_a_text_begins(engine, source, named):
    with pytest.raises(PipelineError, match=f"^no text matches {re.escape(named)}"):
        engine.compile_grammar("grammar", source)


@pytest.mark.parametrize(
    "source",
    [
        'start: "q" A B\nA: "" | /a/\nB: /b*/',
        'start: "q" /a?/ unused?\nunused: "u"\nNOTHING: /a/ & /b/',
        'start: "q" A\nA: (/a/ & /b/) | "y"',
        '%import common (INT, WORD)\nstart: "q" INT WORD\n%ignore / /',
        'start: "q" a\na[stop="x"]: /[a-z]*/',
    ],
)
def test_terminals_that_match_an_empty_text_or_are_not_needed_are_taken(engine, source):
    engine.compile_grammar("grammar", source)


def test_a_grammar_without_a_next_token_ends_the_request_with_the_reason(engine):
    text, last = answer(engine, ask(engine, "calls", 'start: "q" A\nA: /a/ & /b/'))
    assert text == "q" and last.is_refusal and "no token at this place" in str(last.error)


@pytest.mark.parametrize("stops", ["abc", "c", "ab"])
def test_a_stop_token_that_the_form_needs_ends_no_text_before_min_tokens(engine, stops):
    ids = {token for token, data in enumerate(engine.token_bytes) if data and set(data) <= set(stops.encode())}
    request = ask(engine, "regex", "ab+c", min_tokens=40, stop_token_ids=frozenset(ids))
    text, last = answer(engine, request)
    assert text.startswith("ab") and set(text) <= set("abc")
    assert last.finish_reason == "stop" or last.generated_tokens == 80
    if last.finish_reason == "stop" and text[-1] != "c":
        assert last.stopped_by in ids and last.generated_tokens > 40


def test_min_tokens_gives_way_to_a_form_that_is_complete(engine):
    for source, options in (("[ab]{3}", {}), ("[ab]{0,3}", {}), ("ab|abab", {"ignore_eos": True})):
        text, last = answer(engine, ask(engine, "regex", source, min_tokens=60, **options))
        assert last.finish_reason == "stop" and re.fullmatch(source, text), text
