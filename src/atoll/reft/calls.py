"""One call of a ReftModel: which places of which rows each intervention edits, and the hook that edits them.

Places are indices into the token rows as they were given, padding included, and generation keeps counting from there: a step that starts at place 30
(the cache says so) edits of its tokens those whose places were named. So it is the same whether a prompt comes whole, in chunks, or is computed again
without a cache; beams and several answers a prompt repeat its rows. Nothing counts hook calls or compares shapes.

Hooks stay on the model for good and do nothing outside a call: none is ever removed from a module, ours or a stranger's, and another ReftModel on the
same base, or a plain call of the base, is not touched. Used by model.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atoll.errors import RequestRefused, UnsupportedAdapter
from atoll.reft.interventions import Subspaces

PLACES = "sources->base"
_FORMS = (
    'write unit_locations={"sources->base": (None, [[[place, ...] for each row] for each intervention])}, with places counted from 0; '
    "negative ones edit nothing"
)

_current: ContextVar[Call | None] = ContextVar("atoll_reft_call", default=None)


class Chosen(NamedTuple):
    """Places of one step as flat indices into its [rows * length] tokens. read [rows, n]; write [N] those of them that are edited.

    kept [N]: which of the rows * n read ones these are, or None for all of them in order.
    """

    read: Tensor
    write: Tensor
    kept: Tensor | None

    def to(self, device: torch.device) -> Chosen:
        """The same on another device."""
        return Chosen(self.read.to(device), self.write.to(device), None if self.kept is None else self.kept.to(device))


@dataclass(eq=False)
class Call:
    """What is asked of the interventions in one forward or one generation.

    owner: the ReftModel's own key; edits: by each hook's key the intervention, its number, and its subspaces. places: for each intervention [B, n],
    or None for everywhere. generated: where the prompt ends, if generated tokens are edited instead of places of the prompt. arguments: further
    keywords for the interventions.
    """

    owner: object
    edits: Mapping[object, tuple[nn.Module, int, Subspaces | None]]
    places: Sequence[Tensor | None]
    generated: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0
    rows: int | None = None
    length: int | None = None
    idle: bool = False  # whether this step lies behind the last place of all interventions
    _chosen: dict[Any, Chosen | None] = field(default_factory=dict)
    _lasts: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Edits happen within, in this thread."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def enter(self, rows: int | None, length: int | None, start: int) -> None:
        """A step of the base begins: so many rows and tokens, the first of them at place `start`."""
        if (rows, length, start) != (self.rows, self.length, self.start):
            self.rows, self.length, self.start = rows, length, start
            self._chosen = {}
            self.idle = self.generated is None and all(places is not None and start > self._last(places) for places in self.places)

    def chosen(self, number: int, rows: int, length: int, device: torch.device) -> Chosen | None:
        """What intervention `number` edits in this step, or None for nothing. Interventions with the same places share one answer."""
        places = self.places[number]
        assert places is not None
        key = (id(places), rows, length, device)
        if key not in self._chosen:
            found = _resolve(_repeated(places, rows), self.start, length, self.generated)
            self._chosen[key] = None if found is None else found.to(device)
        return self._chosen[key]

    def _last(self, places: Tensor) -> int:
        if id(places) not in self._lasts:
            self._lasts[id(places)] = int(places.max()) if places.numel() else -1
        return self._lasts[id(places)]

    def edited(self, key: object, hidden: Tensor) -> Tensor | None:
        """The edited copy of one module's hidden states [rows, length, d], or None if this step edits nothing there."""
        intervention, number, subspaces = self.edits[key]
        shape = hidden.shape
        if hidden.dim() == 2 and self.rows is not None and self.length is not None and shape[0] == self.rows * self.length:
            hidden = hidden.view(self.rows, self.length, -1)  # some blocks flatten their tokens before the MLP
        if hidden.dim() != 3 or (self.length is not None and hidden.shape[1] != self.length):
            raise UnsupportedAdapter(
                f"intervention {number} sits where the base has a tensor of shape {tuple(shape)}, "
                f"but it edits tensors of shape [rows, {self.length or 'tokens'}, width]"
            )
        rows, length, width = hidden.shape
        if self.places[number] is None:
            return self._applied(intervention, hidden, _of_rows(subspaces, rows)).view(shape)
        chosen = self.chosen(number, rows, length, hidden.device)
        if chosen is None:
            return None
        flat = hidden.reshape(rows * length, width)
        before = flat.index_select(0, chosen.read.view(-1)).view(rows, -1, width)
        after = self._applied(intervention, before, _of_rows(subspaces, rows)).reshape(-1, width)
        if chosen.kept is not None:
            after = after.index_select(0, chosen.kept)
        return flat.index_copy(0, chosen.write, after).view(shape)

    def _applied(self, intervention: nn.Module, before: Tensor, subspaces: Subspaces | None) -> Tensor:
        width = getattr(intervention, "embed_dim", None)
        if isinstance(width, int) and width != before.shape[-1]:
            raise UnsupportedAdapter(f"an intervention has embed_dim {width}, but the base is {before.shape[-1]} wide where it sits")
        after = intervention(before, None, subspaces, **self.arguments)
        if not isinstance(after, Tensor) or after.shape != before.shape:
            found = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
            raise UnsupportedAdapter(f"{type(intervention).__name__} was given {tuple(before.shape)} and returned {found}; the shape must stay")
        return after.to(before.dtype)


