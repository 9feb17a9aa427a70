"""Answers with static files, which clients revalidate on each request."""

import hashlib
from collections.abc import Mapping

from fastapi import Request
from starlette.responses import Response


def file_response(
    request: Request, content: bytes, media_type: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The file, or 304 if the client has it. Ranges are ignored, as RFC 9110 section 14.2 allows.

    A page must not load scripts of another version, so browsers revalidate before they use a cached copy.
    """
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    tagged = {**(headers or {}), "Cache-Control": "no-cache", "ETag": tag}
    known = {one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")}
    if known & {tag, "*"}:
        return Response(status_code=304, headers=tagged)
    return Response(content, headers=tagged, media_type=media_type)
