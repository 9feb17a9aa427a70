"""The reason that is read from the standard error of an engine that failed."""

import subprocess
import sys

import pytest

from model.system.failure import MAX_LENGTH, reason_of

WARNING = "sys:1: ResourceWarning: unclosed socket; the process failed to close it"
PLAIN = """\
WARNING 11-28 04:00:00 [config.py:12] error-prone setting
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    load()
safetensors.SafetensorError: header too small

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in <module>
    raise OSError("no weights") from error
OSError: no weights in model.safetensors
"""
VLLM = """\
(EngineCore pid=71) INFO 11-28 04:00:00 [core.py:9] Initializing
(EngineCore pid=71) ERROR 11-28 04:00:01 [core.py:842] EngineCore failed to start.
(EngineCore pid=71) ERROR 11-28 04:00:01 [core.py:842] Traceback (most recent call last):
(EngineCore pid=71) ERROR 11-28 04:00:01 [core.py:842]   File "core.py", line 833, in run
(EngineCore pid=71) ERROR 11-28 04:00:01 [core.py:842]     load()
(EngineCore pid=71) ERROR 11-28 04:00:01 [core.py:842] ValueError: Head size 8 is not supported
(EngineCore pid=71) Process EngineCore:
(EngineCore pid=71) Traceback (most recent call last):
WARNING 11-28 04:00:02 [api.py:3] from another process
(EngineCore pid=71)   File "process.py", line 314, in _bootstrap
(EngineCore pid=71) ValueError: Head size 8 is not supported
Traceback (most recent call last):
  File "engines.py", line 210, in <module>
    sys.exit(main())
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
PYDANTIC = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, no such architecture [type=value_error]
    For further information visit https://errors.pydantic.dev
[rank0]:[W1128] Warning: the process group was not destroyed
"""


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (PLAIN, "OSError: no weights in model.safetensors"),
        (PLAIN + WARNING, "OSError: no weights in model.safetensors"),
        (VLLM, "ValueError: Head size 8 is not supported"),
        (VLLM + WARNING, "ValueError: Head size 8 is not supported"),
        (
            PYDANTIC,
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, no such "
            + "architecture [type=value_error] For further information visit https://errors.pydantic.dev",
        ),
        ("Traceback (most recent call last):\n  File\nKeyboardInterrupt\n", "KeyboardInterrupt"),
        ("python: error: no such file\nnote: see the manual\n", "python: error: no such file"),
        ("one\ntwo\n", "two"),
        ("", "exit status 3"),
    ],
    ids=["plain", "warning", "vllm", "vllm-warning", "pydantic", "no-text", "no-traceback", "no-error", "silent"],
)
def test_the_exception_is_found_among_other_lines(stderr: str, reason: str) -> None:
    assert reason_of(stderr, 3) == reason


def test_a_killed_process_is_named_by_its_signal() -> None:
    assert reason_of("", -9) == "SIGKILL"
    assert reason_of("loading\nops.cpp:1: GGML_ASSERT(n > 0) failed\nframe 1\n", -6) == (
        "ops.cpp:1: GGML_ASSERT(n > 0) failed (SIGABRT)"
    )


def test_a_long_reason_is_cut() -> None:
    assert len(reason_of(f"Traceback (most recent call last):\nValueError: {'x' * 1000}", 1)) == MAX_LENGTH + 3


@pytest.mark.processes
def test_what_python_itself_prints_is_understood() -> None:
    code = "import warnings\ntry:\n 1/0\nexcept ZeroDivisionError as e:\n raise ValueError('wrong') from e"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert reason_of(done.stderr, done.returncode) == "ValueError: wrong"
