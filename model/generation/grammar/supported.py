"""Rewrites JSON schemas into the keywords that llguidance enforces, without admitting a value that they exclude.

Keywords without effect are dropped, those with an equivalent form are rewritten, bounds beyond llguidance's range are
narrowed, and a keyword that cannot be enforced is refused with its place. Drafts 4 to 2020-12, and OpenAPI's
`nullable`, are read as people's generators write them (pydantic, zod, OpenAPI).
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from model.errors import PipelineError
from model.generation.grammar.schema import MAX_PLACE_LENGTH, Schema, Subschemas, children, dict_of, list_of

TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
MAX_NUMBER = 2**63 - 1024
"""The largest double below 2^63, and so the largest bound that llguidance can count to."""
EXACT = 2**53
"""The largest integer up to which a double holds each."""
MAX_LENGTH = 2**31 - 1
"""Lengths above this bound nothing: every text is shorter."""
MAX_DEPTH = 16
MAX_ALTERNATIVES = 256
DRAFT_4_LENGTHS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")

NOT_ENFORCED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "propertyNames", "dependentRequired",
    "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems", "uniqueItems", "$dynamicRef",
    "$recursiveRef",
)  # fmt: skip
"""Keywords that restrict values and have no counterpart in llguidance."""

YEAR = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
MONTH_AND_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
LEAP_DAY = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29"
DATE = f"(?:{YEAR}-{MONTH_AND_DAY}|{LEAP_DAY})"
TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
BASE64 = r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
FORMATS = {
    "date": f"^{DATE}$",
    "date-time": f"^{DATE}T{TIME}$",
    "time": f"^{TIME}$",
    "byte": BASE64,
    "base64": BASE64,
    "base64url": r"^(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?$",
}
"""Formats as patterns. llguidance's own dates admit 29 February in each year, and its times endless fractions."""
ENFORCED_FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
"""Those that llguidance has."""
ANNOTATIONS = ("password", "binary", "path", "file-path", "directory-path", "unknown")
"""Formats that say what a string is for: each string has them."""
LOOKAROUNDS = {
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(?:\d+\.?\d*|\.\d+)$",
}
"""Patterns with a look-ahead that generators of schemas write, without it: pydantic's of a Decimal."""


def supported(source: str) -> str:
    """A JSON schema, as JSON text, in the keywords of llguidance. Raises PipelineError for what cannot be enforced."""
    root = json.loads(source)
    if not isinstance(root, dict):
        return source
    parts = Subschemas(root)
    for schema, place in zip(parts.all, parts.places, strict=True):
        _Part(parts, schema, place[:MAX_PLACE_LENGTH]).rewrite()
    for schema in parts.all:
        _admit_null(schema)
    return json.dumps(root, ensure_ascii=False)


def supported_in_lark(source: str) -> str:
    """A Lark grammar whose JSON schemas (`%json {...}`) are in the keywords of llguidance. Raises PipelineError."""
    done, at = "", 0
    for found in re.finditer(r"%json\s*(?=\{)", source):
        if found.start() < at:
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(source, found.end())
        except ValueError:
            continue
        done += source[at : found.end()] + supported(json.dumps(schema))
        at = end
    return done + source[at:]


