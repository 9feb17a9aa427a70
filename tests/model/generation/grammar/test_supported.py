"""Schemas as people's generators write them: rewritten without admitting a value that they exclude, or refused."""

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Base64Bytes, BaseModel, Field, SecretStr

from model.errors import PipelineError
from model.generation.grammar.grammar import GrammarCompiler
from model.generation.grammar.supported import MAX_NUMBER, supported

BYTES = [bytes([value]) for value in range(256)]
END = 256


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler([*BYTES, b""], special_ids=[END], end_of_text_ids=[END], vocab_size=257, encode=list)


def admits(compiler: GrammarCompiler, schema: dict, text: str) -> bool:
    matcher = compiler.compile("json", json.dumps(schema)).matcher()
    for token in text.encode():
        if not matcher.allowed()[token]:
            return False
        matcher.accept(token)
    return matcher.may_end


def tagged(**properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties)}


INT64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
REFERENCED = {
    "$defs": {"cat": tagged(kind={"const": "cat"}), "dog": tagged(kind={"const": "dog"}, age={"type": "integer"})},
    "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    "discriminator": {"propertyName": "kind"},
}
CASES = [
    # schema, texts that it admits, texts that it does not
    ({"type": "array", "uniqueItems": False}, ["[]", "[1, 1]"], ["{}"]),
    ({"type": "array", "uniqueItems": True, "maxItems": 1, "items": {"type": "integer"}}, ["[1]"], ["[1, 2]"]),
    ({"type": "string", "format": "password"}, ['"x"'], ["1"]),
    ({"type": ["integer", "string"], "format": "binary"}, ["1", '"x"'], ["null"]),
    ({"type": "integer", "format": "int64"}, ["12"], ["1.5"]),
    ({"type": "string", "format": "date"}, ['"2024-02-29"', '"2000-02-29"'], ['"2023-02-29"', '"1900-02-29"']),
    ({"type": "string", "format": "date"}, ['"1999-12-31"'], ['"2024-04-31"', '"2024-13-01"', '"0000-01-01"']),
    ({"type": "string", "format": "date", "pattern": "^20"}, ['"2010-10-10"'], ['"1910-10-10"', '"20"']),
    ({"type": "string", "format": "date-time"}, ['"2024-02-29T23:59:59.5Z"'], ['"2023-02-29T10:00:00Z"']),
    ({"type": "string", "format": "time"}, ['"10:00:00+01:00"'], ['"24:00:00Z"', '"10:00:00"']),
    ({"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, ['"1.50"', '".5"', '"-1"'], ['"1.5.0"', '"-"']),
    ({"type": "string", "format": "base64"}, ['""', '"YQ=="'], ['"Y"', '"YQ="']),
    ({"type": "string", "nullable": True}, ['"x"', "null"], ["1"]),
    ({"enum": ["a"], "nullable": True}, ['"a"', "null"], ['"b"']),
    (tagged(a={"type": "string", "nullable": False}), ['{"a": "x"}'], ['{"a": null}']),
    ({"$defs": {"a": {"type": "integer"}}, "$ref": "#/$defs/a", "nullable": True}, ["1", "null"], ['"x"']),
    ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, ["1"], ["0"]),
    ({"type": "integer", "exclusiveMinimum": False}, ["0"], ["1.5"]),
    ({"type": "string", "minLength": 2.0, "maxLength": 2**40}, ['"ab"'], ['"a"']),
    (INT64, [str(MAX_NUMBER), str(-MAX_NUMBER), "0"], [str(2**63), str(-(2**63) - 1), "1.5"]),
    ({"type": "integer", "minimum": 2**60 + 1}, [str(2**60 + 256)], [str(2**60), "5"]),
    ({"type": "integer", "maximum": 2**60 - 1}, ["5", "-5", str(2**60 - 128)], [str(2**60)]),
    ({"type": "number", "exclusiveMinimum": 2**60}, [str(2**60 + 256)], [str(2**60), "5"]),
    ({"type": "number", "minimum": 0.5, "maximum": 1e300}, ["0.5", "1e3"[:1]], ["0.4", str(2**64)]),
    (REFERENCED, ['{"kind": "cat"}', '{"kind": "dog", "age": 1}'], ['{"kind": "dog"}', '{"kind": "cow"}']),
    ({"oneOf": [{"const": 1, "title": "one"}, {"const": 2, "title": "two"}]}, ["1", "2"], ["3"]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]}, ["1", '"x"', "null"], ["true"]),
    ({"oneOf": [tagged(a={"type": "integer"}), tagged(a={"type": "string"})]}, ['{"a": 1}', '{"a": ""}'], ["{}"]),
    (
        {"oneOf": [tagged(a={"type": "integer"}) | {"additionalProperties": False}, tagged(b={"type": "integer"})]},
        ['{"a": 1}', '{"b": 1}'],
        ['{"a": ""}'],
    ),
    (
        {"type": "object", "propertyNames": {"enum": ["x y", "b"]}, "additionalProperties": {"type": "integer"}},
        ["{}", '{"x y": 1, "b": 2}'],
        ['{"c": 1}', '{"b": ""}'],
    ),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, ['{"ab": 1}'], ['{"b": 1}']),
    ({"type": "object", "propertyNames": {"minLength": 2}}, ['{"ab": 1}'], ['{"b": 1}']),
    ({"type": "object", "propertyNames": {"type": "string"}}, ['{"b": 1}'], ["1"]),
    (tagged(a={"type": "integer"}) | {"unevaluatedProperties": False}, ['{"a": 1}'], ['{"a": 1, "b": 1}']),
    (tagged(a={"type": "integer"}) | {"minProperties": 1}, ['{"a": 1}'], ["{}"]),
    ({"type": "integer", "then": {"minimum": 3}, "dependentRequired": {}, "not": False}, ["1"], ['""']),
    ({"type": "array", "contains": {"type": "integer"}, "minContains": 0}, ["[]"], ["1"]),
    ({"type": "array", "items": [{"type": "integer"}], "additionalItems": False}, ["[1]"], ["[1, 2]"]),
    (tagged(uniqueItems={"type": "integer"}, format={"type": "string"}), ['{"uniqueItems": 1, "format": ""}'], ["{}"]),
    ({"const": {"not": 1, "format": "phone"}}, ['{"not": 1, "format": "phone"}'], ["{}"]),
]


