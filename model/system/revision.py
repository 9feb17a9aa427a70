"""The revision of the running code, from git."""

import subprocess
from pathlib import Path


def code_revision() -> str:
    """The commit, with the suffix `-dirty` if files differ from it; `unknown` outside a git repository."""
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "unknown"


def git(*arguments: str) -> str:
    """Output of a git command on the repository of this file; empty without git, without a repository and on errors."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