class _Part:
    """One subschema, rewritten in its place."""

    def __init__(self, parts: Subschemas, schema: Schema, place: str) -> None:
        self._parts, self._schema, self._place = parts, schema, place

    def rewrite(self) -> None:
        """Raises PipelineError for what cannot be enforced."""
        self._check_types()
        for name in ("const", "enum"):
            if _is_rounded(self._schema.get(name)):
                raise self._error(name, "has an integer beyond 2^53, which would be rounded")
        self._lengths()
        self._bounds()
        self._format()
        self._pattern()
        self._property_names()
        self._property_counts()
        self._alternatives()
        self._drop_empty()
        for name in NOT_ENFORCED:
            if name in self._schema:
                raise self._error(name, "cannot be enforced: remove it")

    def _error(self, name: str, reason: str) -> PipelineError:
        return PipelineError(f"{self._place}/{name} {reason}")

    def _check_types(self) -> None:
        for name, form in (("properties", dict), ("patternProperties", dict), ("required", list), ("allOf", list)):
            if not isinstance(self._schema.get(name, form()), form):
                expected = "an object" if form is dict else "a list"
                raise self._error(name, f"is {json.dumps(self._schema[name])[:40]}: expected {expected}")
        for name, inner in children(self._schema):
            if not isinstance(inner, dict | bool) and not (name == "items" and isinstance(inner, list)):
                raise self._error(name, f"is {json.dumps(inner)[:40]}: expected a schema, an object or a boolean")
        kinds = self._schema.get("type", [])
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if kind not in TYPES:
                raise self._error("type", f"is {json.dumps(kind)[:40]}: expected one of {', '.join(TYPES)}, or a list")

    def _lengths(self) -> None:
        for name in DRAFT_4_LENGTHS:
            value = self._schema.get(name)
            if isinstance(value, float) and value.is_integer():
                value = self._schema[name] = int(value)
            if name not in self._schema:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self._error(name, f"is {json.dumps(value)[:40]}: expected an integer of 0 or more")
            if value > MAX_LENGTH:
                if name.startswith("min"):
                    raise self._error(name, f"is {value}: no text is as long")
                del self._schema[name]

    def _bounds(self) -> None:
        schema = self._schema
        for name in ("multipleOf", *BOUNDS):
            value = schema.get(name, 0)
            if not isinstance(value, int | float) or (isinstance(value, bool) and not name.startswith("exclusive")):
                raise self._error(name, f"is {json.dumps(value)[:40]}: expected a number")
        if "multipleOf" in schema and schema["multipleOf"] <= 0:
            raise self._error("multipleOf", f"is {schema['multipleOf']}: expected a number above 0")
        large = False
        for name in BOUNDS:
            value = schema.get(name)
            if value is None or isinstance(value, bool) or abs(value) <= EXACT:
                continue
            large, lower = True, name in ("minimum", "exclusiveMinimum")
            if value > MAX_NUMBER if lower else value < -MAX_NUMBER:
                raise self._error(name, f"is {value:.4g}: numbers are generated up to {MAX_NUMBER:.4g}")
            schema[name] = _double_within(value, upwards=lower)
        if large:  # two bounds are counted to, one alone up to 10^15
            if "exclusiveMinimum" not in schema:
                schema.setdefault("minimum", -MAX_NUMBER)
            if "exclusiveMaximum" not in schema:
                schema.setdefault("maximum", MAX_NUMBER)

    def _format(self) -> None:
        name = self._schema.get("format")
        if not isinstance(name, str) or not self._may_be("string"):
            self._schema.pop("format", None)
        elif name in FORMATS:
            pattern = {"pattern": FORMATS[self._schema.pop("format")]}
            if "pattern" in self._schema:
                self._schema.setdefault("allOf", []).append(pattern)
            else:
                self._schema |= pattern
        elif name in ANNOTATIONS:
            del self._schema["format"]
        elif name not in ENFORCED_FORMATS:
            known = ", ".join([*FORMATS, *ENFORCED_FORMATS])
            raise self._error("format", f"{name[:40]!r} cannot be enforced: expected one of {known}")

    def _pattern(self) -> None:
        pattern = self._schema.get("pattern")
        if isinstance(pattern, str):
            self._schema["pattern"] = LOOKAROUNDS.get(pattern, pattern)

    def _property_names(self) -> None:
        """`propertyNames` as a pattern of the names."""
        names = self._schema.get("propertyNames")
        if names is None:
            return
        names = self._resolved(names)
        pattern = _pattern_of_names(names) if isinstance(names, dict) else "" if names is True else None
        declared = [*dict_of(self._schema, "properties"), *list_of(self._schema, "required")]
        if pattern is None or dict_of(self._schema, "patternProperties"):
            raise self._error(
                "propertyNames",
                "cannot be enforced: expected a pattern, an enum or a minLength of the names",
            )
        if pattern:
            try:
                wrong = [name for name in declared if not re.search(pattern, name)]
            except (re.error, TypeError):
                wrong = declared
            if wrong:
                raise self._error("propertyNames", f"does not admit the property {str(wrong[0])[:40]!r}")
            self._schema["patternProperties"] = {pattern: self._schema.get("additionalProperties", True)}
            self._schema["additionalProperties"] = False
        del self._schema["propertyNames"]

    def _property_counts(self) -> None:
        """Drops numbers of properties that hold anyway."""
        required = {name for name in list_of(self._schema, "required") if isinstance(name, str)}
        properties = dict_of(self._schema, "properties")
        if self._schema.get("minProperties", math.inf) <= len(required):
            del self._schema["minProperties"]
        is_closed = self._schema.get("additionalProperties") is False and not dict_of(self._schema, "patternProperties")
        if is_closed and self._schema.get("maxProperties", -1) >= len(properties):
            del self._schema["maxProperties"]

    def _alternatives(self) -> None:
        """`oneOf` as `anyOf`, where no value can be valid under two alternatives."""
        if "oneOf" not in self._schema or "anyOf" in self._schema:
            return
        some = list_of(self._schema, "oneOf")
        if not 0 < len(some) <= MAX_ALTERNATIVES:
            return
        pairs = ((one, other) for at, one in enumerate(some) for other in some[:at])
        if not all(self._are_disjoint(one, other) for one, other in pairs):
            raise self._error(
                "oneOf",
                "has alternatives that a value could be valid under at once: write anyOf, or give each a required"
                " property with a const of its own",
            )
        self._schema["anyOf"] = self._schema.pop("oneOf")

    def _drop_empty(self) -> None:
        """Drops keywords that restrict nothing as they stand."""
        schema = self._schema
        if "if" not in schema:
            schema.pop("then", None)
            schema.pop("else", None)
        elif "then" not in schema and "else" not in schema:
            del schema["if"]
        if schema.get("contains") is None or (schema.get("minContains") == 0 and "maxContains" not in schema):
            for name in ("contains", "minContains", "maxContains"):
                schema.pop(name, None)
        for name in ("dependentRequired", "dependentSchemas", "dependencies"):
            if name in schema and not any(dict_of(schema, name).values()):
                del schema[name]
        for name in ("unevaluatedProperties", "unevaluatedItems"):
            if schema.get(name) in (True, {}):
                del schema[name]
        if schema.get("unevaluatedProperties") is False and not {"allOf", "anyOf", "$ref"} & schema.keys():
            schema.setdefault("additionalProperties", schema.pop("unevaluatedProperties"))
        if schema.get("not") is False or schema.get("not") == {"not": {}}:
            del schema["not"]
        if schema.get("uniqueItems") is False or ("uniqueItems" in schema and schema.get("maxItems", 2) <= 1):
            del schema["uniqueItems"]

    # ---- what a schema admits

    def _resolved(self, schema: Any) -> Any:
        """The schema that a schema without more than a reference refers to."""
        for _ in range(MAX_DEPTH):
            number = self._parts.number(schema)
            target = None if number is None else self._parts.target(number)
            if target is None:
                break
            schema = self._parts.all[target]
        return schema

    def _may_be(self, kind: str) -> bool:
        kinds = self._schema.get("type", kind)
        return kind in (kinds if isinstance(kinds, list) else [kinds])

    def _are_disjoint(self, one: Any, other: Any, depth: int = 0) -> bool:
        """Whether it is certain that no value is valid under both schemas."""
        if one is False or other is False:
            return True
        one, other = self._resolved(one), self._resolved(other)
        if depth > MAX_DEPTH or not isinstance(one, dict) or not isinstance(other, dict):
            return False
        for this, that in ((one, other), (other, one)):
            if any(self._are_disjoint(part, that, depth + 1) for part in list_of(this, "allOf")):
                return True
            for name in ("anyOf", "oneOf"):
                if (some := list_of(this, name)) and all(self._are_disjoint(part, that, depth + 1) for part in some):
                    return True
        if not _types(one) & _types(other):
            return True
        values, others = _constants(one), _constants(other)
        if values is not None and others is not None and not values & others:
            return True
        if _types(one) & _types(other) != {"object"}:
            return False
        return any(
            self._are_disjoint(dict_of(one, "properties").get(name, True), properties.get(name, True), depth + 1)
            for properties in [dict_of(other, "properties")]
            for name in _required(one) & _required(other)
        ) or any(
            "additionalProperties" in that
            and that["additionalProperties"] is False
            and not dict_of(that, "patternProperties")
            and _required(this) - dict_of(that, "properties").keys()
            for this, that in ((one, other), (other, one))
        )


