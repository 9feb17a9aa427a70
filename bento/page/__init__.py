"""The playground at `/`: static HTML, CSS and JavaScript modules in this folder.

The Content-Security-Policy forbids inline scripts, and other hosts except a second service that an option names.
Prompts and completions are inserted as text, never as HTML. The static files are public; requests to the API need a
key where keys are configured.
"""

from html import escape
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from bento.http.files import file_response

FOLDER = Path(__file__).parent
INDEX = "index.html"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Set here because the system's MIME table may differ, and browsers reject modules of another type."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src {connect}; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
SECOND_SERVICE = '<meta name="compare-with" content="{address}">'
"""Where the page finds the second service's address."""


def add_page(app: FastAPI, compare_with: str = "") -> None:
    """Add the routes `/` and `/page/NAME`; reads the files once.

    compare_with: address of a second service, whose answers the page can show beside those of this one.
    """
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES}
    address = f"{compare_with.rstrip('/')}/" if compare_with else ""
    place = SECOND_SERVICE.format(address="").encode()
    files[INDEX] = files[INDEX].replace(place, SECOND_SERVICE.format(address=escape(address)).encode())
    headers = {
        "Content-Security-Policy": POLICY.format(connect=f"'self' {address}".rstrip()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    def answer(request: Request, name: str) -> Response:
        return file_response(request, files[name], MEDIA_TYPES[Path(name).suffix], headers)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return answer(request, INDEX)

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page_file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return answer(request, name)
