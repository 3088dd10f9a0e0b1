"""Records: frozen dataclasses that are JSON documents, or parts of one. Only these two functions touch their keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any, Self, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.base.errors import UserError

_PLAIN = (float, int, str, bool, type(None))
_OPTIONAL = "left out of the document where it is None"


def optional() -> Any:
    """A field that is None by default. It is left out of the document where it is None."""
    return dataclasses.field(default=None, metadata={_OPTIONAL: True})


class Record:
    """The base of every record: a frozen dataclass whose fields are plain values or records."""

    def to_json(self) -> dict[str, Any]:
        """The record as a document: mappings, lists and plain values."""
        return cast(dict[str, Any], plain(self))

    @classmethod
    def from_json(cls, document: Any, origin: str) -> Self:
        """The record that a document holds; keys that it does not know are passed over.

        Raises UserError, which names `origin` (a path, or what the user gave) and the first key that does not fit.
        """
        return cast(Self, _validated(cast(Hashable, cls), document, origin))

    @classmethod
    def all_from_json(cls, document: Any, origin: str) -> tuple[Self, ...]:
        """The records that a list holds, in its order. Raises UserError as `from_json` does."""
        return cast(tuple[Self, ...], _validated(cast(Any, tuple)[cls, ...], document, origin))


def plain(value: Any) -> Any:
    """A value as JSON knows it: records, dataclasses and pydantic's models become mappings, tuples become lists."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            name: plain(inner)
            for name, optional in _fields(type(value))
            if (inner := getattr(value, name)) is not None or not optional
        }
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


@cache
def _fields(kind: Any) -> tuple[tuple[str, bool], ...]:
    """The fields of a dataclass by name, each with whether it is left out where it is None."""
    return tuple((field.name, _OPTIONAL in field.metadata) for field in dataclasses.fields(kind))


def _validated(kind: Hashable, document: Any, origin: str) -> Any:
    try:
        return _adapter(kind).validate_python(document)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the whole of it"
        raise UserError(
            f"'{origin}' is damaged, or of another version of secateur ({where}: {problem['msg'].lower()}); delete "
            "it and run the same command again"
        ) from error


@cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, kind))
