"""Dataclasses of numbers and words, read back from the sections that JSON made of them."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from nlme_sbi.config.conversion import convert

Record = TypeVar("Record")


def read_record(kind: type[Record], plain: Any, place: str, *, missing: Mapping[str, float] | None = None) -> Record:
    """The dataclass that ``dataclasses.asdict`` made a section of, every value held against its annotation.

    JSON has no word for numbers that are not finite, so null is NaN where a field must be a number. A key that is not
    there is the field's default, or null where it may be; keys that are no fields are passed over.

    Args:
        kind: a dataclass whose fields are numbers, words, flags, and tuples or mappings of these.
        plain: the section.
        place: of the section in its file, for messages.
        missing: what null means, by field, where that is not NaN.

    Raises:
        ValueError: ``table.parameters[0].natural must be a number; got 'x' (text).``
    """
    if not isinstance(plain, Mapping):
        raise ValueError(f"{place} must be a section of keys and values.")
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        hint, at = hints[field.name], f"{place}.{field.name}"
        if field.name not in plain:
            if field.default is not MISSING or field.default_factory is not MISSING:
                continue
            if type(None) not in typing.get_args(hint):
                raise ValueError(f"{at} is missing.")
        found = plain.get(field.name)
        if found is None and hint is float:
            found = (missing or {}).get(field.name, math.nan)
        elif typing.get_args(hint)[:1] == (float,) and isinstance(found, (list, tuple)):
            found = [math.nan if one is None else one for one in found]
        elif typing.get_args(hint) == (str, float) and isinstance(found, Mapping):
            found = {key: math.nan if one is None else one for key, one in found.items()}
        values[field.name] = convert(found, hint, at)
    return kind(**values)
