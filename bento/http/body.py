r"""Parses a request's body: strict JSON, bounded in its cost before it is parsed.

Python's parser accepts more than JSON allows or the routes can handle: duplicate names, lone surrogates (`\ud800`),
unbounded depth, and an unbounded number of values, each of which costs more memory than its bytes. NaN and Infinity
pass here in short bodies; the schema refuses them with the name of their field. Long bodies are parsed in another
thread, one at a time (`heavy.py`), and validated there too.
"""

import json
import re
from collections.abc import Callable, Coroutine
from itertools import chain
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope

from bento.errors import ApiError, validation_error
from bento.serving.heavy import rest

MAX_DEPTH = 48
"""Maximum nesting depth: a JSON schema has two levels for each nested object."""
MAX_VALUES = 131_072
"""Maximum number of values in a body: 64 prompts of 2,000 token ids."""
MAX_FIELDS = 256
"""Maximum number of fields of a body itself: the schema names each that it does not know."""
MAX_NAMES = 8_192
"""Maximum number of names, objects and lists in a body: a thousand messages and a thousand biases."""
LONG_BODY = 16_384
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Written by .NET and PowerShell; RFC 8259 section 8.1 lets a parser ignore it."""
_JSON_TYPE = re.compile(r"\s*application/([^\s;]+\+)?json\s*(;.*)?", re.IGNORECASE)
_NESTED = frozenset({dict, list})
_STRINGS = re.compile(rb'"[^"]*"')
_SOME_STRINGS = re.compile(rb'(?:[^"]*+"[^"]*+"){1,1000}+')
"""A part of a JSON text without escapes that takes less than a millisecond to look through, which holds the GIL."""


class JsonRoute(APIRoute):
    """A route whose body is read by `parse`, and a long one validated before FastAPI sees it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler with a strict JSON parser."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            inner = _JsonRequest(request.scope, request.receive, self._read_long)
            if self.body_field is not None:
                await inner.check_content()
            return await handle(inner)

        return handle_json

    def _read_long(self, body: bytes) -> Any:
        """The body's model. Raises ApiError 400."""
        value = parse(body)
        if self.body_field is None:
            return value
        model, errors = self.body_field.validate(value, {}, loc=("body",))
        if errors:
            raise validation_error(errors)
        return model


class _JsonRequest(Request):
    def __init__(self, scope: Scope, receive: Receive, read_long: Callable[[bytes], Any]) -> None:
        super().__init__(scope, receive)
        self._read_long = read_long

    async def check_content(self) -> None:
        """Raises ApiError 400 for an empty body, and for another type than JSON."""
        if not await self.body():
            raise _refusal("the body is empty: expected a JSON object", "missing")
        kind = self.headers.get("content-type", "")
        if not _JSON_TYPE.fullmatch(kind):
            found = f"Content-Type is {json.dumps(kind[:40])}" if kind else "the header Content-Type is missing"
            raise _refusal(f"{found}: expected application/json", "content_type")

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            if len(body) <= LONG_BODY:
                self._json = parse(body)
            else:
                self._json = await self.app.state.heavy.run(self._read_long, body)
        return self._json


def parse(body: bytes) -> Any:
    """The value of a JSON text. Raises ApiError 400."""
    body = body.removeprefix(BYTE_ORDER_MARK)
    names = check_cost(body)
    value = _parse_short(body) if len(body) <= LONG_BODY else _parse_long(body, names)
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise _too_many("fields", MAX_FIELDS)
    return value


def _parse_short(body: bytes) -> Any:
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from None
    except json.JSONDecodeError as error:
        _refuse_depth(body)
        raise _refusal(f"the body is not JSON ({error.msg} at character {error.pos})", "invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python's limit on the digits of an integer
        raise _refusal("the body has a number with thousands of digits", "invalid_number") from None
    _count_names(value)
    if b"\\ud" in body or b"\\uD" in body:  # in valid UTF-8, only an escape can encode a lone surrogate
        _check_characters(value)
    return value


def _refuse_depth(body: bytes) -> None:
    """Name the depth of brackets that stay open: the parser of Python 3.13 takes thousands. Raises ApiError 400."""
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if "depth" in error.msg:
            raise _too_deep() from None


def _parse_long(body: bytes, names: int) -> Any:
    """By orjson, since Python's parser would hold the GIL for 30 ms for a megabyte of numbers, orjson for 3.

    names: number of names in the body. NaN and Infinity are refused here, because they are not JSON.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if "depth" in error.msg:
            raise _too_deep() from None
        if "low surrogate" in error.msg or "high surrogate" in error.msg:
            message = f"half a character (a lone surrogate) at character {error.pos}"
            raise _refusal(f"the body has {message}", "invalid_unicode") from None
        if "infinity" in error.msg:
            raise _refusal("the body has a number beyond the range of a double", "invalid_number") from None
        try:
            body.decode()
        except UnicodeDecodeError as where:
            raise _not_utf8(where) from None
        raise _refusal(f"the body is not JSON ({error.msg} at character {error.pos})", "invalid_json") from None
    if _count_names(value) < names:  # orjson keeps the last of two equal names; Python's parser finds the duplicate
        return _parse_short(body)
    return value


def check_cost(body: bytes) -> int:
    """Limit the values in a body before it is parsed, and the names in a long one. Raises ApiError 400."""
    if len(body) <= MAX_NAMES:
        return 0
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")  # a quote begins or ends a string now
    if plain.count(b'"') > 2 * MAX_VALUES:
        raise _too_many("values", MAX_VALUES)
    start = values = names = inner = 0
    while start < len(plain):
        rest()
        some = _SOME_STRINGS.match(plain, start)
        end = some.end() if some else len(plain)
        skeleton = _STRINGS.sub(b"", plain[start:end])
        values += skeleton.count(b",")
        names += skeleton.count(b":")
        inner += skeleton.count(b"[") + skeleton.count(b"{")
        if values > MAX_VALUES:
            raise _too_many("values", MAX_VALUES)
        if names + inner > MAX_NAMES:
            raise _too_many("names, objects and lists", MAX_NAMES)
        start = end
    return names


def _too_many(what: str, most: int) -> ApiError:
    return _refusal(f"the body has more than {most:,} {what}", "too_many_values")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        shown = twice[:40].encode(errors="replace").decode()
        raise _refusal(f"{shown!r} is given twice", "duplicate_field", shown)
    return fields


def _count_names(value: Any) -> int:
    """The number of names in all objects. Raises ApiError 400 if they are nested too deep."""
    level, names = [value], 0
    for _ in range(MAX_DEPTH + 1):
        names += sum(len(one) for one in level if type(one) is dict)
        inside = [one.values() if type(one) is dict else one for one in level if type(one) is dict or type(one) is list]
        # A list may have 100,000 plain values: only the set of their types is checked.
        level = list(chain.from_iterable(values for values in inside if not _NESTED.isdisjoint(map(type, values))))
        if not level:
            return names
    raise _too_deep()


def _check_characters(value: Any) -> None:
    for name, inner in value.items() if isinstance(value, dict) else [("the body", value)]:
        try:
            json.dumps([name, inner], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            shown = name.encode(errors="replace").decode()[:40]
            raise _refusal(f"{shown} has half a character (a lone surrogate)", "invalid_unicode", shown) from None


def _not_utf8(error: UnicodeDecodeError) -> ApiError:
    return _refusal(f"the body is not UTF-8 (byte {error.start})", "invalid_utf8")


def _too_deep() -> ApiError:
    return _refusal(f"the body is nested more than {MAX_DEPTH} deep", "nested_too_deep")


def _refusal(message: str, code: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, code=code, param=param)