def _admit_null(schema: Schema) -> None:
    """OpenAPI's `nullable: true` as an alternative."""
    if schema.pop("nullable", None) is not True or "null" in _listed(schema.get("type")):
        return
    outer = {name: schema.pop(name) for name in [*schema] if name.startswith(("$", "definitions")) and name != "$ref"}
    inner = dict(schema)
    schema.clear()
    schema.update(outer, anyOf=[inner, {"type": "null"}])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _types(schema: Schema) -> set[str]:
    """The types that a schema admits, integers among the numbers' kinds."""
    kinds: set[str] = set()
    for kind in _listed(schema.get("type", list(TYPES))):
        kinds |= {"integer", "fraction"} if kind == "number" else {kind}
    constants = [value for name in ("const", "enum") if name in schema for value in _values(schema, name)]
    kinds = kinds & {_type(value) for value in constants} if constants else kinds
    return kinds | {"null"} if schema.get("nullable") is True else kinds


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if float(value).is_integer() else "fraction"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object" if isinstance(value, dict) else "null"


def _values(schema: Schema, name: str) -> Iterator[Any]:
    yield from [schema["const"]] if name == "const" else list_of(schema, "enum")


def _constants(schema: Schema) -> set[str] | None:
    """The only values that a schema can admit, as JSON; None if it does not list them."""
    for name in ("const", "enum"):
        if name in schema:
            found = {json.dumps(_canonical(value), sort_keys=True) for value in _values(schema, name)}
            return found | {"null"} if schema.get("nullable") is True else found
    return None


