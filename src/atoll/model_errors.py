"""Turn what pydantic found wrong into one sentence for people.

The one idea: pydantic reports a place (`("trainer", "r")`) and a kind of mistake; the place leads back through the models to the field, whose
description is the hint and whose neighbours are the keys that might have been meant. Where one of several models stands at a place, pydantic names
its tag there, which is no key of the file. The first problem is told in full, the others are counted.

Used by config and config_section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from atoll.errors import ConfigError
from atoll.yaml_file import Key, key_hint, key_text, kind_of, nearest

_LONGEST_VALUE = 60  # characters of a wrong value that a message shows


def config_error(
    problem: ValidationError,
    model: type[BaseModel],
    where: Callable[[Key], str],
    renamed: Callable[[str], str | None] = lambda path: None,
) -> ConfigError:
    """One ConfigError for all that `problem` lists.

    where: the file and line (or other origin) of a key. renamed: what the file itself calls a key, when it was translated from another form.
    """
    first, *rest = problem.errors(include_url=False)
    key, owner, field = _place(model, first["loc"])
    path = renamed(key_text(key)) or key_text(key)
    sentence, hint = _sentence(first, key, path, model, owner, field)
    origin = where(key)
    others = [_place(model, error["loc"])[0] for error in rest]
    others = [other for other in others if key[: len(other)] != other]  # a list with a wrong entry is no second problem
    if others:
        names = list(dict.fromkeys(key_text(other) for other in others))
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        sentence += f" (and {len(others)} more problem{'s' if len(others) > 1 else ''}: {listed})"
    return ConfigError(f"{origin}: {sentence}" if origin else sentence, hint=hint)


def key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a model, sections before their contents; keys inside lists are left out."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if not _is_list(field.annotation):
            paths = (path for inner in _models_in(field.annotation) for path in key_paths(inner, f"{prefix}{name}."))
            yield from dict.fromkeys(paths)


def _sentence(
    error: Mapping[str, Any], key: Key, path: str, model: type[BaseModel], owner: type[BaseModel], field: FieldInfo | None
) -> tuple[str, str]:
    """The sentence about one error and its hint."""
    kind, value, context = error["type"], error.get("input"), error.get("ctx", {})
    description = field.description if field is not None and field.description else ""
    if kind == "extra_forbidden":
        parent = key_text(key[:-1])
        return f"{path} is not a key that Atoll knows", key_hint(str(key[-1]), parent, owner.model_fields, key_paths(model))
    if kind == "missing":
        return f"{path} is missing", f"{path}: {description}"
    if kind == "value_error" and isinstance(value, (Mapping, BaseModel)):
        return f"{path}: {context['error']}" if path else str(context["error"]), ""
    shown = repr(value) if len(repr(value)) <= _LONGEST_VALUE else repr(value)[:_LONGEST_VALUE] + "..."
    if kind == "value_error":
        return f"{path} is {shown}: {context['error']}", f"{path}: {description}"
    guess = nearest(value, _choices(field)) if kind == "literal_error" and isinstance(value, str) else None
    meant = f"did you mean {guess}? " if guess else ""
    return f"{path} is {shown}: {_rule(kind, value, context, error['msg'])}", f"{meant}{path}: {description}"


def _rule(kind: str, value: Any, context: Mapping[str, Any], message: str) -> str:
    """What a value must be, for pydantic's kinds of error; its own words for a kind that is not listed."""
    bounds = {
        "greater_than": ("must be above", "gt"),
        "greater_than_equal": ("must be at least", "ge"),
        "less_than": ("must be below", "lt"),
        "less_than_equal": ("must be at most", "le"),
        "literal_error": ("must be", "expected"),
    }
    if kind in bounds:
        words, name = bounds[kind]
        bound = context[name]
        return f"{words} {bound:g}" if isinstance(bound, float) else f"{words} {bound}"
    if kind == "string_type" and not isinstance(value, (dict, list, type(None))):
        return f"must be text, but this is {kind_of(value)}; put it in quotes"
    wanted = {
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "float_parsing": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "string_type": "text",
        "tuple_type": "a list",
        "dict_type": "keys with values",
        "model_type": "keys with values",
        "model_attributes_type": "keys with values",
        "string_too_short": "text that is not empty",
    }
    if kind in wanted:
        return f"must be {wanted[kind]}" + (f", but this is {kind_of(value)}" if kind.endswith("_type") else "")
    if kind in ("too_long", "string_too_long"):
        return f"must have at most {context['max_length']} {'entries' if kind == 'too_long' else 'characters'}"
    if kind == "too_short":
        return f"must have at least {context['min_length']} entries" if context["min_length"] > 1 else "must not be empty"
    return message[:1].lower() + message[1:]


def _place(model: type[BaseModel], location: Key) -> tuple[Key, type[BaseModel], FieldInfo | None]:
    """The key of the file that a location of pydantic means, the model that holds its last name, and that field; None when the name is unknown."""
    owner, field, key = model, None, list[str | int]()
    inner: type[BaseModel] | None = model
    tagged: dict[str | int, type[BaseModel]] = {}
    for part in location:
        if part in tagged:
            inner, tagged = tagged[part], {}
            continue
        key.append(part)
        if isinstance(part, int) or inner is None:
            continue
        owner, field = inner, inner.model_fields.get(part)
        inner = next(_models_in(field.annotation), None) if field is not None else None
        tagged = _tags(field.annotation) if field is not None else {}
    return tuple(key), owner, field


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside an annotation such as `Model`, `Model | None`, `Model | Other` or `tuple[Model, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _models_in(part)


def _tags(annotation: Any) -> dict[str | int, type[BaseModel]]:
    """The models of a tagged union by tag; {} for any other annotation."""
    return {
        metadata.tag: next(_models_in(part))
        for part in get_args(annotation)
        for metadata in getattr(part, "__metadata__", ())
        if isinstance(metadata, Tag)
    }


def _is_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is tuple


def _choices(field: FieldInfo | None) -> list[str]:
    return [choice for choice in get_args(field.annotation) if isinstance(choice, str)] if field is not None else []
