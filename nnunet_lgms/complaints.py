"""pydantic's first complaint about what a user wrote, as far as a sentence needs it.

Fields say in ``json_schema_extra={"allowed": ...}`` what is allowed, for tables in the docs and for messages alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError

from nnunet_lgms.files import shown


@dataclass(frozen=True)
class Complaint:
    """What is wrong where.

    Attributes:
        path: names of the entries that lead there, the outermost first.
        kind: "missing", "unknown" (an entry that there is not), "name" (of an entry that can have any), or "value".
        given: the value that stands there, or the name, as it is shown in a message.
        allowed: what is allowed there.
        known: entries that the table has in which the last name of the path stands.
    """

    path: tuple[str, ...]
    kind: str
    given: str
    allowed: str
    known: tuple[str, ...]


def described(default: Any, allowed: str, description: str) -> Any:
    """A field with what is allowed in it, and what it is."""
    return Field(default, description=description, json_schema_extra={"allowed": allowed})


def allowed_in(field: Any) -> str:
    """What :func:`described` was told."""
    return field.json_schema_extra["allowed"]


def first_complaint(error: ValidationError, model: type[BaseModel], content: Mapping[str, Any]) -> Complaint:
    """The first complaint about ``content``, which is no ``model``.

    Args:
        error: pydantic's.
        model: the outermost table.
        content: what was given.
    """
    first = error.errors(include_url=False)[0]
    kind = {"missing": "missing", "extra_forbidden": "unknown"}.get(first["type"], "value")
    kind = "name" if "[key]" in first["loc"] else kind
    path: list[str] = []
    inside: type[BaseModel] | None = model
    known = tuple(model.model_fields)
    value: Any = content
    allowed, names_are_free = "", False
    for part in first["loc"]:
        if part == "[key]" or not isinstance(part, str):
            break
        if names_are_free:  # a table whose entries may have any name
            allowed, names_are_free = "a table", False
        elif inside is not None and part in inside.model_fields:
            known = tuple(inside.model_fields)
            field = inside.model_fields[part]
            allowed = allowed_in(field)
            inside = next(_models_in(field.annotation), None)
            names_are_free = inside is not None and _is_free_table(field.annotation)
        elif kind == "unknown" and inside is not None:
            known = tuple(inside.model_fields)
        else:  # pydantic's name of one of several types
            break
        path.append(part)
        value = value.get(part) if isinstance(value, Mapping) else None
    return Complaint(tuple(path), kind, shown(first["input"] if kind == "name" else value), allowed, known)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _is_free_table(annotation: Any) -> bool:
    return get_origin(annotation) is dict or any(map(_is_free_table, get_args(annotation)))