def _canonical(value: Any) -> Any:
    """A value without the difference between 1 and 1.0, which are equal in JSON Schema."""
    if isinstance(value, dict):
        return {name: _canonical(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _required(schema: Schema) -> set[str]:
    return {name for name in list_of(schema, "required") if isinstance(name, str)}


def _pattern_of_names(names: Schema) -> str | None:
    """A pattern of the strings that a schema of names admits: "" for all, None if it is not known."""
    rules = {name: value for name, value in names.items() if name not in ("type", "title", "description", "format")}
    if "format" in names or names.get("type", "string") != "string":
        return None
    if not rules:
        return ""
    if rules.keys() == {"pattern"} and isinstance(rules["pattern"], str):
        return str(rules["pattern"])
    if rules.keys() == {"const"} or rules.keys() == {"enum"}:
        some = [re.escape(value) for name in rules for value in _values(names, name) if isinstance(value, str)]
        return f"^(?:{'|'.join(some)})$" if some else None
    if rules.keys() <= {"minLength", "maxLength"}:
        return f"^(?s:.){{{rules.get('minLength', 0)},{rules.get('maxLength', '')}}}$"
    return None


def _is_rounded(value: Any) -> bool:
    """Whether a JSON value has an integer that a double does not hold: llguidance would write another one."""
    if isinstance(value, int):
        return abs(value) > EXACT
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_is_rounded, inner))


def _double_within(bound: float, *, upwards: bool) -> int | float:
    """The double next to a bound that admits no value that the bound excludes, up to MAX_NUMBER."""
    near = float(max(-MAX_NUMBER, min(MAX_NUMBER, bound)))
    if (near < bound if upwards else near > bound) and -MAX_NUMBER < bound < MAX_NUMBER:
        near = math.nextafter(near, math.inf if upwards else -math.inf)
    return int(near)
