"""HTTP as clients, proxies and broken peers speak it, over raw sockets against a real server."""

import gzip
import json
import shutil
import socket
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bento.http.protocol import MAX_HEAD_BYTES, MAX_HEADERS
from tests.bento.http.wire import BODY, ask, connection, error, post, read_all, read_answer
from tests.bento.openai_service import MAX_BODY_BYTES, Service, running_service

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(receive_timeout_s=1.0) as running:
        yield running


UPGRADES = {
    "Java's HttpClient and curl --http2": [
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAEAAEAA",
    ],
    "websocket": [
        "Connection: keep-alive, Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Key: x",
        "Sec-WebSocket-Version: 13",
    ],
    "TLS": ["connection: upgrade", "upgrade: TLS/1.0, HTTP/1.1"],
}


@pytest.mark.parametrize("headers", UPGRADES.values(), ids=UPGRADES.keys())
def test_an_offer_to_upgrade_is_ignored_and_the_body_is_read(address, headers):
    with connection(address) as made:
        for _ in range(2):
            made.sendall(post(BODY, *headers))
            status, got, body = read_answer(made)
            assert status == 200, body
            assert json.loads(body)["choices"][0]["finish_reason"] == "length"
            assert "upgrade" not in got
        made.sendall(post(BODY))  # the connection goes on
        assert read_answer(made)[0] == 200


def test_an_offer_to_upgrade_is_ignored_wherever_the_packets_are_cut(address):
    request = post(BODY, *UPGRADES["Java's HttpClient and curl --http2"])
    for size in (1, 7, 100):
        with connection(address) as made:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(0, len(request), size):
                made.sendall(request[start : start + size])
            assert read_answer(made)[0] == 200


