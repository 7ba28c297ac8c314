"""LoraHub's two functions: find weights for LoRA modules from a few examples of a new task, and answer with what they make.

By default the search is Atoll's (atoll.compose), its objective the true mean of the examples' losses, and a composition the exact weighted sum of the
modules' updates; `compatible=True` is lorahub 0.1.0. Bases that read with an encoder are run by transformers, as there; decoder bases by Atoll's own
forward.

Used by programs. The names of modules are folders, adapters of the local hub, or Hugging Face ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat

from torch import Tensor

from atoll.compose.candidates import FORMS
from atoll.compose.objective import Objective, Scores, l1
from atoll.compose.pool import Pool, reach
from atoll.compose.result import record_of
from atoll.compose.run import GRADIENT_COST, Settings
from atoll.compose.search import Found, search
from atoll.errors import ConfigError
from atoll.lorahub import arguments
from atoll.lorahub.compatible import learn_as_lorahub
from atoll.lorahub.decoders import DecoderLearner, DecoderModel
from atoll.lorahub.examples import MAX_TOKENS, ExampleDataset
from atoll.lorahub.modules import Module, base_of, find_modules
from atoll.lorahub.objective import STRENGTH, CalledScores, GetLoss, GetRegular, as_regulariser, default_get_loss, default_l1_regularization
from atoll.lorahub.pairs import PairLearner
from atoll.model.base import EMBEDDED, load_base, load_tokenizer
from atoll.model.generic import base_folder, greedy_answers, is_encoder_decoder, load_encoder_decoder
from atoll.model.generic_pool import GenericPool
from atoll.model.pull import pull

if TYPE_CHECKING:
    from atoll.hub.store import Hub

__all__ = ["default_get_loss", "default_l1_regularization", "lorahub_inference", "lorahub_learning"]

MAX_NEW_TOKENS = 256  # of an answer, as in LoraHub
BOUNDS = (-1.5, 1.5)  # of a weight, as in LoraHub

Report = Callable[[str, int, int], None]


class Learner(Protocol):
    """What differs between kinds of base: the modules over it, the examples encoded for it, and what becomes of the weights."""

    num: int
    num_layers: int
    dataset: ExampleDataset

    @property
    def pool(self) -> Pool | GenericPool: ...

    def scores(self, batch_size: int | None) -> Scores: ...

    def candidate(self, weights: Tensor) -> AbstractContextManager[Any]: ...

    def composed(self, weights: Tensor) -> Any: ...

    def finish(self, adapter: Any, manifest: Mapping[str, Any], save_to: Path | None) -> tuple[Any, Any]: ...


def lorahub_learning(
    lora_module_list: Iterable[str | Path],
    example_inputs: Iterable[str],
    example_outputs: Iterable[str],
    max_inference_step: int,
    model_name_or_path: str | Path | None = None,
    batch_size: int | None = None,
    get_loss: GetLoss = default_get_loss,
    get_regular: GetRegular = default_l1_regularization,
    seed: int = 42,
    *,
    compatible: bool = False,
    form: str | None = None,
    method: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    hub: Hub | None = None,
    save_to: str | Path | None = None,
    report: Report | None = None,
) -> tuple[Any, Any, Any]:
    """(weights, model, tokenizer): the best weights found, a numpy array [N], and the base with the modules composed by them.

    max_inference_step: steps of the search, each with one evaluation of the examples, or with one gradient, which takes as long as three.
    model_name_or_path: the base, None for the one that the modules name. batch_size: examples in a forward at most; also handed to get_loss. The
    model is transformers' with merged weights for an encoder-decoder base, a DecoderModel for a decoder.

    get_loss(example_dataset, model, batch_size) and get_regular(weights) of one's own are called for each candidate, the model holding it, and their
    sum is minimised; see examples.ExampleDataset and decoders.DecoderModel. compatible: as lorahub 0.1.0, see compatible.py; encoder-decoder only.
    form: "cat" (None), the exact sum Σ wᵢ Bᵢ Aᵢ, which takes modules of any rank, or "product", LoraHub's (Σ wᵢ Bᵢ)(Σ wᵢ Aᵢ), in which w and -w are
    the same and every two modules add a term that neither was trained for. method: of compose.search; None is "gradient", or "nevergrad:NGOpt"
    where a callable of one's own has no gradients. dtype and device are the base's. save_to: a folder that the composed adapter is written to.

    Raises ConfigError (no modules, unknown options, unequal ranks in the product form), DataError, BaseMismatch (modules of different bases), and
    what loading raises.
    """
    inputs, outputs = arguments.examples(example_inputs, example_outputs)
    form = form or ("product" if compatible else "cat")
    if form not in FORMS:
        raise ConfigError(f"there is no form {form!r}", hint=f"choose one of {', '.join(FORMS)}")
    steps = arguments.count("max_inference_step", max_inference_step, hint="LoraHub's examples use 40")
    if batch_size is not None:
        batch_size = arguments.count("batch_size", batch_size, hint="leave it out to take all examples at once")
    seed = arguments.count("seed", seed, least=0, most=2**32 - 1, hint="leave it out to take 42")
    arguments.check_callable("get_loss", get_loss, "leave it out for LoraHub's loss")
    arguments.check_callable("get_regular", get_regular, "leave it out for LoraHub's, or give lambda weights: 0.0 for none")
    folder = None if save_to is None else arguments.folder(save_to)
    if compatible and (form != "product" or method is not None):
        raise ConfigError(
            "compatible=True takes no form but the product, and no method: they are LoraHub's", hint="leave them out, or leave compatible out"
        )
    modules = find_modules(lora_module_list, hub)
    name = _name(model_name_or_path) if model_name_or_path else base_of(modules)
    if compatible and not _reads_with_an_encoder(name):
        raise ConfigError("compatible=True is for encoder-decoder bases, as LoraHub is", hint="leave compatible out")
    learner = _learner(name, dtype, device, modules, inputs, outputs, form)
    record: dict[str, Any] = {"form": form}
    if compatible:
        assert isinstance(learner, PairLearner), "checked above"
        names = [module.name for module in modules]
        adapters = dict(zip(names, learner.pool.adapters, strict=True))
        learnt = learn_as_lorahub(
            learner.model, adapters, names, learner.dataset, steps, batch_size, get_loss=get_loss, get_regular=get_regular, seed=seed
        )
        weights, adapter = learnt.weights, learnt.adapter
        record |= {"method": "lorahub 0.1.0", "seed": seed, "examples": learner.dataset.digest}
    else:
        found = _search(learner, steps, batch_size, get_loss, get_regular, seed, method, report)
        weights, adapter = found.weights.double().numpy(), learner.composed(found.weights)
        record |= record_of(found, examples_digest=learner.dataset.digest)
    model, tokenizer = learner.finish(adapter, _manifest(modules, weights, record), folder)
    return weights, model, tokenizer


def lorahub_inference(
    example_inputs: Iterable[str],
    model_or_name_path: Any,
    tokenizer_or_tokenizer_path: Any,
    batch_size: int,
    example_outputs: Iterable[str] | None = None,
) -> tuple[list[str], float | None]:
    """(predictions, accuracy): greedy answers of at most 256 tokens, and the percentage that equals its output (None without outputs).

    Case, full stops and blanks at the ends do not count. Padding is masked, so batch_size changes no answer. The model is one that lorahub_learning
    returned, any encoder-decoder model of transformers, or the folder or id of a base.
    """
    inputs = arguments.texts("example_inputs", example_inputs)
    outputs = None if example_outputs is None else arguments.texts("example_outputs", example_outputs)
    if outputs is not None:
        arguments.check_pairs(inputs, outputs)
    batch_size = arguments.count("batch_size", batch_size, hint="5 is a good start")
    model, tokenizer = _model(model_or_name_path), _tokenizer(tokenizer_or_tokenizer_path)
    predictions: list[str] = []
    for start in range(0, len(inputs), batch_size):
        part = inputs[start : start + batch_size]
        if isinstance(model, DecoderModel):
            predictions += model.answers(part, tokenizer, MAX_NEW_TOKENS)
        else:
            predictions += greedy_answers(model, tokenizer, part, max_new_tokens=MAX_NEW_TOKENS, max_tokens=MAX_TOKENS)
    if outputs is None:
        return predictions, None
    right = sum(_plain(answer) == _plain(output) for answer, output in zip(predictions, outputs, strict=True))
    return predictions, 100 * right / max(1, len(predictions))


def _plain(text: str) -> str:
    return text.strip().lower().replace(".", "")


def _learner(name: str, dtype: str, device: str, modules: Sequence[Module], inputs: Sequence[str], outputs: Sequence[str], form: str) -> Learner:
    if _reads_with_an_encoder(name):
        return PairLearner(load_encoder_decoder(name, dtype=dtype, device=device), modules, inputs, outputs, form)
    return DecoderLearner(load_base(name, dtype=dtype, device=device), modules, inputs, outputs, form)


def _search(
    learner: Learner,
    max_inference_step: int,
    batch_size: int | None,
    get_loss: GetLoss,
    get_regular: GetRegular,
    seed: int,
    method: str | None,
    report: Report | None,
) -> Found:
    """Search by gradients where the objective has them, else by values."""

    def called(weights: Tensor) -> SupportsFloat:
        with learner.candidate(weights) as model:
            return get_loss(learner.dataset, model, batch_size)

    own_loss, own_regular = get_loss is not default_get_loss, get_regular is not default_l1_regularization
    scores = CalledScores(called, learner.num, learner.num_layers) if own_loss else learner.scores(batch_size)
    objective = Objective(scores, as_regulariser(get_regular) if own_regular else l1(STRENGTH))
    method = method or ("nevergrad:NGOpt" if own_loss or own_regular else "gradient")
    if own_regular and method.startswith("gradient"):
        raise ConfigError(f"the method {method} needs gradients, and a get_regular of one's own has none", hint="use cma or nevergrad:NGOpt")
    budget = max_inference_step * (GRADIENT_COST if method.startswith("gradient") else 1)
    settings = Settings(bounds=BOUNDS, reach=reach(learner.pool.adapters))
    return search(objective, learner.num, method, budget=budget, seed=seed, settings=settings, report=report)


def _manifest(modules: Sequence[Module], weights: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the composed adapter says of its making; the base is the learner's to add."""
    parents = [
        {"name": module.name, "digest": module.digest, "weight": float(weight.mean()), **({"layer_weights": weight.tolist()} if weight.ndim else {})}
        for module, weight in zip(modules, weights, strict=True)
    ]
    return {"format": 1, "kind": "composed", "parents": parents, "composition": dict(record)}


