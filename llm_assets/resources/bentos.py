"""BentoML's stores of models and Bentos; each command runs in a separate process.

BentoML reads BENTOML_HOME once, and a second build in one process reuses the first one's service module: the Bento
would contain a different model than its arguments name. Commands run in their own process group, which ends with the
step.
`bento_store.py` beside this file is the program that reads and fills the stores.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from llm_assets.artifacts.locks import exclusive
from llm_assets.artifacts.manifest import VERSION_DIGITS
from llm_assets.paths import REPOSITORY
from llm_assets.resources import bill_of_materials
from model.errors import PipelineError
from model.progress import Log, silent
from model.settings import ServingSettings
from model.system.commands import run


class BentoBuilder(dg.ConfigurableResource):
    """Puts models into BentoML's model store and builds Bentos from `bento/`."""

    home: str = Field(default="", description="BentoML's home. Empty: BENTOML_HOME, else BentoML's own default.")
    service: str = Field(default="bento.service:RexService", description="Import path of the service to package.")
    source_dir: str = Field(default=str(REPOSITORY), description="Folder that the build runs in.")

    def import_model(self, tag: str, model_dir: Path, labels: Mapping[str, str], log: Log = silent) -> dict[str, Any]:
        """Put a model directory into the model store under `tag`, unless the store has it.

        Returns `{"tag", "path", "bytes", "created"}`; created is False if the store already had it.
        """
        with exclusive(self._lock(tag)):
            return self._store("model", tag, str(model_dir), json.dumps(dict(labels)), log=log)

    def find_bento(self, tag: str, log: Log = silent) -> dict[str, Any] | None:
        """`{"tag", "path", "bytes"}` of a Bento in the store, or None."""
        found = self._store("bento", tag, log=log)
        return found or None

    def find_missing(self, bento: str, model: str, log: Log = silent) -> str:
        """Which of a Bento's and its model's tags is not in the stores; empty if both are."""
        return str(self._store("missing", bento, model, log=log)["tag"])

    def build(
        self, tag: str, *, labels: Mapping[str, str], arguments: Mapping[str, Any], log: Log = silent
    ) -> dict[str, Any]:
        """Build the Bento `name:version` with the service's arguments; returns its `find_bento` entry.

        Adds a bill of materials beside the Bento's list of packages: this environment's packages with their licenses.

        Raises PipelineError with the last line of BentoML's output if the build fails.
        """
        name, version = tag.split(":")
        command = [sys.executable, "-m", "bentoml", "build", self.service, "--name", name, "--version", version]
        for key, value in labels.items():
            command += ["--label", f"{key}={value}"]
        for key, value in arguments.items():
            command += ["--arg", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
        printed = self._run([*command, "-o", "tag"], f"building Bento {tag}", log)
        if f"__tag__:{tag}" not in printed:
            raise PipelineError(f"bentoml build of {tag} did not print that tag: see its output in the run's log")
        found = self.find_bento(tag)
        if found is None:
            raise PipelineError(
                f"bentoml built {tag}, but the store has no such Bento: is BENTOML_HOME the same for both?"
            )
        requirements = Path(found["path"], "env", "python", "requirements.txt")
        needed = bill_of_materials.of_requirements(requirements.read_text().splitlines())
        bill = requirements.with_name(bill_of_materials.FILE)
        bill_of_materials.write(bill, name=name, version=version, model=str(arguments["model"]), components=needed)
        return {**found, "bytes": found["bytes"] + bill.stat().st_size}

    def build_once(
        self, name: str, *, labels: Mapping[str, str], arguments: Mapping[str, Any], log: Log = silent
    ) -> dict[str, Any]:
        """The Bento `name` for these arguments and the current source, built unless the store has it.

        Returns `{"tag", "path", "bytes", "created"}`.
        """
        tag = self.tag(name, arguments, log)
        with exclusive(self._lock(tag)):
            found = self.find_bento(tag)
            bento = self.build(tag, labels=labels, arguments=arguments, log=log) if found is None else found
        return {**bento, "created": found is None}

    def tag(self, name: str, arguments: Mapping[str, Any], log: Log = silent) -> str:
        """The tag of the Bento `name`: its version is a hash of everything that determines it."""
        self._compile_native_step(log)
        content = json.dumps(dict(arguments), sort_keys=True) + self.source_digest()
        return f"{name}:{hashlib.sha256(content.encode()).hexdigest()[:VERSION_DIGITS]}"

    def package(
        self,
        name: str,
        model_dir: Path,
        version: str,
        serving: ServingSettings,
        labels: Mapping[str, str],
        log: Log = silent,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Import a model directory as `name:version` and build the Bento that serves it; returns both store entries."""
        model = self.import_model(f"{name}:{version}", model_dir, labels, log=log)
        arguments = {
            **dataclasses.asdict(serving),
            "model": model["tag"],
            # auto: read from the artifact, since with quantization.method=none quantized_model is in full precision.
            "quantized": "auto" if serving.quantized else False,
        }
        bento = self.build_once(name, labels=labels, arguments=arguments, log=log)
        return {**bento, "arguments": arguments}, model

    def export(self, tag: str, folder: Path, log: Log = silent) -> dict[str, Any]:
        """Copy a Bento with its models into a new folder, in the layout of an image.

        Returns the Bento's image settings, `{"base_image", "python_version"}`.
        """
        return self._store("export", tag, str(folder), log=log)

    def source_digest(self) -> str:
        """Hash of everything a build packs except the weights: the code in bento/ and model/, and the package pins."""
        root, total = Path(self.source_dir), hashlib.sha256()
        files = [path for folder in ("bento", "model") for path in (root / folder).rglob("*") if path.is_file()]
        for path in sorted([*files, root / "bentofile.yaml", root / "constraints.txt"]):
            if "__pycache__" not in path.parts and path.suffix not in (".stamp", ".lock") and path.is_file():
                total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\n")
        return total.hexdigest()

    def _compile_native_step(self, log: Log) -> None:
        """Compile the native CPU step, so that the Bento contains it and its image needs no compiler.

        If this machine has no compiler, the log says what that costs.
        """
        program = Path(self.source_dir, "model", "native", "build.py")
        if program.is_file():
            self._run([sys.executable, str(program.absolute())], "compiling the native step", log)

    def _lock(self, tag: str) -> Path:
        """Lock file of a name: BentoML refuses to create what another process created since it was looked up."""
        home = self.home or os.environ.get("BENTOML_HOME") or Path.home() / "bentoml"
        return Path(self.source_dir, home, ".locks", tag.split(":")[0])

    def _store(self, *arguments: str, log: Log) -> dict[str, Any]:
        program = str(Path(__file__).with_name("bento_store.py"))
        printed = self._run([sys.executable, program, *arguments], f"BentoML store: {' '.join(arguments[:2])}", log)
        answer: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
        return answer

    def _run(self, command: Sequence[str], what: str, log: Log) -> str:
        """Standard output of a command on the stores; its standard error goes to the log."""
        # REX_... configure a running service. Dagster reads them from the stack's .env; a build must ignore them.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("REX_")}
        environment = {**inherited, "BENTOML_DO_NOT_TRACK": "True"}
        if self.home:
            environment["BENTOML_HOME"] = self.home
        return run(command, what, cwd=self.source_dir, environment=environment, log=log, name="bentoml")
