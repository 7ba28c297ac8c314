"""Schemas that cannot be enforced, and what is left of those that can."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atoll.engine.grammar import GrammarCompiler
from atoll.engine.request import Grammar
from atoll.engine.schema import read_schema
from atoll.errors import RequestRefused
from conftest import tiny_tokenizer

BAD_SCHEMAS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "is not JSON"),
    "a list": ("[]", r"is \[\], but must be a JSON object"),
    "a number": ("3", "is 3, but must be a JSON object"),
    "null": ("null", "is null, but must be"),
    "NaN": ('{"minimum": NaN}', "NaN is no JSON number"),
    "a number out of range": ('{"type":"number","minimum":1e999}', "too large"),
    "an unknown type": ('{"type":"objekt"}', "Invalid type: objekt"),
    "no type at all": ('{"type":[]}', "Unsatisfiable"),
    "a type that is a number": ('{"type":3}', "type must be"),
    "a misspelt keyword": ('{"type":"object","properties":{"a":{"type":"string","minLenght":2}}}', "at #/properties/a uses 'minLenght'"),
    "not": ('{"not":{"type":"string"}}', "uses 'not', which cannot be enforced"),
    "if": ('{"if":{"type":"string"},"then":{"minLength":2}}', "uses 'if'"),
    "uniqueItems": ('{"type":"array","items":{"uniqueItems":true,"type":"array"}}', "at #/items uses 'uniqueItems'"),
    "contains": ('{"type":"array","contains":{"type":"string"}}', "uses 'contains'"),
    "dependentRequired": ('{"type":"object","dependentRequired":{"a":["b"]}}', "uses 'dependentRequired'"),
    "propertyNames": ('{"anyOf":[{"propertyNames":{"pattern":"a"}}]}', "at #/anyOf/0 uses 'propertyNames'"),
    "nullable": ('{"type":"string","nullable":true}', "uses 'nullable'"),
    "options for the compiler": ('{"type":"string","x-guidance":{"lenient":true}}', "uses 'x-guidance'"),
    "an unknown format": ('{"type":"string","format":"nonsense"}', "Unknown format: nonsense"),
    "a pattern that does not parse": ('{"type":"string","pattern":"("}', "unclosed group"),
    "a pattern that looks ahead": ('{"type":"string","pattern":"(?=a)b"}', "look-around"),
    "a reference to nothing": ('{"$ref":"#/$defs/a"}', 'refers to "#/\\$defs/a", which is not there'),
    "a reference elsewhere": ('{"$ref":"http://example.com/s.json"}', "only places inside the schema"),
    "a reference that is a number": ('{"$ref":3}', "refers to 3"),
    "a reference to itself": ('{"$ref":"#"}', "can never be completed"),
    "references in a circle": ('{"$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}},"$ref":"#/$defs/a"}', "can never be completed"),
    "an object that requires itself": ('{"type":"object","properties":{"c":{"$ref":"#"}},"required":["c"]}', "can never be completed"),
    "a list that requires itself": ('{"type":"array","items":{"$ref":"#"},"minItems":1}', "can never be completed"),
    "a bad keyword behind a reference": ('{"$ref":"#/examples/0","examples":[{"zork":1}]}', "at #/examples/0 uses 'zork'"),
    "limits that cross": ('{"type":"integer","minimum":5,"maximum":2}', "Unsatisfiable"),
    "an empty enum": ('{"enum":[]}', "Unsatisfiable"),
    "false": ('{"type":"array","items":false,"minItems":1}', "Unsatisfiable|no text"),
    "types that exclude each other": ('{"allOf":[{"type":"string"},{"type":"number"}]}', "Unsatisfiable"),
    "choices that overlap": ('{"oneOf":[{"type":"string"},{"type":"string","minLength":2}]}', "not exclusive"),
    "properties that are a list": ('{"type":"object","properties":[]}', "properties must be an object"),
    "required that is a string": ('{"type":"object","required":"a"}', "required"),
    "items that are a number": ('{"type":"array","items":3}', "at #/items is 3, but must be a schema"),
    "minItems below zero": ('{"type":"array","minItems":-1}', "minItems"),
    "more properties than can be told apart": ('{"type":"object","minProperties":3}', "minProperties 3"),
    "half a character": ('{"const":"\\ud800"}', "cannot be used"),
    "too deep": ('{"items":' * 100 + "{}" + "}" * 100, "nested too deeply"),
    "far too deep": ("[" * 30000, "nested too deeply|not JSON"),
    "too long": (json.dumps({"enum": ["x" * 70000]}), "at most 65536 are accepted"),
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(), 320, (2,))


@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_reason(compiler: GrammarCompiler, name: str) -> None:
    """A client's mistake is a sentence to the client before anything runs; a keyword dropped in silence would break the promise."""
    text, reason = BAD_SCHEMAS[name]
    with pytest.raises(RequestRefused, match=reason) as caught:
        compiler.check(Grammar("json_schema", text))
    assert len(caught.value.message) < 420 and "\n" not in caught.value.message


GOOD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "string", "uniqueItems": False, "nullable": False}, {"type": "string"}),
    ({"properties": {"not": {"type": "null"}, "if": True}}, {"properties": {"not": {"type": "null"}, "if": True}}),  # names, not keywords
    ({"enum": [{"zork": 1}], "default": {"zork": 1}, "x-mine": [1]}, {"enum": [{"zork": 1}], "default": {"zork": 1}, "x-mine": [1]}),
    ({"const": {"$ref": "nowhere"}}, {"const": {"$ref": "nowhere"}}),
]


@pytest.mark.parametrize(("given", "kept"), GOOD, ids=str)
def test_words_that_ask_for_nothing_are_no_obstacle(compiler: GrammarCompiler, given: dict[str, Any], kept: dict[str, Any]) -> None:
    """Generated schemas are full of titles, defaults and switches set to off; and a property may be called as a keyword is."""
    assert json.loads(read_schema(json.dumps(given))) == kept
    compiler.check(Grammar("json_schema", json.dumps(given)))


@pytest.mark.parametrize(
    "given",
    [
        {"type": "object", "properties": {"c": {"$ref": "#"}}},
        {"type": "object", "properties": {"c": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["c"]},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": ["object", "null"], "properties": {"c": {"$ref": "#"}}, "required": ["c"]},
        {"type": "object", "properties": {"a/b": {"type": "null"}, "~": {"$ref": "#/properties/a~1b"}}, "required": ["~", "a/b"]},
        {"$defs": {"a b": {"enum": [1]}}, "$ref": "#/%24defs/a%20b"},
        {"prefixItems": [{"type": "null"}, {"$ref": "#"}], "type": "array", "minItems": 1},
    ],
    ids=str,
)
def test_recursion_that_can_end_is_accepted(compiler: GrammarCompiler, given: dict[str, Any]) -> None:
    """Trees and linked lists refer to themselves; only those that must go on for ever are refused."""
    compiler.check(Grammar("json_schema", json.dumps(given)))


def test_a_misspelt_keyword_gets_the_right_one_as_a_hint() -> None:
    """The commonest mistake in a schema written by hand."""
    with pytest.raises(RequestRefused) as caught:
        read_schema('{"properties": {"a/b": {"patern": "x"}}}')
    assert "at #/properties/a~1b uses 'patern'" in caught.value.message
    assert "'pattern'" in caught.value.hint
