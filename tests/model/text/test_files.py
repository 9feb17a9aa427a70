import contextlib
import gzip
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.errors import PipelineError, TransientError
from model.settings import CorpusSettings
from model.text.chat.template import turns_of
from model.text.corpus import SPLITS, CorpusSummary, build_corpus, read_documents
from model.text.files import list_files
from model.text.sources import Sources, fingerprint

TEXTS = [f"Document {number} of a few words.\n" for number in range(40)]
NOBODY = 65_534


def files(*paths: object, **options: object) -> CorpusSettings:
    options = {"validation_fraction": 0.3} | options
    return CorpusSettings(source="files", paths=[str(path) for path in paths], **options)


def build(tmp_path: Path, *paths: object, **options: object) -> CorpusSummary:
    return build_corpus(files(*paths, **options), tmp_path / "out", log=LOGGED.append)


LOGGED: list[str] = []


@pytest.fixture(autouse=True)
def forgets_the_log() -> None:
    LOGGED.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    for number, text in enumerate(TEXTS):
        (made / f"{number:02}.txt").write_text(text)
    return made


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder that every user may enter, as a user who may not read all of it."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    is_root = os.geteuid() == 0
    try:
        yield place
    finally:
        if is_root:
            os.seteuid(0)
        for path in place.rglob("*"):
            path.chmod(0o755)
        shutil.rmtree(place)


def become_nobody() -> None:
    if os.geteuid() == 0:
        os.seteuid(NOBODY)


@pytest.mark.parametrize("pattern", ["**/*", "*/*", "**/*.txt"])
def test_a_folder_that_cannot_be_read_is_named(pattern: str) -> None:
    with as_nobody() as place:
        for name in ("open", "closed"):
            (place / name).mkdir()
            (place / name / "a.txt").write_text("words")
        (place / "closed").chmod(0)
        become_nobody()
        with pytest.raises(
            PipelineError, match=r"the folder .*/closed cannot be read \(Permission denied\); make it"
        ) as told:
            list_files([f"{place}/{pattern}"])
        assert not isinstance(told.value, TransientError)
        with pytest.raises(
            PipelineError, match=r"closed/a\.txt' cannot be listed: Permission denied; make it readable"
        ):
            list_files([f"{place}/closed/a.txt"])


def test_a_file_that_cannot_be_read_is_named() -> None:
    with as_nobody() as place:
        (place / "a.txt").write_text("words")
        (place / "b.txt").write_text("more words")
        (place / "b.txt").chmod(0)
        become_nobody()
        with pytest.raises(PipelineError, match=r"b\.txt cannot be read: Permission denied; make it readable") as told:
            list(Sources(files(f"{place}/*")))
        assert not isinstance(told.value, TransientError)


def test_what_a_glob_matches_that_is_no_file_is_counted_and_named(tmp_path: Path, folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / "device.txt").symlink_to("/dev/zero")
    (folder / "folder.txt").mkdir()
    (folder / "folder.txt" / "inside.md").write_text("not matched")
    (folder / "empty.txt").mkdir()
    (folder / "linked.txt").symlink_to(tmp_path)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(str(folder / "socket.txt"))
    summary = build(tmp_path, folder / "*.txt")
    assert summary.documents == 40
    assert summary.skipped == 6
    assert {entry.removeprefix(f"{folder}/") for entry in list_files([f"{folder}/*.txt"]).skipped} == {
        "pipe.txt (a pipe)",
        "dangling.txt (a broken link)",
        "device.txt (a device)",
        "folder.txt (a folder)",
        "linked.txt (a link to a folder)",
        "socket.txt (a socket)",
    }
    assert any("skipped 6 names that are not files" in line and "dangling.txt" in line for line in LOGGED)


def test_folders_that_the_pattern_enters_are_not_counted(tmp_path: Path, folder: Path) -> None:
    (folder / "a.b").mkdir()
    (folder / "a.b.txt").write_text("beside")
    (folder / "a.b" / "deep").mkdir()
    (folder / "a.b" / "deep" / "x.txt").write_text("words in the deep")
    summary = build(tmp_path, folder / "**" / "*")
    assert (summary.documents, summary.skipped) == (42, 0)
    assert build(tmp_path, folder / "*").skipped == 1


