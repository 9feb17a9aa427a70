"""The parts of a JSON schema: its subschemas, their places and the references between them."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

Schema = dict[str, Any]
ONE = ("additionalItems", "additionalProperties", "items", "unevaluatedProperties", "unevaluatedItems")
SEVERAL = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
NAMED = ("$defs", "definitions", "patternProperties", "properties")
"""Keywords whose value is a schema, a list of schemas, or schemas by name."""
MAX_PLACE_LENGTH = 80


class Subschemas:
    """All subschemas of a JSON schema that are objects, numbered; the root is 0."""

    def __init__(self, root: Schema) -> None:
        self.all: list[Schema] = []
        self.places: list[str] = []
        self._numbers: dict[int, int] = {}
        self._bases: list[str] = []
        self._documents: dict[str, Any] = {"": root}
        self._anchors: dict[tuple[str, str], Schema] = {}
        waiting: list[tuple[Any, str, str]] = [(root, "#", "")]
        while waiting:
            schema, place, base = waiting.pop()
            if not isinstance(schema, dict):
                continue
            if isinstance(schema.get("$id"), str):
                base = urldefrag(urljoin(base, schema["$id"]))[0]
                self._documents[base] = schema
            if isinstance(schema.get("$anchor"), str):
                self._anchors[base, schema["$anchor"]] = schema
            self._numbers[id(schema)] = len(self.all)
            self.all.append(schema)
            self.places.append(place)
            self._bases.append(base)
            waiting += [(inner, f"{place}/{name}", base) for name, inner in children(schema)]

    def target(self, at: int) -> int | None:
        """The subschema that `$ref` refers to; None without one, and for one that is not found."""
        reference = self.all[at].get("$ref")
        if not isinstance(reference, str):
            return None
        document, fragment = urldefrag(urljoin(self._bases[at], reference))
        if fragment and not fragment.startswith("/"):
            return self.number(self._anchors.get((document, unquote(fragment))))
        found: Any = self._documents.get(document)
        for part in unquote(fragment).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                found = found[int(part)] if part.isdecimal() and int(part) < len(found) else None
            else:
                found = found.get(part) if isinstance(found, dict) else None
        return self.number(found)

    def reached(self) -> list[int]:
        """The subschemas that a value can be validated by: definitions only where something refers to them."""
        reached, waiting = dict.fromkeys([0]), [0]
        while waiting:
            at = waiting.pop()
            new = [number for number in self.used(at) if number not in reached]
            reached.update(dict.fromkeys(new))
            waiting += new
        return sorted(reached)

    def used(self, at: int) -> list[int]:
        """The subschemas that a subschema applies: not its definitions."""
        inner = [one for name, one in children(self.all[at]) if not name.startswith(("$defs/", "definitions/"))]
        found = [*(self.number(one) for one in inner), self.target(at)]
        return [number for number in found if number is not None]

    def number(self, schema: Any) -> int | None:
        """The number of a subschema of this very schema; None for anything else."""
        return self._numbers.get(id(schema))


def children(schema: Schema) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, with the way to each, such as `properties/name`."""
    for name in ONE:
        if name in schema:
            yield name, schema[name]
    for name in SEVERAL:
        yield from ((f"{name}/{index}", inner) for index, inner in enumerate(list_of(schema, name)))
    for name in NAMED:
        yield from ((f"{name}/{key}", inner) for key, inner in dict_of(schema, name).items())


def list_of(schema: Schema, name: str) -> list[Any]:
    """A keyword's value if it is a list, else an empty one."""
    value = schema.get(name)
    return value if isinstance(value, list) else []


def dict_of(schema: Schema, name: str) -> dict[str, Any]:
    """A keyword's value if it is an object, else an empty one."""
    value = schema.get(name)
    return value if isinstance(value, dict) else {}
