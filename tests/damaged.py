"""Adapter folders to damage, and how each damage must be refused.

Used by tests of what is read from strangers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.errors import AtollError
from atoll.model.adapter_files import CONFIG_FILE, WEIGHTS_FILE, check_adapter_files, read_adapter


def refused(folder: Path, error: type[AtollError], *words: str) -> AtollError:
    """Reading fails with exactly this class, naming the file or folder and every one of `words`; checking fails in the same way."""
    messages = []
    for read in (read_adapter, check_adapter_files):
        with pytest.raises(AtollError) as found:
            read(folder)
        assert type(found.value) is error, found.value
        messages.append(found.value.message)
        for word in (str(folder), *words):
            assert word in found.value.message
    assert messages[0] == messages[1]
    return found.value


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the safetensors header, data untouched. change edits it in place, or returns the header's bytes."""
    raw = (folder / WEIGHTS_FILE).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    given = change(header)
    new = given if isinstance(given, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])
