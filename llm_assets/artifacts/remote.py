"""Object store access: replacing a small file only if it is unchanged, old uploads, and errors in one line.

Credentials come from the environment as the store's own tools read them (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL and AWS_PROFILE for S3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from upath import UPath

from model.errors import PipelineError, TransientError

ABANDONED_AFTER = timedelta(days=1)
"""Age of the newest file of an upload without a manifest, from which it counts as abandoned."""
_EXTRAS = {
    "s3": "pip install '.[s3]'",
    "gs": "pip install gcsfs",
    "abfs": "pip install adlfs",
    "az": "pip install adlfs",
}
_NETWORK = {"botocore", "aiobotocore", "aiohttp", "asyncio", "gcsfs", "azure", "fsspec", "requests", "urllib3"}


def revision(path: UPath) -> str:
    """Identity of a file's content for `replace_if_unchanged`; empty if there is no file."""
    path.fs.invalidate_cache()
    try:
        return str(path.fs.info(path.path).get("ETag", "unknown"))
    except FileNotFoundError:
        return ""


def replace_if_unchanged(path: UPath, text: str, seen: str) -> bool:
    """Write a small file unless another process wrote it since `seen`, its `revision`; whether it was written.

    S3's conditional writes make this one step. Other stores write unconditionally.
    """
    if path.protocol not in ("s3", "s3a"):
        path.write_text(text)
        return True
    condition = {"IfMatch": seen} if seen else {"IfNoneMatch": "*"}
    try:
        path.fs.pipe_file(path.path, text.encode(), **condition)
    except OSError as error:
        if _code(error) == "ConditionalRequestConflict":  # another conditional write at the same time
            return False
        if not isinstance(error, FileExistsError | FileNotFoundError) and _code(error) != "PreconditionFailed":
            raise
        # A repeated request fails on what its first attempt has written.
        path.fs.invalidate_cache()
        try:  # in one request: an open file expires when another process replaces it
            return bool(path.fs.cat_file(path.path) == text.encode())
        except FileNotFoundError:
            return False
    return True


def _code(error: OSError) -> str:
    """S3's own code of an error that s3fs has translated."""
    answer = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def is_abandoned(folder: UPath, pointer: UPath) -> bool:
    """Whether a folder without a manifest is what a killed upload left.

    pointer: LATEST. Ages are counted back from its last replacement, since both dates are of the store's clock.
    """
    uploaded, replaced = _last_modified(folder), _last_modified(pointer)
    return uploaded is not None and replaced is not None and uploaded < replaced - ABANDONED_AFTER


def _last_modified(path: UPath) -> datetime | None:
    """The date of the newest file at or below a path; None if there is none, or the store tells none."""
    try:
        found = path.fs.find(path.path, detail=True)
    except FileNotFoundError:  # another process removed it
        return None
    modified = [info.get("LastModified") or info.get("created") for info in found.values() if info["type"] == "file"]
    return max((date.astimezone(UTC) for date in modified if isinstance(date, datetime)), default=None)


@contextmanager
def refusals(root: str) -> Iterator[None]:
    """Makes an error of an object store one line: PipelineError for a refusal, TransientError for a lost connection."""
    try:
        yield
    except (PipelineError, BrokenPipeError):
        raise
    except ImportError as error:
        scheme = root.partition(":")[0]
        raise PipelineError(f"{root} needs another package ({error}): {_EXTRAS.get(scheme, 'install it')}") from error
    except Exception as error:
        name, reason = type(error).__name__, (str(error).strip() or type(error).__name__).splitlines()[0]
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if "Credentials" in name or isinstance(error, PermissionError):
            raise PipelineError(
                f"{root} refuses access ({reason}): expected credentials with rights to read and write there in the "
                "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        if isinstance(error, FileNotFoundError) and "bucket" in reason.lower():
            raise PipelineError(
                f"{root} does not exist ({reason}): create the bucket, or correct the address"
            ) from error
        if isinstance(error, ConnectionError | TimeoutError) or modules & _NETWORK:
            raise TransientError(f"{root} does not answer ({reason}): run again when it does") from error
        raise
