"""The one run of the whole `smoke` pipeline that the end-to-end tests share."""

import pytest

from tests.e2e.workplace import Workplace, new_workplace


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Workplace:
    """The whole `smoke` pipeline, once for all tests, through the command that the README gives."""
    workplace = new_workplace(tmp_path_factory.mktemp("smoke"))
    result = workplace.run(
        "dagster", "job", "execute", "-m", "llm_assets.definitions", "-j", "llm_pipeline",
        "--tags", '{"dagster/partition": "smoke"}',
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:]
    (workplace.root / "pipeline.log").write_text(result.stdout)
    return workplace
