"""What a card says of a composition: how it was made, what it was compared with, and each parent's weights by layer.

The manifest may be a stranger's, so whatever is not of the expected form is left out.

Used by card.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LAYERS_NOTE = "Each layer has its own weight; the mean is shown, all are in the manifest."


def composition_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Method, form, number of examples, seed, how it was chosen and what compressing kept, as names and values."""
    made = _mapping(manifest.get("composition"))
    kept, num = _number(made.get("energy_kept")), _number(made.get("num_examples"))
    rows = [
        ("method", _text(made.get("method"))),
        ("form", _text(made.get("form"))),
        ("k (examples)", f"{num:g}" if num is not None else ""),
        ("seed", _text(made.get("seed"))),
        ("compressed to rank", _text(made.get("rank"))),
        ("kept of the updates' energy", f"{kept:.2%}" if kept is not None and (kept < 1 or made.get("rank") is not None) else ""),
    ]
    return [(name, text) for name, text in rows if text]


def control_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """A row for each contestant that was measured: name, held-out loss, mean score over seeds, mean accuracy of the likeliest label."""
    rows = []
    for name, figures in _mapping(_mapping(manifest.get("composition")).get("controls")).items():
        found = _mapping(figures)
        loss, error = _number(found.get("loss")), _number(found.get("loss_stderr"))
        held_out = "" if loss is None else f"{loss:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        rows.append((str(name), held_out, _mean(found.get("scores")), _mean(found.get("options"))))
    return rows


def layer_weights(entry: Any) -> tuple[float, ...] | None:
    """The weights of a parent's own layers, of its entry in a manifest; None where it has one weight for all."""
    found = _mapping(entry)
    weights, layers = found.get("layer_weights"), found.get("layers")
    if not isinstance(weights, list) or not weights or any(_number(weight) is None for weight in weights):
        return None
    if isinstance(layers, list) and layers and all(type(layer) is int and 0 <= layer < len(weights) for layer in layers):
        weights = [weights[layer] for layer in layers]
    return tuple(float(weight) for weight in weights)


def range_text(weights: Sequence[float], digits: int = 3) -> str:
    """ "-0.120 … +0.480": the least and the greatest."""
    return f"{min(weights):+.{digits}f} … {max(weights):+.{digits}f}"


def strength(weight: float | None, by_layer: Sequence[float] | None) -> float:
    """The mean of |weight|, which signs of layers do not cancel in; 0 where nothing is known."""
    if by_layer:
        return sum(abs(one) for one in by_layer) / len(by_layer)
    return abs(weight or 0.0)


def parent_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of one parent, the same wherever it is told: digest, name, weight, and where layers have weights, layer_weights and layers."""
    told: dict[str, Any] = {key: entry.get(key) for key in ("digest", "name", "weight")}
    return told | {key: list(entry[key]) for key in ("layer_weights", "layers") if isinstance(entry.get(key), list | tuple)}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _mean(values: Any) -> str:
    if not isinstance(values, list) or not values or any(_number(value) is None for value in values):
        return ""
    return f"{sum(values) / len(values):.4f}"
