"""The OpenAPI document: every status that a route can answer, with its body."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from bento.schema import ErrorResponse

Responses = dict[int | str, dict[str, Any]]


def _errors(**meanings: str) -> Responses:
    return {int(name[1:]): {"model": ErrorResponse, "description": meaning} for name, meaning in meanings.items()}


LISTING = _errors(_401="The service has API keys and the request has none of them.", _500="The server failed.")
"""Error answers of every route."""
READING = {
    **LISTING,
    **_errors(
        _400="The request is wrong; the message names the field.",
        _404="The named model is not served.",
        _413="The body is too large.",
        _503="No model is ready or no slot became free in time; Retry-After says when to try again, if that can help.",
    ),
}
"""Error answers of a route with a body."""
GENERATING = {
    **READING,
    **_errors(
        _429="The queue is full; Retry-After says when to try again.",
        _504="The answer was not complete in time.",
    ),
}
"""Error answers of a route that generates."""


def stream_of(kind: str) -> dict[str, Any]:
    """The 200 response of a route that can stream. kind: object type of an event's data."""
    data = {"type": "string", "description": f"JSON of a {kind}, an error object or, at the end, [DONE]."}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    example = 'data: {"object": "' + kind + '", ...}\n\ndata: [DONE]\n\n'
    return {
        "description": "The whole answer or, with stream=true, its parts as they are generated.",
        "content": {"text/event-stream": {"schema": event, "example": example}},
    }


def without(responses: Responses, *statuses: int) -> Responses:
    """`responses` without the given statuses."""
    return {status: response for status, response in responses.items() if status not in statuses}


def describe(app: FastAPI) -> None:
    """Set the app's OpenAPI document, without the 422 that FastAPI lists for every body: the service answers 400."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
