"""What all groups of settings share: the kinds of values, and what is refused everywhere."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

LARGEST = 10**9  # of a count: a larger one is a typing mistake, and would exhaust memory or time


def printable(text: str) -> str:
    if len(text) > 2000 or not text.isprintable():
        raise ValueError("has characters that cannot be printed, or more than 2,000")
    return text


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Check keyword arguments, which are stored with the run: only what JSON can hold, and no NaN or infinity."""

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                check(key)
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)
        elif isinstance(value, str):
            printable(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"holds {value}, which cannot be written to JSON: set it in the factory")
        elif not isinstance(value, int | float | None):
            raise ValueError(f"holds a {type(value).__name__}: give numbers, text, lists and mappings")

    check(values)
    return values


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Density = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Bytes = Annotated[int, Field(ge=1, le=2**60)]
Text = Annotated[str, AfterValidator(printable)]


class Section(BaseModel):
    """A group of settings; frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        """Refuse true and false for other types: `epochs: yes` would become 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            kind = cls.model_fields[name].annotation if name in cls.model_fields else bool
            if kind is bool or name == "kwargs" or (isinstance(kind, type) and issubclass(kind, Section)):
                continue
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            if any(isinstance(item, bool) for item in items):
                raise ValueError(f"{name}={short(value)} is true or false (as yes, no, on and off are): give a value")
        return values


def is_default(section: BaseModel, name: str) -> bool:
    """Whether a setting of a section has its default value."""
    field = type(section).model_fields[name]
    return bool(getattr(section, name) == field.get_default(call_default_factory=True))


def short(value: Any, most: int = 100) -> str:
    """A value as text for a message, cut after `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
