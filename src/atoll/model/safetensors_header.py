"""Check the header of an adapter's safetensors file without mapping a tensor.

The file may be a stranger's: its header is read under a limit, every offset is checked against the file's size, and every name must mean something.

Used by adapter_files.py and generic_adapter.py, before the safetensors library sees the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from atoll.errors import AdapterFormatError, UnsupportedAdapter
from atoll.model.sites import MODULE_NAMES, Site, parse_peft_key

_HEADER_LIMIT = 1 << 21  # bytes; an 80-layer base needs about 170 KB for 7 targets, and as much for every three parts of untied edits
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_ANY_KEY = re.compile(r"base_model\.model\.([A-Za-z0-9_.]{1,300})\.lora_([AB])\.weight")

K = TypeVar("K", bound=Hashable)


def check_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Check a safetensors header without mapping a tensor; returns every tensor's shape by its name.

    Refuses: a header over 2 MB, repeated names, tensors that overlap, leave gaps or end elsewhere than the file, other dtypes, no tensor at all.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int, str]] = []
    with path.open("rb") as file:
        header, data_start = _read_header(file, path)
        size = os.fstat(file.fileno()).st_size - data_start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, span, item_bytes = _entry(name, entry, path)
        if span[1] - span[0] != math.prod(shape) * item_bytes:
            raise AdapterFormatError(f"{path}: {name} says shape {shape} but spans {span[1] - span[0]} bytes")
        shapes[name] = shape
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise AdapterFormatError(f"{path}: {name} starts at byte {start} of the data, but the one before ends at {end}")
        end = stop
    if end != size:
        raise AdapterFormatError(
            f"{path} has {size} bytes of data, but its header describes {end}: the file is {'truncated' if size < end else 'padded'}"
        )
    if not shapes:
        raise AdapterFormatError(f"{path} holds no tensors")
    return shapes


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise AdapterFormatError(f"{path} is {len(prefix)} bytes long, too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > _HEADER_LIMIT:
        raise AdapterFormatError(f"{path}: the safetensors header claims {length} bytes, more than the limit of {_HEADER_LIMIT}")
    raw = file.read(length)
    if len(raw) < length:
        raise AdapterFormatError(f"{path} ends inside its header: the file is truncated")

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise AdapterFormatError(f"{path}: the header names a tensor twice")
        return dict(pairs)

    try:
        header = json.loads(raw, object_pairs_hook=no_repeats)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path}: the safetensors header is not JSON") from error
    if not isinstance(header, dict):
        raise AdapterFormatError(f"{path}: the safetensors header is not an object")
    return header, 8 + length


def _entry(name: str, entry: Any, path: Path) -> tuple[tuple[int, ...], tuple[int, int], int]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, stop)) and stop >= start
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise AdapterFormatError(f"{path}: the header's entry for {name!r} is malformed")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise AdapterFormatError(f"{path}: {name} is stored as {dtype}, but {', '.join(_DTYPE_BYTES)} were expected")
    return shape, (start, stop), _DTYPE_BYTES[dtype]


def lora_sites(shapes: Mapping[str, tuple[int, ...]], path: Path) -> set[Site]:
    """The sites whose LoRA factors these tensors are.

    Refuses names that are not factors of a linear that Atoll knows, a site with only one factor, factors of different rank.
    """
    wanted = f"neither a LoRA factor of {', '.join(MODULE_NAMES)} nor part of a ReFT edit"
    return _paired(shapes, path, parse_peft_key, lambda site: f"layer {site.layer} {site.target}", wanted)


def lora_paths(shapes: Mapping[str, tuple[int, ...]], path: Path) -> set[str]:
    """As lora_sites, for a base of another family: the paths of its linears."""
    return _paired(shapes, path, _parse_any_key, str, "no LoRA factor of a linear")


def _parse_any_key(name: str) -> tuple[str, str] | None:
    found = _ANY_KEY.fullmatch(name)
    return None if found is None else (found[1], found[2])


def _paired(
    shapes: Mapping[str, tuple[int, ...]], path: Path, parse: Callable[[str], tuple[K, str] | None], said: Callable[[K], str], wanted: str
) -> set[K]:
    factors: dict[K, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found = parse(name)
        if found is None:
            raise UnsupportedAdapter(f"{path} has a tensor {name!r}, which is {wanted}")
        if len(shape) != 2 or 0 in shape:
            raise AdapterFormatError(f"{path}: {name} has shape {shape}, but a matrix was expected")
        factors.setdefault(found[0], {})[found[1]] = shape
    for key, pair in factors.items():
        if len(pair) != 2:
            raise AdapterFormatError(f"{path}: {said(key)} has only factor {next(iter(pair))}; A and B are both needed")
        rank_a, rank_b = pair["A"][0], pair["B"][1]
        if rank_a != rank_b:
            raise AdapterFormatError(f"{path}: {said(key)} has A of rank {rank_a} and B of rank {rank_b}")
    return set(factors)
