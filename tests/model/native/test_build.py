"""The library is compiled once, by any compiler, and missed in one line where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.errors import PipelineError
from model.generation.steps.choose import choose_step
from model.native import library
from model.native.build import build, find_compiler
from model.native.library import available_instructions, choose_instructions
from tests.support.tiny import tiny_model, tiny_tokenizer

REPO = Path(__file__).resolve().parents[3]
needs_compiler = pytest.mark.skipif(
    find_compiler() is None, reason="no C++ compiler (Debian's g++): there is nothing to build with"
)


def run_build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model.native.build", "--output", str(tmp_path / "made.so")]
    return subprocess.run(
        command, cwd=REPO, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


@pytest.mark.processes
def test_without_a_compiler_one_line_says_what_is_missed_and_the_set_up_goes_on(tmp_path):
    done = run_build(tmp_path, CXX="no-such-compiler")
    (line,) = done.stderr.splitlines()
    assert line.startswith("note: no C++ compiler") and "install g++" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
@needs_compiler
def test_a_compiler_that_fails_is_one_line_and_leaves_what_was_there(tmp_path):
    (tmp_path / "made.so").write_text("the last good one")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'error: out of paper' >&2\nexit 1\n")
    broken.chmod(0o755)
    (line,) = run_build(tmp_path, CXX=str(broken)).stderr.splitlines()
    assert "out of paper" in line
    assert (tmp_path / "made.so").read_text() == "the last good one"


def test_without_the_library_models_run_by_the_reference(monkeypatch, tmp_path):
    model = tiny_model(tiny_tokenizer())
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "missing.so"))
    library.open_library.cache_clear()
    try:
        assert available_instructions() == []
        assert choose_step(model).name == "reference"
        with pytest.raises(PipelineError, match=r"run python -m model\.native\.build"):
            choose_step(model, "native")
    finally:
        monkeypatch.undo()
        library.open_library.cache_clear()


def test_models_run_natively_where_they_can(fastest):
    assert choose_step(tiny_model(tiny_tokenizer())).name == "native"
    assert choose_step(tiny_model(tiny_tokenizer()), "reference").name == "reference"
    assert choose_step(tiny_model(tiny_tokenizer()).to(torch.float64)).name == "reference"


def test_an_instruction_set_is_named_by_the_environment_and_refused_where_it_is_missing(monkeypatch, fastest):
    assert choose_instructions() == fastest
    monkeypatch.setenv(library.INSTRUCTIONS_VARIABLE, "portable")
    assert choose_instructions() == "portable"
    monkeypatch.setenv(library.INSTRUCTIONS_VARIABLE, "mmx")
    with pytest.raises(PipelineError, match=r"'mmx' is not available: expected one of portable"):
        choose_instructions()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_kernels_pass_the_sanitizers(tmp_path, sanitizer):
    source, run = Path(__file__).parent / "exercise.cpp", available_instructions()
    program = build(tmp_path / "exercise", sanitizers=sanitizer, program=source, instructions=run)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in run:
        assert f"{name}: the same bits" in done.stdout
