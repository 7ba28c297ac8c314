"""Which interventions act where: PyReFT's ReftConfig, and its form as JSON from which the same interventions are built again.

PyReFT saves positional lists and the names of classes; dtype, act_fn, dropout and add_bias are lost there. Here every keyword of an intervention is
in the file, under a version number, and a path such as `roberta.encoder.layer[3].output` comes back as it was.

Used by model.py (a ReftModel has one), folder.py, importer.py, convert.py.
"""

from __future__ import annotations

import copy
import enum
import json
from collections import namedtuple
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from atoll.errors import AdapterFormatError, BaseMismatch, ConfigError
from atoll.files import write_file
from atoll.reft.components import Site, unwrapped
from atoll.reft.interventions import Intervention, class_name, class_named

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"

# The order is PyReFT's: its files hold these as lists.
RepresentationConfig = namedtuple(
    "RepresentationConfig",
    (
        "layer",
        "component",
        "unit",
        "max_number_of_units",
        "low_rank_dimension",
        "intervention_type",
        "intervention",
        "subspace_partition",
        "group_key",
        "intervention_link_key",
        "moe_key",
        "source_representation",
        "hidden_source_representation",
        "latent_dim",
    ),
    defaults=(0, "block_output", "pos", 1, *[None] * 10),
)
_SAVED = tuple(name for name in RepresentationConfig._fields if name not in ("intervention", "intervention_type", "source_representation"))


class TaskType(str, enum.Enum):  # noqa: UP042 (str(TaskType.SEQ_CLS) is what PyReFT's is)
    """What a ReFT model is trained for."""

    SEQ_CLS = "SEQ_CLS"
    CAUSAL_LM = "CAUSAL_LM"


class ReftType(str, enum.Enum):  # noqa: UP042
    """PyReFT's names of two methods."""

    LOREFT = "LOREFT"
    NLOREFT = "NOREFT"


