"""Measurements of a registered version that later stages make: scores on tasks, and the parity of its export.

Each is a tag of the version, as JSON. `promotion.py` weighs them: an export that computes another model than the
checkpoint, or a task on which the version is worse than the champion by more than chance, is an objection.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

TASKS, PARITY = "evaluation_tasks", "exported_parity"
"""Tags of a version: its scores on tasks of lm-eval, and the result of its export's certificates."""
NOT_MEASURED = "not measured"
FALSE_OBJECTION = 0.05
"""Probability that a version as good as the champion is called worse on any of its scores, however many there are: a
bound of each score's own, such as one standard error, would reject most equal models that have a dozen scores.
"""
_SHOWN = 3
"""Differences of an export that are kept in words."""

Scores = list[dict[str, Any]]


def measurements(artifact: Path, num_fewshot: int) -> dict[str, str]:
    """The tags that the artifact of `exported_model` or `evaluation_report` gives to the version that it measures.

    num_fewshot: solved examples before each question of the tasks. Empty if no engine ran the export.
    """
    certificates, evaluation = artifact / "certificates.json", artifact / "evaluation.json"
    found: dict[str, Any] = {}
    if certificates.is_file() and (rows := json.loads(certificates.read_text())["certificates"]):
        differences = [f"{row['engine']}, {row['file']}: {line}" for row in rows for line in row["differences"]]
        found[PARITY] = {
            "certificates": len(rows),
            "differences": len(differences),
            "first_differences": [line[:200] for line in differences[:_SHOWN]],
            "log_probability_difference": max(row["log_probability_difference"] for row in rows),
        }
    if evaluation.is_file():
        found[TASKS] = {"num_fewshot": num_fewshot, **json.loads(evaluation.read_text())}
    return {name: json.dumps(value) for name, value in found.items()}


def later_evidence(version: Any, champion: Any) -> dict[str, Any]:
    """The entries `parity` and `tasks` of a decision: numbers, or in words why there are none.

    champion: the version to compare with, or None.
    """
    return {"parity": _read(version, PARITY) or NOT_MEASURED, "tasks": _compare(version, champion)}


def objection(evidence: Mapping[str, Any]) -> str | None:
    """Why these entries speak against a version, else None."""
    parity, tasks = evidence.get("parity"), evidence.get("tasks")
    if isinstance(parity, Mapping) and export_agrees(evidence) is False:
        places = f"{parity['differences']} places" if parity["differences"] > 1 else "one place"
        return f"its export differs from the checkpoint in {places}: {parity['first_differences'][0]}"
    worse = [score for score in tasks if score["is_worse"]] if isinstance(tasks, list) else []
    if worse:
        named = "; ".join(
            f"{score['task']} {score['metric']} {score['candidate']:.4f}, the champion's {score['champion']:.4f}, "
            f"{score['loss_in_stderr']:.1f} standard errors of the difference worse "
            f"(bound {score['bound_in_stderr']:.1f})"
            for score in worse
        )
        return f"it is worse on {len(worse)} of {len(tasks or [])} scores of the same tasks: {named}"
    return None


def export_agrees(evidence: Mapping[str, Any]) -> bool | None:
    """Whether the export computes the same model; None if that is not measured."""
    parity = evidence.get("parity")
    return not parity["differences"] if isinstance(parity, Mapping) else None


def in_words(evidence: Mapping[str, Any]) -> dict[str, str]:
    """Both entries in a few words each."""
    parity, tasks = evidence.get("parity", NOT_MEASURED), evidence.get("tasks", NOT_MEASURED)
    if isinstance(parity, Mapping):
        parity = f"differences: {parity['differences']}"
    if isinstance(tasks, list):
        tasks = f"{sum(score['is_worse'] for score in tasks)} of {len(tasks)} worse"
    return {"parity": parity, "tasks": tasks}


def _compare(version: Any, champion: Any) -> Scores | str:
    """Each score of both versions, or in words why they are not compared.

    Both are scored on the same documents. `stderr` is that of the difference of two independent scores, which is more
    than that of paired ones.
    """
    own, other = _read(version, TASKS), _read(champion, TASKS) if champion else None
    if own is None:
        return NOT_MEASURED
    if other is None:
        return "measured, but not the champion's" if champion else "measured, without a champion to compare with"
    ours, theirs = ({(row["task"], row["metric"]): row for row in found["scores"]} for found in (own, other))
    documents = [{key: row["documents"] for key, row in found.items()} for found in (ours, theirs)]
    differs = {
        "tasks": ours.keys() != theirs.keys(),
        "documents": documents[0] != documents[1],
        "solved examples": own["num_fewshot"] != other["num_fewshot"],
    }
    if other_name := next((name for name, is_different in differs.items() if is_different), ""):
        return f"measured, with other {other_name} than the champion's"
    bound = NormalDist().inv_cdf(1 - FALSE_OBJECTION / max(1, len(ours)))  # Bonferroni's, one-sided
    scores = []
    for (task, metric), row in ours.items():
        rival = theirs[task, metric]
        errors = [found["stderr"] for found in (row, rival)]
        stderr = None if None in errors else math.hypot(*errors)
        loss = rival["value"] - row["value"] if row["higher_is_better"] else row["value"] - rival["value"]
        loss_in_stderr = loss / stderr if stderr and row["higher_is_better"] is not None else None
        scores.append(
            {
                "task": task,
                "metric": metric,
                "documents": row["documents"],
                "candidate": row["value"],
                "champion": rival["value"],
                "stderr": stderr,
                "loss_in_stderr": loss_in_stderr,
                "bound_in_stderr": bound,
                "is_worse": loss_in_stderr is not None and loss_in_stderr > bound,
            }
        )
    return scores


def _read(version: Any, tag: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(version.tags[tag]) if tag in version.tags else None
    return found
