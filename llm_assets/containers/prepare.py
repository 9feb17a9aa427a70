"""Prepares the composed stack's database server before the other services start.

    python -m llm_assets.containers.prepare

Creates missing databases `dagster` and `mlflow` and migrates both to this version's tables, once and here, because two
concurrent migrations would conflict. Reads POSTGRES_HOST, POSTGRES_PORT, POSTGRES_USER, POSTGRES_PASSWORD,
LLM_API_KEYS, REX_BIND and REX_UI_BIND. Refuses to publish the stack to a network with the example's password, or the
generation service without a key.
"""

import ipaddress
import os
import re
import subprocess
import sys
from collections.abc import Mapping

from model.errors import PipelineError, ends_in_one_line

EXAMPLE_PASSWORD = "example-only-change-me"
DATABASES = ("dagster", "mlflow")


def check_settings(environment: Mapping[str, str]) -> None:
    """Raises PipelineError, one line without the password, for settings that the stack must not start with."""
    password = environment.get("POSTGRES_PASSWORD", "")
    if not re.fullmatch(r"[A-Za-z0-9._~-]+", password):
        raise PipelineError(
            "POSTGRES_PASSWORD is empty or has a character that a URL cannot contain: expected letters, digits and "
            "._~-; set it in .env"
        )
    for name in ("REX_BIND", "REX_UI_BIND"):
        address = environment.get(name) or "127.0.0.1"
        if password == EXAMPLE_PASSWORD and not _is_loopback(address):
            raise PipelineError(
                f"POSTGRES_PASSWORD is the example's and {name} is {address}, where others reach the stack: set a "
                f"password of your own in .env, or {name}=127.0.0.1"
            )
    address = environment.get("REX_BIND") or "127.0.0.1"
    if not _is_loopback(address) and not environment.get("LLM_API_KEYS"):
        raise PipelineError(
            f"REX_BIND is {address}, where others reach the generation service, and LLM_API_KEYS is empty: set a key "
            "in .env, or REX_BIND=127.0.0.1"
        )


def create_databases(environment: Mapping[str, str]) -> list[str]:
    """Create the missing databases and return their names. Raises PipelineError if the server refuses."""
    import psycopg2

    try:
        connection = psycopg2.connect(
            host=environment["POSTGRES_HOST"],
            port=environment.get("POSTGRES_PORT") or "5432",
            user=environment["POSTGRES_USER"],
            password=environment["POSTGRES_PASSWORD"],
            dbname="postgres",
        )
    except psycopg2.OperationalError as error:
        raise PipelineError(
            f"the database server refused the connection: {' '.join(str(error).split())}; a volume keeps the password "
            "that it was created with"
        ) from None
    connection.autocommit = True  # CREATE DATABASE cannot run in a transaction
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT datname FROM pg_database")
            present = {row[0] for row in cursor.fetchall()}
            missing = [name for name in DATABASES if name not in present]
            for name in missing:
                cursor.execute(f"CREATE DATABASE {name}")
    finally:
        connection.close()
    return missing


def mlflow_uri(environment: Mapping[str, str]) -> str:
    """The address of MLflow's database."""
    port = environment.get("POSTGRES_PORT") or "5432"
    user, password, host = (environment[f"POSTGRES_{name}"] for name in ("USER", "PASSWORD", "HOST"))
    return f"postgresql+psycopg2://{user}:{password}@{host}:{port}/mlflow"


@ends_in_one_line
def main() -> int:
    """Prepare both databases; prints one line and exits with 1 on an error."""
    check_settings(os.environ)
    created = create_databases(os.environ)
    print(f"databases: {', '.join(created) or 'none'} created", flush=True)
    migrations = {
        "dagster": [sys.executable, "-m", "dagster", "instance", "migrate"],
        "mlflow": [sys.executable, "-m", "mlflow", "db", "upgrade", mlflow_uri(os.environ)],
    }
    running = {
        name: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name, command in migrations.items()
    }
    for name, process in running.items():
        said, _ = process.communicate()
        if process.returncode:
            raise PipelineError(
                f"migrating the database {name} to this version failed: {' '.join(said[-500:].split())}"
            )
    print("both databases have this version's tables", flush=True)
    return 0


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


if __name__ == "__main__":
    sys.exit(main())
