"""Compatibility routes: health probes of gateways and load tools, and metadata for evaluation harnesses.

`/health` and `/ping` follow vLLM's, TGI's and SageMaker's, `/version`, `/server_info` and `/tokenizer_info` as
vLLM's, `/schema.json` what BentoML's client expects. `/docs` loads BentoML's copy of Swagger UI, without other hosts.
"""

import functools
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response

from bento.bentoml_internals import swagger_ui_file
from bento.errors import ApiError
from bento.http.files import file_response
from bento.serving.admission import unavailable
from bento.serving.models import Models, Served

PACKAGE = "rex-pipeline"
SWAGGER = {"swagger-ui-bundle.js": "text/javascript; charset=utf-8", "swagger-ui.css": "text/css; charset=utf-8"}
SCRIPT, STYLE = SWAGGER
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def add_probes(app: FastAPI, models: Models, refusal: Callable[[], ApiError | None]) -> None:
    """Add the routes. refusal: the reason why the service is not ready, None if it is."""
    get = partial(app.get, include_in_schema=False)

    def served() -> Served:
        if models.current is None:
            raise refusal() or unavailable("the model is being loaded: try again", "loading")
        return models.current

    async def health() -> Response:
        if problem := refusal():
            raise problem
        return JSONResponse({"status": "ok"})

    for path, methods in (("/health", ["GET"]), ("/ping", ["GET", "POST"])):
        app.add_api_route(path, health, methods=methods, include_in_schema=False)

    @app.options("*", include_in_schema=False)
    async def read_methods() -> Response:
        """The server as a whole (RFC 9110 section 9.3.7)."""
        return Response(status_code=204, headers={"Allow": "GET, HEAD, OPTIONS, POST"})

    @get("/version")
    async def read_version() -> Response:
        try:
            number = version(PACKAGE)
        except PackageNotFoundError:  # in a Bento the sources are not installed
            number = app.version
        return JSONResponse({"version": number})

    @get("/server_info")
    async def server_info() -> Response:
        one = served()
        return JSONResponse(
            {
                "model": models.name,
                "names": sorted(models.names()),
                "version": one.version,
                "system_fingerprint": one.fingerprint,
                "engine": one.engine.step_name,
                "precision": one.engine.precision,
                "max_model_len": one.engine.context_length,
                "vocab_size": one.engine.vocab_size,
                "origin": one.origin,
            }
        )

    @get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        tokenizer = served().engine.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                **{name: getattr(tokenizer, name) for name in SPECIAL_TOKENS},
                "chat_template": tokenizer.chat_template,
                "model_max_length": served().engine.context_length,
                "vocab_size": served().engine.vocab_size,
            }
        )

    # Encoded once: at 100 kB or more, encoding would block the event loop for as long as several model steps.
    encoded_openapi = functools.cache(lambda: orjson.dumps(app.openapi()))
    encoded_schema = functools.cache(
        lambda: orjson.dumps({"name": models.name, "type": "service", "routes": bentoml_routes(app)})
    )

    @get("/openapi.json")
    async def openapi() -> Response:
        return Response(encoded_openapi(), media_type="application/json")

    @get("/schema.json")
    async def schema() -> Response:
        return Response(encoded_schema(), media_type="application/json")

    @get("/docs")
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url=f"/docs/{SCRIPT}",
            swagger_css_url=f"/docs/{STYLE}",
            swagger_favicon_url="/page/icon.svg",
        )

    @get("/redoc")
    async def redoc() -> Response:
        return RedirectResponse("/docs")

    @get("/docs/{name}")
    def docs_file(request: Request, name: str) -> Response:
        if name not in SWAGGER:
            raise HTTPException(404)
        return file_response(request, swagger_ui_file(name).read_bytes(), SWAGGER[name])


def bentoml_routes(app: FastAPI) -> list[dict[str, Any]]:
    """The routes with a body as BentoML's schema lists them; a name is a path with underscores."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    found = []
    for path, operations in document["paths"].items():
        if operation := operations.get("post"):
            body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            found.append(
                {
                    "name": path.strip("/").replace("/", "_"),
                    "route": path,
                    "doc": operation["summary"],
                    "batchable": False,
                    "is_task": False,
                    "input": {**schemas[body], "$defs": schemas},
                    "output": {"type": "object"},
                }
            )
    return found
