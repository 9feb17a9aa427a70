"""Which code runs, as git names it."""

import subprocess
from pathlib import Path


def code_revision() -> str:
    """The commit, with `-dirty` behind it where files differ from it; `unknown` outside a git repository."""
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "unknown"


def git(*arguments: str) -> str:
    """What git prints of the repository that this file is in; empty without git, without a repository and on errors."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
