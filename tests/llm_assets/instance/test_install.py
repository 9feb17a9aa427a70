"""The installation: from a new environment, with packages whose hashes are verified."""

import hashlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llm_assets.containers.packages import pinned
from llm_assets.instance.install import CONSTRAINTS, install_command, lock_command, main
from llm_assets.paths import REPOSITORY
from model.errors import PipelineError


@pytest.mark.processes
def test_it_needs_nothing_but_the_standard_library() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import llm_assets.instance.install; print('imported')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(REPOSITORY)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "imported\n", done.stderr


def test_every_package_but_torch_is_locked_with_hashes() -> None:
    lock = CONSTRAINTS.read_text()
    names = {canonicalize_name(line.partition("==")[0]) for line in pinned(lock)}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    listed = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {canonicalize_name(Requirement(one).name) for several in listed for one in several}
    assert wanted - names == {"torch", "rex-pipeline"}
    entries = [entry for entry in lock.replace("\\\n", "").splitlines() if "==" in entry.split("#")[0]]
    assert len(entries) == len(pinned(lock)) > 300
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    assert "://" not in lock  # no package index


def test_pip_installs_nothing_without_a_hash_but_torch() -> None:
    lines = [line for line in (REPOSITORY / "Makefile").read_text().splitlines() if "/pip install" in line]
    assert lines
    assert all(
        "--no-deps" in line and ("--require-hashes" in line or line.endswith(" torch==2.13.0")) for line in lines
    )


@pytest.mark.processes
@pytest.mark.parametrize("is_right", [True, False], ids=["right", "wrong"])
def test_a_file_with_another_hash_is_refused(tmp_path: Path, is_right: bool) -> None:
    """As `install_command` passes them: the hashes stand in the constraints."""
    wheel, info = tmp_path / "tiny_thing-1.0-py3-none-any.whl", "tiny_thing-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_thing.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes() if is_right else b"another").hexdigest()
    (tmp_path / "constraints.txt").write_text(f"tiny-thing==1.0 --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--no-index", "--find-links"]
    command += [str(tmp_path), "--cache-dir", str(tmp_path / "cache"), "--target", str(tmp_path / "installed")]
    command += ["--constraint", str(tmp_path / "constraints.txt"), "tiny-thing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == is_right, done.stderr
    assert (tmp_path / "installed" / "tiny_thing.py").exists() == is_right
    assert is_right or "Hash mismatch" in done.stderr


def test_an_unknown_extra_or_package_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PipelineError, match=r"no extra 'clutser': expected one of cluster, dev, "):
        install_command(["clutser"])
    assert "--upgrade-package=transformers" in lock_command(["transformers"])
    with pytest.raises(PipelineError, match=r"no package 'transfomers' in constraints\.txt"):
        lock_command(["transfomers"])
    assert main([]) == 1
    assert capsys.readouterr().err == "error: nothing to install: name an extra of pyproject.toml, such as dev\n"
