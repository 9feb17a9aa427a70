"""CycloneDX bill of materials of a Bento or an image: each package with its version and its license.

Python packages state their license in their metadata, Debian packages in `/usr/share/doc/PACKAGE/copyright`, read from
the base image (`ContainerEngine.base_packages`). The output is reproducible.
"""

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution, distributions
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILE = "sbom.cdx.json"
_NO_TIME = datetime(1970, 1, 1, tzinfo=UTC)


def of_requirements(requirements: Iterable[str]) -> list[Component]:
    """The packages of this environment that the requirements need, transitively.

    A requirement that is not installed is omitted: it is for another platform.
    """
    found: dict[str, Distribution] = {}
    wanted = [Requirement(line) for line in requirements]
    while wanted:
        requirement = wanted.pop()
        key = canonicalize_name(requirement.name)
        if key in found:
            continue
        try:
            found[key] = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        needed = [Requirement(line) for line in found[key].requires or ()]
        extras = requirement.extras or {""}
        wanted += [
            one for one in needed if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return [_python(one) for one in found.values()]


def of_folder(packages: Path) -> list[Component]:
    """The Python packages that are unpacked in a folder."""
    return [_python(one) for one in distributions(path=[str(packages)])]


def of_base_image(found: Mapping[str, Any]) -> list[Component]:
    """The result of `ContainerEngine.base_packages`: the interpreter and Debian packages."""
    purls = [PackageURL("generic", None, "cpython", found["python"])]
    purls += [
        PackageURL("deb", "debian", one["name"], one["version"], {"arch": one["architecture"]})
        for one in found["debian"]
    ]
    stated = [["PSF-2.0"], *(one["licenses"] for one in found["debian"])]
    return [
        Component(
            name=purl.name,
            version=purl.version,
            licenses=[LicenseFactory().make_with_name(name) for name in sorted(set(names))],
            purl=purl,
            bom_ref=str(purl),
        )
        for purl, names in zip(purls, stated, strict=True)
    ]


def licenses(bill: str) -> dict[str, int]:
    """Number of components per license in a bill of materials, the most common license first."""
    stated = Counter(
        " and ".join(one.get("expression") or one["license"].get("id") or one["license"]["name"] for one in given)
        for given in (component.get("licenses", ()) for component in json.loads(bill)["components"])
    )
    return {name or "not stated": count for name, count in stated.most_common()}


def write(target: Path, *, name: str, version: str, model: str = "", components: Sequence[Component]) -> None:
    """Write the bill of the Bento or image `name:version`.

    model: tag of the model that it serves; empty for the image of the stack, which holds none.
    """
    subject = Component(name=name, version=version, type=ComponentType.APPLICATION, bom_ref=f"{name}:{version}")
    held = list(components)
    if model:
        kind, ref = ComponentType.MACHINE_LEARNING_MODEL, f"model:{model}"
        held = [Component(name=model.partition(":")[0], version=model.partition(":")[2], type=kind, bom_ref=ref), *held]
    content = f"{name}:{version} {model} " + " ".join(sorted(f"{one.name}=={one.version}" for one in components))
    bill = Bom(
        components=held,
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, content),
        metadata=BomMetaData(component=subject, timestamp=_NO_TIME),
    )
    bill.register_dependency(subject, held)
    target.write_text(JsonV1Dot6(bill).output_as_string(indent=2) + "\n")


def _python(package: Distribution) -> Component:
    name = canonicalize_name(package.metadata["Name"])
    purl = PackageURL("pypi", None, name, package.version)
    stated = _license(package)
    return Component(
        name=name,
        version=package.version,
        licenses=[LicenseFactory().make_from_string(stated)] if stated else [],
        purl=purl,
        bom_ref=str(purl),
    )


def _license(package: Distribution) -> str:
    """The license expression, else the short name in the older field, the classifiers, or the license file's title."""
    metadata = package.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    field = metadata["License"].strip() if "License" in metadata else ""
    if field and field != "UNKNOWN" and "\n" not in field and len(field) < 80:
        return field
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or () if "License ::" in line]
    if classifiers:
        return " and ".join(classifiers)
    for file in package.files or ():
        if text := _first_line(file):
            return text
    return ""


def _first_line(file: PackagePath) -> str:
    """The title of a license's file, such as "MIT License"; empty for other files."""
    if not re.match(r"(licen[cs]e|copying)", file.name, re.IGNORECASE):
        return ""
    try:
        lines = (line.strip() for line in file.read_text().splitlines())
    except (OSError, UnicodeDecodeError):
        return ""
    return next((line[:80] for line in lines if line), "")
