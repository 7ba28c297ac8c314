"""A sweep: one training file, and values of some of its keys, as many trainings.

    sweep:
      adapter.r: [4, 8, 16]                                       # every combination of the lists,
      trainer.learning_rate: {min: 1e-5, max: 1e-3, log: true}    # or with a range somewhere,
      samples: 12                                                 # so many random draws
      seed: 0
      best_by: validation_loss                                    # or metric: the task's own, on the validation rows

Any key of a training file can be swept, in its dotted form; each point is the file with those values in it, checked as a file of its own. A point's
name follows from its values, so that a sweep with more values finds the trainings of the smaller one again.

Used by workflows/sweeping.py and the command line.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, cast

from atoll.config import BUILTIN, TrainConfig, is_valid_name
from atoll.config_file import SWEEP, LoadedConfig, load_parsed
from atoll.errors import ConfigError
from atoll.model_errors import key_paths
from atoll.yaml_file import YamlFile, key_hint, kind_of, nearest, read_yaml

BestBy = Literal["validation_loss", "metric"]
BEST_BY: tuple[BestBy, ...] = ("validation_loss", "metric")
CONTROLS = ("samples", "seed", "best_by")
MOST_POINTS = 1000
_RANGE_KEYS = {"min", "max", "log"}
_LONGEST_NAME = 96


@dataclass(frozen=True)
class SweepPoint:
    """One training of a sweep: its name, its values by swept key, and the file with these values in it."""

    name: str
    values: Mapping[str, Any]
    loaded: LoadedConfig[TrainConfig]


@dataclass(frozen=True)
class LoadedSweep:
    """A checked sweep. name: what the best of it will be called; keys: those that are swept; root and warnings as LoadedConfig's."""

    name: str
    points: tuple[SweepPoint, ...]
    keys: tuple[str, ...]
    best_by: BestBy
    path: Path
    root: Path
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Range:
    """Numbers from low to high: whole ones where both ends are; drawn evenly, or evenly in their logarithm."""

    low: float
    high: float
    log: bool

    def draw(self, generator: random.Random) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        drawn = generator.uniform(low, high)
        value = math.exp(drawn) if self.log else drawn
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(self.high, max(self.low, round(value)))
        return min(self.high, max(self.low, float(f"{value:.3g}")))  # three digits say enough, and stand in the name


def is_sweep(path: Path) -> bool:
    """Whether a file has a sweep section. Raises ConfigError for a file that is not YAML."""
    return SWEEP in read_yaml(path).data


def load_sweep(path: str | Path, overrides: Mapping[str, Any] | None = None) -> LoadedSweep:
    """Read a training file with a sweep section and check every point of it. Raises ConfigError, one sentence, naming file, line and key.

    overrides: as load_config's, for all points; `sweep.samples` and the like among them change the sweep itself.
    """
    file = read_yaml(Path(path))
    given = dict(overrides or {})
    section = file.data.get(SWEEP)
    if not isinstance(section, dict) or not section:
        raise ConfigError(f"{file.where((SWEEP,))}: sweep is {kind_of(section)}, expected keys with lists", hint="for example  adapter.r: [4, 8, 16]")
    section = {**section, **{key.removeprefix("sweep."): given.pop(key) for key in list(given) if key.startswith("sweep.")}}
    plain = YamlFile(file.path, {key: value for key, value in file.data.items() if key != SWEEP}, file.lines)
    axes = {key: _axis(file, key, value) for key, value in section.items() if key not in CONTROLS}
    if not axes:
        raise ConfigError(f"{file.where((SWEEP,))}: sweep names no key to sweep over", hint="for example  adapter.r: [4, 8, 16]")
    if twice := sorted(key for key in axes for other in axes if key.startswith(f"{other}.")):
        raise ConfigError(f"{file.where((SWEEP, twice[0]))}: sweep.{twice[0]} is inside another swept key", hint="sweep one of the two")
    if both := sorted(key for key in given for axis in axes if f"{key}.".startswith(f"{axis}.") or f"{axis}.".startswith(f"{key}.")):
        way_out = f"leave it out, or change the sweep: --set 'sweep.{both[0]}=[...]'"
        raise ConfigError(f"{both[0]} is given, but {file.path} sweeps over it", hint=way_out)
    best_by = section.get("best_by", BEST_BY[0])
    if best_by not in BEST_BY:
        guess = nearest(str(best_by), BEST_BY)
        hint = f"did you mean {guess}?" if guess else ""
        raise ConfigError(f"{file.where((SWEEP, 'best_by'))}: sweep.best_by is {best_by!r}, expected {' or '.join(BEST_BY)}", hint=hint)
    drawn = _points(file, axes, _whole(file, section, "samples"), _whole(file, section, "seed") or 0)
    first = cast("LoadedConfig[TrainConfig]", load_parsed(plain, "train", given, drawn[0]))
    name = _base_name(first)
    points = []
    for values, own in zip(drawn, _names(name, drawn), strict=True):
        swept = {**values, "name": own}
        points.append(SweepPoint(own, values, cast("LoadedConfig[TrainConfig]", load_parsed(plain, "train", given, swept))))
    warnings = tuple(dict.fromkeys(warning for point in points for warning in point.loaded.warnings))
    return LoadedSweep(name, tuple(points), tuple(axes), best_by, file.path, first.root, warnings)


