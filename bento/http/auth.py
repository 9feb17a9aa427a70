"""API keys: access control of the service.

Keys come from the variable LLM_API_KEYS (comma separated) and from a file named by LLM_API_KEYS_FILE (one per line);
each grants access to every route. Without keys the service is open, so it only starts on a loopback address unless
REX_ALLOW_ANONYMOUS is true.
"""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bentoml.exceptions import InvalidArgument
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bento.errors import ApiError

KEYS, KEYS_FILE = "LLM_API_KEYS", "LLM_API_KEYS_FILE"
HEALTH_PATHS = frozenset({"/livez", "/readyz", "/healthz"})
OPEN_PATHS = HEALTH_PATHS | {"/", "/docs", "/redoc", "/health", "/openapi.json", "/ping", "/version"}
"""Paths that need no key: health, and documents without data (the page prompts for a key and sends it itself)."""
OPEN_PREFIXES = ("/page/", "/docs/")
"""Files of the page and of the documentation."""


def read_api_keys(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The keys; empty if neither variable is set.

    Raises InvalidArgument, one line without any key in it, for a file that cannot be read or contains no key, and for a
    key that a header cannot contain.
    """
    environment = os.environ if environment is None else environment
    keys = [key.strip() for key in environment.get(KEYS, "").split(",")]
    if name := environment.get(KEYS_FILE):
        try:
            lines = [line.strip() for line in Path(name).read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"{KEYS_FILE} is {name!r}, which cannot be read: {error}") from None
        if not any(lines):
            raise InvalidArgument(f"{KEYS_FILE} is {name!r}, which contains no key: write one key per line")
        keys += lines
    keys = [key for key in keys if key]
    for number, key in enumerate(keys, start=1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise InvalidArgument(
                f"key {number} of {KEYS} and {KEYS_FILE} has a character that a header cannot contain: use printable "
                "ASCII without spaces"
            )
    return tuple(dict.fromkeys(keys))


def refuse_open_address(host: str, keys: Iterable[str], *, allow_anonymous: bool) -> None:
    """Raises InvalidArgument for an address that other hosts can reach, without a key and without `allow_anonymous`."""
    if tuple(keys) or allow_anonymous or is_loopback(host):
        return
    raise InvalidArgument(
        f"no API key is set and the service would listen on {host}, where others can reach it: set {KEYS} or "
        f"{KEYS_FILE}, listen on 127.0.0.1, or allow every client with REX_ALLOW_ANONYMOUS=true"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; true for an empty host (a Unix socket)."""
    try:
        return not host or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ApiKeyMiddleware:
    """Answers 401 to requests without one of `keys`; without configured keys every request passes."""

    def __init__(self, app: ASGIApp, *, keys: Iterable[str]) -> None:
        self.app = app
        # Digests have equal length, so the comparison takes the same time for every key.
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        is_closed = bool(self._digests) and scope["type"] == "http" and not _is_open(scope)
        if is_closed and not self._knows(scope):
            raise ApiError(
                401,
                "this service needs an API key: send a valid one in the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        await self.app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if anthropic_key := headers.get("x-api-key"):  # sent by Anthropic's clients
            scheme, key = "bearer", anthropic_key
        given = _digest(key.strip())
        # Compare with every key: stopping at the first match would leak its position through timing.
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        scope.setdefault("state", {})["api_key"] = given.hex()
        return scheme.lower() == "bearer" and any(found)


def _is_open(scope: Scope) -> bool:
    if scope["method"] == "OPTIONS":  # a CORS preflight carries no key
        return True
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_PREFIXES))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()
