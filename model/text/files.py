"""Finds and opens the files that `corpus.paths` names.

Nothing is skipped silently: a folder that cannot be read ends the listing, and matches of a glob that are not files are
named in `Listing.skipped`. Errors of a network or a disk raise TransientError, since a retry may help; all others raise
PipelineError.
"""

import errno
import os
import ssl
import stat
import unicodedata
from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from model.errors import OF_THE_PROCESS, PipelineError, TransientError

_HTTP_TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 507}
_OF_THE_NAME = (errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENODEV, errno.ENOTDIR, errno.ENXIO)
"""Errors of a name that stands for nothing to read from start to end, as of a file of /proc."""
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@dataclass(frozen=True)
class File:
    """One file. source: its name as the corpus records it, printable UTF-8. size: stored bytes, 0: unknown."""

    source: str
    fs: Any
    path: str
    size: int


@dataclass
class Listing:
    """Files in order, each once, and the matches that are not files, with the reason."""

    files: list[File] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def list_files(patterns: Iterable[str], option: str = "corpus.paths") -> Listing:
    """The files that paths, globs and fsspec URLs name, each pattern's sorted by path. option: names them in errors.

    Raises PipelineError if a pattern matches no file or a folder under it cannot be read, TransientError if an
    address does not answer.
    """
    found: dict[tuple[Any, str], File] = {}
    skipped: dict[str, None] = {}
    for pattern in patterns:
        listing = _match(pattern, f"{option} {pattern!r}")
        for file in listing.files:
            found.setdefault((file.fs.protocol, file.path), file)
        skipped.update(dict.fromkeys(listing.skipped))
        if not listing.files:
            where = f" (working folder {Path.cwd()})" if _is_relative(pattern) else ""
            also = f"; skipped {', '.join(listing.skipped[:3])}" if listing.skipped else ""
            raise PipelineError(
                f"{option} {pattern!r} matches no file{where}{also}; for all files of a folder write FOLDER/**/*"
            )
    return Listing(list(found.values()), list(skipped))


def open_file(file: File) -> BinaryIO:
    """Open a file for reading bytes. Raises PipelineError or TransientError, one line, if that fails."""
    with reading(file.source, file.fs):
        return cast(BinaryIO, file.fs.open(file.path, "rb"))


@contextmanager
def reading(source: str, fs: Any) -> Iterator[None]:
    """Turn errors of a file system while `source` is read into one line."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise _failure(f"{source} cannot be read", error, "make it readable, or leave it out") from error
    except OSError as error:
        if error.errno in OF_THE_PROCESS:
            raise
        if error.errno in _OF_THE_NAME:
            raise PipelineError(f"{source} cannot be read: {_line(error)}; leave it out") from error
        raise TransientError(
            f"{source} cannot be read: {_line(error)}; run again once its disk or network works"
        ) from error
    except Exception as error:
        if isinstance(fs, LocalFileSystem) or not _is_network(error):
            raise
        raise _failure(
            f"{source} cannot be read", error, "check the address and the network, then run again"
        ) from error


def printable(name: str) -> str:
    r"""A name with escapes for bytes that are not UTF-8, control characters and line ends: `caf\xe9.txt`."""
    return "".join(_escape(c) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in name)


def _escape(character: str) -> str:
    code = ord(character)
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0  # a byte that is not UTF-8, as Python keeps it in names
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _Local(LocalFileSystem):
    """The local file system, which records the folders that it could not list: fsspec's glob skips them."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.unreadable: list[tuple[str, str]] = []
        self.refused: OSError | None = None

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        """As the base class's."""
        try:
            return super().ls(path, detail, **options)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in OF_THE_PROCESS:
                self.refused = error  # fsspec's glob would skip it
                raise
            self.unreadable.append((path, _line(error)))
            raise


def _match(pattern: str, named: str) -> Listing:
    """named: the pattern with its option, for errors."""
    # fsspec would read a local file's `::` as a chain of file systems.
    if "::" in pattern and os.path.lexists(pattern):
        return _match_local(pattern, named, str(Path(pattern).absolute()))
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_PROCESS:
            raise
        raise _failure(f"{named} cannot be listed", error, _CHECK) from error
    if isinstance(fs, LocalFileSystem):
        return _match_local(pattern, named, path)
    try:
        info = fs.info(path)
    except Exception as error:
        if not set(path) & set("*["):
            raise _failure(f"{named} cannot be read", error, _CHECK) from error
        try:
            found = _glob(fs, path, detail=True)
        except Exception as error:
            raise _failure(f"{named} cannot be listed", error, _CHECK) from error
    else:
        found = {path: info}
    files = [(fs.unstrip_protocol(name), name, info) for name, info in sorted(found.items())]
    return Listing([File(printable(s), fs, n, i.get("size") or 0) for s, n, i in files if i["type"] == "file"])


def _glob(fs: AbstractFileSystem, path: str, **options: Any) -> Any:
    """`fs.glob`, which lists all folders before it finds that a pattern is not valid."""
    glob_translate(path)
    return fs.glob(path, **options)


