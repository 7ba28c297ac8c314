"""What every part of a configuration shares: frozen, no unknown keys, no NaN, errors as one sentence.

Used by all files of the configuration, and by loggers and comparisons of runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from atoll.model_errors import config_error


class Section(BaseModel):
    """The base of all models of a configuration. A wrong value raises ConfigError with one sentence, also from Python."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    if not TYPE_CHECKING:  # type checkers see the fields as arguments

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as problem:
                name = type(self).__name__
                raise config_error(problem, type(self), lambda key: name) from None

        # tells pydantic that this is a plain __init__: nested sections are then checked in one go, and places in errors stay complete
        __init__.__pydantic_base_init__ = True

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts True as 1, so `r: true` would pass for a rank of 1."""
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        if _holds_number(cls.model_fields[str(info.field_name)].annotation) and any(isinstance(item, bool) for item in inner):
            raise ValueError("must be a number, not true or false")
        return value


def empty_as_mapping(value: Any) -> Any:
    """A section heading with nothing under it means all defaults."""
    return {} if value is None else value


def given(section: Section) -> Mapping[str, Any]:
    """The keys that were set, not those that kept their default."""
    return section.model_dump(exclude_unset=True)


def _holds_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(_holds_number(part) for part in get_args(annotation))


def by_dotted_key(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A config's values by dotted key; lists are values, and so are empty mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from by_dotted_key(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
