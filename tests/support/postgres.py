"""A real PostgreSQL server of its own for a test, on an address of this machine."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.workplace import free_port

USER, PASSWORD = "rex", "a-password-of-the-test"
ACCOUNT = "postgres"
"""Who runs the server where the tests are root's: PostgreSQL refuses to."""


@dataclass(frozen=True)
class Postgres:
    """A running server. env: as `deploy/dagster.yaml` reads it."""

    port: int
    address: str

    @property
    def env(self) -> dict[str, str]:
        return {
            "POSTGRES_HOST": self.address,
            "POSTGRES_PORT": str(self.port),
            "POSTGRES_USER": USER,
            "POSTGRES_PASSWORD": PASSWORD,
        }


def _programs() -> Path:
    """The folder of initdb and pg_ctl; the test is skipped where there is none."""
    on_path = [Path(found).parent for found in [shutil.which("initdb")] if found]
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    for folder in [*on_path, *reversed(installed)]:
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    pytest.skip("PostgreSQL is not installed: no initdb (Debian's package postgresql)")


@contextmanager
def postgres_server(address: str = "127.0.0.1") -> Iterator[Postgres]:
    """A fresh server that asks for a password."""
    programs, port = _programs(), free_port()
    account: dict[str, Any] = {"user": ACCOUNT, "group": ACCOUNT, "extra_groups": []} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="rex-postgres-"))
    if account:
        shutil.chown(folder, ACCOUNT, ACCOUNT)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    settings = f"-p {port} -c listen_addresses={address} -c unix_socket_directories= -c fsync=off"

    def run(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [programs / program, "-D", folder / "data", *arguments], cwd=folder, check=False, capture_output=True,
            text=True, timeout=300, **account,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        run(
            "initdb", "-U", USER, "--pwfile", str(folder / "password"), "-A", "scram-sha-256", "--no-sync", "-E", "UTF8"
        )
        with (folder / "data" / "pg_hba.conf").open("a") as clients:
            clients.write("host all all samenet scram-sha-256\n")
        run("pg_ctl", "-w", "-o", settings, "-l", str(folder / "log"), "start")
        try:
            yield Postgres(port, address)
        finally:
            run("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