def _axis(file: YamlFile, key: str, value: Any) -> Sequence[Any] | _Range:
    """What a key is swept over. Raises ConfigError for a key that a training file has not, and for anything but a list or a range."""
    where, known = file.where((SWEEP, key)), list(key_paths(TrainConfig))
    open_ended = any(key.startswith(f"{path}.") for path in known if path.endswith("_pattern"))
    if key == "name":
        raise ConfigError(f"{where}: sweep.name cannot be swept: names follow from the values", hint="give `name` once, outside the sweep")
    if key not in known and not open_ended:
        parent, _, leaf = key.rpartition(".")
        beside = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == parent] + ([] if parent else list(CONTROLS))
        raise ConfigError(f"{where}: sweep.{key} is not a key of a training file", hint=key_hint(leaf, parent, beside, known))
    if isinstance(value, dict) and value and set(value) <= _RANGE_KEYS:
        return _range(where, key, value)
    if isinstance(value, dict):
        inner = f"{key}.{next(iter(value), 'KEY')}"
        raise ConfigError(f"{where}: sweep.{key} is a mapping, expected a list or a range", hint=f"write {inner}: [...], or {{min: …, max: …}}")
    if not isinstance(value, list):
        hint = f"write [{value}, …], or give {key} outside the sweep"
        raise ConfigError(f"{where}: sweep.{key} is {kind_of(value)}, expected a list of values or {{min: …, max: …}}", hint=hint)
    if not value:
        raise ConfigError(f"{where}: sweep.{key} is an empty list", hint="give the values to try")
    forms = [_form(item) for item in value]
    if twice := [item for place, item in enumerate(value) if forms[place] in forms[:place]]:
        raise ConfigError(f"{where}: sweep.{key} has {twice[0]!r} more than once", hint="keep one of the two")
    return value


def _range(where: str, key: str, value: Mapping[str, Any]) -> _Range:
    low, high, log = value.get("min"), value.get("max"), value.get("log", False)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in (low, high))
    if not numbers or not isinstance(log, bool) or low >= high or (log and low <= 0):  # type: ignore[operator]
        rule = "min below max, both numbers" + (", min above 0 with log" if log else "")
        raise ConfigError(f"{where}: sweep.{key} is no range: {dict(value)}, expected {rule}", hint="for example {min: 1e-5, max: 1e-3, log: true}")
    return _Range(cast(float, low), cast(float, high), log)


def _whole(file: YamlFile, section: Mapping[str, Any], key: str) -> int | None:
    value, least = section.get(key), 1 if key == "samples" else 0
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ConfigError(f"{file.where((SWEEP, key))}: sweep.{key} is {value!r}, expected a whole number from {least}")
    return value


