r"""Reading a request's body: JSON and nothing that only looks like it, refused before any field is looked at.

Python's parser takes more than JSON allows or than a program behind it can carry: names given twice, half characters
(`\ud800`), any depth. NaN and Infinity pass here and are refused with the name of their field.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from bento.errors import ApiError

DEEPEST = 16


class JsonRoute(APIRoute):
    """A route whose body is read by `parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, with another way to read JSON."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse(await self.body())
        return self._json


def parse(body: bytes) -> Any:
    """The value of a JSON text. Raises ApiError 400."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _refusal(f"the body is not UTF-8 (byte {error.start})", "invalid_utf8") from None
    except json.JSONDecodeError as error:
        raise _refusal(f"the body is not JSON ({error.msg} at character {error.pos})", "invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python's limit on the digits of an integer
        raise _refusal("the body has a number with thousands of digits", "invalid_number") from None
    _check_depth(value)
    if b"\\ud" in body or b"\\uD" in body:  # the only way to write half a character in valid UTF-8
        _check_characters(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        shown = twice[:40].encode(errors="replace").decode()
        raise _refusal(f"{shown!r} is given twice", "duplicate_field", shown)
    return fields


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer if type(outer) is list else ())
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return
    raise _too_deep()


def _check_characters(value: Any) -> None:
    for name, inner in value.items() if isinstance(value, dict) else [("the body", value)]:
        try:
            json.dumps([name, inner], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            shown = name.encode(errors="replace").decode()[:40]
            raise _refusal(f"{shown} has half a character (a lone surrogate)", "invalid_unicode", shown) from None


def _too_deep() -> ApiError:
    return _refusal(f"the body is nested more than {DEEPEST} deep", "nested_too_deep")


def _refusal(message: str, code: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, code=code, param=param)
