"""What the system refuses, each refused by the system itself where a test can bring that about."""

import errno
import multiprocessing
import os
import resource
import shlex
import sqlite3
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import PipelineError, TransientError, ends_in_one_line, limits_as_error
from model.settings import CorpusSettings
from model.text.corpus import build_corpus
from model.text.files import list_files

FORK = multiprocessing.get_context("fork")


def refused(work: Callable[[], object], limit: int | None = None, soft: int = 0, user: int = 0) -> tuple[str, str]:
    """Kind and text of the error that `work` ends in, in a separate process under a limit, or as another user."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run(answer: Connection) -> None:
        if limit is not None:
            resource.setrlimit(limit, (soft, resource.getrlimit(limit)[1]))
        if user:
            os.setuid(user)
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the test shows it
            answer.send((type(error).__name__, str(error)))
        else:
            answer.send(("nothing", ""))

    process = FORK.Process(target=run, args=(sender,))
    process.start()
    found: tuple[str, str] = receiver.recv()
    process.join()
    return found


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def within(directory: Path, work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with limits_as_error(directory):
            work()

    return run


def test_a_process_out_of_files_is_told_the_limit_to_raise(tmp_path: Path) -> None:
    def opens() -> None:
        files = [(tmp_path / str(number)).open("w") for number in range(100)]
        assert files

    kind, text = refused(within(tmp_path, opens), resource.RLIMIT_NOFILE, open_files() + 5)
    assert kind == "PipelineError"
    assert text.startswith(f"{tmp_path}/") and "Too many open files; raise the limit of open files (`ulimit -n" in text


@pytest.mark.parametrize("text", ["{}/*.txt", "{}/**/*.txt"])
def test_a_corpus_is_not_blamed_for_the_files_that_its_process_may_not_open(tmp_path: Path, text: str) -> None:
    (tmp_path / "in" / "more").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a")
    settings = CorpusSettings(source="files", paths=[text.format(tmp_path / "in")])
    held = []

    def builds() -> None:
        while True:
            try:
                held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        build_corpus(settings, tmp_path / "out")

    kind, line = refused(within(tmp_path, builds), resource.RLIMIT_NOFILE, open_files() + 20)
    assert kind == "PipelineError" and "ulimit -n" in line
    assert not list((tmp_path / "out").glob("*.parquet"))
    assert list_files(settings.paths).files


@pytest.mark.parametrize("of", ["numpy", "torch", "python"])
def test_a_process_out_of_memory_is_told_so(tmp_path: Path, of: str) -> None:
    takes = {
        "numpy": lambda: np.ones(2**31),
        "torch": lambda: torch.ones(2**31),
        "python": lambda: bytearray(2**33),
    }[of]
    kind, text = refused(within(tmp_path, takes), resource.RLIMIT_AS, virtual_bytes() + 2**30)
    assert kind == "PipelineError"
    assert text.startswith(f"out of memory while working on {tmp_path} (") and "limit " in text and "\n" not in text


def test_a_file_beyond_the_limit_of_its_size_is_named(tmp_path: Path) -> None:
    kind, text = refused(
        within(tmp_path, lambda: (tmp_path / "a").write_bytes(bytes(10_000))), resource.RLIMIT_FSIZE, 4096
    )
    assert kind == "PipelineError" and "File too large; raise the limit of a file's size" in text


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    kind, text = refused(within(tmp_path, lambda: (tmp_path / "a").write_text("a")), user=65534)
    assert kind == "PipelineError"
    assert text == f"{tmp_path}/a: Permission denied; give this user the right to it, or choose another folder, " + (
        "then run again"
    )


def test_a_full_disk_is_named_by_every_writer(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    for writes in (lambda: full.write_text("a"), lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"a")):
        with pytest.raises(PipelineError, match="no disk space left while writing to"), limits_as_error(tmp_path):
            writes()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.EROFS, "Read-only file system", "a/b"), PipelineError, "a/b: Read-only file system; mount it"),
        (OSError(errno.EIO, "Input/output error", b"a/b"), TransientError, "a/b: Input/output error; the disk"),
        (OSError(errno.ENFILE, "Too many open files in system"), TransientError, "end other programs"),
        (RuntimeError("can't start new thread"), TransientError, "raise the limit of processes and threads"),
        (ImportError("libtorch.so: cannot map: Cannot allocate memory"), PipelineError, "out of memory while"),
        (Exception("I/O error: Read-only file system (os error 30)"), PipelineError, "Read-only file system; mount"),
        (sqlite3.OperationalError("database or disk is full"), PipelineError, "no disk space left"),
        (sqlite3.OperationalError("attempt to write a readonly database"), PipelineError, "Read-only file system"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_refusal_is_one_line_and_tried_again_where_that_may_help(
    tmp_path: Path, error: Exception, kind: type[PipelineError], text: str
) -> None:
    with pytest.raises(PipelineError) as found, limits_as_error(tmp_path):
        raise error
    assert type(found.value) is kind
    assert text in str(found.value) and "\n" not in str(found.value) and "again" in str(found.value)
    with pytest.raises(PipelineError) as found, limits_as_error(tmp_path):
        raise ValueError("wrapped") from error
    assert text in str(found.value)


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(2, "no file", "a"), ConnectionError("down")])
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as found, limits_as_error(tmp_path):
        raise error
    assert found.value is error


@pytest.mark.parametrize(("options", "says"), [({"capture_output": True}, ": b is 2"), ({}, "")])
def test_a_program_that_fails_is_one_line_with_its_last_one(options: dict[str, bool], says: str, capsys) -> None:
    command = ["sh", "-c", "echo a >&2; echo error: b is 2 >&2; exit 3"]

    @ends_in_one_line
    def main() -> int:
        subprocess.run(command, check=True, **options)
        return 0

    assert main() == 1
    assert capsys.readouterr().err == f"error: {shlex.join(command)} ended with status 3{says}\n"


def test_a_message_stays_one_line_of_bounded_length_whatever_was_found() -> None:
    assert str(PipelineError("found 'a\nb\r\nc': expected d")) == r"found 'a\nb\nc': expected d"
    message = str(TransientError("found " + "x" * 10**6 + ": expected less"))
    assert len(message) < 2100 and message.startswith("found x") and message.endswith(": expected less")
