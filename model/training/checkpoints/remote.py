"""Copies of a training's complete checkpoints in a folder or an object store, so that another machine can resume it.

The process that launches a training copies them in a thread, whatever its processes do, and saving never waits for it.
A copy counts once its `committed` file is there: it is written last and holds the digests of the others, which are
compared when the copy is fetched. Any URL that fsspec opens will do; credentials come from the environment.
"""

import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from model.artifact import file_digests
from model.errors import PipelineError
from model.progress import Log
from model.training.checkpoints import local as checkpoints
from model.training.checkpoints.local import COMMITTED, RECORD

LOOK_EVERY_S = 2.0
"""How often new checkpoints are looked for."""
logger = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)")


class RemoteCheckpoints:
    """The copies of one training at `url`."""

    def __init__(self, url: str, scratch_dir: Path, log: Log) -> None:
        """Raises PipelineError if the package that opens the URL is not installed."""
        self._url, self._scratch_dir, self._log = url.rstrip("/"), scratch_dir, log
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise PipelineError(
                f"checkpoints cannot be copied to {url}: {error}; install the package (pip install '.[s3]' for s3://), "
                "or correct LLM_ASSETS_CHECKPOINTS"
            ) from error

    def fetch(self) -> None:
        """Fetch the copies if they are ahead of the checkpoints in the scratch folder; a damaged copy is left out.

        Raises PipelineError if the store does not answer: the training would start over.
        """
        try:
            self._fetch()
        except PipelineError:
            raise
        except Exception as error:
            raise PipelineError(
                f"the checkpoints in {self._url} cannot be read ({_line(error)}): run again when the store answers, or "
                "empty LLM_ASSETS_CHECKPOINTS to train without copies"
            ) from error

    def _fetch(self) -> None:
        copies, here = self._copies(), checkpoints.steps_saved(self._scratch_dir)
        if not copies or (here and here[-1] >= max(copies)):
            return
        record, own = self._fs.cat_file(f"{self._root}/{RECORD}"), self._scratch_dir / RECORD
        if own.is_file() and own.read_bytes() != record:
            self._log(f"the checkpoints in {self._url} are of another training and are not used")
            return
        self._scratch_dir.mkdir(parents=True, exist_ok=True)
        own.write_bytes(record)
        for step in sorted(copies.keys() - set(here)):
            incoming = checkpoints.staging(self._scratch_dir) / f"checkpoint-{step}"
            shutil.rmtree(incoming, ignore_errors=True)
            for name in copies[step]:
                (incoming / name).parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # the comparison names it
                    self._fs.get_file(f"{self._root}/checkpoint-{step}/{name}", str(incoming / name))
            if _digests(incoming) != copies[step]:
                self._log(f"the copy of step {step:,} in {self._url} is damaged and is not used")
                continue
            checkpoints.commit(self._scratch_dir, step)
            self._log(f"fetched the checkpoint of step {step:,} from {self._url}")

    def push(self) -> None:
        """Copy the checkpoints that have no copy, oldest first, then remove the copies of those that are gone."""
        copies, here = self._copies(), checkpoints.steps_saved(self._scratch_dir)
        for step in here:
            folder = checkpoints.checkpoint_dir(self._scratch_dir, step)
            if step in copies:
                continue
            try:
                digests = _digests(folder)
                if not self._fs.exists(f"{self._root}/{RECORD}"):
                    self._put(self._scratch_dir / RECORD, RECORD)
                for name in digests:
                    self._put(folder / name, f"checkpoint-{step}/{name}")
                self._fs.pipe_file(f"{self._root}/checkpoint-{step}/{COMMITTED}", json.dumps(digests).encode())
            except FileNotFoundError:
                if folder.is_dir():  # a missing bucket, not a checkpoint that the training has removed meanwhile
                    raise
        for step in self._folders() - set(checkpoints.steps_saved(self._scratch_dir)):
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/checkpoint-{step}/{COMMITTED}")
            with suppress(FileNotFoundError):
                self._fs.rm(f"{self._root}/checkpoint-{step}", recursive=True)

    def remove(self) -> None:
        """Remove all copies, once the result of the training is published. Logs a warning if that fails."""
        try:
            self._fs.rm(self._root, recursive=True)
        except FileNotFoundError:
            pass
        except Exception as error:  # noqa: BLE001 - whatever the store's package raises
            logger.warning("the copies of checkpoints in %s are not removed: %s", self._url, _line(error))

    def _put(self, path: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        if "file" in self._fs.protocol:
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(path), target)

    def _folders(self) -> set[int]:
        """Steps that have a folder, complete or not."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return set()
        names = (_NAME.fullmatch(str(path).rstrip("/").rpartition("/")[2]) for path in found)
        return {int(name[1]) for name in names if name}

    def _copies(self) -> dict[int, dict[str, Any]]:
        """Digests by name of the complete copies, by step."""
        copies = {}
        for step in self._folders():
            with suppress(FileNotFoundError):
                copies[step] = json.loads(self._fs.cat_file(f"{self._root}/checkpoint-{step}/{COMMITTED}"))
        return copies


@contextmanager
def copied(remote: RemoteCheckpoints | None, scratch_dir: Path, log: Log) -> Iterator[None]:
    """Fetch the copies before the block, and copy new checkpoints inside it and at its end.

    A training goes on if the store does not answer: the log says so, and the copy is tried again.
    """
    if remote is None:
        yield
        return
    remote.fetch()
    ended = threading.Event()
    failures: list[str] = []

    def push() -> bool:
        try:
            remote.push()
        except Exception as error:  # noqa: BLE001 - whatever the store's package raises
            failures.append(_line(error))
            if len(failures) == 1:  # `log` belongs to the thread that trains
                logger.warning("checkpoints are not copied, which is tried again: %s", failures[0])
            return False
        failures.clear()
        return True

    def watch() -> None:
        seen: list[int] = []
        while not ended.wait(LOOK_EVERY_S):
            steps = checkpoints.steps_saved(scratch_dir)
            if steps != seen and push():
                seen = steps

    thread = threading.Thread(target=watch, name="checkpoint copies", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if not push():
            log(f"the last checkpoints were not copied: {failures[-1]}")


def _digests(directory: Path) -> dict[str, Any]:
    """Size and SHA-256 of each file of a checkpoint but the marker, as plain data."""
    return {name: digest for name, digest in file_digests(directory).items() if name != COMMITTED}


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
