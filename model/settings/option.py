"""An option of the pipeline: a dataclass field with its default, text, unit and range, all in this one place.

    steps: int = option(500, "Optimizer steps.", above=0, maximum=10**9)

Range checks, `--explain`, the tables in docs/ and README, the Launchpad's help and the service's arguments are all made
from these fields. No torch, no Hydra: importing this module is cheap.
"""

import copy
import dataclasses
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from model.errors import PipelineError

T = TypeVar("T")
_KEY = "option"


@dataclass(frozen=True)
class Bounds:
    """Range of a number, or of each number of a list. `above` and `below` are exclusive, the others inclusive."""

    above: float | None = None
    minimum: float | None = None
    below: float | None = None
    maximum: float | None = None
    reason: str = ""
    """Reason for the lower bound, shown after it."""

    def admits(self, value: float) -> bool:
        """Whether `value` is in range; NaN never is."""
        return (
            (self.above is None or value > self.above)
            and (self.minimum is None or value >= self.minimum)
            and (self.below is None or value < self.below)
            and (self.maximum is None or value <= self.maximum)
            and not math.isnan(value)
        )

    def __str__(self) -> str:
        if (self.above, self.below) == (0, 1):
            return "a fraction between 0 and 1"
        if (self.minimum, self.maximum) == (0, 1):
            return "a fraction, 0 to 1"
        if self.minimum is not None and self.below is not None:
            return f"{self.minimum:,g} to below {self.below:,g}"
        parts = []
        if self.above is not None:
            parts.append(f"a number greater than {_number(self.above)}")
        elif self.minimum is not None:
            parts.append("0 or more" if self.minimum == 0 else f"at least {_number(self.minimum)}")
        if self.reason:
            parts[-1] += f" ({self.reason})"
        if self.maximum is not None:
            parts.append(f"at most {_number(self.maximum)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Option:
    """Documentation of one option. default: None if a value is required."""

    group: str
    name: str
    type: Any
    default: Any
    text: str
    unit: str
    bounds: Bounds | None

    @property
    def full_name(self) -> str:
        """`group.name`, as an override spells it."""
        return f"{self.group}.{self.name}" if self.group else self.name

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of an option that takes one of a few; none for the others."""
        members = get_args(self.type) if _is_union(self.type) else (self.type,)
        return tuple(value for member in members if get_origin(member) is Literal for value in get_args(member))

    @property
    def allowed(self) -> str:
        """Range or choices in words; empty for text that may be anything."""
        if self.choices:
            kinds = ["true", "false"] if _is_union(self.type) and bool in get_args(self.type) else []
            return ", ".join([*kinds, *map(str, self.choices)])
        return str(self.bounds) if self.bounds else ""

    @property
    def default_text(self) -> str:
        """The default as a person types it, with its unit: `500 steps`, `true`, `none`."""
        if self.default in ("", None, [], {}):
            return "none"
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, list):
            return ", ".join(map(str, self.default))
        number = _number(self.default) if isinstance(self.default, int | float) else str(self.default)
        return f"{number} {self.unit}".rstrip()


def option(
    default: T,
    text: str,
    *,
    unit: str = "",
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
    reason: str = "",
) -> T:
    """A dataclass field. text: what the option does and what its special values mean, in one or two sentences.

    unit: of the number. Bounds: see `Bounds`; for a list they hold for each element. Choices are the type's Literal.
    """
    bounds = Bounds(above, minimum, below, maximum, reason)
    described = {"text": text, "unit": unit, "bounds": None if bounds == Bounds() else bounds}
    value: Any = default
    if isinstance(value, list | dict):
        made = dataclasses.field(default_factory=lambda: copy.deepcopy(value), metadata={_KEY: described})
    else:
        made = dataclasses.field(default=value, metadata={_KEY: described})
    return cast(T, made)


def expect(ok: bool, name: str, value: object, expected: str) -> None:
    """Raises PipelineError, one line, if `ok` is false. name: the option with its group."""
    if not ok:
        raise PipelineError(f"{name} is {value!r}: expected {expected}")


def expect_types(settings: "Settings") -> None:
    """Raises PipelineError if an option is not of its field's type, for settings that Hydra has not checked."""
    for item in options(type(settings)):
        value = getattr(settings, item.name)
        expected = "a list of texts" if get_origin(item.type) is list else item.allowed or _type_name(item.type)
        expect(_is_of(item.type, value), item.full_name, value, expected)


def _type_name(kind: Any) -> str:
    return {str: "text", bool: "true or false"}.get(kind, str(kind))


def _is_of(kind: Any, value: object) -> bool:
    if _is_union(kind):
        return any(_is_of(member, value) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(get_args(kind)[0], one) for one in value)
    if kind is float or kind is int:
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, get_origin(kind) or kind)


class Settings:
    """Base of every stage's settings: checks each option's range where its value enters."""

    group: ClassVar[str]
    """The folder of `configs/` and the name in overrides."""

    def __init_subclass__(cls, group: str = "") -> None:
        if group:
            cls.group = group

    def __post_init__(self) -> None:
        for item in options(type(self)):
            value = getattr(self, item.name)
            if item.bounds is None or value is None or isinstance(value, str | bool):
                continue
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(one, int | float) for one in values):
                continue  # `expect_types` says so
            expected = f"a list, each {item.bounds}" if isinstance(value, list) else str(item.bounds)
            expect(all(map(item.bounds.admits, values)), item.full_name, value, expected)


def options(settings: type[Settings]) -> Iterator[Option]:
    """The options of a stage, in the order of their declaration."""
    hints = get_type_hints(settings)
    for field in dataclasses.fields(cast(Any, settings)):
        described = field.metadata[_KEY]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Option(settings.group, field.name, hints[field.name], default, **described)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
