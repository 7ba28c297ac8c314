"""Bases of other families than the native decoder's: transformers' own forward, to which LoRA is added from outside.

The one idea: no weight is written. For the time of a forward, hooks add to the output of each linear what the adapters say (generic_pool.py), so that
changing an adapter costs nothing and several may share a batch. Encoder-decoder models (T5 and its like) are what is built on it here: label losses,
for whose time T5's attention is computed by t5_attention.py, and greedy answers of rows that pair an input with a target.

Used by lorahub. Another family joins by naming its linears (`linears_of`) and, if it is no encoder-decoder, by a batch of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.errors import BaseFormatError, BaseNotFound
from atoll.model.base import checked_device, checked_dtype, load_tokenizer
from atoll.model.fingerprint import read_json, weight_files
from atoll.model.generic_adapter import GenericAdapter
from atoll.model.pull import HUB_FILES, hub_snapshot
from atoll.model.t5_attention import attentions_of, scoring

IGNORED = -100  # the label of a place that has none, in transformers and in LoraHub

# (input of a linear [..., d_in], its output [..., d_out]) -> the output plus something that is linear in the input; may be in place
Change = Callable[[Tensor, Tensor], Tensor]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w-][\w.-]*")
_LAYER = re.compile(r"((?:.*?\.)??\d+)\.")


class GenericModel:
    """A frozen transformers model, its tokenizer, and its linears: path -> (d_out, d_in).

    layer_of numbers the blocks that the linears stand in, in the model's order: an encoder's first, then the decoder's.
    """

    def __init__(self, name: str, path: Path, model: Any, tokenizer: Any) -> None:
        self.name, self.path, self.tokenizer = name, path, tokenizer
        self.model: Any = model.eval().requires_grad_(False)
        self._linears = linears_of(model)
        self.linears: Mapping[str, tuple[int, int]] = {place: (linear.out_features, linear.in_features) for place, linear in self._linears.items()}
        blocks: dict[str, int] = {}
        self.layer_of: Mapping[str, int] = {place: blocks.setdefault(_block(place), len(blocks)) for place in self._linears}
        self.num_layers = len(blocks)
        self._head = model.get_output_embeddings()
        self._attentions = attentions_of(model)
        self._encoder = next(place for place, module in model.named_modules() if module is model.get_encoder())

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    def in_encoder(self, places: Iterable[str]) -> bool:
        """Whether any of these linears is the encoder's; if not, what the encoder says does not depend on the adapters."""
        return any(place.startswith(self._encoder + ".") for place in places)

    @contextmanager
    def changed(self, changes: Mapping[str, Change]) -> Iterator[None]:
        """Within, every forward of `model` has these changes at the outputs of its linears."""
        handles = [self._linears[place].register_forward_hook(_hook(change)) for place, change in changes.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def merge(self, adapter: GenericAdapter) -> None:
        """Add an adapter's updates to the model's own weights, for good. W += s B A, computed in float32."""
        adapter.check_fits(self.linears)
        for place, module in adapter.modules.items():
            weight = self._linears[place].weight
            update = (module.b.float() @ module.a.float()) * module.scaling
            weight.add_(update.to(weight.device, weight.dtype))

    @torch.no_grad()
    def encode(self, pairs: Pairs) -> Tensor:
        """The base's encoder states [k, T, D]."""
        states: Tensor = self.model.get_encoder()(input_ids=pairs.input_ids, attention_mask=pairs.attention_mask).last_hidden_state
        return states

    def label_losses(self, pairs: Pairs, changes: Mapping[str, Change], num: int = 1, encoded: Tensor | None = None) -> Tensor:
        """[num, k] float32: each candidate's mean loss over the labels of each pair, in nats. Differentiable in what the changes hold.

        The forward has num times the k pairs, candidate by candidate; changes get them in that order. encoded [k, T, D]: the encoder's states where
        they are known. Logits are made at labels only.
        """
        count = len(pairs.labels)
        places = pairs.label_places(num)
        given: dict[str, Any] = {"attention_mask": pairs.attention_mask.repeat(num, 1)}
        if encoded is None:
            given["input_ids"] = pairs.input_ids.repeat(num, 1)
        else:
            from transformers.modeling_outputs import BaseModelOutput

            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded.repeat(num, 1, 1))
        begun = self.model.prepare_decoder_input_ids_from_labels(labels=pairs.labels).repeat(num, 1)
        chosen = self._head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[places].unsqueeze(0),))
        try:
            with scoring(self._attentions, changes, num), self.changed(changes):
                logits = self.model(**given, decoder_input_ids=begun, use_cache=False).logits[0]
        finally:
            chosen.remove()
        labels = pairs.labels.flatten()[pairs.label_places(1)]
        each = F.cross_entropy(logits.float(), labels.repeat(num), reduction="none").view(num, -1)
        return each.new_zeros(num, count).index_add(1, pairs.pair_of_label, each) / pairs.num_labels


