"""The champion of an experiment's models: shows it with its decisions, promotes and rolls back by hand.

    python -m llm_assets.champion show smoke
    python -m llm_assets.champion promote smoke 3 --reason "the samples read better"
    python -m llm_assets.champion rollback smoke --reason "complaints about version 3"

A service that follows the champion (REX_CHAMPION) switches within its polling interval. A manual choice stays until a
version is significantly better on the champion's own text.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_assets.registry import model_name
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.versions.measurements import in_words
from llm_assets.versions.mlflow_model import add_mlflow_model
from llm_assets.versions.promotion import CHAMPION, DECISION, decision_of, history, set_by_hand
from llm_assets.versions.register import all_versions
from model.errors import PipelineError, ends_in_one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient


@ends_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; prints one line and exits with 1 if there is no such model or version."""
    parser = argparse.ArgumentParser(prog="python -m llm_assets.champion", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("show", "print the versions, the champion and former champions"),
        ("promote", "make a version champion"),
        ("rollback", "restore the previous champion, or the named version"),
    ):
        one = commands.add_parser(command, help=text, description=text)
        one.add_argument("experiment", help="as in configs/experiment/")
        if command != "show":
            one.add_argument("version", nargs=None if command == "promote" else "?", help="number of the version")
            one.add_argument("--reason", required=True, help="why, in a few words; it is recorded")
    given = parser.parse_args(argv)
    client, _ = MlflowTracking().client()
    name = model_name(given.experiment)
    versions = sorted(all_versions(client, name), key=lambda version: int(version.version))
    if not versions:
        raise PipelineError(f"no registered model {name}: expected an experiment that was trained; make pipeline first")
    current = client.get_registered_model(name).aliases.get(CHAMPION)
    if given.command != "show":
        if not given.reason.strip():
            raise PipelineError("--reason is empty: expected why, in a few words")
        version = given.version or _former(client, name, str(current) if current else None)
        if version not in {str(known.version) for known in versions}:
            numbers = ", ".join(str(known.version) for known in versions)
            raise PipelineError(f"{name} has no version {version}: expected one of {numbers}")
        if version == str(current):
            raise PipelineError(f"version {version} of {name} is already the champion: nothing was changed")
        set_by_hand(client, name, version, given.reason.strip(), log=print)
        print(f"{name}: version {version} is champion" + (f", was {current}" if current else ""))
        return 0
    if current:
        add_mlflow_model(client, name, str(current), print)
    _show(client, name, versions, str(current) if current else None)
    return 0


def _former(client: "MlflowClient", name: str, current: str | None) -> str:
    """The previous champion."""
    before = [entry["version"] for entry in history(client, name) if entry["version"] != current]
    if not before:
        raise PipelineError(f"{name} has had no champion before version {current}: name the version to roll back to")
    return before[-1]


def _show(client: "MlflowClient", name: str, versions: list[Any], current: str | None) -> None:
    print(f"{name}: {'no champion' if current is None else f'version {current} is champion'}\n")
    for version in versions:
        mark = "*" if str(version.version) == current else " "
        bits = float(version.tags.get("bits_per_byte", "nan"))
        print(f"{mark} {version.version:>3}  {version.tags.get('asset', ''):19} {bits:8.4f} bits per byte")
        if DECISION in version.tags:
            print(f"       {version.tags[DECISION]}")
            words = in_words(decision_of(version))
            print(f"       tasks: {words['tasks']}; parity of the export: {words['parity']}")
    entries = history(client, name)
    if entries:
        print("\nchampions, the newest last:")
    for entry in entries:
        print(f"  {entry['at'] or 'time unknown':25}  version {entry['version']}: {entry['reason']}")


if __name__ == "__main__":
    sys.exit(main())
