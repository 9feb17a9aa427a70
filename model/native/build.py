"""Compiles the native step with the machine's C++ compiler: `python -m model.native.build`.

The result is one shared library next to this file, `librex_native.so`, for every CPU of this architecture: kernels are
compiled once per instruction set and chosen when a model is loaded. Without a compiler everything works without the
library, and this program prints one line with the consequence. It imports no torch.

    python -m model.native.build [--sanitize address,undefined] [--output PATH]
"""

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.progress import with_dots
from model.system.cpu import usable_cores

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "engine", FOLDER / "kernels")
LIBRARY = FOLDER / "librex_native.so"
COMPILERS = ("c++", "g++", "clang++")
# -ffp-contract=off: only explicit fused multiply-adds are fused, so that a result does not depend on which of two
# kernels computes it.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
X86_KERNELS = {
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "amx": [*AVX512, "-mamx-tile", "-mamx-int8"],
}
ARM_KERNELS = {"dotprod": ["-march=armv8.2-a+dotprod"]}
WITHOUT = "the native step is not built, and models generate several times more slowly on a CPU"


def find_compiler() -> str | None:
    """Path of a C++ compiler: `CXX` if set, else the first of COMPILERS that exists; None if there is none."""
    named = os.environ.get("CXX")
    return next((path for name in ([named] if named else COMPILERS) if (path := shutil.which(name))), None)


def build(
    output: Path = LIBRARY,
    *,
    sanitizers: str = "",
    program: Path | None = None,
    instructions: Collection[str] | None = None,
) -> Path:
    """Compile the library to `output`, atomically; does nothing if it is up to date.

    sanitizers: argument of `-fsanitize=`, for tests. program: a source with a `main`, to build a program instead.
    instructions: sets to compile kernels for besides the portable ones; None for all that the compiler supports.
    Raises RuntimeError, one line, without a compiler or if it fails.
    """
    compiler = find_compiler()
    if compiler is None and output.is_file() and not program:
        return output  # prebuilt, as a Bento brings it into an image
    if compiler is None:
        raise RuntimeError(f"no C++ compiler ({', '.join(COMPILERS)}, or CXX): {WITHOUT}; install g++")
    # Without optimization, code with checks of addresses compiles in a third of the time, but threads are slow; -g1 is
    # enough for the lines in reports.
    optimized = "-O1" if "thread" in sanitizers else "-O0"
    checked = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g1", optimized]
    flags = [*FLAGS, *(checked if sanitizers else [])]
    stamp = output.with_suffix(".stamp")
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # concurrent processes compile once
        kernels = {name: extra for name, extra in _kernels().items() if instructions is None or name in instructions}
        return _build(compiler, flags, kernels, output, stamp, program)


def _build(
    compiler: str, flags: list[str], kernels: dict[str, list[str]], output: Path, stamp: Path, program: Path | None
) -> Path:
    digest = _digest([compiler, *flags, *kernels, program.read_text() if program else ""])
    if output.is_file() and stamp.is_file() and stamp.read_text() == digest:
        return output
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as scratch:
        made = Path(scratch, output.name)
        _compile(compiler, flags, kernels, Path(scratch), made, program)
        made.replace(output)
    stamp.write_text(digest)
    return output


def _compile(
    compiler: str, flags: list[str], wanted: dict[str, list[str]], scratch: Path, made: Path, program: Path | None
) -> None:
    kernels = {name: extra for name, extra in wanted.items() if _accepts(compiler, extra)}
    known = [f"-DHAS_{name}" for name in kernels]
    jobs = [(source.stem, source, known) for source in _files("*.cpp") if source.stem != "kernels"]
    for name, extra in {"portable": [], **kernels}.items():
        unsigned = "true" if name in ("avxvnni", "avx512", "amx") else "false"
        defined = [f"-DKERNELS={name}", f"-DUNSIGNED_WEIGHTS={unsigned}"]
        jobs.append((f"kernels_{name}", FOLDER / "kernels" / "kernels.cpp", [*extra, *defined]))
    if program:
        jobs.append((program.stem, program, []))
    call = [compiler, *flags, *(f"-I{folder}" for folder in SOURCES)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        compiled = pool.map(
            lambda job: _run([*call, *job[2], "-c", str(job[1]), "-o", str(scratch / f"{job[0]}.o")]), jobs
        )
        list(compiled)  # raises the first error
    # Link the C++ runtime statically: a Bento's image may have an older one.
    whole = ["-static-libstdc++", "-static-libgcc"] if sys.platform == "linux" and "-g1" not in flags else []
    _run(
        [
            compiler,
            *flags,
            *whole,
            *([] if program else ["-shared"]),
            "-o",
            str(made),
            *(str(scratch / f"{name}.o") for name, _, _ in jobs),
        ]
    )


def _kernels() -> dict[str, list[str]]:
    machine = platform.machine().lower()
    return X86_KERNELS if machine in ("x86_64", "amd64") else ARM_KERNELS if machine in ("aarch64", "arm64") else {}


def _accepts(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler supports these flags; old compilers lack the newest instruction sets."""
    command = [compiler, *flags, "-x", "c++", "-E", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        reason = lines[0] if lines else f"exit status {done.returncode}"
        raise RuntimeError(f"{Path(command[0]).name} fails ({reason}): {WITHOUT}")


def _files(pattern: str) -> list[Path]:
    return sorted(path for folder in SOURCES for path in folder.glob(pattern))


def _digest(parts: list[str]) -> str:
    content = hashlib.sha256("\n".join([*parts, platform.machine()]).encode())
    for source in [*_files("*.cpp"), *_files("*.h"), Path(__file__)]:
        content.update(source.read_bytes())
    return content.hexdigest()


def main() -> int:
    """Build, or print one line with the reason; exits with 0 either way, as the library is optional."""
    parser = argparse.ArgumentParser(prog="python -m model.native.build", description=__doc__.split("\n")[0])  # type: ignore
    parser.add_argument("--output", type=Path, default=LIBRARY, help="the shared library (default: next to this file)")
    parser.add_argument("--sanitize", default="", help="argument of -fsanitize=, such as address,undefined; for tests")
    arguments = parser.parse_args()
    try:
        print(with_dots(lambda: build(arguments.output, sanitizers=arguments.sanitize), "compiling the native step"))
    except (RuntimeError, OSError) as error:
        print(f"note: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
