"""Compiles the native step with whatever C++ compiler the machine has: `python -m model.native.build`.

The result is one shared library beside this file, `librex_native.so`, for every processor of this machine's kind:
kernels are compiled once for each instruction set and chosen when a model is loaded. Without a compiler everything
works without it, and this program says in one line what is missed. It imports no torch.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.system.cpu import usable_cores

SOURCES = Path(__file__).parent
LIBRARY = SOURCES / "librex_native.so"
COMPILERS = ("c++", "g++", "clang++")
# -ffp-contract=off: multiply-adds are fused where the code says so and nowhere else, so that a number does not depend
# on which of two kernels has formed it.
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
WITHOUT = "the native step is not built, and models generate several times more slowly on a processor"


def find_compiler() -> str | None:
    """Path of a C++ compiler: `CXX` where that is set, else the first of the usual names; None where there is none."""
    named = os.environ.get("CXX")
    return next((path for name in ([named] if named else COMPILERS) if (path := shutil.which(name))), None)


def build(output: Path = LIBRARY, *, sanitizers: str = "", program: Path | None = None) -> Path:
    """Compile the library to `output`, which is replaced only once it is whole; nothing is done where it is up to date.

    sanitizers: what `-fsanitize=` takes, for tests. program: a source with a `main`, which makes a program of it.
    Raises RuntimeError, one line, without a compiler or where it fails.
    """
    compiler = find_compiler()
    if compiler is None and output.is_file() and not program:
        return output  # carried here, as a Bento carries it into an image
    if compiler is None:
        raise RuntimeError(f"no C++ compiler ({', '.join(COMPILERS)}, or CXX): {WITHOUT}; install g++")
    flags = [*FLAGS, *([f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"] if sanitizers else [])]
    stamp = output.with_suffix(".stamp")
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together compile once
        return _build(compiler, flags, output, stamp, program)


def _build(compiler: str, flags: list[str], output: Path, stamp: Path, program: Path | None) -> Path:
    digest = _digest([compiler, *flags, program.read_text() if program else ""])
    if output.is_file() and stamp.is_file() and stamp.read_text() == digest:
        return output
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as scratch:
        made = Path(scratch, output.name)
        _compile(compiler, flags, Path(scratch), made, program)
        made.replace(output)
    stamp.write_text(digest)
    return output


def _compile(compiler: str, flags: list[str], scratch: Path, made: Path, program: Path | None) -> None:
    kernels = {name: extra for name, extra in _kernels().items() if _accepts(compiler, extra)}
    known = [f"-DHAS_{name}" for name in kernels]
    jobs = [(source.stem, source, known) for source in sorted(SOURCES.glob("*.cpp")) if source.stem != "kernels"]
    for name, extra in {"portable": [], **kernels}.items():
        unsigned = "true" if name in ("avxvnni", "avx512", "amx") else "false"
        defined = [f"-DKERNELS={name}", f"-DUNSIGNED_WEIGHTS={unsigned}"]
        jobs.append((f"kernels_{name}", SOURCES / "kernels.cpp", [*extra, *defined]))
    if program:
        jobs.append((program.stem, program, [f"-I{SOURCES}"]))
    with ThreadPoolExecutor(usable_cores()) as pool:
        objects = pool.map(
            lambda job: _run([compiler, *flags, *job[2], "-c", str(job[1]), "-o", str(scratch / f"{job[0]}.o")]), jobs
        )
        list(objects)
    # The C++ runtime goes in: a Bento's image may have an older one.
    whole = ["-static-libstdc++", "-static-libgcc"] if sys.platform == "linux" and "-g" not in flags else []
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
    """Whether the compiler knows these instruction sets; old ones do not know the newest."""
    command = [compiler, *flags, "-x", "c++", "-E", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        reason = lines[0] if lines else f"exit status {done.returncode}"
        raise RuntimeError(f"{Path(command[0]).name} fails ({reason}): {WITHOUT}")


def _digest(parts: list[str]) -> str:
    content = hashlib.sha256("\n".join([*parts, platform.machine(), *_kernels()]).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"), Path(__file__)]):
        content.update(source.read_bytes())
    return content.hexdigest()


def main() -> int:
    """Build, or say in one line why not; the exit status is 0 either way, since everything works without."""
    parser = argparse.ArgumentParser(prog="python -m model.native.build", description=__doc__.split("\n")[0])  # type: ignore
    parser.add_argument("--output", type=Path, default=LIBRARY, help="the shared library (default: beside this file)")
    parser.add_argument("--sanitize", default="", help="what -fsanitize= takes, such as address,undefined; for tests")
    arguments = parser.parse_args()
    try:
        print(build(arguments.output, sanitizers=arguments.sanitize))
    except (RuntimeError, OSError) as error:
        print(f"note: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
