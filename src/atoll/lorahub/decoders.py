"""Learning on a decoder base, which LoraHub does not know: the modules as a pool of atoll.compose, answers by the engine.

A DecoderModel stands where LoraHub has transformers' model: get_loss of one's own calls it like a causal model of transformers, lorahub_inference
asks it for answers, and it saves itself as an ordinary adapter, to be published and served.

Used by algorithm.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.compose.losses import LabelLosses
from atoll.compose.pool import Pool
from atoll.compose.result import compose
from atoll.data.encode import EncodedRow, encode_examples
from atoll.data.prompt import PromptFormat, encode_prompts
from atoll.data.task import Example
from atoll.engine.engine import Engine
from atoll.engine.request import Completion, Request, SamplingParams
from atoll.errors import BaseMismatch, ConfigError, EngineError, RequestRefused
from atoll.hub.compatibility import verdict
from atoll.lorahub.examples import ExampleDataset
from atoll.lorahub.modules import Module
from atoll.model.adapter import Adapter
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.base import tensor_shapes
from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch
from atoll.model.generic import IGNORED
from atoll.model.sites import peft_key

if TYPE_CHECKING:
    from atoll.model.base import Base

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """What a DecoderModel returns: logits [B, T, V], and the mean loss of the labels if there were any."""

    logits: Tensor
    loss: Tensor | None


class DecoderModel:
    """A base with one adapter, or alone, used like a causal model of transformers. Frozen: nothing it returns has gradients.

    Example:
        weights, model, tokenizer = lorahub_learning([...], inputs, outputs, 40)
        model.save_pretrained("composed")
    """

    def __init__(self, base: Base, adapter: Adapter | None = None, engine: Callable[[], Engine] | None = None) -> None:
        """engine gives one over the same base, which several models may share; it is asked for the first answer."""
        self.base, self.adapter = base, adapter
        self._engine = engine or cache(partial(Engine, base))

    @property
    def device(self) -> torch.device:
        return self.base.decoder.device

    def to(self, device: Any) -> DecoderModel:
        """Itself: where a base computes is said when it is loaded."""
        return self

    def eval(self) -> DecoderModel:
        """Itself: it has no other mode."""
        return self

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Outputs:
        """The logits of padded rows [B, T]; labels [B, T] stand where their own tokens do, -100 where there is none, as in transformers.

        Padding may stand on either side; its logits are zero.
        """
        kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        batch = PackedBatch.of([row[mask].tolist() for row, mask in zip(input_ids, kept, strict=True)], device=self.device)
        packed = self.base.decoder.logits(self.base.decoder.forward(batch, self._adapters(batch.num_tokens))).float()
        logits = packed.new_zeros(*input_ids.shape, packed.shape[1])
        logits[kept.to(self.device)] = packed
        if labels is None:
            return Outputs(logits, None)
        targets = labels.to(self.device)[:, 1:].flatten()
        return Outputs(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED))

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 256) -> Tensor:
        """The rows with their greedy continuations behind, filled up with the end-of-text token [B, T + new]."""
        kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        answers = self._complete([row[mask].tolist() for row, mask in zip(input_ids, kept, strict=True)], max_new_tokens)
        width = max(len(answer.token_ids) for answer in answers)
        new = [[*answer.token_ids, *[self.base.eos_ids[0]] * (width - len(answer.token_ids))] for answer in answers]
        return torch.cat([input_ids, torch.tensor(new, dtype=torch.int64, device=input_ids.device)], 1)

    def answers(self, prompts: Sequence[str], tokenizer: Any, max_new_tokens: int) -> list[str]:
        """Greedy answers, without the end mark. A prompt that leaves no room for one in the base's context loses its beginning."""
        room = self._engine().config.row_tokens(self.base.context_length) - max_new_tokens
        if room < 1:
            raise RequestRefused(f"{self.base.name} has no room for {max_new_tokens} new tokens", hint="use a base with a longer context")
        encoded = encode_prompts(prompts, tokenizer)
        cut = sum(len(prompt) > room for prompt in encoded)
        if cut:
            _log.warning("%d of %d prompts lost their beginning to fit the base's context", cut, len(encoded))
        return [answer.text for answer in self._complete([prompt[-room:] for prompt in encoded], max_new_tokens)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter's folder, with its manifest, as PEFT and `atoll hub publish` read it."""
        if self.adapter is None:
            raise ConfigError(f"this model is {self.base.name} alone, which has no adapter to save", hint="save what lorahub_learning returns")
        write_adapter(Path(folder), self.adapter)

    @cached_property
    def _slot(self) -> Any:
        assert self.adapter is not None
        return self.base.decoder.new_bank().load(self.adapter)

    def _adapters(self, num_tokens: int) -> AdapterBatch:
        return BASE_ONLY if self.adapter is None else AdapterBatch.single(self._slot, num_tokens)

    def _complete(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Completion]:
        engine, key = self._engine(), None if self.adapter is None else f"lorahub {id(self)}"
        if self.adapter is not None:
            engine.register(str(key), self.adapter)
        try:
            sampling = SamplingParams(max_new_tokens=max_new_tokens)
            completions = engine.generate([Request(prompt, adapter=key, sampling=sampling) for prompt in prompts])
        finally:
            if key is not None:
                engine.unregister(key)
        failed = next((completion for completion in completions if completion.finish_reason == "error"), None)
        if failed is not None:
            raise EngineError(f"a prompt could not be answered: {failed.error}", hint="run it again")
        return completions


class DecoderLearner:
    """algorithm.Learner over a base of the native decoder."""

    def __init__(self, base: Base, modules: Sequence[Module], inputs: Sequence[str], outputs: Sequence[str], form: str) -> None:
        adapters = [read_adapter(module.folder) for module in modules]
        for module, adapter in zip(modules, adapters, strict=True):
            _check_base(base, module.name, adapter)
        self.base, self.form = base, form
        self.pool = Pool.of(adapters, base.decoder, [module.name for module in modules], [module.digest for module in modules])
        self.num, self.num_layers = self.pool.num, self.pool.num_layers
        if form == "product":
            _ = self.pool.factors  # what the form cannot take is said before the search
        self._rows = _encoded(base, inputs, outputs)
        self.dataset = _dataset(self._rows, inputs, outputs, base.eos_ids[0])
        self._engine = cache(partial(Engine, base))

    def scores(self, batch_size: int | None) -> LabelLosses:
        """Each example's mean label loss. How many examples stand in a forward goes by their tokens, not by batch_size."""
        return LabelLosses(self.base.decoder, self.pool, self._rows, form=self.form)

    @contextmanager
    def candidate(self, weights: Tensor) -> Iterator[DecoderModel]:
        """A model with a candidate's weights [N] in it."""
        yield DecoderModel(self.base, self.composed(weights), self._engine)

    def composed(self, weights: Tensor) -> Adapter:
        """The adapter of the weights [N] or [N, L]."""
        return compose(self.pool, weights, form=self.form).adapter

    def finish(self, adapter: Adapter, manifest: Mapping[str, Any], save_to: Path | None) -> tuple[DecoderModel, Any]:
        """The base with the adapter, and its tokenizer. With save_to, the adapter's folder is written too."""
        model = DecoderModel(self.base, replace(adapter, manifest={**manifest, "base": self.base.describe()}), self._engine)
        if save_to is not None:
            model.save_pretrained(save_to)
        return model, self.base.tokenizer


def _check_base(base: Base, name: str, adapter: Adapter) -> None:
    """Raise BaseMismatch where a module cannot run on the base; warn where it is known to be of another one."""
    shapes = {peft_key(site, factor): getattr(module, factor.lower()).shape for site, module in adapter.modules.items() for factor in "AB"}
    recorded = adapter.manifest.get("base")
    found = verdict(recorded, shapes, base.fingerprint.to_json(), tensor_shapes(base.path))
    if found.kind == "refused":
        raise BaseMismatch(f"module {name!r} does not fit {base.name}: {found.reason}", hint="use the base that it was made for")
    if found.kind == "compatible" and recorded:
        _log.warning("module %r fits %s in shape, but is not known to be of it: %s", name, base.name, found.reason)


def _encoded(base: Base, inputs: Sequence[str], outputs: Sequence[str]) -> list[EncodedRow]:
    """Examples as in training: the output follows the input after a blank, unless one of them brings its own, and ends the text."""
    examples = []
    for number, (prompt, output) in enumerate(zip(inputs, outputs, strict=True), 1):
        apart = prompt[-1:].isspace() or output[:1].isspace()
        examples.append(Example(prompt, output if apart else PromptFormat().completion_prefix + output, {}, f"example {number}"))
    encoded = encode_examples(examples, base.tokenizer, None, context=base.context_length, eos_ids=base.eos_ids)
    if encoded.num_cut:
        _log.warning("%d of %d examples lost the beginning of their input to fit the base's context", encoded.num_cut, len(examples))
    return encoded.rows


def _dataset(rows: Sequence[EncodedRow], inputs: Sequence[str], outputs: Sequence[str], pad_id: int) -> ExampleDataset:
    width = max(len(row.token_ids) for row in rows)
    pads = [width - len(row.token_ids) for row in rows]
    return ExampleDataset(
        {
            "input": inputs,
            "output": outputs,
            "input_ids": [[*row.token_ids, *[pad_id] * pad] for row, pad in zip(rows, pads, strict=True)],
            "attention_mask": [[1] * len(row.token_ids) + [0] * pad for row, pad in zip(rows, pads, strict=True)],
            "labels": [
                [*[IGNORED] * row.first_label, *row.token_ids[row.first_label :], *[IGNORED] * pad] for row, pad in zip(rows, pads, strict=True)
            ],
        }
    )
