"""The random requests of `bench.fuzz`: of every route with a body, right and wrong, the same for a seed."""

import json
import random

from bench.fuzz import Requests, _is_complete, _status
from bento.api import create_app


def test_requests_of_every_route_are_made_again_by_their_seeds():
    document = create_app(model_name="m", request_timeout_s=60, max_body_bytes=4096).openapi()
    made = Requests(json.loads(json.dumps(document)))
    requests = [made.one(random.Random(seed)) for seed in range(3000)]
    assert requests == [made.one(random.Random(seed)) for seed in range(3000)] and all(requests)
    for path in document["paths"]:
        if "post" in document["paths"][path]:
            assert any(request.startswith(f"POST {path} HTTP/1.1\r\n".encode()) for request in requests), path
    assert len({request.partition(b" ")[0] for request in requests}) > 8


def test_an_answer_is_read_to_its_end_past_interim_ones():
    interim, head = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
    assert _status(bytearray(interim + head)) == "200" and _status(bytearray()) == "closed"
    assert not _is_complete(b"POST /", bytearray(interim + head + b"x"))
    assert _is_complete(b"POST /", bytearray(interim + head + b"xy")) and _is_complete(b"HEAD /", bytearray(head))
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
    assert not _is_complete(b"GET /", bytearray(chunked)) and _is_complete(b"GET /", bytearray(chunked + b"0\r\n\r\n"))
