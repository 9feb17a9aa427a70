"""Work over many items, one task each: in this process, or on Ray's hosts if `compute.engine` is ray.

A stage calls one function with every item and gets the results in the order of the items, wherever the tasks ran. A
function writes its files with `completed`, so that a task that was killed leaves nothing, one that ran twice leaves one
result, and another attempt of the stage finds what is done.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.errors import PipelineError
from model.settings import ComputeSettings
from model.system.cluster import connected

Apply = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Calls a function with every item and yields the results in the order of the items, as `map` does."""
RETRIES = 3
"""Of a task whose process or host died; an error that the task raised is not tried again."""
AT_ONCE = 4096
"""Tasks that wait, run, or have a result that is not taken yet."""


@contextmanager
def tasks(compute: ComputeSettings, *, gpus: float = 0.0) -> Iterator[Apply | None]:
    """One task for each item on Ray; None if `compute` starts no tasks, and the work is done in this process.

    gpus: that Ray reserves for each task, besides a core.
    A task is repeated if its process or its host dies. Its PipelineError is raised as soon as it is known; an error of
    its process names the item. Raises what `connected` raises.
    """
    if compute.engine != "ray":
        yield None
        return
    with connected(compute) as ray:
        options = {"max_retries": RETRIES, "num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}

        def apply(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
            task = ray.remote(**options)(function)
            running: dict[Any, int] = {}
            done: dict[int, Any] = {}
            started = 0
            try:
                for wanted in range(len(items)):
                    while wanted not in done:
                        while started < min(len(items), wanted + AT_ONCE):
                            running[task.remote(items[started])] = started
                            started += 1
                        (ready, *_), _ = ray.wait(list(running), num_returns=1)
                        number = running.pop(ready)
                        done[number] = _result(ray, ready, items[number])
                    yield done.pop(wanted)
            finally:
                for left in running:
                    ray.cancel(left, force=True)

        yield apply


def _result(ray: Any, ready: Any, item: Any) -> Any:
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:  # its process or its host died, again and again
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"the task of {item} died {RETRIES + 1} times: {reason}") from error


@contextmanager
def completed(folder: Path) -> Iterator[Path]:
    """A new folder that becomes `folder` at the end of the block, in one step, unless another task was first."""
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staged
        try:
            staged.rename(folder)
        except OSError:
            if not folder.is_dir():  # else a repetition of this task was first
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
