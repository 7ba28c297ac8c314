"""Look through a JSON Schema before it is compiled: refuse what could not be enforced and what never ends.

Constrained decoding promises that an answer fits its schema. The compiler refuses most keywords it cannot enforce, but takes any word it does not
know for an annotation, so a misspelt "minLenght" would be dropped in silence; and it accepts schemas that only an endless text satisfies. Both are
found here, with the place named.

Used by grammar.py, and by the server for the parameters of tools. Plain Python.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any, NoReturn
from urllib.parse import unquote

from atoll.errors import RequestRefused

MAX_GRAMMAR_BYTES = 65_536  # of a schema, and of any other grammar
MAX_NESTING = 60  # objects and lists inside one another; the compiler's JSON reader stops at 128

_ONE = ("additionalProperties", "additionalItems", "items")  # keywords whose value is a schema (`items`: or a list of them)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_STRINGS = ("minLength", "maxLength", "pattern", "format")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("required", "minItems", "maxItems", "minProperties", "maxProperties")
_ENFORCED = frozenset((*_ONE, *_LISTS, *_MAPS, *_STRINGS, *_NUMBERS, *_COUNTS, "type", "const", "enum", "$ref"))
_ABOUT = (
    "$anchor",
    "$comment",
    "$id",
    "$schema",
    "id",
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
)
_MEDIA = ("contentEncoding", "contentMediaType", "contentSchema", "discriminator", "externalDocs", "xml")
_ANNOTATIONS = frozenset((*_ABOUT, *_MEDIA))
_NESTING_HINT = f"at most {MAX_NESTING} levels are accepted; name inner parts in $defs and refer to them"
_NO_EFFECT = {"uniqueItems": False, "nullable": False}  # with these values they ask for nothing


def read_schema(text: str) -> str:
    """The schema to compile: `text`, checked, in compact form. Raises RequestRefused naming what is wrong and where."""
    size = len(text.encode())
    if size > MAX_GRAMMAR_BYTES:  # before a look inside, which is not free
        raise RequestRefused(f"the JSON schema has {size} bytes, but at most {MAX_GRAMMAR_BYTES} are accepted")
    try:
        return _read(text)
    except RecursionError:
        raise RequestRefused("the JSON schema is nested too deeply", hint=_NESTING_HINT) from None


def _read(text: str) -> str:
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise RequestRefused(f"the JSON schema is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise RequestRefused(f"the JSON schema is {_brief(document)}, but must be a JSON object", hint='the least is {"type": "object"}')
    survey = _Survey(document)
    survey.visit(document, "", 0)
    survey.follow_references()
    survey.check_endless()
    try:
        return json.dumps(document, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise RequestRefused("the JSON schema holds a number that is too large") from None


class _Survey:
    """One walk through a schema. Places are JSON pointers into it ("" is the whole)."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._schemas: dict[str, Any] = {}  # by place, in the order they were found
        self._references: dict[str, str] = {}  # place of a `$ref` -> place of its target

    def visit(self, schema: Any, place: str, depth: int) -> None:
        """Check a schema and everything in it."""
        if depth > MAX_NESTING:
            raise RequestRefused("the JSON schema is nested too deeply", hint=_NESTING_HINT)
        if not isinstance(schema, dict | bool):
            _refuse(place, f"is {_brief(schema)}, but must be a schema: an object, true or false")
        self._schemas[place] = schema
        if isinstance(schema, dict):
            self._check_keywords(schema, place)
            self._check_least_properties(schema, place)
            for name, inner in _inner(schema):
                self.visit(inner, f"{place}/{name}", depth + 1)
            if "$ref" in schema:
                self._references[place] = self._target(schema["$ref"], place)

    def follow_references(self) -> None:
        """Visit targets that no keyword leads to, until there are none left."""
        pending = list(self._references.values())
        while pending:
            target = pending.pop()
            if target not in self._schemas:
                before = len(self._references)
                self.visit(self._at(target), target, 0)
                pending += list(self._references.values())[before:]

    def check_endless(self) -> None:
        """Refuse a schema that only an endless text satisfies, such as an object that requires itself."""
        ends: set[str] = set()
        pending, before = self._innermost_first(), -1
        while len(ends) > before:  # once where nothing refers back
            before = len(ends)
            for place in pending:
                if self._ends(self._schemas[place], place, ends):
                    ends.add(place)
            pending = [place for place in pending if place not in ends]
        if "" not in ends:
            raise RequestRefused(
                "the JSON schema can never be completed: what it demands contains itself without end",
                hint="make the part that refers back optional, or give it another choice, such as null",
            )

    def _innermost_first(self) -> list[str]:
        """All places that the whole leads to, each after those that it leads to itself, as far as they do not lead back."""
        order: list[str] = []
        seen, open_places = {""}, [("", self._leads_to(""))]
        while open_places:
            place, following = open_places[-1]
            new = next((name for name in following if name not in seen), None)
            if new is None:
                order.append(place)
                open_places.pop()
            else:
                seen.add(new)
                open_places.append((new, self._leads_to(new)))
        return order

    def _leads_to(self, place: str) -> Iterator[str]:
        schema = self._schemas[place]
        if place in self._references:
            yield self._references[place]
        if isinstance(schema, dict):
            yield from (f"{place}/{name}" for name, _ in _inner(schema))

    def _ends(self, schema: Any, place: str, ends: set[str]) -> bool:
        """Whether some finite value can satisfy the schema, given the places of which that is known."""
        if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
            return True  # false is the compiler's to refuse
        if place in self._references and self._references[place] not in ends:
            return False
        if not all(f"{place}/allOf/{i}" in ends for i in range(_length(schema, "allOf"))):
            return False
        for name in ("anyOf", "oneOf"):
            if _length(schema, name) and not any(f"{place}/{name}/{i}" in ends for i in range(_length(schema, name))):
                return False
        types = schema.get("type", "any")
        return any(self._value_ends(schema, place, ends, kind) for kind in (types if isinstance(types, list) and types else [types]))

    def _value_ends(self, schema: dict[str, Any], place: str, ends: set[str], kind: Any) -> bool:
        if kind == "object":
            required = schema.get("required")
            names = [f"{place}/properties/{_escape(name)}" for name in required if isinstance(name, str)] if isinstance(required, list) else []
            return all(name in ends for name in names if name in self._schemas)
        least = schema.get("minItems", 0)
        if kind == "array" and isinstance(least, int) and least > 0:
            first = _length(schema, "prefixItems")
            rest = f"{place}/items"
            return all(f"{place}/prefixItems/{i}" in ends for i in range(min(first, least))) and (
                least <= first or rest not in self._schemas or rest in ends
            )
        return True

    def _check_keywords(self, schema: dict[str, Any], place: str) -> None:
        """Refuse a keyword that would not be enforced, unless it only describes; drop those that ask for nothing."""
        for key in list(schema):
            if key in _NO_EFFECT and schema[key] is _NO_EFFECT[key]:
                del schema[key]
            elif key not in _ENFORCED and key not in _ANNOTATIONS and (key == "x-guidance" or not key.startswith("x-")):
                near = difflib.get_close_matches(key, sorted(_ENFORCED), n=1, cutoff=0.8)
                hint = f"did you mean {near[0]!r}?" if near else "leave it out, or say it with " + ", ".join(("anyOf", "enum", "pattern", "minItems"))
                if key == "nullable":
                    hint = 'write {"type": ["string", "null"]} or anyOf with {"type": "null"}'
                _refuse(place, f"uses {key!r}, which cannot be enforced", hint)

    def _check_least_properties(self, schema: dict[str, Any], place: str) -> None:
        """Names that `properties` does not list may come twice in an answer, so more than one of them cannot be counted on."""
        least, required = schema.get("minProperties", 0), schema.get("required", [])
        if isinstance(least, int) and isinstance(required, list) and least > len(required) + 1:
            _refuse(place, f"has minProperties {least}, which is enforced only up to one more than it requires by name", "name them in 'required'")

    def _target(self, reference: Any, place: str) -> str:
        """The place a `$ref` points to, in one spelling."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            _refuse(place, f"refers to {_brief(reference)}, but only places inside the schema can be followed", "write it as #/$defs/name")
        pointer = unquote(reference[1:])
        target = "".join("/" + _escape(part.replace("~1", "/").replace("~0", "~")) for part in pointer.split("/")[1:])
        try:
            self._at(target)
        except (KeyError, IndexError, ValueError, TypeError):
            _refuse(place, f"refers to {_brief(reference)}, which is not there")
        return target

    def _at(self, place: str) -> Any:
        found: Any = self._document
        for part in place.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found[int(name)] if isinstance(found, list) else found[name]
        return found


def _inner(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(pointer from here, value) of each schema directly inside. A value of the wrong shape is the compiler's to refuse."""
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            yield from ((f"{key}/{_escape(name)}", inner) for name, inner in value.items())
        elif (key in _LISTS or key == "items") and isinstance(value, list):
            yield from ((f"{key}/{i}", inner) for i, inner in enumerate(value))
        elif key in _ONE:
            yield key, value


def _length(schema: dict[str, Any], key: str) -> int:
    value = schema.get(key)
    return len(value) if isinstance(value, list) else 0


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse(place: str, what: str, hint: str = "") -> NoReturn:
    where = f"the JSON schema at #{place}" if place else "the JSON schema"
    raise RequestRefused(f"{where} {what}", hint=hint)
