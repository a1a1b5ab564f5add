"""Settings: frozen, checked options that are a section of the config and a function's argument.

Pydantic knows what is wrong with a value; here that becomes one line with the key, what was given
and the nearest known key, as everywhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import QSearchError, nearest

#: kind of pydantic's error -> what is said instead of its words
_WORDS = {"path_type": "must be the path of a file"}
#: characters of a value that an error quotes
_QUOTED = 80


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Made = TypeVar("Made", bound=Settings)


def checked(kind: type[Made], content: Mapping[str, Any], source: str = "") -> Made:
    """Settings from plain data.

    Args:
        kind: the settings' class.
        content: key -> value, sections within sections.
        source: where it was read, for the error; left out, the class's name.

    Returns:
        The settings.

    Raises:
        QSearchError: naming the key, what was given, and the nearest known key.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise QSearchError(f"{source or kind.__name__}: {_reason(kind, error)}") from None


def changed(settings: Made | None, kind: type[Made], changes: Mapping[str, Any]) -> Made:
    """`settings` (the defaults of `kind`, when None) with some keys changed, and checked again."""
    kept = {} if settings is None else {n: getattr(settings, n) for n in kind.model_fields}
    return checked(kind, kept | dict(changes)) if changes or settings is None else settings


def field_names(kind: Any) -> Iterable[str]:
    """Keys of settings, or of a plain dataclass that is a section."""
    if dataclasses.is_dataclass(kind):
        return [f.name for f in dataclasses.fields(kind)]
    return list(getattr(kind, "model_fields", ()))


def shortened(value: Any) -> str:
    """A value as an error quotes it: a line at most."""
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 2]} …"


def _reason(kind: type[Settings], error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(p) for p in first["loc"])
    if first["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        said = _WORDS.get(first["type"], first["msg"].lower())
        return f"{place}: {said}; given {shortened(first.get('input'))}"
    section: Any = kind
    for part in first["loc"][:-1]:
        known = {f: t.annotation for f, t in getattr(section, "model_fields", {}).items()}
        section = known.get(str(part), section)
        section = next((a for a in get_args(section) if isinstance(a, type)), section)
    return f"unknown key {place!r}{nearest(str(first['loc'][-1]), field_names(section))}"