@pytest.mark.parametrize(("schema", "valid", "invalid"), CASES, ids=[json.dumps(case[0])[:60] for case in CASES])
def test_a_schema_admits_what_it_says(compiler, schema, valid, invalid):
    assert [text for text in valid if not admits(compiler, schema, text)] == []
    assert [text for text in invalid if admits(compiler, schema, text)] == []
    is_older = isinstance(schema.get("exclusiveMinimum"), bool) or isinstance(schema.get("items"), list)
    has_look_ahead = "(?!" in schema.get("pattern", "")
    if not (is_older or has_look_ahead or "nullable" in json.dumps(schema)):
        assert all(jsonschema_rs.is_valid(schema, json.loads(text)) for text in valid)


REFUSED = [
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems cannot be enforced: remove it"),
    (tagged(a={"not": {"type": "string"}}), "#/properties/a/not cannot be enforced: remove it"),
    ({"items": {"if": {"type": "string"}, "then": {"minLength": 1}}}, "#/items/if cannot be enforced"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "#/dependentRequired cannot be enforced"),
    ({"type": "string", "format": "phone"}, "#/format 'phone' cannot be enforced: expected one of date, "),
    ({"type": "text"}, '#/type is "text": expected one of string, number'),
    ({"type": ["string", 5]}, "#/type is 5: expected one of string, number"),
    (tagged(a=5), "#/properties/a is 5: expected a schema, an object or a boolean"),
    ({"required": True}, "#/required is true: expected a list"),
    ({"properties": []}, "#/properties is []: expected an object"),
    ({"type": "string", "minLength": -1}, "#/minLength is -1: expected an integer of 0 or more"),
    ({"type": "string", "minLength": 1.5}, "#/minLength is 1.5: expected an integer of 0 or more"),
    ({"type": "string", "minLength": 2**31}, "#/minLength is 2147483648: no text is as long"),
    ({"type": "integer", "multipleOf": 0}, "#/multipleOf is 0: expected a number above 0"),
    ({"type": "integer", "minimum": "1"}, '#/minimum is "1": expected a number'),
    ({"type": "integer", "minimum": True}, "#/minimum is true: expected a number"),
    ({"type": "number", "minimum": 1e30}, "#/minimum is 1e+30: numbers are generated up to 9.223e+18"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf has alternatives that a value could be valid"),
    ({"oneOf": [{"type": "integer", "nullable": True}, {"type": "null"}]}, "#/oneOf has alternatives that a value"),
    ({"oneOf": [{"enum": ["a"], "nullable": True}, {"const": None}]}, "#/oneOf has alternatives that a value"),
    ({"oneOf": [tagged(a={}), tagged(b={})]}, "#/oneOf has alternatives that a value could be valid"),
    ({"type": "object", "propertyNames": {"format": "date"}}, "#/propertyNames cannot be enforced: expected a pattern"),
    (tagged(b={}) | {"propertyNames": {"pattern": "^a"}}, "#/propertyNames does not admit the property 'b'"),
    ({"const": 2**53 + 1}, "#/const has an integer beyond 2^53"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=[json.dumps(case[0])[:60] for case in REFUSED])
def test_what_cannot_be_enforced_is_refused_with_its_place(compiler, schema, reason):
    with pytest.raises(PipelineError) as refused:
        compiler.compile("json", json.dumps(schema))
    assert str(refused.value).startswith(reason) and "\n" not in str(refused.value)
    with pytest.raises(PipelineError) as refused:
        compiler.compile("grammar", f"start: %json {json.dumps(schema)}")
    assert str(refused.value).startswith(reason)


def test_schemas_in_a_grammar_are_rewritten_too(compiler):
    first, second = {"type": "string", "nullable": True}, {"oneOf": [{"const": 1}, {"const": 2}]}
    source = f'start: "<" %json {json.dumps(first)} ">" rest\nrest: %json {json.dumps(second)}'
    matcher = compiler.compile("grammar", source).matcher()
    for token in b"<null>2":
        assert matcher.allowed()[token]
        matcher.accept(token)
    assert matcher.may_end


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    born: datetime


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    secret: SecretStr
    path: Path
    price: Decimal
    picture: Base64Bytes
    visits: dict[Literal["spring", "fall"], int]


def test_a_schema_of_pydantic_is_enforced(compiler):
    right = {
        "pet": {"kind": "dog", "born": "2024-02-29T10:00:00Z"},
        "secret": "x",
        "path": "a/b",
        "price": "1.50",
        "picture": "YQ==",
        "visits": {"fall": 2},
    }
    schema = Owner.model_json_schema()
    text = json.dumps(right)
    Owner.model_validate_json(text)
    assert admits(compiler, schema, text)
    for part, wrong in (
        ('"dog"', '"cow"'),
        ("2024-02-29T", "2023-02-29T"),
        ("YQ==", "YQ="),
        ('"fall"', '"winter"'),
    ):
        assert part in text and not admits(compiler, schema, text.replace(part, wrong))


@settings(max_examples=200)
@given(st.integers(-(2**70), 2**70), st.booleans())
def test_a_large_bound_is_narrowed_and_never_widened(bound, is_lower):
    name = "minimum" if is_lower else "maximum"
    try:
        rewritten = json.loads(supported(json.dumps({"type": "integer", name: bound})))
    except PipelineError:
        assert bound > MAX_NUMBER if is_lower else bound < -MAX_NUMBER
        return
    found = rewritten[name]
    assert found >= bound if is_lower else found <= bound
    assert float(found) == found
    assert abs(found) <= max(MAX_NUMBER, 2**53) and (abs(bound) > MAX_NUMBER or abs(found - bound) <= 1024)
