"""From a folder of an adapter's files to what the engine can register: read, checked against the base, with the prompt and labels that came with it.

Everything that can be wrong with an adapter is found here, in a worker thread and before the engine hears of it: size, form, options, finite values,
shapes, another base. Messages name the adapter as the client did, never a path of this machine.

Used by registry.py (in its workers).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import AdapterFormatError, AtollError, BaseMismatch, TaskError
from atoll.model.adapter_files import read_manifest

if TYPE_CHECKING:
    from atoll.data.prompt import PromptFormat
    from atoll.hub.compatibility import Verdict
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base

BUILTIN = "builtin:"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """An adapter that fits the base. num_bytes: of all its tensors. parents: (digest, name, weight) of what it was composed of.

    packed: its tensors in the engine's layout, made ahead; whoever registers it takes them out, so that they go when the engine gives them up.
    """

    digest: str
    adapter: Adapter
    num_bytes: int
    prompt: PromptFormat | None = None
    labels: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] = ()
    parents: tuple[Mapping[str, Any], ...] = ()
    packed: list[Any] = field(default_factory=list)


class Loader:
    """Reads adapters for one base. Its methods may be called from several threads."""

    def __init__(self, base: Base, *, ignore_quantization: bool = False) -> None:
        from atoll.model.fingerprint import tensor_shapes

        self._base, self._shapes, self._ignore_quantization = base, tensor_shapes(base.path), ignore_quantization
        self.pack: Callable[[Adapter], Any] | None = None  # the engine's, once there is one

    def load(self, folder: Path, digest: str, name: str) -> Loaded:
        """The adapter of a folder that nobody changes. Raises AdapterFormatError, UnsupportedAdapter or BaseMismatch, naming it `name`."""
        from atoll.model.adapter_files import read_adapter

        try:
            adapter = read_adapter(folder)
            self.check_base(folder, name)
            return self._checked(adapter, digest, name)
        except AtollError as error:
            raise type(error)(error.message.replace(str(folder), name), hint=error.hint) from error

    def fits(self, folder: Path) -> bool:
        """Whether an adapter's tensors have the shapes that the base needs, by the header alone."""
        try:
            return self._verdict(folder, read_manifest(folder).get("base")).usable
        except AtollError:
            return False

    def is_of_other_weights(self, folder: Path) -> bool:
        """Whether an adapter's manifest says that it was made for other weights than the base's."""
        return self._verdict(folder, read_manifest(folder).get("base")).is_of_other_weights

    def made(self, adapter: Adapter, digest: str, name: str) -> Loaded:
        """The same for an adapter that was computed here, such as a merged one."""
        return self._checked(adapter, digest, name)

    def check_base(self, folder: Path, name: str) -> None:
        """Raise BaseMismatch for an adapter that cannot run on the base, by its manifest and its files' header; warn where it may be of another."""
        found = self._verdict(folder, read_manifest(folder).get("base"))
        if not found.usable:
            hint = "use the base that it was trained on"
            if found.quantization is not None:
                hint = f"serve the base rounded alike: atoll serve --quantization {found.quantization}; --ignore-quantization loads it all the same"
            raise BaseMismatch(f"{name} does not fit the base {self._base.title!r}: {found.reason}", hint=hint)
        if found.kind != "exact":
            _log.warning("%s fits %s, but it may have been trained on another base: %s", name, self._base.title, found.reason)

    def _verdict(self, folder: Path, recorded: Any) -> Verdict:
        from atoll.hub.compatibility import verdict
        from atoll.hub.intake import tensor_shapes

        recorded, fingerprint = recorded if isinstance(recorded, dict) else None, self._base.fingerprint.to_json()
        return verdict(recorded, tensor_shapes(folder), fingerprint, self._shapes, ignore_quantization=self._ignore_quantization)

    def _checked(self, adapter: Adapter, digest: str, name: str) -> Loaded:
        from atoll.data.prompt import PromptFormat

        shape = self._base.decoder.shape
        adapter.check_fits(shape.linears, shape.num_layers)
        if adapter.head:
            self._base.decoder.head_shapes(adapter.num_classes)
        manifest = adapter.manifest
        own = manifest.get("prompt")
        return Loaded(
            digest=digest,
            adapter=adapter,
            num_bytes=_num_bytes(adapter),
            prompt=PromptFormat.from_json(own) if own else None,
            labels=self._labels(adapter, name),
            stop_token_ids=_token_ids(manifest.get("stop_token_ids"), shape.vocabulary),
            parents=_parents(manifest.get("parents"), name),
            packed=[self.pack(adapter)] if self.pack is not None else [],
        )

    def _labels(self, adapter: Adapter, name: str) -> tuple[str, ...] | None:
        """The names of its classes; over an encoder those of its classifier, numbered as transformers does where nobody named them."""
        found = labels_of(adapter.manifest, name)
        if not self._base.decoder.classifies:
            return found
        if found is not None and adapter.head and len(found) != adapter.num_classes:
            raise AdapterFormatError(
                f"{name}: its manifest names {len(found)} labels, but its classifier has {adapter.num_classes} classes", hint="correct the manifest"
            )
        return (found or tuple(f"LABEL_{number}" for number in range(adapter.num_classes))) if adapter.head else None


def _num_bytes(adapter: Adapter) -> int:
    lora = sum(tensor.nbytes for module in adapter.modules.values() for tensor in module.tensors)
    return (
        lora
        + sum(tensor.nbytes for tensor in adapter.head.values())
        + sum(tensor.nbytes for found in adapter.edits.values() for tensor in found.tensors.values())
    )


def labels_of(manifest: Mapping[str, Any], name: str = "") -> tuple[str, ...] | None:
    """The closed set of answers of the task that an adapter was trained on: the manifest's own, its training setting's, or the built-in task's."""
    training = manifest.get("training")
    config = training.get("config") if isinstance(training, dict) else None
    data = config.get("data") if isinstance(config, dict) else None
    data = data if isinstance(data, dict) else {}
    found = manifest.get("labels") or data.get("label_set")
    path = data.get("path")
    if found is None and isinstance(path, str) and path.startswith(BUILTIN):
        from atoll.tasks.generators import describe

        try:
            found = describe(path.removeprefix(BUILTIN)).get("label_set")
        except TaskError:
            _log.info("%s was trained on %s, which this Atoll does not know: no closed set of labels", name, path)
    if isinstance(found, list | tuple) and len(found) > 1 and all(isinstance(label, str) and label for label in found):
        return tuple(found)
    return None


def _parents(value: Any, name: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list | None) or not all(isinstance(parent, dict) for parent in value or ()):
        raise AdapterFormatError(f"{name}: parents in its manifest are {value!r:.60}, expected a list of objects")
    from atoll.hub.card_composition import parent_entry

    return tuple(parent_entry(parent) for parent in value or ())


def _token_ids(value: Any, vocabulary: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        return ()
    return tuple(token for token in value if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocabulary)
