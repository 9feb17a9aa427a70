"""Finds and opens the files that `corpus.paths` names.

Nothing is skipped silently: a folder that cannot be read ends the listing, and matches of a glob that are not files are
named in `Listing.skipped`. Errors of a network or a disk raise TransientError, since a retry may help; all others raise
PipelineError.
"""

import os
import stat
import unicodedata
from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from model.errors import OF_THE_PROCESS, PipelineError, TransientError

_HTTP_TRANSIENT = {408, 425, 429}
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


def list_files(patterns: Iterable[str]) -> Listing:
    """The files that paths, globs and fsspec URLs name, each pattern's sorted by path.

    Raises PipelineError if a pattern matches no file or a folder under it cannot be read, TransientError if an
    address does not answer.
    """
    found: dict[tuple[Any, str], File] = {}
    skipped: dict[str, None] = {}
    for pattern in patterns:
        listing = _match(pattern)
        for file in listing.files:
            found.setdefault((file.fs.protocol, file.path), file)
        skipped.update(dict.fromkeys(listing.skipped))
        if not listing.files:
            relative = "://" not in pattern and not Path(pattern).expanduser().is_absolute()
            where = f" (working folder {Path.cwd()})" if relative else ""
            also = f"; skipped {', '.join(listing.skipped[:3])}" if listing.skipped else ""
            raise PipelineError(
                f"corpus.paths {pattern!r} matches no file{where}{also}; for all files of a folder write FOLDER/**/*"
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
        raise _failure(
            f"{source} cannot be read", error, "make it readable, or leave it out of corpus.paths"
        ) from error
    except OSError as error:
        if error.errno in OF_THE_PROCESS:
            raise
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


def _match(pattern: str) -> Listing:
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
    except (ImportError, ValueError) as error:
        raise PipelineError(f"corpus.paths {pattern!r} cannot be listed: {_line(error)}") from error
    if isinstance(fs, LocalFileSystem):
        return _match_local(pattern, path)
    try:
        info = fs.info(path)
    except Exception as error:
        if not set(path) & set("*["):
            raise _failure(
                f"corpus.paths {pattern!r} cannot be read", error, "check the address and the network, then run again"
            ) from error
        try:
            found = fs.glob(path, detail=True)
        except Exception as error:
            raise _failure(
                f"corpus.paths {pattern!r} cannot be listed", error, "check the address and the network, then run again"
            ) from error
    else:
        found = {path: info}
    named = [(fs.unstrip_protocol(name), name, info) for name, info in sorted(found.items())]
    return Listing([File(printable(s), fs, n, i.get("size") or 0) for s, n, i in named if i["type"] == "file"])


def _match_local(pattern: str, path: str) -> Listing:
    relative = "://" not in pattern and not Path(pattern).expanduser().is_absolute()

    def named(name: str) -> str:
        return printable(os.path.relpath(name) if relative else name)

    fs = _Local()
    try:
        Path(path).lstat()
        names = [path]
    except (FileNotFoundError, NotADirectoryError):
        names = sorted(fs.glob(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise PipelineError(
            f"corpus.paths {pattern!r} cannot be listed: {_line(error)}; make it readable, or choose another path"
        ) from error
    if fs.refused:
        raise fs.refused
    for folder, reason in fs.unreadable:
        raise PipelineError(
            f"corpus.paths {pattern!r}: the folder {named(folder)} cannot be read ({reason}); make it readable, or "
            "choose paths without it"
        )
    listing = Listing()
    for name in names:
        try:
            found = Path(name).stat()
        except OSError as error:
            reason = "a broken link" if Path(name).is_symlink() else _line(error)
            listing.skipped.append(f"{named(name)} ({reason})")
            continue
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFREG:
            listing.files.append(File(named(name), fs, name, found.st_size))
        elif kind != stat.S_IFDIR or not _is_walked(name, names):
            what = ("a link to " if kind == stat.S_IFDIR and Path(name).is_symlink() else "") + _KINDS[kind]
            listing.skipped.append(f"{named(name)} ({what})")
    return listing


def _is_walked(folder: str, names: list[str]) -> bool:
    """Whether one of the sorted `names` lies in the folder too, or the folder holds nothing."""
    first = bisect(names, f"{folder}/")
    inside = first < len(names) and names[first].startswith(f"{folder}/")
    return not Path(folder).is_symlink() and (inside or not any(Path(folder).iterdir()))


def _failure(what: str, error: BaseException, advice: str) -> PipelineError:
    """One line for an error of a file system: transient unless its causes say that a retry cannot help.

    fsspec wraps the errors of a connection in FileNotFoundError.
    """
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    reason = next((cause for cause in causes if not isinstance(cause, FileNotFoundError)), causes[-1])
    status = getattr(reason, "status", None)
    if isinstance(reason, FileNotFoundError):
        return PipelineError(f"{what}: there is no such file")
    answered = isinstance(status, int) and 400 <= status < 500 and status not in _HTTP_TRANSIENT
    permanent = isinstance(reason, PermissionError | IsADirectoryError | ValueError | ImportError | NotImplementedError)
    if answered or permanent:
        return PipelineError(f"{what}: {_line(reason)}; {advice}")
    return TransientError(f"{what}: {_line(reason)}; {advice}")


def _is_network(error: BaseException) -> bool:
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"aiohttp", "httpx", "httpcore", "requests", "urllib3", "botocore", "fsspec", "asyncio"})


def _line(error: BaseException) -> str:
    """The first line of an error's text, the system's own words if it has them."""
    words = getattr(error, "strerror", None)
    if isinstance(status := getattr(error, "status", None), int):
        words = f"{status} {getattr(error, 'message', '')}".strip()
    return ((isinstance(words, str) and words) or str(error).strip() or type(error).__name__).splitlines()[0]
