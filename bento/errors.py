"""Error responses: one JSON shape for every status of 400 and above, with a one-line message that names the field.

Messages echo short numbers and words only, never the text of a prompt.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

PRIVATE_FIELDS = {
    "prompt", "context", "messages", "input", "instructions", "system", "suffix", "stop", "stop_sequences", "user",
    "metadata", "prompt_cache_key", "text_1", "text_2", "queries", "query", "documents", "data_1", "data_2",
    "chat_template_kwargs",
}  # fmt: skip
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
CONTEXT_EXCEEDED = "context_length_exceeded"
UNSUPPORTED_VALUE = "unsupported_value"
"""OpenAI's error code for a value that this model does not support but another may."""
EXPECTED = {
    "dict_type": "expected an object",
    "list_type": "expected a list",
    "model_attributes_type": "expected an object",
    "model_type": "expected an object",
}
"""Replacements for pydantic's reasons that name Python types."""
MAX_VALUE_LENGTH = 40
MAX_NAME_LENGTH = 64


class ApiError(HTTPException):
    """An error response of status 400 or above. param: the invalid field of the request, if there is one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        type: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.content = error_content(message, type=type, param=param, code=code)

    def response(self, path: str = "") -> JSONResponse:
        """The JSON response, in the format of the API that `path` belongs to."""
        content = anthropic_error(self) if path.startswith(ANTHROPIC_PATH) else self.content
        return JSONResponse(content, self.status_code, self.headers)


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's format, with the fields of OpenAI's."""
    other = "invalid_request_error" if error.status_code < 500 else "api_error"
    detail = {**error.content["error"], "type": ANTHROPIC_TYPES.get(error.status_code, other)}
    if detail["code"] == CONTEXT_EXCEEDED:
        detail["message"] = f"prompt is too long: {detail['message']}"  # the words that Anthropic's clients look for
    return {"type": "error", "error": detail}


def error_content(message: str, *, type: str, param: str | None, code: str) -> dict[str, Any]:
    """The body of an error response."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def context_exceeded(message: str, param: str) -> ApiError:
    """A text that exceeds the context. Clients look for OpenAI's sentence, or for the code inside the message."""
    return ApiError(400, f"{message} ({CONTEXT_EXCEEDED})", code=CONTEXT_EXCEEDED, param=param)


def server_error(status: int, message: str, *, code: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """An error of the server, not of the request."""
    return ApiError(status, message, code=code, type="server_error", headers=headers)


def without_route(method: str, path: str, status: int, headers: Mapping[str, str]) -> ApiError:
    """A 404 for a path without a route, a 405 for a method that its route does not have."""
    shown = json.dumps(path[:MAX_NAME_LENGTH], ensure_ascii=False)
    if status == 405:
        message = f"{method} is not a method of {shown}: expected {headers.get('Allow', 'another one')}"
    else:
        message = f"{shown} is not a route of this service: /docs lists them"
    return ApiError(status, message, code=f"http_{status}", headers=headers)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """A 400 for the first of pydantic's errors."""
    first = errors[0]
    path = [part for part in first["loc"] if part != "body"]
    kind, reason = first["type"], first["msg"][:1].lower() + first["msg"][1:]
    if named := first.get("ctx", {}).get("param"):  # a validator of several fields names one
        return ApiError(400, f"{named}: {reason}", code=kind, param=named)
    if not path:
        return ApiError(400, "the body is not a JSON object", code=kind)
    param = str(path[0])[:MAX_NAME_LENGTH]
    place = param + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part:.{MAX_NAME_LENGTH}}" for part in path[1:]
    )
    if kind == "extra_forbidden":
        return ApiError(400, f"{place!r} is not a field of this request", code=kind, param=param)
    if kind == "missing":
        return ApiError(400, f"{place} is missing", code=kind, param=param)
    if kind == "none_required":
        return ApiError(400, f"{place} is not supported: leave it out", code="unsupported_parameter", param=param)
    reason = EXPECTED.get(kind, reason)
    return ApiError(400, f"{place}{_shown(param, first.get('input'))}: {reason}", code=kind, param=param)


def _shown(param: str, value: object) -> str:
    """` is VALUE`; empty for a long value and for a user's text."""
    if param in PRIVATE_FIELDS or not isinstance(value, str | int | float | bool | None):
        return ""
    text = json.dumps(value)
    return f" is {text}" if len(text) <= MAX_VALUE_LENGTH else ""