@pytest.mark.parametrize(
    ("name", "found"),
    [("pipe", "a pipe"), ("link", "a broken link"), ("folder", "a folder"), ("device", "a device")],
)
def test_a_path_that_is_no_file_says_what_it_is(tmp_path: Path, name: str, found: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    (tmp_path / "device").symlink_to("/dev/null")
    with pytest.raises(PipelineError, match=rf"matches no file; skipped .*{name} \({found}\)"):
        list_files([str(tmp_path / name)])


def test_names_that_are_no_utf8_are_read_and_shown_as_escapes(tmp_path: Path, folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("from a name in Latin-1")
    (folder / "two\nlines.txt").write_text("from a name of two lines")
    (folder / "日本 語.txt").write_text("from a Japanese name")
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
    settings = files(folder / "*")
    assert len(fingerprint(settings)) == 64
    summary = build(tmp_path, folder / "*")
    assert (summary.documents, summary.invalid_utf8) == (43, 1)
    sources = {s for shard in (tmp_path / "out").glob("*.parquet") for s in pq.read_table(shard)["source"].to_pylist()}
    assert {r"caf\xe9.txt", r"two\x0alines.txt", "日本 語.txt"} <= {Path(source).name for source in sources}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["invalid_utf8_sources"] == [
        rf"{folder}/\xff.txt"
    ]


@pytest.mark.parametrize("opening", ["[", '{"text": [', '{"a":'])
def test_json_nested_too_deep_is_named(tmp_path: Path, opening: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + opening * 200_000 + "\n")
    with pytest.raises(PipelineError, match=r"a\.jsonl, line 2 is not JSON \(nested too deep\)"):
        build(tmp_path, tmp_path / "a.jsonl")


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    column = pa.array(TEXTS)
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(PipelineError, match=r"a\.parquet has the column 'text' 2 times; expected it once"):
        build(tmp_path, tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["empty.parquet", "tail.parquet", "head.parquet"])
def test_a_parquet_file_that_is_not_whole_is_named(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({"text": TEXTS * 100}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    cut = {"empty": b"", "tail": data[: len(data) // 2], "head": data[len(data) // 2 :]}[name.split(".")[0]]
    (tmp_path / name).write_bytes(cut)
    with pytest.raises(PipelineError, match=rf"{name}: broken Parquet file \(.*\); fetch or write it again"):
        build(tmp_path, tmp_path / name)


def write_conversations(path: Path, prompts: list[str | None], responses: list[str | None]) -> Path:
    if path.suffix == ".parquet":
        dictionary = pa.array(responses).dictionary_encode()
        pq.write_table(pa.table({"answer": dictionary, "n": list(range(len(prompts))), "question": prompts}), path)
    else:
        rows = [{"question": p, "answer": r} for p, r in zip(prompts, responses, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_conversations_of_parquet_and_of_json_lines_are_the_same(tmp_path: Path) -> None:
    prompts, responses = [f"is {n} odd?" for n in range(40)], [("no", "yes")[n % 2] for n in range(40)]
    found = []
    for name in ("a.jsonl", "a.parquet"):
        path = write_conversations(tmp_path / name, prompts, responses)
        build(tmp_path, path, text_field="question", response_field="answer")
        found.append(sorted(text for split in SPLITS for text in read_documents(tmp_path / "out", split)))
    assert found[0] == found[1] and len(found[0]) == 40
    assert all(turns_of(text)[0].content.startswith("is ") for text in found[0])


def test_conversations_that_lack_a_part_are_named(tmp_path: Path) -> None:
    options = {"text_field": "question", "response_field": "answer"}
    for prompts, responses in ((["a", None], ["b", "c"]), (["a", "b"], ["c", None]), (["a", "b"], ["c", ""])):
        path = write_conversations(tmp_path / "a.parquet", prompts, responses)
        with pytest.raises(PipelineError, match=r"a\.parquet, row 2: found a .* as prompt and .* as response"):
            build(tmp_path, path, **options)
    with pytest.raises(PipelineError, match=r"no field 'reply'; found: .*set corpus\.response_field"):
        build(tmp_path, path, text_field="question", response_field="reply")
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(PipelineError, match=r"a\.txt is plain text: corpus\.response_field needs records"):
        build(tmp_path, tmp_path / "a.txt", **options)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = {
            "/gone.txt": 404,
            "/closed.txt": 403,
            "/busy.txt": 503,
            "/later.txt": 429,
            "/never.txt": 501,
            "/loop.txt": 302,
            "/away.txt": 302,
        }.get(self.path, 200)
        data = "".join(TEXTS).encode() * 100
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/loop.txt" if self.path == "/loop.txt" else "file:///etc/hostname")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status == 200 and self.command == "GET":
            self.wfile.write(data[: 100 if self.path == "/cut.txt" else len(data)])

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_address_is_read(tmp_path: Path, address: str) -> None:
    summary = build(tmp_path, f"{address}/a.txt", document_bytes=500)
    assert summary.documents > 1 and summary.sources == 1


@pytest.mark.parametrize(
    ("name", "told", "is_transient"),
    [
        ("gone.txt", "cannot be read: 404 Not Found", False),
        ("closed.txt", "cannot be read: 403 Forbidden", False),
        ("busy.txt", "cannot be read: 503 Service Unavailable", True),
        ("later.txt", "cannot be read: 429 Too Many Requests", True),
        ("cut.txt", "cannot be read", True),
        ("never.txt", "cannot be read: 501 Not Implemented", False),
        ("loop.txt", "cannot be read: the server redirects without end", False),
        ("away.txt", "cannot be read: the server redirects to file:///etc/hostname, which is not HTTP", False),
    ],
)
def test_an_address_that_fails_says_how_and_is_tried_again_where_that_helps(
    tmp_path: Path, address: str, name: str, told: str, is_transient: bool
) -> None:
    with pytest.raises(PipelineError, match=rf"{name}.*{told}") as raised:
        build(tmp_path, f"{address}/{name}", document_bytes=500)
    assert isinstance(raised.value, TransientError) == is_transient
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1:9", "nowhere.invalid"])
def test_a_dead_address_is_no_missing_file(tmp_path: Path, host: str) -> None:
    for path in ("a.txt", "a.txt?version=2"):
        with pytest.raises(TransientError, match=r"a\.txt.* cannot be read: .*(failed|not known|resol).*; check the a"):
            build(tmp_path, f"http://{host}/{path}")


def test_a_server_of_another_protocol_is_told(tmp_path: Path, address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-server\r\n")
                connection.close()

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(PipelineError, match=r"a\.txt' cannot be read: the answer is not HTTP \(Bad status line\)"):
            build(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}/a.txt")
        server.shutdown(socket.SHUT_RDWR)
    with pytest.raises(PipelineError, match=r"cannot be read: .*SSL") as raised:
        build(tmp_path, address.replace("http:", "https:") + "/a.txt")
    assert not isinstance(raised.value, TransientError)


@pytest.mark.parametrize(
    ("pattern", "told", "is_transient"),
    [
        ("ftp://127.0.0.1:9/a.txt", "cannot be listed: Connection refused", True),
        ("zip://a.txt::/nowhere/a.zip", "cannot be listed: there is no such file: /nowhere/a.zip", False),
        ("dbfs://a", "cannot be listed: fsspec cannot open it without options", False),
        ("http://", "cannot be read: it is not a valid address", False),
        ("~nobody-of-this-name/a.txt", "matches no file", False),
        ("a***.txt", r"cannot be listed: Invalid pattern: '\*\*'", False),
        ("/proc/cpuinfo", "cannot be read: Invalid argument; leave it out", False),
    ],
)
def test_a_path_that_no_file_system_opens_is_one_line(
    tmp_path: Path, pattern: str, told: str, is_transient: bool
) -> None:
    with pytest.raises(PipelineError, match=told) as raised:
        build(tmp_path, pattern)
    assert isinstance(raised.value, TransientError) == is_transient
    assert "\n" not in str(raised.value)


def test_a_file_whose_name_looks_like_a_chain_of_file_systems_is_read(tmp_path: Path) -> None:
    (tmp_path / "zip::a.txt").write_text("".join(f"line {number} of a text\n" for number in range(200)))
    assert build(tmp_path, tmp_path / "zip::a.txt", document_bytes=100).sources == 1


def test_names_of_fields_stay_within_one_line(tmp_path: Path) -> None:
    names = ["a\nb", "c" * 10_000, *(f"k{number}" for number in range(500))]
    (tmp_path / "a.jsonl").write_text(json.dumps(dict.fromkeys(names, 1)) + "\n")
    with pytest.raises(PipelineError, match=r"no field 'text'; found: 'a\\nb', 'ccc.* and 482 more; set") as raised:
        build(tmp_path, tmp_path / "a.jsonl")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.parquet"])
def test_a_file_without_a_document_is_counted(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.txt").write_text("".join(f"line {number} of a text\n" for number in range(200)))
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / name)
    else:
        (folder / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    summary = build(tmp_path, folder / "*", document_bytes=100)
    assert (summary.sources, summary.empty) == (2, 1) and name in summary.empty_sources[0]
