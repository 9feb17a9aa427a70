"""The page's files as the server gives them: types, policy, caching, and nothing that lies elsewhere."""

import re

import pytest
from starlette.testclient import TestClient

from bento.api import create_app
from bento.page import FOLDER

FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in {".css", ".html", ".js", ".svg"})


def test_the_root_is_a_page_that_may_only_load_from_its_own_server(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_may_ask_the_second_service_that_an_option_names():
    app = create_app(model_name="x", request_timeout_s=1, max_body_bytes=1, compare_with="https://other.example/rex")
    answer = TestClient(app).get("/")
    assert "connect-src 'self' https://other.example/rex/; " in answer.headers["content-security-policy"]
    assert '<meta name="compare-with" content="https://other.example/rex/">' in answer.text


def test_every_file_that_the_page_names_is_served_with_its_type(client):
    types = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
    named = set(re.findall(r'(?:src|href)="(page/[^"]+)"', client.get("/").text))
    scripts = [(FOLDER / name).read_text() for name in FILES if name.endswith(".js")]
    named |= {f"page/{name}" for script in scripts for name in re.findall(r'from "\./([^"]+)"', script)}
    assert {f"page/{name}" for name in FILES} - named == {"page/index.html"}
    for path in named:
        answer = client.get(f"/{path}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, types[path.rsplit(".", 1)[1]]), path


def test_a_file_is_sent_again_only_when_it_has_changed(client):
    first = client.get("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/app.js", headers={"If-None-Match": '"other"'}).content == first.content
    assert client.head("/page/app.js").headers["etag"] == first.headers["etag"]


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2fapi.py", "%2e%2e/api.py", ""])
def test_only_the_pages_files_are_served(client, name):
    assert client.get(f"/page/{name}").status_code == 404


def test_no_file_names_another_host_or_holds_an_inline_script():
    for name in FILES:
        text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.", text), name
        assert not re.search(r"<script(?![^>]*src=)|\son[a-z]+=|style=\"|javascript:|innerHTML|eval\(", text), name
