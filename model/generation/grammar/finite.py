"""Finds parts of grammars that no finite text matches, such as an object that requires itself; refuses such grammars.

Generation that enters such a part never ends, or has no next token. llguidance detects contradictions but no endless
recursion. A part is finite if one of its alternatives consists of finite parts: the least fixed point over all parts
(as for productive nonterminals: Hopcroft and Ullman, Introduction to Automata Theory, 4.4). Whether a finite part can
be satisfied at all is left to llguidance, and so is every form that is not recognized here.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from model.errors import PipelineError
from model.generation.grammar.schema import MAX_PLACE_LENGTH, Schema, Subschemas, dict_of, list_of

T = TypeVar("T")


def check_schema(source: str) -> None:
    """Raises PipelineError for a JSON schema, as JSON text, with a part that only an infinite value could match."""
    root = json.loads(source)
    if not isinstance(root, dict):
        return
    schemas = Subschemas(root)
    if '"$ref"' not in source:
        return  # recursion needs a reference
    finite = _least_fixed_point(
        {at: schemas.used(at) for at in range(len(schemas.all))}, partial(_is_finite_schema, schemas)
    )
    for number in schemas.reached():
        if number not in finite:
            place = schemas.places[number][:MAX_PLACE_LENGTH]
            raise PipelineError(
                f"no text is ever complete under {place}: it requires itself inside; make a part optional"
            )


def check_lark(source: str) -> None:
    """Raises PipelineError for a Lark grammar with a rule that only an infinite text could match.

    JSON schemas in it (`%json {...}`) are checked as well.
    """
    for schema in _embedded_schemas(source):
        check_schema(schema)
    try:
        reader = _LarkReader(source)
        rules = reader.rules()
        uses = reader.uses()
    except (ValueError, RecursionError):
        return  # not read here: the compiler decides
    finite = _least_fixed_point(uses, lambda name, known: _is_finite(rules[name], rules, known))
    for name in _reached(uses):
        if name not in finite:
            raise PipelineError(
                f"no text is ever complete in the rule {name[:MAX_PLACE_LENGTH]!r}: it requires itself inside"
            )


def check_terminals(source: str, matches_nothing: Callable[[str], bool]) -> None:
    """Raises PipelineError for a Lark grammar with a terminal or a regular expression that no text matches: `[a&&b]`.

    matches_nothing: whether no text matches a grammar, by the compiler. A concatenation matches nothing if one of its
    parts does, so a single grammar decides in most cases.
    """
    try:
        reader = _LarkReader(source)
        reader.rules()
        used = list(dict.fromkeys(one for name in _reached(reader.uses()) for one in reader.lexemes[name]))
    except (ValueError, RecursionError):
        return

    def is_empty(some: list[str]) -> bool:
        # The text in front makes the first token cheap: only tokens that begin with it are tried.
        return matches_nothing("\n".join([f'start: {ALL}\n{ALL}: "x" {" ".join(some)}', *reader.definitions]))

    if not used or not is_empty(used):
        return
    while len(used) > 1:
        half = used[: len(used) // 2]
        used = half if is_empty(half) else used[len(half) :]
    raise PipelineError(f"no text matches {used[0][:MAX_PLACE_LENGTH]}: correct it")


def _reached(uses: Mapping[str, Iterable[str]]) -> list[str]:
    """The rules that a text can need, `start` first."""
    reached, waiting = dict[str, None](), ["start"]
    while waiting:
        name = waiting.pop()
        if name in uses and name not in reached:
            reached[name] = None
            waiting += uses[name]
    return list(reached)


def _least_fixed_point(uses: Mapping[T, Iterable[T]], is_finite: Callable[[T, set[T]], bool]) -> set[T]:
    """The finite parts. uses: the parts that each consists of. is_finite: decides for one, given those known so far."""
    users: dict[T, list[T]] = {}
    for name, used in uses.items():
        for one in used:
            users.setdefault(one, []).append(name)
    known: set[T] = set()
    waiting = list(uses)[::-1]  # inner parts follow outer ones
    while waiting:
        following: dict[T, None] = {}
        for name in waiting:
            if name not in known and is_finite(name, known):
                known.add(name)
                following.update(dict.fromkeys(users.get(name, ())))
        waiting = [name for name in following if name not in known]
    return known


def _is_finite_schema(schemas: Subschemas, at: int, known: set[int]) -> bool:
    """Whether some finite value is valid, given the subschemas of which that is known."""
    schema = schemas.all[at]

    def known_finite(inner: Any) -> bool:
        number = schemas.number(inner)
        return number is None or number in known

    target = schemas.target(at)
    if target is not None and target not in known:
        return False
    if not all(map(known_finite, list_of(schema, "allOf"))):
        return False
    for name in ("anyOf", "oneOf"):
        if (parts := list_of(schema, name)) and not any(map(known_finite, parts)):
            return False
    if "const" in schema or "enum" in schema:
        return True
    if schema.get("type") in ("object", ["object"]):
        return all(any(map(known_finite, inner)) for inner in _required(schema))
    if schema.get("type") in ("array", ["array"]):
        least = schema.get("minItems", 0)
        first = list_of(schema, "prefixItems")
        needed = first[: least if isinstance(least, int) else 0]
        if isinstance(least, int) and least > len(first):
            needed = [*first, schema.get("items")]
        return all(map(known_finite, needed))
    return True


def _required(schema: Schema) -> Iterator[list[Any]]:
    """For each required property the schemas of which one applies to it."""
    properties = dict_of(schema, "properties")
    others = [*dict_of(schema, "patternProperties").values(), schema.get("additionalProperties")]
    for name in list_of(schema, "required"):
        possible = [properties[name]] if isinstance(name, str) and name in properties else others
        yield [inner for inner in possible if inner is not False] or [True]


# ---- Lark

ALL = "ALL_TERMINALS_OF_THE_GRAMMAR"
Expression = str | tuple[str, list[Any]] | None
"""A rule's name; "any" or "all" of several; None for expressions that are always finite."""
TOKENS = re.compile(
    r"""(?P<skip>[ \t\r]+|//[^\n]*|\#[^\n]*|\n(?=\s*\|))|(?P<line>\n)
    |(?P<text>"(?:\\.|[^"\\\n])*"i?|/(?![/*])(?:\\.|[^/\\\n])+/[a-z]*|<[^<>\n]*>)
    |(?P<name>[a-zA-Z_](?:[a-zA-Z0-9_.]|-(?!>))*)|(?P<number>[0-9]+)|(?P<sign>\.\.|->|[:|()\[\]?*+~{},!&=])
    |(?P<block>%(?:json|regex|lark)\s*(?=\{))|(?P<directive>%[a-z]+[^\n]*)""",
    re.VERBOSE,
)


