"""LoraHub's two functions under their own names: a program written for lorahub runs with only its imports changed.

    from atoll.lorahub.algorithm import lorahub_learning, lorahub_inference
    from atoll.lorahub.constant import LORA_MODULE_NAMES

    algorithm.py   the two functions
    arguments.py   what the two functions are given, checked
    modules.py     names to adapters: folders, the local hub, the Hugging Face hub
    examples.py    the examples as the data set that LoraHub hands to get_loss
    objective.py   LoraHub's loss and regulariser, and callables of one's own as scores
    pairs.py       encoder-decoder bases (T5), by model/generic.py
    decoders.py    decoder bases, by Atoll's own forward and engine
    compatible.py  lorahub 0.1.0 to the bit, with its mistakes

What differs by default is what is wrong there: the loss is a mean whatever the batch size, updates are summed exactly (form="product" is LoraHub's
sum of factors), every module counts with its own scaling and must be of one base, the last module is not lost, and no state dict is loaded again for
a candidate. Each name is fetched from its module on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow _HOMES; tests/lorahub/test_algorithm.py holds the two equal
    from atoll.lorahub.algorithm import lorahub_inference, lorahub_learning
    from atoll.lorahub.constant import LORA_MODULE_NAMES
    from atoll.lorahub.objective import default_get_loss, default_l1_regularization

_HOMES = {
    "LORA_MODULE_NAMES": "constant",
    "default_get_loss": "objective",
    "default_l1_regularization": "objective",
    "lorahub_inference": "algorithm",
    "lorahub_learning": "algorithm",
}

__all__ = ["LORA_MODULE_NAMES", "default_get_loss", "default_l1_regularization", "lorahub_inference", "lorahub_learning"]


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module, once (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'atoll.lorahub' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"atoll.lorahub.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
