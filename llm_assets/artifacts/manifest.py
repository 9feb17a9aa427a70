"""The typed record in every artifact, `manifest.json`, and the rules of compatibility between artifacts.

`content_hash` covers only the files, not the time and run that made them. `stage_config` is the part of an experiment's
settings that determines an asset; a stage refuses an upstream made with a different one.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_assets.registry import EVALUATION, IMAGES, settings_groups
from model.artifact import MANIFEST, FileDigest, content_hash, file_digests, parse_manifest
from model.errors import PipelineError
from model.settings import ExperimentSettings

SCHEMA_VERSION = 1
VERSION_DIGITS = 16
_CHECKPOINT = re.compile(rf"/.*/(trained_checkpoint/[^/]+/[0-9a-f]{{{VERSION_DIGITS}}})/?")


@dataclass(frozen=True)
class Manifest:
    """Identity and provenance of an artifact.

    files: digest by path relative to the artifact. config: the part of the settings that determines it.
    upstream: content hash by asset. failed_checks: the blocking checks it did not pass; such a version is kept for
    inspection but never becomes the latest. warned_checks: those it passed with a warning.
    code, source: hashes of the code and of the inputs other than the upstream; empty: unknown.
    registration: arguments of the model's registration (`register_version`).
    certificates: comparisons with other engines (`model.export.parity.Certificate`).
    """

    asset: str
    experiment: str
    files: dict[str, FileDigest]
    content_hash: str
    config: dict[str, Any]
    config_hash: str
    code_version: str
    upstream: dict[str, str]
    mlflow_run_id: str | None
    dagster_run_id: str
    created: str
    failed_checks: list[str] = field(default_factory=list)
    warned_checks: list[str] = field(default_factory=list)
    code: str = ""
    source: str = ""
    registration: dict[str, Any] | None = None
    certificates: list[dict[str, Any]] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @property
    def version(self) -> str:
        """The name of the artifact's folder: the first 16 hex digits of the content hash."""
        return self.content_hash[:VERSION_DIGITS]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(digest["size"] for digest in self.files.values())

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: object) -> "Manifest":
        """Parse a manifest; the PipelineError for an unreadable one names `source`."""
        fields = parse_manifest(text, source)
        try:
            manifest = cls(**{**fields, "config": _portable(fields["config"])})
            manifest._check_types()
        except (KeyError, TypeError, ValueError) as error:
            raise PipelineError(f"{source} is not a manifest ({error}); materialize the asset again") from error
        if manifest.schema_version != SCHEMA_VERSION:
            raise PipelineError(
                f"{source} has schema version {manifest.schema_version}, this code reads {SCHEMA_VERSION}; "
                "materialize the asset again"
            )
        return manifest

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest of a complete artifact. Raises PipelineError."""
        path = directory / MANIFEST
        if not path.is_file():
            raise PipelineError(f"no {MANIFEST} in {directory}: expected a complete artifact; materialize it again")
        return cls.from_json(path.read_text(errors="replace"), path)

    def _check_types(self) -> None:
        """Raises TypeError or ValueError for fields of other types, and for a date that has no later one."""
        for kind, names in _TYPES.items():
            for name in names:
                if not isinstance(value := getattr(self, name), kind):
                    raise TypeError(f"{name} is {value!r}")
        if not datetime.fromisoformat(self.created).tzinfo or self.created >= "9999":
            raise ValueError(f"created is {self.created!r}")


_TYPES: dict[type, tuple[str, ...]] = {
    str: ("asset", "experiment", "content_hash", "config_hash", "code_version", "dagster_run_id", "created"),
    dict: ("config", "upstream"),
    list: ("failed_checks", "warned_checks", "certificates"),
}


def seal(
    directory: Path,
    *,
    asset: str,
    experiment: str,
    config: dict[str, Any],
    code_version: str,
    upstream: Mapping[str, str],
    mlflow_run_id: str | None,
    dagster_run_id: str,
    failed_checks: Sequence[str] = (),
    warned_checks: Sequence[str] = (),
    code: str = "",
    source: str = "",
    registration: Mapping[str, Any] | None = None,
    certificates: Sequence[Mapping[str, Any]] = (),
) -> Manifest:
    """Write the manifest of a finished directory, as its last file."""
    files = file_digests(directory)
    if not files:
        raise PipelineError(f"{directory} is empty: expected the files of {asset}")
    manifest = Manifest(
        asset=asset,
        experiment=experiment,
        files=files,
        content_hash=content_hash(files),
        config=config,
        config_hash=config_hash(config),
        code_version=code_version,
        upstream=dict(upstream),
        mlflow_run_id=mlflow_run_id,
        dagster_run_id=dagster_run_id,
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        failed_checks=list(failed_checks),
        warned_checks=list(warned_checks),
        code=code,
        source=source,
        registration=dict(registration) if registration else None,
        certificates=[dict(certificate) for certificate in certificates],
    )
    (directory / MANIFEST).write_text(manifest.to_json())
    return manifest


def stage_config(settings: ExperimentSettings, asset: str) -> dict[str, Any]:
    """The settings groups that determine `asset`, as plain data (JSON types)."""
    groups = {group: dataclasses.asdict(getattr(settings, group)) for group in settings_groups(asset)}
    plain: dict[str, Any] = _portable(json.loads(json.dumps(groups)))
    return plain


def _portable(config: Any) -> Any:
    """Plain data with published checkpoints named by asset, experiment and version in place of their folders.

    `latest:NAME` resolves to a local folder, and an artifact's identity must not change when the checkout moves.
    """
    if isinstance(config, Mapping):
        return {key: _portable(value) for key, value in config.items()}
    if isinstance(config, str) and (found := _CHECKPOINT.fullmatch(config)):
        return found[1]
    return config


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of plain data, 64 hex digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings flattened to dotted keys; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def refresh_command(asset: str, experiment: str, overrides: Sequence[str] = ()) -> str:
    """The command that materializes `asset` and everything downstream."""
    locations = {"llm_assets.images": IMAGES, "llm_assets.evaluation": EVALUATION}
    holds = (name for name, stages in locations.items() if asset in {stage.name for stage in stages})
    module = next(holds, "llm_assets.definitions")
    command = f"dagster asset materialize -m {module} --select '{asset}+' --partition {experiment}"
    if overrides:
        config = {"resources": {"hydra": {"config": {"overrides": list(overrides)}}}}
        command += f" --config-json '{json.dumps(config)}'"
    return command


def assert_compatible(
    upstream: Sequence[Manifest], settings: ExperimentSettings, experiment: str, overrides: Sequence[str] = ()
) -> None:
    """Refuse upstream artifacts made with other settings than this run's, or that do not belong together.

    Raises PipelineError with the first differing options, both values and the command that refreshes the artifact.
    """
    for manifest in upstream:
        if manifest.experiment != experiment:
            raise PipelineError(
                f"{manifest.asset} {manifest.version} belongs to experiment {manifest.experiment!r}, this run to "
                f"{experiment!r}; materialize it: {refresh_command(manifest.asset, experiment, overrides)}"
            )
        built, wanted = flatten(manifest.config), flatten(stage_config(settings, manifest.asset))
        missing = "nothing"
        differing = [
            f"{key}={built.get(key, missing)!r} (this run: {wanted.get(key, missing)!r})"
            for key in sorted(built.keys() | wanted.keys())
            if built.get(key, missing) != wanted.get(key, missing)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise PipelineError(
                f"{manifest.asset} of {experiment!r} was made with {', '.join(differing[:3])}{more}; "
                f"refresh it: {refresh_command(manifest.asset, experiment, overrides)}"
            )
    latest = {manifest.asset: manifest.content_hash for manifest in upstream}
    for manifest in upstream:
        for asset, version in manifest.upstream.items():
            if latest.get(asset, version) != version:
                raise PipelineError(
                    f"{manifest.asset} of {experiment!r} was made from {asset} {version[:VERSION_DIGITS]}, the latest "
                    f"is {latest[asset][:VERSION_DIGITS]}; refresh it: "
                    f"{refresh_command(manifest.asset, experiment, overrides)}"
                )
