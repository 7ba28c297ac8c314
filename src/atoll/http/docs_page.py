"""GET /docs: the OpenAPI document as a page that needs nothing from elsewhere, no script and no style sheet of another site.

Used by app.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; background: #fff }
details { border: 1px solid #d0d7de; border-radius: 6px; margin: .4rem 0; padding: .4rem .8rem }
summary { cursor: pointer } code { font: 14px/1.4 ui-monospace, monospace }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0 }
.method { display: inline-block; min-width: 4rem; font-weight: 700 } .dim { color: #57606a }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 } details { border-color: #30363d } .dim { color: #9198a1 } }
"""


def docs_page(document: Mapping[str, Any]) -> str:
    """The page as HTML."""
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{title}</title>",
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{escape(info.get('description', ''))}</p>",
        "<p class='dim'>The same for programs: <a href='openapi.json'><code>openapi.json</code></a></p>",
    ]
    for tag, routes in _by_tag(document).items():
        parts.append(f"<h2>{escape(tag)}</h2>")
        parts += [_route(path, method, route, document) for path, method, route in routes]
    return "".join(parts) + "</body></html>"


def _by_tag(document: Mapping[str, Any]) -> dict[str, list[tuple[str, str, Mapping[str, Any]]]]:
    found: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            found.setdefault(route.get("tags", ["Server"])[0], []).append((path, method, route))
    return found


def _route(path: str, method: str, route: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    head = f"<span class='method'>{method.upper()}</span> <code>{escape(path)}</code> <span class='dim'>{escape(route.get('summary', ''))}</span>"
    inside = f"<p>{escape(route['description'])}</p>" if route.get("description") else ""
    if body is not None:
        inside += "<h4>Body</h4>" + _fields(_resolved(body, document), document)
    answers = "".join(
        f"<tr><td><code>{escape(str(code))}</code></td><td>{escape(answer.get('description', ''))}</td></tr>"
        for code, answer in sorted(route.get("responses", {}).items())
    )
    return f"<details><summary>{head}</summary>{inside}<h4>Answers</h4><table>{answers}</table></details>"


def _fields(schema: Mapping[str, Any], document: Mapping[str, Any], depth: int = 0) -> str:
    """The fields of an object as a table; those of objects inside it below their own."""
    required = schema.get("required", [])
    rows = []
    for name, field in schema.get("properties", {}).items():
        note = " (required)" if name in required else ""
        rows.append(
            f"<tr><td><code>{escape(name)}</code></td><td class='dim'>{escape(_kind(field, document))}{note}</td>"
            f"<td>{escape(field.get('description', ''))}</td></tr>"
        )
        inner = _object_in(field, document)
        if inner is not None and depth < 2:
            rows.append(f"<tr><td></td><td colspan='2'>{_fields(inner, document, depth + 1)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _kind(field: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(option, document) for option in field["anyOf"])
    if "$ref" in field:
        return "object"
    if "enum" in field or "const" in field:
        return " or ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}), document)}"
    return str(field.get("type", "any"))


def _object_in(field: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The object type that a field holds, alone, or null, or in a list."""
    for option in (field, *field.get("anyOf", [])):
        option = option.get("items", option) if option.get("type") == "array" else option
        if "$ref" in option:
            return _resolved(option, document)
    return None


def _resolved(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found