def _reads_with_an_encoder(name: str) -> bool:
    if name.lower() in EMBEDDED or name.lower().endswith(".gguf"):
        return False
    return is_encoder_decoder(base_folder(name))


def _name(given: str | Path) -> str:
    if not isinstance(given, str | Path):
        raise ConfigError(f"model_name_or_path is {type(given).__name__}, expected a name", hint="give the folder or id of a base, or leave it out")
    return str(given)


def _model(given: Any) -> Any:
    """A model to ask: as given, or loaded by its name."""
    if isinstance(given, str | Path):
        name = str(given)
        return load_encoder_decoder(name).model if _reads_with_an_encoder(name) else DecoderModel(load_base(name, dtype="float32"))
    if not isinstance(given, DecoderModel) and not getattr(getattr(given, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(given).__name__} is neither an encoder-decoder model of transformers nor what lorahub_learning returns",
            hint="for a decoder base, give its folder or id",
        )
    return given


def _tokenizer(given: Any) -> Any:
    """A tokenizer: as given, or loaded by the name of its base."""
    if not isinstance(given, str | Path):
        if not callable(given):
            raise ConfigError(f"{given!r:.60} is no tokenizer", hint="give what lorahub_learning returned, or the folder or id of its base")
        return given
    name = str(given)
    return load_tokenizer(pull(name) if name.lower() in EMBEDDED or name.lower().endswith(".gguf") else base_folder(name))