def _points(file: YamlFile, axes: Mapping[str, Sequence[Any] | _Range], samples: int | None, seed: int) -> list[dict[str, Any]]:
    """The values of each training: the whole grid in the order of the file, or so many different draws."""
    ranges = [key for key, axis in axes.items() if isinstance(axis, _Range)]
    if ranges and samples is None:
        raise ConfigError(
            f"{file.where((SWEEP, ranges[0]))}: sweep.{ranges[0]} is a range, and nothing says how many values to draw",
            hint="add samples: 10 to the sweep, or give a list",
        )
    generator = random.Random(seed)
    if not ranges:
        size = math.prod(len(cast("Sequence[Any]", axis)) for axis in axes.values())
        _check_number(file, min(size, samples or size))
        chosen = range(size) if samples is None or samples >= size else sorted(generator.sample(range(size), samples))
        return [_of_grid(axes, index) for index in chosen]
    assert samples is not None
    _check_number(file, samples)
    drawn: dict[str, dict[str, Any]] = {}
    for _ in range(20 * samples):
        if len(drawn) == samples:
            break
        values = {key: axis.draw(generator) if isinstance(axis, _Range) else generator.choice(axis) for key, axis in axes.items()}
        drawn.setdefault(_form(values), values)
    return list(drawn.values())


def _of_grid(axes: Mapping[str, Sequence[Any] | _Range], index: int) -> dict[str, Any]:
    """The grid's point of a number; the last key changes fastest."""
    values = {}
    for key, axis in reversed(list(cast("Mapping[str, Sequence[Any]]", axes).items())):
        index, place = divmod(index, len(axis))
        values[key] = axis[place]
    return dict(reversed(values.items()))


def _check_number(file: YamlFile, number: int) -> None:
    if number > MOST_POINTS:
        raise ConfigError(
            f"{file.where((SWEEP,))}: the sweep has {number} trainings, more than the {MOST_POINTS} that are allowed",
            hint="add samples: 50 to draw some of them, or shorten the lists",
        )


def _form(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _base_name(loaded: LoadedConfig[TrainConfig]) -> str:
    """What the file calls its adapter: name, or what the data is called, or the file itself."""
    data = loaded.config.data
    source = PurePath((data.path or data.train or "").removeprefix(BUILTIN))
    names = (loaded.config.name, source.stem, loaded.path.stem)
    return next((name for name in names if name and is_valid_name(name)), "sweep")


def _names(base: str, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """base-r_8-learning_rate_0.0005 for each point: as much of the keys as tells them apart, and a hash where that is too long or not enough."""
    keys = list(points[0])
    short = {key: _short(key, keys) for key in keys}
    plain = ["-".join([base, *(f"{short[key]}_{_slug(value)}" for key, value in point.items())]) for point in points]
    folded = [name.casefold() for name in plain]
    names = []
    for name, point in zip(plain, points, strict=True):
        if len(name) > _LONGEST_NAME or not is_valid_name(name) or folded.count(name.casefold()) > 1:
            digest = hashlib.sha256(_form(point).encode()).hexdigest()[:8]
            name = f"{re.sub(r'[.]{2,}', '.', name)[: _LONGEST_NAME - 9].rstrip('.-_')}-{digest}"
        names.append(name)
    return names


def _short(key: str, keys: Sequence[str]) -> str:
    """The last parts of a dotted key that no other swept key ends with."""
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        tail = parts[-length:]
        if sum(other.split(".")[-length:] == tail for other in keys) == 1:
            return "_".join(tail)
    return "_".join(parts)


def _slug(value: Any) -> str:
    """A value as part of a name."""
    if isinstance(value, dict):
        return "_".join(f"{key}_{_slug(item)}" for key, item in value.items()) or "empty"
    if isinstance(value, list | tuple):
        return ".".join(map(_slug, value)) or "empty"
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "empty"