def _is_relative(pattern: str) -> bool:
    return "://" not in pattern and not pattern.startswith(("/", "~"))


def _match_local(pattern: str, named: str, path: str) -> Listing:
    relative = _is_relative(pattern)

    def shown(name: str) -> str:
        return printable(os.path.relpath(name) if relative else name)

    fs = _Local()
    try:
        try:
            Path(path).lstat()
            names = [path]
        except (FileNotFoundError, NotADirectoryError):
            names = sorted(_glob(fs, path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in it, or `**` inside a name
        if isinstance(error, OSError) and error.errno in OF_THE_PROCESS:
            raise
        raise PipelineError(
            f"{named} cannot be listed: {_line(error)}; make it readable, or choose another path"
        ) from error
    if fs.refused:
        raise fs.refused
    for folder, reason in fs.unreadable:
        raise PipelineError(
            f"{named}: the folder {shown(folder)} cannot be read ({reason}); make it readable, or "
            "choose paths without it"
        )
    listing = Listing()
    for name in names:
        try:
            found = Path(name).stat()
        except OSError as error:
            reason = "a broken link" if Path(name).is_symlink() else _line(error)
            listing.skipped.append(f"{shown(name)} ({reason})")
            continue
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFREG:
            listing.files.append(File(shown(name), fs, name, found.st_size))
        elif kind != stat.S_IFDIR or not _is_walked(name, names):
            what = ("a link to " if kind == stat.S_IFDIR and Path(name).is_symlink() else "") + _KINDS[kind]
            listing.skipped.append(f"{shown(name)} ({what})")
    return listing


def _is_walked(folder: str, names: list[str]) -> bool:
    """Whether one of the sorted `names` lies in the folder too, or the folder holds nothing."""
    first = bisect(names, f"{folder}/")
    inside = first < len(names) and names[first].startswith(f"{folder}/")
    return not Path(folder).is_symlink() and (inside or not any(Path(folder).iterdir()))


_CHECK = "check the address and the network, then run again"


def _failure(what: str, error: BaseException, advice: str) -> PipelineError:
    """One line for an error of a file system: transient if its causes say that a retry may help.

    fsspec wraps the errors of a connection in FileNotFoundError.
    """
    causes = _causes(error)
    reason = next((cause for cause in causes if not isinstance(cause, FileNotFoundError)), causes[-1])
    if isinstance(reason, FileNotFoundError):
        named = f": {reason.filename}" if reason.filename else ""
        return PipelineError(f"{what}: there is no such file{named}")
    kind = TransientError if _may_pass(reason) else PipelineError
    return kind(f"{what}: {_line(reason)}; {advice}")


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    return causes


def _may_pass(reason: BaseException) -> bool:
    """Whether an error of a file system may be temporary: of a connection, or an answer of a busy server."""
    if (status := _status(reason)) is not None:
        return status in _HTTP_TRANSIENT or status >= 520
    if isinstance(reason, ssl.SSLError):
        return isinstance(reason, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    if isinstance(
        reason, PermissionError | IsADirectoryError | ValueError | TypeError | ImportError | NotImplementedError
    ):
        return False
    # botocore's names of what is missing on this machine, aiohttp's of answers that lead nowhere
    if any(word in type(reason).__name__ for word in ("Credentials", "Profile", "Redirect")):
        return False
    return any(isinstance(cause, OSError) or _is_network(cause) for cause in _causes(reason))


def _status(error: BaseException) -> int | None:
    """The status that a server answered with."""
    status = getattr(error, "status", None)
    return status if isinstance(status, int) and status >= 400 and not _is_no_http(error) else None


def _is_no_http(error: BaseException) -> bool:
    """Whether aiohttp could not read an answer as HTTP: it gives its own error the status 400."""
    return hasattr(error, "status") and any("http_exceptions" in type(cause).__module__ for cause in _causes(error))


def _is_network(error: BaseException) -> bool:
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"aiohttp", "httpx", "httpcore", "requests", "urllib3", "botocore", "fsspec", "asyncio"})


def _line(error: BaseException) -> str:
    """An error's text in one line of bounded length, the system's own words if it has them."""
    words = getattr(error, "strerror", None)
    name, message = type(error).__name__, str(getattr(error, "message", ""))
    if (status := _status(error)) is not None:
        words = f"{status} {message}".strip()
    elif _is_no_http(error):
        words = f"the answer is not HTTP ({message.split(':')[0]})"
    elif "TooManyRedirects" in name:
        words = "the server redirects without end"
    elif "Redirect" in name:
        words = f"the server redirects to {error}, which is not HTTP"
    elif "InvalidUrl" in name or "InvalidURL" in name:
        words = "it is not a valid address"
    elif isinstance(error, TypeError):
        words = f"fsspec cannot open it without options ({error})"
    text = " ".join(((isinstance(words, str) and words) or str(error).strip() or name).split())
    return text if len(text) <= _MAX_LINE_LENGTH else f"{text[:_MAX_LINE_LENGTH]}..."


_MAX_LINE_LENGTH = 300