class ReftConfig:
    """One intervention a representation, in the order in which unit_locations names them.

    representations: a dict, a RepresentationConfig, or a list of these and of lists of field values in PyReFT's order. Each has `intervention`, an
    instance, or `intervention_type`, a class (intervention_types gives one for all, or one each). Of `mode` only "parallel" is there: ReFT has no
    source whose activations could be taken one after another. Further keywords become attributes, as with a transformers configuration.

    Raises ConfigError for keys that PyReFT does not have, and for an entry with both an instance and a class, or neither.
    """

    def __init__(
        self,
        representations: Any = (),
        intervention_types: Any = None,
        mode: str = "parallel",
        sorted_keys: Sequence[str] | None = None,
        model_type: Any = None,
        intervention_dimensions: Any = None,
        intervention_constant_sources: Any = None,
        **others: Any,
    ) -> None:
        if mode != "parallel":
            raise ConfigError(f"the mode is {mode!r}, but ReFT has only 'parallel'")
        several = isinstance(representations, (list, tuple)) and not isinstance(representations, RepresentationConfig)
        entries = [_entry(given) for given in (representations if several else [representations])]
        types = list(intervention_types) if isinstance(intervention_types, (list, tuple)) else [intervention_types] * len(entries)
        if len(types) != len(entries):
            raise ConfigError(f"there are {len(types)} intervention_types for {len(entries)} representations")
        self.representations = [_with_type(index, entry, given) for index, (entry, given) in enumerate(zip(entries, types, strict=True))]
        self.mode = mode
        self.sorted_keys = sorted_keys
        self.model_type = model_type
        self.intervention_dimensions = intervention_dimensions
        self.intervention_constant_sources = intervention_constant_sources
        self.base: dict[str, Any] = {}
        self.text_config: Any = None
        self.__dict__.update(others)

    @property
    def intervention_types(self) -> list[type]:
        """The class of each intervention."""
        return [type(entry.intervention) if entry.intervention is not None else entry.intervention_type for entry in self.representations]

    @property
    def keys(self) -> list[str]:
        """The name of each intervention, as PyReFT names its files."""
        keys: list[str] = []
        for entry in self.representations:
            place = f"comp_{entry.component.replace('.', '_')}" if "." in entry.component else f"layer_{entry.layer}_comp_{entry.component}"
            stem = f"{place}_unit_{entry.unit.replace('.', '_')}_nunit_{entry.max_number_of_units}"
            keys.append(f"{stem}#{sum(key.rpartition('#')[0] == stem for key in keys)}")
        return keys

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """The base's text configuration once a ReftModel has this one: transformers' Trainer aligns a tokenizer's special tokens with it."""
        return self if self.text_config is None else self.text_config

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON: interventions as class and keywords. Raises ConfigError for a keyword of a user's class that JSON cannot hold."""
        first: dict[int, str] = {}
        entries = []
        for key, entry in zip(self.keys, self.representations, strict=True):
            saved = {name: getattr(entry, name) for name in _SAVED}
            if entry.intervention is None:
                described: dict[str, Any] | None = {"type": class_name(entry.intervention_type)}
            else:
                described = {"same_as": first[id(entry.intervention)]} if id(entry.intervention) in first else _described(key, entry.intervention)
                first.setdefault(id(entry.intervention), key)
            entries.append({"key": key, **saved, "intervention": described})
        return {"atoll_reft_format": FORMAT_VERSION, "mode": self.mode, "base": self.base, "representations": entries}

    def to_json_string(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> ReftConfig:
        """The configuration of a `to_dict`, with new interventions (initial values). Raises AdapterFormatError naming what is not as it must be."""
        version = data.get("atoll_reft_format") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise AdapterFormatError(f"the ReFT configuration has format {version!r}, but this version of Atoll reads {FORMAT_VERSION}")
        known = {"atoll_reft_format", "mode", "base", "representations"}
        if set(data) != known:
            raise AdapterFormatError(f"the ReFT configuration has the keys {sorted(data)}, but must have {sorted(known)}")
        made: dict[str, Intervention] = {}
        try:
            config = cls(representations=[_restored(entry, made) for entry in data["representations"]], mode=data["mode"])
        except (ConfigError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise AdapterFormatError(f"the ReFT configuration cannot be read: {error}") from error
        if config.keys != [entry["key"] for entry in data["representations"]]:
            raise AdapterFormatError("the keys of the ReFT configuration do not fit its layers and components")
        config.base = dict(data["base"])
        return config

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json into a folder, which is made."""
        write_file(Path(save_directory) / CONFIG_FILE, self.to_json_string())

    @classmethod
    def from_pretrained(cls, load_directory: str | Path) -> ReftConfig:
        """Read what `save_pretrained` or ReftModel.save wrote. Raises AdapterFormatError."""
        file = Path(load_directory) / CONFIG_FILE
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AdapterFormatError(f"{file} cannot be read: {error}") from error
        return cls.from_dict(data)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def with_instances(given: ReftConfig, sites: list[Site], model: nn.Module) -> ReftConfig:
    """A copy of the configuration for a base, with an instance in each entry. Raises ConfigError for one that does not fit its site."""
    config = copy.copy(given)
    linked: dict[Any, nn.Module] = {}
    entries = []
    for entry, site in zip(given.representations, sites, strict=True):
        intervention = linked.get(entry.intervention_link_key) if entry.intervention_link_key is not None else None
        if intervention is None:
            intervention = entry.intervention if entry.intervention is not None else _instance(entry, site, model)
        if entry.intervention_link_key is not None:
            linked[entry.intervention_link_key] = intervention
        if not isinstance(intervention, nn.Module):
            raise ConfigError(f"the intervention of {entry.component} is a {type(intervention).__name__}, but must be a torch module")
        width = getattr(intervention, "embed_dim", None)
        if isinstance(width, int) and site.width is not None and width != site.width:
            raise ConfigError(f"the intervention of {site.path} has embed_dim {width}, but the base is {site.width} wide there")
        rank = getattr(intervention, "low_rank_dimension", entry.low_rank_dimension)
        entries.append(entry._replace(intervention=intervention, intervention_type=None, low_rank_dimension=rank))
    config.representations = entries
    config.model_type = str(type(unwrapped(model)))
    config.base = _description(model)
    base_config = unwrapped(model).config
    config.text_config = base_config.get_text_config() if hasattr(base_config, "get_text_config") else base_config
    return config


def _instance(entry: Any, site: Site, model: Any) -> nn.Module:
    """An instance of an entry's class, made with the entry's fields as PyReFT makes it."""
    if entry.low_rank_dimension is None:
        raise ConfigError(f"the representation of {site.path} has an intervention_type but no low_rank_dimension")
    width = site.width if site.width is not None else unwrapped(model).config.hidden_size
    fields = {name: value for name, value in entry._asdict().items() if value is not None and not name.startswith("intervention")}
    made: nn.Module = entry.intervention_type(**fields, embed_dim=width * entry.max_number_of_units, use_fast=False)
    return made


def _description(model: Any) -> dict[str, Any]:
    """What a saved configuration says of its base."""
    config = unwrapped(model).config
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        "name_or_path": getattr(config, "_name_or_path", "") or None,
        "architecture": type(unwrapped(model)).__name__,
        "hidden_size": getattr(text, "hidden_size", None),
        "num_hidden_layers": getattr(text, "num_hidden_layers", None),
    }


def check_base(saved: Mapping[str, Any], model: nn.Module) -> None:
    """Raises BaseMismatch if a saved configuration belongs to a base of other measures."""
    found = _description(model)
    for name in ("hidden_size", "num_hidden_layers"):
        if saved.get(name) not in (None, found[name]):
            raise BaseMismatch(f"the ReFT model was saved with a base whose {name} is {saved[name]}, but this one's is {found[name]}")


def _entry(given: Any) -> Any:
    if isinstance(given, RepresentationConfig):
        return given
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(RepresentationConfig._fields))
        if unknown:
            near = get_close_matches(unknown[0], RepresentationConfig._fields, n=1)
            raise ConfigError(
                f"a representation has the key {unknown[0]!r}, but its keys are {', '.join(RepresentationConfig._fields)}",
                hint=f"did you mean {near[0]!r}?" if near else "",
            )
        return RepresentationConfig(**given)
    if isinstance(given, (list, tuple)) and len(given) <= len(RepresentationConfig._fields):
        return RepresentationConfig(*given)
    raise ConfigError(f"a representation is a {type(given).__name__}, but must be a dict, a list of fields or a RepresentationConfig")


def _with_type(index: int, entry: Any, given: Any) -> Any:
    """The entry with exactly one of intervention and intervention_type, and the rank of its intervention."""
    if entry.intervention is not None and entry.intervention_type is not None:
        raise ConfigError(f"representation {index} has an intervention and an intervention_type, but must have one of them")
    if entry.unit != "pos":
        raise ConfigError(f"representation {index} has the unit {entry.unit!r}, but ReFT edits positions: 'pos'")
    if entry.source_representation is not None or entry.hidden_source_representation is not None:
        raise ConfigError(f"representation {index} has a source_representation, but ReFT's interventions take none")
    if entry.intervention is not None:
        rank = getattr(entry.intervention, "low_rank_dimension", None)
        return entry._replace(low_rank_dimension=rank if isinstance(rank, int) else entry.low_rank_dimension)
    cls = entry.intervention_type if entry.intervention_type is not None else given
    if not isinstance(cls, type):
        raise ConfigError(
            f"representation {index} has no intervention",
            hint='give "intervention": LoreftIntervention(embed_dim=..., low_rank_dimension=...), or "intervention_type": LoreftIntervention',
        )
    return entry._replace(intervention_type=cls)


def _described(key: str, intervention: nn.Module) -> dict[str, Any]:
    if not isinstance(intervention, Intervention):
        return {"type": class_name(type(intervention))}
    for name, value in intervention.settings.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ConfigError(f"intervention {key} was made with {name}={value!r}, which JSON cannot hold") from error
    return {"type": class_name(type(intervention)), **intervention.settings}


def _restored(entry: dict[str, Any], made: dict[str, Intervention]) -> Any:
    """The representation of one saved entry; `made` has those before it, by key."""
    if set(entry) != {"key", "intervention", *_SAVED}:
        raise AdapterFormatError(f"a saved representation has the keys {sorted(entry)}, but must have {sorted({'key', 'intervention', *_SAVED})}")
    described, fields = dict(entry["intervention"]), {name: entry[name] for name in _SAVED}
    if "same_as" in described:
        return RepresentationConfig(**fields, intervention=made[described["same_as"]])
    cls = class_named(described.pop("type"))
    if not described:  # saved before a ReftModel had built it
        return RepresentationConfig(**fields, intervention_type=cls)
    made[entry["key"]] = cls(**described)
    return RepresentationConfig(**fields, intervention=made[entry["key"]])