def test_an_offer_with_a_chunked_body_and_one_without_a_body_are_answered(address):
    offer = UPGRADES["websocket"]
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    assert ask(address, post(chunked, *offer, "Transfer-Encoding: chunked"))[0] == 200
    head = "\r\n".join(["GET /v1/models HTTP/1.1", "Host: x", *offer])
    assert ask(address, head.encode() + b"\r\n\r\n")[0] == 200


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed (Debian's package curl)")
@pytest.mark.parametrize("options", [["--http2"], ["--http1.0"], ["--http1.1", "-H", "Expect: 100-continue"]], ids=str)
def test_curl_is_answered(address, options, tmp_path):
    body = tmp_path / "body"
    body.write_bytes(BODY)
    url = f"http://{address[0]}:{address[1]}/v1/completions"
    command = [
        "curl",
        "-sS",
        "--max-time",
        "20",
        *options,
        "-H",
        "Content-Type: application/json",
        "-d",
        f"@{body}",
        url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"]


@pytest.mark.skipif(not shutil.which("javac"), reason="no JDK is installed (Debian's default-jdk-headless)")
@pytest.mark.processes
def test_javas_http_client_is_answered(address, tmp_path):
    program = Path(tmp_path / "Ask.java")
    program.write_text(
        """
        import java.net.URI;
        import java.net.http.*;
        public class Ask {
            public static void main(String[] given) throws Exception {
                HttpClient client = HttpClient.newHttpClient();
                for (int i = 0; i < 2; i++) {
                    HttpRequest request = HttpRequest.newBuilder(URI.create(given[0]))
                        .header("Content-Type", "application/json")
                        .POST(HttpRequest.BodyPublishers.ofString(given[1])).build();
                    HttpResponse<String> answer = client.send(request, HttpResponse.BodyHandlers.ofString());
                    System.out.println(answer.statusCode() + " " + answer.body().contains("choices"));
                }
            }
        }
        """
    )
    url = f"http://{address[0]}:{address[1]}/v1/completions"
    done = subprocess.run(
        ["java", str(program), url, BODY.decode()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["200", "true"] * 2, done.stderr


@pytest.mark.parametrize(
    "head",
    [
        b"X-Long: " + b"a" * (MAX_HEAD_BYTES + 10_000),
        b"\r\n".join(b"X-%d: %b" % (i, b"b" * 1000) for i in range(100)),
        b"\r\n".join(b"X-%d: 1" % i for i in range(MAX_HEADERS + 1)),
    ],
    ids=["one long", "many bytes", "many"],
)
def test_headers_are_bounded_before_anything_else(address, head):
    with connection(address) as made:
        made.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        assert error(read_answer(made), 431)["message"]


def test_a_url_without_an_end_is_refused_and_the_connection_closed(address):
    with connection(address) as made:
        made.sendall(b"GET /" + b"a" * (2 * MAX_HEAD_BYTES))
        assert error(read_answer(made), 431)


def test_headers_that_proxies_add_are_accepted(address):
    extra = [f"X-Proxy-{i}: {'v' * 100}" for i in range(100)]
    assert ask(address, post(BODY, *extra))[0] == 200


MALFORMED = [
    b"nonsense\r\n\r\n",
    b"GET / http/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
]


@pytest.mark.parametrize("request_bytes", MALFORMED, ids=lambda value: str(value)[:40])
def test_malformed_requests_get_the_error_object_and_the_connection_is_closed(address, request_bytes):
    with connection(address) as made:
        made.sendall(request_bytes)
        answer = read_answer(made)
        assert error(answer, 400)["code"] == "invalid_http"
        assert answer[1]["connection"] == "close"
        assert made.recv(1) == b""


GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (post(b"", "Transfer-Encoding: gzip, chunked"), 501),
        (post(b"", "Transfer-Encoding: gzip"), 501),
        (post(b"", "Transfer-Encoding: gzip", "Transfer-Encoding: chunked"), 501),
        (GET.replace(b"1.1", b"2.0") + b"\r\n", 505),
        (GET.replace(b"1.1", b"3.0") + b"\r\n", 505),
        (GET.replace(b"1.1", b"9.9") + b"\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (GET + b"Host: y\r\n\r\n", 400),
        (GET.replace(b"Host: x\r\n", b"") + b"\r\n", 400),
        (GET + b"Host: y\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 400),
        *[
            (GET.replace(b"x", host) + b"\r\n", 400)
            for host in (b"a b", b"user@x", b"x/y", b"b\xfccher.example", b"x:http", b"::1", b"[::1", b"x\ty")
        ],
    ],
    ids=lambda value: str(value)[:60],
)
def test_violations_of_the_standard_that_the_parser_accepts_are_refused(address, request_bytes, status):
    with connection(address) as made:
        made.sendall(request_bytes)
        assert error(read_answer(made), status)
        assert made.recv(1) == b""


@pytest.mark.parametrize("host", [b"", b"x:", b"[::1]:80", b"my_host.example.:8080", b"b%C3%BCcher.example"])
def test_hosts_of_every_form_are_accepted(address, host):
    assert ask(address, GET.replace(b"x", host) + b"\r\n")[0] == 200


def test_the_refusal_of_malformed_http_names_the_violation(address):
    assert "Content-Length" in error(ask(address, MALFORMED[3]), 400)["message"]
    assert "header" in error(ask(address, GET + b"No colon\r\n\r\n"), 400)["message"]
    assert "target" in error(ask(address, GET.replace(b"/v1", b"http://x:99999999/v1") + b"\r\n"), 400)["message"]
    assert "HTTP/2" in error(ask(address, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 505)["message"]


@pytest.mark.parametrize("version", ["1.2", "1.9"])
def test_a_higher_minor_version_is_answered_as_http_1_1(address, version):
    with connection(address) as made:
        for _ in range(2):  # on one connection
            made.sendall(post(BODY, version=version))
            assert read_answer(made)[0] == 200
        made.sendall(post(BODY, "Connection: Upgrade", "Upgrade: h2c", version=version))
        assert read_answer(made)[0] == 200


def test_an_old_client_is_not_told_to_continue(address):
    with connection(address) as made:
        made.sendall(post(BODY, "Expect: 100-continue", version="1.0"))
        assert read_all(made).startswith(b"HTTP/1.1 200")


def test_a_client_that_waits_to_continue_with_a_broken_body_gets_only_the_refusal(address, caplog):
    with connection(address) as made:
        made.sendall(post(b"no chunk\r\n\r\n", "Expect: 100-continue", "Transfer-Encoding: chunked"))
        assert error(read_answer(made), 400)
        assert made.recv(1) == b""
    assert ask(address, GET + b"\r\n")[0] == 200
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/nowhere", 404), ("PUT", "/v1/completions", 405)])
def test_a_body_that_no_route_reads_is_not_waited_for(address, method, path, status):
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
    with connection(address) as made:
        made.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert error(read_answer(made), status)
        assert made.recv(1) == b""  # the client may send the body or not
    with connection(address) as made:
        made.sendall(f"{head}\r\n".encode())
        assert error(read_answer(made), status)
        made.sendall(b"x" * 1_000_000 + GET + b"\r\n")
        assert read_answer(made)[0] == 200


def test_a_tunnel_and_a_question_about_the_server_are_answered(address):
    assert error(ask(address, b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n"), 405)
    status, headers, body = ask(address, b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, headers["allow"], body) == (204, "GET, HEAD, OPTIONS, POST", b"")
    assert error(ask(address, b"GET * HTTP/1.1\r\nHost: x\r\n\r\n"), 405)


def test_head_is_answered_where_get_is_and_has_no_body(address):
    for path in ("/v1/models", "/metrics", "/openapi.json", "/", "/v1/nothing"):
        with connection(address) as made:
            made.sendall(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            made.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            received = read_all(made)
        head, _, rest = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404" if "nothing" in path else b"HTTP/1.1 200"), head
        assert rest.startswith(b"HTTP/1.1 200")


def test_needless_slashes_do_not_count(address):
    for path in ("/v1/models/", "//v1/models", "/v1//models"):
        status, _, body = ask(address, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert status == 200
        assert json.loads(body)["object"] == "list"
    for path in ("/v1/completions/", "//v1/completions"):
        assert ask(address, post(BODY, path=path))[0] == 200


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/completions", "OPTIONS, POST"),
        ("/v1/models/", "GET, HEAD, OPTIONS"),
        ("/", "GET, HEAD, OPTIONS"),
        ("/metrics", "GET, HEAD, OPTIONS"),
    ],
)
def test_options_and_the_refusal_of_a_method_name_the_methods_of_a_path(address, path, allowed):
    status, headers, body = ask(address, f"OPTIONS {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (status, headers["allow"], body) == (204, allowed, b"")
    refused = ask(address, f"DELETE {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert error(refused, 405) and refused[1]["allow"] == allowed
    assert error(ask(address, b"OPTIONS /v1/nothing HTTP/1.1\r\nHost: x\r\n\r\n"), 404)


def chunks(*parts: bytes, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    lines = [b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts]
    return b"".join([*lines, b"0", extension, b"\r\n", trailers, b"\r\n"])


@pytest.mark.parametrize(
    "body",
    [
        chunks(BODY, extension=b';name=value;other="quoted"'),
        chunks(*[BODY[at : at + 1] for at in range(len(BODY))]),
        chunks(BODY, trailers=b"Digest: x\r\nServer-Timing: y\r\n"),
        chunks(b" " * 5000, *[b" "] * 9000, BODY),  # more bytes around the chunks than a head may have
    ],
    ids=["extensions", "single bytes", "trailers", "much padding"],
)
def test_chunked_bodies_are_read(address, body):
    with connection(address) as made:
        for _ in range(2):
            made.sendall(post(body, "Transfer-Encoding: chunked", "Trailer: Digest"))
            assert read_answer(made)[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        chunks(BODY, trailers=b"X: " + b"a" * 2 * MAX_HEAD_BYTES + b"\r\n"),
        chunks(BODY, extension=b";" + b"a" * 2 * MAX_HEAD_BYTES),
        chunks(BODY, trailers=b"X: 1\r\n" * (MAX_HEADERS + 1)),
        chunks(BODY, trailers=(b"X: " + b"a" * 1000 + b"\r\n") * 100),
        b"1" + b";" * 2 * MAX_HEAD_BYTES,
    ],
    ids=["a trailer", "an extension", "trailers", "long trailers", "an extension without an end"],
)
def test_trailers_and_chunk_extensions_are_bounded_as_headers_are(address, body):
    with connection(address) as made:
        with suppress(ConnectionResetError, BrokenPipeError):
            made.sendall(post(body, "Transfer-Encoding: chunked"))
        assert error(read_answer(made), 431)
        assert made.recv(1) == b""


def test_a_byte_order_mark_before_the_json_is_ignored(address):
    for body in (BODY, BODY[:-1] + b" " * 16_000 + b"}"):
        assert ask(address, post(b"\xef\xbb\xbf" + body))[0] == 200


def test_http_1_0_gets_whole_answers_and_streams_without_chunks(address):
    for stream in (False, True):
        body = json.dumps({**json.loads(BODY), "stream": stream}).encode()
        with connection(address) as made:
            made.sendall(post(body, version="1.0"))
            head, _, content = read_all(made).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        if stream:
            assert content.startswith(b"data: {") and content.endswith(b"data: [DONE]\n\n")
        else:
            assert json.loads(content)["choices"]


COMPRESSED = {
    "gzip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY),
    "GZIP": gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]),
    "deflate": zlib.compress(BODY),
    "Deflate": zlib.compress(BODY)[2:-4],
    "identity": BODY,
}


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_compressed_bodies_are_read(address, encoding):
    assert ask(address, post(COMPRESSED[encoding], f"Content-Encoding: {encoding}"))[0] == 200


def test_compressed_bodies_are_within_the_same_limit(address):
    for size in (MAX_BODY_BYTES + 1, 500 * MAX_BODY_BYTES):
        bomb = gzip.compress(b" " * size)
        assert len(bomb) < MAX_BODY_BYTES
        assert error(ask(address, post(bomb, "Content-Encoding: gzip")), 413)["code"] == "body_too_large"


def test_identity_is_not_counted_among_the_encodings(address):
    for named in (["identity, gzip"], ["gzip", "identity"], ["identity"] * 2):
        body = gzip.compress(BODY) if "gzip" in ", ".join(named) else BODY
        assert ask(address, post(body, *(f"Content-Encoding: {one}" for one in named)))[0] == 200
    twice = post(gzip.compress(gzip.compress(BODY)), *["Content-Encoding: gzip"] * 2)
    assert "gzip, gzip" in error(ask(address, twice), 415)["message"]


def test_a_body_of_many_compressed_texts_is_refused(address):
    many = gzip.compress(b"") * (MAX_BODY_BYTES // 20)
    assert error(ask(address, post(many, "Content-Encoding: gzip")), 400)["code"] == "invalid_encoding"


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip"])
def test_another_compression_is_refused_by_name(address, encoding):
    answer = ask(address, post(BODY, f"Content-Encoding: {encoding}"))
    assert encoding in error(answer, 415)["message"]
    assert answer[1]["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    "body",
    [BODY, gzip.compress(BODY)[:-9], gzip.compress(BODY)[:12] + b"xxxxxxxx"],
    ids=["plain", "cut off", "corrupt"],
)
def test_a_body_that_does_not_match_its_encoding_is_refused(address, body):
    assert error(ask(address, post(body, "Content-Encoding: gzip")), 400)["code"] == "invalid_encoding"