class EditHook:
    """A forward hook, or pre-hook, of one intervention's module."""

    def __init__(self, key: object, is_input: bool) -> None:
        self.key, self.is_input = key, is_input

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        call = _current.get()
        if call is None or call.idle or self.key not in call.edits:
            return None
        if not self.is_input:
            return _replaced(rest[0], call, self.key)
        kwargs: dict[str, Any] = rest[0]
        if args:
            first = _replaced(args[0], call, self.key)
            return None if first is None else ((first, *args[1:]), kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next((name for name, value in kwargs.items() if isinstance(value, Tensor)), "")
        changed = _replaced(kwargs.get(name), call, self.key)
        return None if changed is None else (args, {**kwargs, name: changed})


class StepHook:
    """A forward pre-hook of a model: tells the call where in its rows a step stands."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _current.get()
        if call is None or call.owner is not self.owner:
            return
        tokens = next((value for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]) if isinstance(value, Tensor)), None)
        if tokens is not None and tokens.dim() >= 2:
            call.enter(tokens.shape[0], tokens.shape[1], cached(kwargs, tokens.shape[1]))


def cached(kwargs: Mapping[str, Any], length: int) -> int:
    """How many tokens of each row stand before the `length` that a call of a transformers model brings."""
    cache = next((kwargs[name] for name in ("past_key_values", "cache_params") if kwargs.get(name) is not None), None)
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.shape[1]) - length
    raise UnsupportedAdapter(f"the base keeps its state in a {type(cache).__name__}, which does not say how many tokens it holds")


@contextmanager
def recomputing(model: nn.Module, call: Call) -> Iterator[None]:
    """Within, blocks whose activations transformers computes again in the backward pass do so with this call's edits."""
    found = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    found = [module for module in found if "_gradient_checkpointing_func" in vars(module)]
    before = [vars(module)["_gradient_checkpointing_func"] for module in found]
    try:
        for module, function in zip(found, before, strict=True):
            module._gradient_checkpointing_func = _again(function, call)
        yield
    finally:
        for module, function in zip(found, before, strict=True):
            module._gradient_checkpointing_func = function


def _again(function: Any, call: Call) -> Any:
    def checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
        rows, length, start = call.rows, call.length, call.start

        def within(*inputs: Any, **named: Any) -> Any:
            with call.active():
                call.enter(rows, length, start)
                return forward(*inputs, **named)

        return function(within, *args, **kwargs)

    return checkpointed


def parse_places(unit_locations: Any, number: int, batch: int) -> list[Tensor | None]:
    """For each of `number` interventions the places [B, n] int64 of `batch` rows (or of a multiple of them), filled up with -1; None for everywhere.

    Raises RequestRefused with the forms there are.
    """
    if unit_locations is None:
        return [None] * number
    if not isinstance(unit_locations, Mapping) or len(unit_locations) != 1 or next(iter(unit_locations)) not in (PLACES, "base"):
        raise RequestRefused(f"unit_locations is {_shown(unit_locations)}", hint=_FORMS)
    key, given = next(iter(unit_locations.items()))
    if key == PLACES and isinstance(given, (tuple, list)) and len(given) == 2 and (isinstance(given, tuple) or given[0] is None or _flat(given)):
        given = given[1]  # the first are places in a source, of which ReFT has none
    if given is None:
        return [None] * number
    if isinstance(given, int) or _flat(given):
        same = torch.tensor([[given] if isinstance(given, int) else list(given)]).expand(batch, -1)
        return [same] * number
    lists = given.tolist() if hasattr(given, "tolist") else list(given)
    if len(lists) != number:
        raise RequestRefused(
            f"unit_locations has places for {len(lists)} interventions, but the model has {number}",
            hint=f"{_FORMS}; ask for num_interventions={number} where the places are made",
        )
    known: list[tuple[Any, Tensor]] = []
    return [None if rows is None else _tensor(rows, batch, index, known) for index, rows in enumerate(lists)]


def parse_subspaces(subspaces: Any, number: int, batch: int) -> list[Subspaces | None]:
    """For each of `number` interventions the subspaces of each row, or None for all. An int or a flat list is for every row of every intervention."""
    if subspaces is None:
        return [None] * number
    if isinstance(subspaces, int) or _flat(subspaces):
        return [[[subspaces] if isinstance(subspaces, int) else list(subspaces)] * batch] * number
    lists = subspaces.tolist() if hasattr(subspaces, "tolist") else list(subspaces)
    if len(lists) != number:
        raise RequestRefused(f"subspaces are given for {len(lists)} interventions, but the model has {number}")
    return lists


def check_places(places: Sequence[Tensor | None], length: int) -> None:
    """Raises RequestRefused for a place past the last of `length` tokens."""
    checked: set[int] = set()
    for index, tensor in enumerate(places):
        if tensor is None or id(tensor) in checked:
            continue
        checked.add(id(tensor))
        if tensor.numel() and int(tensor.max()) >= length:
            row = int((tensor >= length).any(1).nonzero()[0])
            raise RequestRefused(
                f"intervention {index} is to edit place {int(tensor[row].max())} of row {row}, but the rows have {length} tokens", hint=_FORMS
            )


def _tensor(rows: Any, batch: int, index: int, known: list[tuple[Any, Tensor]]) -> Tensor:
    """The places of one intervention. Interventions with equal ones get one tensor, and so one set of indices in each step."""
    try:
        rows = rows.tolist() if hasattr(rows, "tolist") else [row.tolist() if hasattr(row, "tolist") else list(row) for row in rows]
        for same, tensor in known:
            if rows == same:
                return tensor
        lists = [[int(place) for place in row] for row in rows]
    except TypeError:
        raise RequestRefused(f"the places of intervention {index} are {_shown(rows)}, but must be a list for each row", hint=_FORMS) from None
    if not lists or len(lists) % batch:
        raise RequestRefused(f"intervention {index} has places for {len(lists)} rows, but the batch has {batch}", hint=_FORMS)
    width = max(map(len, lists))
    known.append((rows, torch.tensor([[*row, *[-1] * (width - len(row))] for row in lists], dtype=torch.int64)))
    return known[-1][1]


def _flat(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(place, int) and not isinstance(place, bool) for place in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _repeated(places: Tensor, rows: int) -> Tensor:
    """The places of `rows` rows: beams and several answers a prompt stand side by side."""
    times, rest = divmod(rows, max(len(places), 1))
    if rest:
        raise RequestRefused(f"there are places for {len(places)} rows, but the base was called with {rows}")
    return places.repeat_interleave(times, 0) if times > 1 else places


def _of_rows(subspaces: Subspaces | None, rows: int) -> Subspaces | None:
    if subspaces is None or len(subspaces) == rows or rows % len(subspaces):
        return subspaces
    return [row for row in subspaces for _ in range(rows // len(subspaces))]


def _resolve(places: Tensor, start: int, length: int, generated: int | None) -> Chosen | None:
    rows = len(places)
    if generated is None:
        local = places - start
        wanted = (places >= 0) & (local >= 0) & (local < length) & _first_of_equals(places)
    else:
        local = torch.arange(min(max(generated - start, 0), length), length).expand(rows, -1)
        wanted = (places >= 0).any(1, keepdim=True).expand_as(local)
    if not bool(wanted.any()):
        return None
    read = local.clamp(0, length - 1) + length * torch.arange(rows).unsqueeze(1)
    if bool(wanted.all()):
        return Chosen(read.contiguous(), read.reshape(-1), None)
    kept = wanted.reshape(-1).nonzero().squeeze(1)
    return Chosen(read.contiguous(), read.reshape(-1)[kept], kept)


def _first_of_equals(places: Tensor) -> Tensor:
    """False where a row has named a place before: it is edited once."""
    ordered, order = places.sort(dim=1, stable=True)
    new = torch.ones_like(places, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(new).scatter_(1, order, new)


def _replaced(value: Any, call: Call, key: object) -> Any:
    """What a module hands over, with its hidden states edited; None if nothing changes."""
    if isinstance(value, Tensor):
        return call.edited(key, value)
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        first = call.edited(key, value[0])
        return None if first is None else (first, *value[1:])
    if isinstance(value, Mapping) and isinstance(first := next(iter(value.values()), None), Tensor):  # transformers' ModelOutput
        changed = call.edited(key, first)
        return None if changed is None else type(value)(**{**value, next(iter(value)): changed})
    raise UnsupportedAdapter(f"an intervention sits where the base hands over a {type(value).__name__}, but it edits a tensor [rows, tokens, width]")
