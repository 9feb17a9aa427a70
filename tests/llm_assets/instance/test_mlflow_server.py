import subprocess
import sys

import pytest


@pytest.mark.processes
def test_the_process_of_mlflows_page_does_not_import_dagster() -> None:
    program = "import sys, llm_assets.instance.mlflow_server as server; print('dagster' in sys.modules, server.main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False <function main")
