"""Scores a model on tasks of lm-eval, by name: its own, or those of YAML files in a folder.

lm-eval (the extra `harness`) computes requests, metrics and standard errors; this loads the model as it is stored, in
full precision or quantized, and writes what was found. Its tasks read data through `datasets`.
"""

import difflib
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model.artifact import write_json
from model.errors import PipelineError
from model.progress import Log, silent, with_lines
from model.settings import EvaluationSettings
from model.system.tasks import Apply
from model.text.tokenizer import load_tokenizer
from model.weights.loading import load_model

RESULTS, REPORT = "evaluation.json", "evaluation.md"


@dataclass(frozen=True)
class Score:
    """One metric of one task. stderr: of the mean over documents; None if lm-eval gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    higher_is_better: bool | None


def harness_release() -> str:
    """The installed release of lm-eval; empty without it."""
    return version("lm-eval") if find_spec("lm_eval") else ""


@dataclass(frozen=True)
class ScoreTask:
    """One name of `evaluation.tasks`, for the model in `model_dir`."""

    name: str
    settings: EvaluationSettings
    model_dir: Path

    def __str__(self) -> str:
        return self.name


def score_tasks(
    settings: EvaluationSettings, model_dir: Path, output_dir: Path, *, log: Log = silent, apply: Apply = map
) -> list[Score]:
    """Score the model in `model_dir`, and write `evaluation.json` and `evaluation.md` to `output_dir`.

    apply: scores each of `evaluation.tasks` by itself, so that a score does not depend on the others or on where it is
    computed.
    Raises PipelineError without lm-eval or tasks, for unknown tasks, and for tasks whose data or definition fail.
    """
    if not settings.tasks:
        raise PipelineError("evaluation.tasks is empty: expected names of lm-eval's tasks, as [hellaswag,piqa]")
    if not harness_release():
        raise PipelineError("evaluation.tasks needs lm-eval, which is not installed: run `make harness`")
    include = Path(settings.include_path)
    if settings.include_path and not include.is_dir():
        raise PipelineError(f"evaluation.include_path is {settings.include_path!r}: expected a folder with YAML files")
    check_names(settings.tasks, _manager(settings.include_path, frozenset(settings.tasks)).all_tasks)
    log(f"evaluation: {', '.join(settings.tasks)} with lm-eval {harness_release()}")
    items = [ScoreTask(name, settings, model_dir.absolute()) for name in dict.fromkeys(settings.tasks)]

    def run() -> list[Score]:
        """A task that two names select is scored with both, and named once."""
        scores: dict[tuple[str, str], Score] = {}
        for found in apply(score_task, items):
            for score in found:
                scores.setdefault((score.task, score.metric), score)
        return list(scores.values())

    try:
        scores = with_lines(run, log, "evaluation")
    finally:
        _judge.cache_clear()
        _manager.cache_clear()
    write_json(output_dir / RESULTS, {"lm-eval": harness_release(), "scores": [vars(score) for score in scores]})
    (output_dir / REPORT).write_text(as_markdown(scores), encoding="utf-8")
    return scores


def score_task(task: ScoreTask) -> list[Score]:
    """The scores of one task of lm-eval, or of the tasks of one group."""
    import lm_eval

    settings = task.settings
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    judge = _judge(task.model_dir, settings.batch_size)
    manager = _manager(settings.include_path, frozenset(settings.tasks))
    try:
        return read_scores(
            lm_eval.simple_evaluate(
                model=judge,
                tasks=[task.name],
                num_fewshot=None if settings.num_fewshot < 0 else settings.num_fewshot,
                limit=settings.limit or None,
                task_manager=manager,
                bootstrap_iters=1000,
                log_samples=False,
            )
        )
    except Exception as error:
        # A task is foreign code and data: anything may fail in it.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PipelineError(
            f"evaluation.tasks {task.name} failed in lm-eval: {type(error).__name__}: {reason}; "
            "expected tasks whose data can be read: name others, or files of your own with evaluation.include_path"
        ) from error


@functools.lru_cache(maxsize=1)
def _manager(include_path: str, tasks: frozenset[str]) -> Any:
    """Where lm-eval finds the tasks: its own are thousands of files to read, and are left out if none is named."""
    from lm_eval.tasks import TaskManager

    folder = str(Path(include_path).absolute()) if include_path else None
    manager = TaskManager(include_path=folder, include_defaults=False)
    return manager if tasks <= set(manager.all_tasks) else TaskManager(include_path=folder)


@functools.lru_cache(maxsize=1)
def _judge(model_dir: Path, batch_size: int) -> Any:
    """The model as lm-eval takes it, loaded once in a process that scores several tasks."""
    from lm_eval.models.huggingface import HFLM

    model = load_model(model_dir)
    if hasattr(model.config, "quantization_config"):
        # lm-eval would ask transformers for this project's own method; the model is loaded, and needs it no more.
        del model.config.quantization_config
    tokenizer = load_tokenizer(model_dir)
    length = model.config.max_position_embeddings
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=length)


def check_names(tasks: list[str], known: list[str]) -> None:
    """Raises PipelineError for a name that is neither known nor a pattern."""
    for task in tasks:
        if task not in known and "*" not in task:
            close = difflib.get_close_matches(task, known, n=3)
            hint = f"did you mean {', '.join(close)}? Else" if close else "else"
            raise PipelineError(
                f"evaluation.tasks names {task!r}: expected a task of lm-eval; {hint} set evaluation.include_path "
                "to the folder of its YAML file"
            )


def read_scores(found: Mapping[str, Any]) -> list[Score]:
    """The scores of lm-eval's results, in its order of tasks."""
    scores = []
    for task, values in found["results"].items():
        higher = found.get("higher_is_better", {}).get(task, {})
        documents = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            scores.append(
                Score(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    documents=int(documents),
                    higher_is_better=higher.get(metric),
                )
            )
    return scores


def as_markdown(scores: list[Score]) -> str:
    """A table of scores, with standard errors."""
    rows = "".join(
        f"| {score.task} | {score.metric} | {score.value:.4f}{f' ± {score.stderr:.4f}' if score.stderr else ''} "
        f"| {score.documents:,} |\n"
        for score in scores
    )
    return f"# Evaluation\n\n| task | metric | value, standard error | documents |\n|---|---|---|---|\n{rows}"