def _embedded_schemas(source: str) -> Iterator[str]:
    for found in re.finditer(r"%json\s*(?=\{)", source):
        try:
            schema, _ = json.JSONDecoder().raw_decode(source, found.end())
        except ValueError:
            continue
        yield json.dumps(schema)


class _LarkReader:
    """Reads rules as expressions. Raises ValueError for syntax that it does not know."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens: list[tuple[str, str]] = []
        self._begins: list[int] = []
        self.lexemes: dict[str, list[str]] = {}
        """Names of terminals, and regular expressions, in each rule."""
        self.definitions: list[str] = []
        """Of the terminals, as they stand in the source, and imports."""
        at = 0
        while at < len(source):
            found = TOKENS.match(source, at)
            if not found or not found.lastgroup:
                raise ValueError(source[at : at + 20])
            begin, at = at, found.end()
            if found[0].startswith("%import"):
                self.definitions.append(found[0])
            self._begins += [begin] * (found.lastgroup not in ("skip", "directive"))
            if found.lastgroup == "block":
                _, at = json.JSONDecoder().raw_decode(source, at)
                self._tokens.append(("text", ""))
            elif found.lastgroup not in ("skip", "directive"):
                self._tokens.append((found.lastgroup, found[0]))
        self._tokens.append(("line", ""))
        self._begins.append(len(source))
        self._at = 0
        self._rules: dict[str, Expression] = {}

    def rules(self) -> dict[str, Expression]:
        """The expression of each rule; terminals cannot be recursive and are left out."""
        rules = self._rules
        while self._at < len(self._tokens):
            if self._take("line"):
                continue
            while self._take("sign", "?!"):
                pass
            begin = self._begins[self._at]
            name = self._expect("name")
            if self._take("sign", "["):  # attributes of the rule
                while not self._take("sign", "]"):
                    self._at += 1
                    if self._at >= len(self._tokens):
                        raise ValueError(name)
            self._expect("sign", ":")
            if _is_terminal(name):
                while not self._take("line"):
                    self._at += 1
                self.definitions.append(self._source[begin : self._begins[self._at - 1]])
            else:
                name = name.partition(".")[0]
                self._used = self.lexemes.setdefault(name, [])
                rules[name] = self._alternatives()
                self._expect("line")
        return rules

    def uses(self) -> dict[str, list[str]]:
        """The rules that each rule names."""
        return {name: list(_names(rule)) for name, rule in self._rules.items()}

    def _alternatives(self) -> Expression:
        parts = [self._sequence()]
        while self._take("sign", "|"):
            parts.append(self._sequence())
        return "any", parts

    def _sequence(self) -> Expression:
        parts: list[Expression] = []
        while (part := self._item()) is not False:
            parts.append(part)  # type: ignore[arg-type]
        if self._take("sign", "->"):
            self._expect("name")
        return "all", parts

    def _item(self) -> Expression | bool:
        """One element with its repetition; False at the end of a sequence."""
        if text := self._take("text"):
            if text.startswith("/"):
                self._used.append(text)
            if self._take("sign", ".."):
                self._expect("text")
            part: Expression = None
        elif name := self._take("name"):
            part = None if _is_terminal(name) else name
            if _is_terminal(name):
                self._used.append(name)
        elif self._take("sign", "("):
            part = self._alternatives()
            self._expect("sign", ")")
        elif self._take("sign", "["):
            part = ("any", [None, self._alternatives()])
            self._expect("sign", "]")
        else:
            return False
        return self._repeated(part)

    def _repeated(self, part: Expression) -> Expression:
        while True:
            if self._take("sign", "?*"):
                part = ("any", [None, part])
            elif self._take("sign", "~") or self._take("sign", "{"):
                least = self._take("number")
                while self._take("sign", ("..", ",", "}")) or self._take("number"):
                    pass
                part = part if least and int(least) else ("any", [None, part])
            elif not self._take("sign", "+"):
                return part

    def _take(self, kind: str, values: Iterable[str] = ()) -> str | None:
        """The next token if it is of this kind and one of these; a line's end counts as a token."""
        if self._at < len(self._tokens) and self._tokens[self._at][0] == kind:
            value = self._tokens[self._at][1]
            if not values or value in values:
                self._at += 1
                return value or " "
        return None

    def _expect(self, kind: str, values: Iterable[str] = ()) -> str:
        if found := self._take(kind, values):
            return found
        raise ValueError(kind)


def _is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _is_finite(part: Expression, rules: dict[str, Expression], known: set[str]) -> bool:
    if part is None:
        return True
    if isinstance(part, str):
        return part not in rules or part in known
    decide = any if part[0] == "any" else all
    return decide(_is_finite(one, rules, known) for one in part[1])


def _names(part: Expression) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif part is not None:
        for one in part[1]:
            yield from _names(one)
