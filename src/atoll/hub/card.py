"""The card: one page that says what an adapter is, what it was made from and how good it is.

Everything on it comes from strangers' files, so every text is escaped or fenced: a name cannot become a link, a heading or HTML.

Made by Hub.show; printed by the command line, shown by the server and the interface.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atoll.hub.intake import StoredFile
from atoll.hub.ledger import Run, Score
from atoll.hub.records import Version
from atoll.train.cost import Cost, price_text

_README_SHOWN = 4000
_SPEC_SHOWN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform")


@dataclass(frozen=True)
class Parent:
    """One adapter that a composed one was made of. name is the hub's, if it is still there."""

    digest: str | None
    name: str | None
    weight: float | None


@dataclass(frozen=True)
class Card:
    """All that the hub knows of one version."""

    version: Version
    config: Mapping[str, Any]  # adapter_config.json
    manifest: Mapping[str, Any]
    readme: str
    files: tuple[StoredFile, ...]
    scores: tuple[Score, ...]
    runs: tuple[Run, ...]
    parents: tuple[Parent, ...]
    children: tuple[str, ...]  # references of what was composed from this version

    @property
    def base(self) -> Mapping[str, Any]:
        """The base record: name and the four hashes, None where unknown."""
        return dict(self.manifest["base"])

    @property
    def training(self) -> Mapping[str, Any]:
        """The training record, empty for a stranger's adapter."""
        return dict(self.manifest.get("training") or {})

    def to_json(self) -> dict[str, Any]:
        return {
            **self.version.to_json(),
            "config": dict(self.config),
            "manifest": dict(self.manifest),
            "readme": self.readme,
            "files": [{"name": file.name, "sha256": file.sha256, "size_bytes": file.size_bytes} for file in self.files],
            "scores": [score.to_json() for score in self.scores],
            "runs": [run.to_json() for run in self.runs],
            "parents": [{"digest": parent.digest, "name": parent.name, "weight": parent.weight} for parent in self.parents],
            "children": list(self.children),
        }

    def markdown(self) -> str:
        """The card as Markdown, safe to render as HTML."""
        parts = [self._facts(), self._edits(), self._scores(), self._training(), self._cost(), self._lineage(), self._files(), self._readme()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _facts(self) -> str:
        version, base = self.version, self.base
        stated = {key: self.config[key] for key in _SPEC_SHOWN if self.config.get(key) not in (None, {}, [], False)}
        spec = [(key, ", ".join(map(str, value)) if isinstance(value, list) else value) for key, value in stated.items()]
        rows = [
            ("version", f"{version.number}{' (yanked)' if version.yanked else ''}, {version.created:%Y-%m-%d %H:%M} UTC"),
            ("digest", f"sha256:{version.digest}"),
            ("kind", f"composed ({self._form})" if version.kind == "composed" else version.kind),
            ("base", version.base or "not recorded"),
            ("base weights", base.get("weights_fingerprint") or "not recorded: checked by shapes only"),
            *spec,
            ("parameters", f"{version.num_parameters:,}" if version.num_parameters else ""),
            ("bytes", f"{version.size_bytes:,}"),
            ("task", version.task),
            ("licence", version.licence or "not stated"),
            ("tags", ", ".join(version.tags)),
            ("origin", _origin(self.manifest.get("origin"))),
            ("message", version.message),
        ]
        title = f"# {escape(version.name)}"
        about = f"{escape(version.description)}\n\n" if version.description else ""
        return f"{title}\n\n{about}{_table(('', ''), [(key, value) for key, value in rows if value not in (None, '')])}"

    @property
    def _form(self) -> str:
        """What its files hold, whatever it was made from: lora, reft or lora+reft."""
        return str(self.config.get("peft_type", "")).casefold().replace("_", "+")

    def _edits(self) -> str:
        """One line a ReFT part; see model/reft.py for what the words mean."""
        head = ("method", "layers", "rank", "positions", "component", "tied", "activation", "dropout", "weight")
        parts = [part for part in self.config.get("reft") or () if isinstance(part, Mapping)]
        return f"## Edits\n\n{_table(head, [_edit_cells(part) for part in parts])}" if parts else ""

    def _scores(self) -> str:
        head = ("task", "metric", "value", "stderr", "n", "failures", "by options", "task version")
        rows = [
            (s.task, s.metric, f"{s.value:.4f}", _figure(s.stderr), s.n, s.failures, _figure(s.options_value), s.task_version[:12])
            for s in self.scores
        ]
        return f"## Scores\n\n{_table(head, rows)}" if rows else ""

    def _training(self) -> str:
        plain = [(key, value) for key, value in self.training.items() if isinstance(value, str | int | float) and not isinstance(value, bool)]
        return f"## Training\n\n{_table(('', ''), plain)}" if plain else ""

    def _cost(self) -> str:
        """What the newest finished run cost that made it; nothing for an adapter that was trained elsewhere."""
        known = [run.cost for run in self.runs if run.status == "finished" and run.cost is not None]
        if not known:
            return ""
        return f"## Cost\n\n{_table(('', ''), cost_rows(Cost.from_json(known[0])))}"

    def _lineage(self) -> str:
        rows = [
            (parent.name or "unknown here", f"sha256:{parent.digest}" if parent.digest else "", _figure(parent.weight)) for parent in self.parents
        ]
        made_of = f"## Composed of\n\n{_table(('adapter', 'digest', 'weight'), rows)}" if rows else ""
        used_in = "## Used in\n\n" + "\n".join(f"- {escape(child)}" for child in self.children) if self.children else ""
        return "\n\n".join(part for part in (made_of, used_in) if part)

    def _files(self) -> str:
        return f"## Files\n\n{_table(('file', 'bytes', 'sha256'), [(file.name, f'{file.size_bytes:,}', file.sha256) for file in self.files])}"

    def _readme(self) -> str:
        """In a fence longer than any inside, so that it is shown as text: no links, images or HTML of a stranger."""
        if not self.readme.strip():
            return ""
        shown = self.readme[:_README_SHOWN] + ("\n…" if len(self.readme) > _README_SHOWN else "")
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", shown)), default=0))
        return f"## README of its author\n\n{fence}text\n{shown}\n{fence}"


def escape(value: Any) -> str:
    """Text as one line of Markdown that means nothing but itself."""
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", line)
    return re.sub(r"(?i)\b(https?|ftp|www)([:.])", r"\1&#8203;\2", line)  # some renderers link bare addresses: a zero-width space stops them


def cost_rows(cost: Cost) -> list[tuple[str, str]]:
    """A cost as names and figures, what is not known left out."""
    price = price_text(cost)
    rows = [
        ("tokens", f"{cost.tokens:,}" if cost.tokens is not None else None),
        ("seconds", f"{cost.seconds:,.1f}"),
        ("CPU-seconds", f"{cost.cpu_seconds:,.1f}" if cost.cpu_seconds is not None else None),
        ("peak memory of the process", f"{cost.peak_memory_bytes / 1e6:,.0f} MB" if cost.peak_memory_bytes else None),
        ("energy of the processors", f"{cost.energy_joules / 3600:,.2f} Wh" if cost.energy_joules is not None else None),
        ("price", f"{price} = {cost.formula}" if price else None),
    ]
    return [(name, text) for name, text in rows if text is not None]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(escape(cell) for cell in row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _edit_cells(part: Mapping[str, Any]) -> tuple[Any, ...]:
    layers, ranks, positions = part.get("layers"), part.get("rank_pattern") or {}, part.get("positions")
    other = ", ".join(f"layer {layer}: {rank}" for layer, rank in ranks.items())
    return (
        part.get("method"),
        "all" if layers is None else _listed(layers),
        f"{part.get('rank')} ({other})" if other else part.get("rank"),
        _listed(positions) if isinstance(positions, list) else positions,
        part.get("component"),
        "yes" if part.get("tied") else "no",
        part.get("activation") or "none",
        part.get("dropout"),
        part.get("weight"),
    )


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _origin(origin: Any) -> str:
    if not isinstance(origin, Mapping):
        return ""
    return " ".join(str(origin[key]) for key in ("source", "revision") if origin.get(key))