@dataclass(frozen=True)
class Pairs:
    """k pairs as one padded batch: input_ids and attention_mask [k, T], labels [k, U] with IGNORED at places without; all int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, device: torch.device | str = "cpu") -> Pairs:
        """Pad pairs of (input ids, label ids) to the right."""
        longest, widest = max(len(row) for row, _ in rows), max(len(labels) for _, labels in rows)
        inputs = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row, _ in rows], dtype=torch.int64, device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows], dtype=torch.int64, device=device)
        labels = torch.tensor([[*label, *[IGNORED] * (widest - len(label))] for _, label in rows], dtype=torch.int64, device=device)
        return cls(inputs, mask, labels)

    @property
    def num_labels(self) -> Tensor:
        """[k]: the labels of each pair."""
        return (self.labels != IGNORED).sum(1)

    @property
    def pair_of_label(self) -> Tensor:
        """[labels]: the pair that each label belongs to."""
        return (self.labels != IGNORED).nonzero()[:, 0]

    def label_places(self, num: int) -> Tensor:
        """Where the labels stand among num times the k x U places of the decoder."""
        return (self.labels != IGNORED).repeat(num, 1).flatten().nonzero().flatten()


@torch.no_grad()
def greedy_answers(model: Any, tokenizer: Any, inputs: Sequence[str], *, max_new_tokens: int, max_tokens: int) -> list[str]:
    """The greedy answers of an encoder-decoder model of transformers to one batch of texts, each cut to max_tokens; without special tokens."""
    rows = tokenizer(list(inputs), max_length=max_tokens, padding=True, truncation=True, return_tensors="pt").to(model.device)
    given = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    written = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    answers: list[str] = tokenizer.batch_decode(written.cpu(), skip_special_tokens=True)
    return answers


def linears_of(model: Any) -> dict[str, nn.Linear]:
    """Every linear that LoRA can act on, by its path, in the model's order; the output embeddings are none of them."""
    head = model.get_output_embeddings()
    return {place: module for place, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def base_folder(name: str) -> Path:
    """The folder of a base of any family: one on this disk, or that of a hub id, fetched if it is not cached. Raises BaseNotFound."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not _HUB_ID.fullmatch(name):
        raise BaseNotFound(f"no base {name!r}: it is neither a folder on this disk nor a hub id like org/name", hint="check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        if weight_files(cached):
            return cached
    except (LocalEntryNotFoundError, BaseFormatError):  # not there, or not whole
        pass
    return hub_snapshot(name)


def is_encoder_decoder(path: Path) -> bool:
    """Whether the base in a folder reads with one stack and writes with another, by its config.json. Raises BaseFormatError where there is none."""
    if not (path / "config.json").is_file():
        raise BaseFormatError(f"{path} has no config.json, so it is not a base model", hint="give the folder that holds config.json")
    return bool(read_json(path / "config.json").get("is_encoder_decoder"))


def load_encoder_decoder(name: str, *, dtype: str = "float32", device: str = "cpu") -> GenericModel:
    """Load an encoder-decoder base by transformers, from safetensors, without running code from its folder.

    Raises BaseNotFound, BaseFormatError where the folder is damaged or holds another kind of model, and ConfigError for a dtype or device that is
    not there.
    """
    from transformers import AutoModelForSeq2SeqLM

    torch_dtype, torch_device, path = checked_dtype(dtype), checked_device(device), base_folder(name)
    if not is_encoder_decoder(path):
        raise BaseFormatError(f"{path} is no encoder-decoder model, such as T5", hint="give the folder of an encoder-decoder base")
    if not weight_files(path):
        raise BaseFormatError(f"{path} has no *.safetensors", hint="convert it in a place you trust: model.save_pretrained(folder)")
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch_dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and its Rust readers raise what they like for a damaged file
        raise BaseFormatError(f"{path} cannot be loaded: {error}", hint="restore the files from where the base came from") from error
    return GenericModel(name, path, model.to(torch_device), load_tokenizer(path))


def _hook(change: Change) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _, args, output: change(args[0], output)


def _block(place: str) -> str:
    """The path up to the first number: the block that a linear stands in ("encoder.block.3")."""
    found = _LAYER.match(place)
    return place if found is None else found[1]
