"""Which adapters a request's composition is made from, and what can be told of them before it waits for its turn.

The process would find all this out too, but minutes later: what it refuses of adapters that are named, by their kind, base or ranks, stands in the
hub's index and in the headers of their files.

Used by compose.py and compose_body.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from atoll.errors import AdapterNotFound, RequestRefused
from atoll.hub.intake import tensor_shapes
from atoll.hub.names import parse_reference
from atoll.model.adapter_files import CONFIG_FILE, read_object
from atoll.serving.entries import AdapterRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    from atoll.config_compose import ComposeSettings
    from atoll.hub.records import Version
    from atoll.server.compose_body import ComposeBody
    from atoll.serving.keys import Caller
    from atoll.serving.service import Service

MAX_NAME_CHARS = 512


async def candidates(body: ComposeBody, service: Service, caller: Caller) -> tuple[str, ...]:
    """References of the adapters to compose, each of one version; () for all that the process finds in the hub, where the key may use all.

    Raises AdapterNotFound for one that is not there or not for this key, in the same words; RequestRefused for one that is not of the hub.
    """
    if body.adapters:
        return tuple([await _reference(name, service, caller) for name in body.adapters])
    if caller.adapters is None:
        return ()
    listed = await service.operator.listing.adapters(caller, with_engine=False)
    newest = [info.version for info in listed if info.kind == "lora" and info.version.startswith(f"{info.name}@")]  # of a hub's own names
    mine = await asyncio.to_thread(_of_this_base, newest, body.exclude, service)
    if not mine:
        raise AdapterNotFound("there is no LoRA adapter of this base that this key may use", hint="GET /adapters lists those that it may use")
    return tuple(mine)


def _of_this_base(references: Sequence[str], exclude: Sequence[str], service: Service) -> list[str]:
    """Without those that are excluded, and those that were made for other weights, as composing all of a hub leaves them out."""
    assert service.hub is not None, "checked by may_publish"
    excluded, loader = [parse_reference(text) for text in exclude], service.registry.loader
    found = [service.hub.resolve(reference) for reference in references]
    kept = [version for version in found if not any(reference.means(version) for reference in excluded)]
    return [version.ref for version in kept if not (version.path.is_dir() and loader.is_of_other_weights(version.path))]


async def _reference(name: str, service: Service, caller: Caller) -> str:
    if name.startswith("hf:") or "://" in name:
        raise RequestRefused(
            f"{name[:120]!r} names an adapter of elsewhere, and only adapters of the hub are composed", hint="publish it first: POST /adapters"
        )
    located, _ = await service.registry.lookups.locate(AdapterRef(name[: MAX_NAME_CHARS + 1], "pbase"), caller)
    if located.source != "hub" or not caller.allows(located.name):
        raise RequestRefused(f"{name[:120]!r} is a name that was given to an adapter of elsewhere", hint="only adapters of the hub are composed")
    return located.version


def check_adapters(settings: ComposeSettings, service: Service) -> None:
    """Of the adapters that the settings name, what needs no tensors. Blocks: for a thread. Files that are not on this disk are not fetched.

    Raises RequestRefused (none is left, kinds that are not weighed, unequal ranks in the product form) and BaseMismatch.
    """
    assert service.hub is not None, "checked by may_publish"
    excluded = [parse_reference(text) for text in settings.exclude]
    named = [service.hub.resolve(reference) for reference in settings.adapters]
    kept = [version for version in named if not any(reference.means(version) for reference in excluded)]
    if named and not kept:
        raise RequestRefused("every adapter named is excluded, so none is left to compose", hint="exclude fewer")
    for version in kept:
        if version.kind not in ("lora", "composed"):
            raise RequestRefused(
                f"{version.ref} is {version.kind}: it edits hidden states, and only LoRA factors are weighed",
                hint="leave it out; merged_adapters of a request adds edits up with weights of your own",
            )
        if version.path.is_dir():
            service.registry.loader.check_base(version.path, version.ref)
    plain = [version for version in kept if not _is_dora(version)]  # the process leaves DoRA's out, with a warning
    if kept and not plain:
        raise RequestRefused(
            f"{', '.join(version.ref for version in kept[:5])}: DoRA's magnitudes belong to one update alone, and cannot be weighed",
            hint="name plain LoRA adapters",
        )
    if settings.form == "product" and len(plain) <= settings.top_k:  # all of them go on to the search
        _check_ranks(plain)


def _is_dora(version: Version) -> bool:
    return version.path.is_dir() and bool(read_object(version.path / CONFIG_FILE).get("use_dora"))


def _check_ranks(versions: Sequence[Version]) -> None:
    """The product form sums factors, which must be of one shape wherever two adapters change the same linear."""
    ranks: dict[str, tuple[int, str]] = {}
    for version in versions:
        shapes = tensor_shapes(version.path) if version.path.is_dir() else {}
        for key, shape in shapes.items():
            if key.endswith(".lora_A.weight"):
                rank, ref = ranks.setdefault(key, (shape[0], version.ref))
                if rank != shape[0]:
                    raise RequestRefused(
                        f"the product form needs adapters of equal rank, but {ref} has rank {rank} where {version.ref} has {shape[0]}",
                        hint="use the form cat, which takes any ranks, or leave adapters out",
                    )
