"""Decides which version of a registered model is champion, by evidence, and records the decision.

The alias `champion` moves automatically only to a version without objections (a check with a warning, a latency above
the bound) that no other version beats and that is better than the champion on the same text by more than chance
(`model/paired.py`); the champion is scored again for the comparison. The first candidate is promoted without one. An
alias that a person moved (it differs from the last recorded decision) moves only to a version that is better on the
champion's own text. Tags of the version hold the decision and its numbers; a tag of the model holds the history of
champions with the reasons. `python -m llm_assets.champion` shows both, promotes by hand and rolls back.

A version is decided on when it is registered, before its export and its tasks can exist (`measurements.py`). Once they
are measured, `decide_again` weighs them: a champion that they speak against is withdrawn, and the former one returns.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_assets.versions.measurements import later_evidence, objection
from llm_assets.versions.mlflow_model import FOLDER, add_mlflow_model
from model.progress import Log, silent

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from model.paired import PairedComparison

CHAMPION = "champion"
"""The alias in MLflow's registry."""
DECIDED, HISTORY = "champion_decided", "champion_history"
"""Tags of a registered model: the version of the last automatic promotion ("by hand" after a manual one), and the
history of champions with times and reasons, newest last.
"""
DECISION, EVIDENCE = "champion_decision", "champion_evidence"
"""Tags of a version: the decision in words, and its numbers as JSON."""
_HISTORY_ENTRIES = 16
_REASON_CHARACTERS = 160
BY_HAND = "`python -m llm_assets.champion promote` promotes it by hand"


@dataclass(frozen=True)
class Evidence:
    """Evidence for a candidate against the champion.

    measure_latency_ratio: the candidate's time per token as a multiple of the champion's; called if a bound is set.
    """

    comparison: "PairedComparison"
    measure_latency_ratio: Callable[[], float]


CompareWithChampion = Callable[[Path], Evidence]
"""Takes the champion's model directory and scores the candidate and the champion on the same text."""


@dataclass(frozen=True)
class Contest:
    """How a version is measured against the champion.

    compare: None if there is no text to score both on. most_latency_ratio: the largest time per token, as a multiple of
    the champion's; 0: no limit.
    """

    compare: CompareWithChampion | None = None
    most_latency_ratio: float = 0.0


NO_CONTEST = Contest()
"""A version that meets a champion is not compared, and so not promoted."""


def decide_champion(
    client: "MlflowClient",
    name: str,
    version: Any,
    versions: Sequence[Any],
    contest: Contest,
    *,
    objections: Sequence[str],
    log: Log,
) -> None:
    """Decide once whether `version` becomes champion, and record it.

    versions: all of the model. objections: reasons against the version that hold whatever its score.
    """
    model = client.get_registered_model(name)
    current = str(model.aliases[CHAMPION]) if CHAMPION in model.aliases else None
    if current == str(version.version):
        return
    champion = _numbered(versions, current)
    is_by_hand = model.tags.get(DECIDED) not in (None, current)
    record: dict[str, Any] = {**later_evidence(version, champion), "objections": list(objections)}
    against = _reason_against(version, versions, objections) or objection(record)
    if against is None and is_by_hand and (champion is None or _kind(champion) != _kind(version)):
        against = f"the champion ({current or 'none'}) was set by hand, and it was measured on another text"
    if against:
        promoted, reason = False, f"not promoted: {against}"
    elif champion is None:
        promoted, reason = True, f"promoted: the first candidate, {_bits(version):.4f} bits per byte"
    else:
        log(f"{name} version {version.version}: scoring it and the champion, version {current}, on the same text")
        try:
            if contest.compare is None:
                raise ValueError("no text to score both on")
            with tempfile.TemporaryDirectory(prefix="rex-champion-") as folder:
                evidence = contest.compare(download_model(client, champion, Path(folder)))
                scores = dataclasses.asdict(evidence.comparison)
                record |= {**scores, "champion": current, "champion_bits_per_byte": scores["champion"]}
                ratio = evidence.measure_latency_ratio() if contest.most_latency_ratio else 0.0
                record |= {"latency_ratio": ratio} if ratio else {}
            promoted, reason = _weigh(evidence.comparison, current, ratio, contest.most_latency_ratio)
        except Exception as error:  # noqa: BLE001 - a broken or foreign champion must not end the training
            promoted = False
            reason = f"not promoted: the champion, version {current}, cannot be scored ({error}); {BY_HAND}"
    client.set_model_version_tag(name, str(version.version), EVIDENCE, json.dumps(record))
    client.set_model_version_tag(name, str(version.version), DECISION, reason)
    if promoted:
        # The decision first: a process killed in between leaves an alias that the next run treats as set by hand.
        client.set_registered_model_tag(name, DECIDED, str(version.version))
        _set_champion(client, name, str(version.version), reason, former=current, log=log)
    log(f"{name} version {version.version}: {reason}")


def decide_again(
    client: "MlflowClient",
    name: str,
    version: Any,
    versions: Sequence[Any],
    contest: Contest,
    log: Log,
) -> None:
    """Weigh what was measured since the decision on `version`, record it, and change the decision if it must be.

    A champion by decision is withdrawn if the measurements speak against it. A version that they spoke against is
    decided on again once they no longer do.
    """
    number = str(version.version)
    if DECISION not in version.tags:
        return  # it is not a candidate
    model = client.get_registered_model(name)
    current = str(model.aliases[CHAMPION]) if CHAMPION in model.aliases else None
    before: dict[str, Any] = json.loads(version.tags.get(EVIDENCE, "{}"))
    rival = before.get("champion") or (current if current != number else None)
    record = {**before, **later_evidence(version, _numbered(versions, rival))}
    client.set_model_version_tag(name, number, EVIDENCE, json.dumps(record))
    against = objection(record)
    if current == number and against:
        if model.tags.get(DECIDED) == number:
            _withdraw(client, name, number, _numbered(versions, rival), against, log)
        else:
            against += "; it was set by hand and stays the champion"
        log(f"{name} version {number}: {against}")
    elif current != number and objection(before) and not against:
        decide_champion(client, name, version, versions, contest, objections=record.get("objections", []), log=log)


