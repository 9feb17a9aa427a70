"""The container engine through its command line: Docker, with or without BuildKit, or a compatible engine.

Each command runs in a separate process, which ends with the step. `llm_assets/containers/context.py` prepares
the build context; the instructions are `bento/Dockerfile`.
"""

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from bench.containers.container import HARDENED
from model.errors import PipelineError
from model.progress import Log, silent
from model.system.commands import run

# Reads torch's version file, because importing torch takes seconds.
_PROBE = """
import importlib.util, json, os, runpy
torch = importlib.util.find_spec("torch").submodule_search_locations[0]
version = runpy.run_path(os.path.join(torch, "version.py"))
packages = os.listdir(os.path.dirname(torch))
print(json.dumps({
    "torch": version["__version__"],
    "cuda": version["cuda"] or "",
    "cuda_packages": sum(name.startswith("nvidia_cu") and name.endswith(".dist-info") for name in packages),
    "uid": os.getuid(),
}))
"""

# Debian states licenses in copyright files, mostly in the machine-readable format DEP 5; of others the file is named.
_BASE_PROBE = """
import json, pathlib, platform, re, shutil, subprocess
fields = "${Package}\\t${Version}\\t${Architecture}\\n"
command = ["dpkg-query", "-W", "-f", fields]
listed = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which(command[0]) else ""
debian = []
for name, version, architecture in (line.split("\\t") for line in listed.splitlines()):
    file = pathlib.Path("/usr/share/doc", name, "copyright")
    text = file.read_text(errors="replace") if file.is_file() else ""
    licenses = re.findall(r"^License: *(\\S[^\\n]*)", text, re.MULTILINE) if text.startswith("Format:") else []
    found = licenses or re.findall(r"/usr/share/common-licenses/([\\w.-]*\\w)", text)
    found = found or [f"as in {file}" if text else "not stated"]
    debian.append({"name": name, "version": version, "architecture": architecture, "licenses": sorted(set(found))})
print(json.dumps({"python": platform.python_version(), "debian": debian}))
"""


