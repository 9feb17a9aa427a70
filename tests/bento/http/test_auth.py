"""API keys: where they come from, what they open, and when the service may run without one."""

import pytest
from bentoml.exceptions import InvalidArgument
from starlette.testclient import TestClient

from bento.api import create_app
from bento.http.auth import is_loopback, read_api_keys, refuse_open_address
from tests.bento.openai_service import refusal

KEYS = ("first-key", "second-key")
ORIGIN = "https://app.example"


def make_client(**options) -> TestClient:
    return TestClient(create_app(model_name="m", request_timeout_s=1, max_body_bytes=100, **options))


@pytest.fixture
def client() -> TestClient:
    return make_client(api_keys=KEYS, cors_origins=[ORIGIN])


def test_keys_come_from_the_variable_and_the_file(tmp_path):
    (tmp_path / "keys").write_text("third\n\n  fourth \r\nfirst\n")
    found = read_api_keys({"LLM_API_KEYS": "first, second,,", "LLM_API_KEYS_FILE": str(tmp_path / "keys")})
    assert found == ("first", "second", "third", "fourth")
    assert read_api_keys({}) == read_api_keys({"LLM_API_KEYS": ""}) == ()


@pytest.mark.parametrize("content", [None, "", "\n \n", "a b\n", "schlüssel\n", b"\xff\xfe"])
def test_a_file_without_good_keys_is_refused_in_one_line_without_them(tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidArgument, match="LLM_API_KEYS_FILE") as refusal:
        read_api_keys({"LLM_API_KEYS_FILE": str(file)})
    assert "\n" not in str(refusal.value)
    assert "schlüssel" not in str(refusal.value) and "a b" not in str(refusal.value)


def test_without_keys_only_loopback_is_served_unless_anonymous_clients_are_allowed():
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost", ""):
        assert is_loopback(host)
        refuse_open_address(host, (), allow_anonymous=False)
    for host in ("0.0.0.0", "::", "10.0.0.8", "example.org"):
        with pytest.raises(InvalidArgument, match=f"listen on {host},"):
            refuse_open_address(host, (), allow_anonymous=False)
        refuse_open_address(host, (), allow_anonymous=True)
        refuse_open_address(host, KEYS, allow_anonymous=False)


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer first-ke", "Bearer first-key2", "Basic first-key", "first-key", "Bearer ÿ"],
)
def test_anything_but_a_key_is_401(client, authorization):
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    for method, path in (
        ("POST", "/generate"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
        ("POST", "/"),
        ("PUT", "/docs"),
    ):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]
        assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens_every_route(client, key):
    headers = {"Authorization": f"bearer {key}"}
    assert client.get("/metrics", headers=headers).status_code == 200
    assert client.get("/nothing", headers=headers).status_code == 404


def test_documents_without_data_need_no_key(client):
    for path in ("/", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200, path


def test_a_browser_may_ask_and_can_read_every_refusal(client):
    ask = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = client.options("/generate", headers=ask)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    right = {"Authorization": "Bearer first-key"}
    for headers, status in (({}, 401), (right, 503)):
        answer = client.post("/generate", json={}, headers={"Origin": ORIGIN, **headers})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "Retry-After" in answer.headers["access-control-expose-headers"]
    for wrong in ({"Origin": "https://other.example"}, {"Access-Control-Request-Method": "DELETE"}):
        refused = client.options("/generate", headers={**ask, **wrong})
        assert refusal(refused)["code"] == "cors"
        assert "Access-Control-Request-Method" in refused.headers["vary"]


def test_no_origin_is_allowed_by_default():
    answer = make_client().post("/generate", json={}, headers={"Origin": ORIGIN})
    assert "access-control-allow-origin" not in answer.headers