def _withdraw(client: "MlflowClient", name: str, number: str, former: Any, against: str, log: Log) -> None:
    """Give the alias of version `number` back to the champion before it, or remove it if there was none."""
    client.set_model_version_tag(name, number, DECISION, f"withdrawn: {against}")
    if former is None:
        client.delete_registered_model_alias(name, CHAMPION)
        client.delete_registered_model_tag(name, DECIDED)
        return
    client.set_registered_model_tag(name, DECIDED, str(former.version))
    reason = f"version {number} was withdrawn: {against}"
    _set_champion(client, name, str(former.version), reason, former=number, log=log)


def _numbered(versions: Sequence[Any], number: str | None) -> Any:
    return next((version for version in versions if str(version.version) == number), None)


def set_by_hand(client: "MlflowClient", name: str, version: str, reason: str, log: Log = silent) -> None:
    """Make a version champion by hand; afterwards the alias moves only to a better model.

    Raises MlflowException if there is no such version.
    """
    former = client.get_registered_model(name).aliases.get(CHAMPION)
    client.get_model_version(name, version)
    # Recorded even if the last decision chose this version, since a manual choice outranks decisions.
    client.set_registered_model_tag(name, DECIDED, "by hand")
    client.set_model_version_tag(name, version, DECISION, f"promoted by hand: {reason}")
    _set_champion(client, name, version, f"by hand: {reason}", former=str(former) if former else None, log=log)


def warned(checks: Sequence[str]) -> list[str]:
    """The objections to a model because of its checks that passed with a warning."""
    return [f"its check {name} has a warning" for name in checks]


def history(client: "MlflowClient", name: str) -> list[dict[str, str]]:
    """All champions of a model, newest last: `{"version", "at", "reason"}`."""
    found: list[dict[str, str]] = json.loads(client.get_registered_model(name).tags.get(HISTORY, "[]"))
    return found


def decision_of(version: Any) -> dict[str, Any]:
    """The recorded decision on a version: `decision` in words and, if there was a champion, the evidence."""
    recorded = {"decision": version.tags[DECISION]} if DECISION in version.tags else {}
    return {**recorded, **json.loads(version.tags.get(EVIDENCE, "{}"))}


def download_model(client: "MlflowClient", version: Any, folder: Path) -> Path:
    """Download the model directory of a version from the tracking store into `folder`."""
    return Path(client.download_artifacts(version.run_id, FOLDER, str(folder)))


def _reason_against(version: Any, versions: Sequence[Any], objections: Sequence[str]) -> str | None:
    """Why a version is rejected without a comparison with the champion, else None."""
    bits = _bits(version)
    if not math.isfinite(bits):
        return f"{bits} bits per byte"
    if objections:
        return "; ".join(objections)
    rivals = [
        other
        for other in versions
        if _kind(other) == _kind(version)
        and str(other.version) != str(version.version)
        and not objection(json.loads(other.tags.get(EVIDENCE, "{}")))  # a refused one cannot be chosen instead
    ]
    better = [other for other in rivals if not bits < _bits(other)]
    if better:
        best = min(better, key=_bits)
        return f"{bits:.4f} bits per byte, version {best.version} has {_bits(best):.4f} on the same text"
    return None


def _weigh(scores: "PairedComparison", current: str | None, ratio: float, most_ratio: float) -> tuple[bool, str]:
    said = f"{scores.candidate:.4f} bits per byte, the champion, version {current}, has {scores.champion:.4f}"
    said += " on the same text"
    if not scores.is_better:
        ends = f"{scores.low:+.4f} to {scores.high:+.4f}"
        said += f"; {scores.confidence:.0%} interval of the difference: {ends}, {scores.pieces} {scores.unit}"
        return False, f"not promoted: {said}"
    if ratio > most_ratio:
        took = f"{ratio:.2f} times the champion's time per token"
        return False, f"not promoted: {said}, but it takes {took} (at most {most_ratio:g})"
    return True, f"promoted: {said}"


def _set_champion(
    client: "MlflowClient", name: str, version: str, reason: str, *, former: str | None, log: Log
) -> None:
    entries = history(client, name)
    if former and (not entries or entries[-1]["version"] != former):  # set on MLflow's page, which takes no reason
        entries.append({"version": former, "at": "", "reason": "set in another way"})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entries.append({"version": version, "at": now, "reason": reason[:_REASON_CHARACTERS]})
    client.set_registered_model_alias(name, CHAMPION, version)
    client.set_registered_model_tag(name, HISTORY, json.dumps(entries[-_HISTORY_ENTRIES:]))
    add_mlflow_model(client, name, version, log)


def _kind(version: Any) -> tuple[str | None, str | None]:
    """Recorded scores are comparable if this is equal: the asset, and the text that they were measured on."""
    return version.tags.get("asset"), _evaluation_text(version.tags)


def _bits(version: Any) -> float:
    return float(version.tags["bits_per_byte"])


def _evaluation_text(tags: Mapping[str, str]) -> str | None:
    """The tag `evaluation_text` of a model version, or its name in older versions, `yardstick`."""
    return tags.get("evaluation_text", tags.get("yardstick"))