class ContainerEngine(dg.ConfigurableResource):
    """Builds and inspects images."""

    command: str = Field(default="docker", description="Docker's command line, or one that takes the same arguments.")
    base_image: str = Field(
        default="",
        description="Base image: a slim Debian with the Bento's Python. Empty: LLM_ASSETS_BASE_IMAGE, else the one "
        "that the Bento names.",
    )

    def require(self) -> None:
        """Raise PipelineError, one line, if no container engine answers."""
        if shutil.which(self.command) is None:
            raise PipelineError(
                f"no command {self.command!r}: an image needs a container engine; install Docker (Debian: apt install "
                "docker.io) and run again"
            )
        try:
            run([self.command, "version", "--format", "{{.Server.Version}}"], "querying its version")
        except PipelineError as error:
            raise PipelineError(
                f"{self.command!r} is installed, but its engine does not answer; start it (systemctl start docker, or "
                f"dockerd as root) or let this user reach it (group docker), and run again: {error}"
            ) from None

    def base(self, named: str, packages: Sequence[str] = (), log: Log = silent) -> tuple[str, str]:
        """Name and id of the base image: the field's, the variable's or `named`; pulled if it is not present.

        packages: Debian packages that it must have; without them, an image of it that has them is built, which needs
        the network.
        """
        name = self.base_image or os.environ.get("LLM_ASSETS_BASE_IMAGE") or named
        found = self.find_image(name)
        if found is None:
            log(f"pulling {name}")
            try:
                run([self.command, "pull", "--quiet", name], f"pulling {name}", log=log, name=self.command)
            except PipelineError as error:
                raise PipelineError(
                    f"image {name} is not on this machine and cannot be pulled: {error}; set another base image in "
                    "LLM_ASSETS_BASE_IMAGE"
                ) from None
            found = self.find_image(name)
        assert found is not None
        missing = set(packages) - {one["name"] for one in self.base_packages(name)["debian"]} if packages else set()
        return self._extended(name, found["id"], sorted(missing), log) if missing else (name, found["id"])

    def _extended(self, base: str, base_id: str, packages: Sequence[str], log: Log) -> tuple[str, str]:
        """Name and id of an image of `base` with Debian packages besides, built unless there is one."""
        digest = hashlib.sha256(" ".join([base_id, *packages]).encode()).hexdigest()[:12]
        name = f"rex-base:{digest}"
        found = self.find_image(name)
        if found is None:
            named = " ".join(packages)
            log(f"adding {named} to {base}")
            install = f"apt-get update -q && apt-get install -q --yes --no-install-recommends {named}"
            instructions = f"FROM {base}\nRUN {install} && rm -rf /var/lib/apt/lists/*\n"
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "Dockerfile").write_text(instructions)
                try:
                    run([self.command, "build", "--tag", name, folder], f"adding {named} to {base}", log=log)
                except PipelineError as error:
                    raise PipelineError(
                        f"{error}; name a base image that has {named} in LLM_ASSETS_BASE_IMAGE"
                    ) from None
            found = self.find_image(name)
        assert found is not None
        return name, found["id"]

    def find_image(self, tag: str) -> dict[str, Any] | None:
        """`{"id", "bytes", "layers", "labels"}` of a local image, or None."""
        try:
            printed = run([self.command, "image", "inspect", tag], f"looking for image {tag}")
        except PipelineError:
            return None
        (image,) = json.loads(printed)
        return {
            "id": image["Id"],
            "bytes": image["Size"],
            "layers": len(image["RootFS"]["Layers"]),
            "labels": image["Config"]["Labels"] or {},
        }

    def build(self, tag: str, context: Path, base: str, labels: Mapping[str, str], log: Log = silent) -> dict[str, Any]:
        """Build `tag` from a folder that holds a Bento and its packages; returns its `find_image` entry."""
        command = [self.command, "build", "--tag", tag, "--build-arg", f"BASE_IMAGE={base}"]
        command += ["--network", "none", "--file", str(context / "bento" / "src" / "bento" / "Dockerfile")]
        for name, value in labels.items():
            command += ["--label", f"{name}={value}"]
        environment = {**os.environ, "BUILDKIT_PROGRESS": "plain"}
        what = f"building image {tag}"
        run([*command, str(context)], what, environment=environment, log=log, name=self.command, logs_output=True)
        found = self.find_image(tag)
        assert found is not None
        return found

    def probe(self, tag: str, python: Sequence[str] = ("python3",)) -> dict[str, Any]:
        """`{"torch", "cuda", "cuda_packages", "uid"}` as seen inside the image; cuda is "" in a CPU build.

        python: the command of the interpreter that has torch.
        """
        found: dict[str, Any] = json.loads(self._run_in(tag, *python, "-c", _PROBE))
        return found

    def _run_in(self, tag: str, program: str, *arguments: str) -> str:
        """Standard output of a program in a hardened container of an image, without a network."""
        command = [
            self.command,
            "run",
            "--rm",
            "--network",
            "none",
            *HARDENED,
            "--entrypoint",
            program,
            tag,
            *arguments,
        ]
        return run(command, f"running {program} in image {tag}")

    def base_packages(self, base: str) -> dict[str, Any]:
        """`{"python": its version, "debian": [{"name", "version", "architecture", "licenses"}]}` of a base image.

        A base without Debian's package manager has an empty list.
        """
        return dict(json.loads(self._run_in(base, "python3", "-c", _BASE_PROBE)))

    def read_file(self, tag: str, path: str) -> str:
        """A text file of an image."""
        return self._run_in(tag, "cat", path)

    def run_command(self, tag: str, device: str, memory: str = "2g") -> str:
        """The command that starts an image's service: hardened, on this machine's loopback address, without a key."""
        words = [self.command, "run", "--rm", "-p", "127.0.0.1:3000:3000", *HARDENED, "--memory", memory]
        words += ["--gpus", "all"] if device == "gpu" else []
        return shlex.join([*words, "-e", "REX_ALLOW_ANONYMOUS=true", tag])
