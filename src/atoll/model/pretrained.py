"""A transformers model from a base's folder: from safetensors, without running code from the folder, and without its talk on stderr.

Used by generic_decoder.py and masked_encoder.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from atoll.errors import BaseFormatError


def loaded(auto: Any, path: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The model that an auto class makes of the folder, and the names of tensors that the files lack or have in another shape, sorted.

    Raises BaseFormatError where it cannot be made.
    """
    try:
        with _quietly():
            model, report = auto.from_pretrained(
                path, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # transformers and its Rust readers raise what they like for a damaged file
        raise BaseFormatError(f"{path} cannot be loaded: {error}", hint="restore the files from where the base came from") from error
    found = (name if isinstance(name, str) else name[0] for what in ("missing_keys", "mismatched_keys") for name in report.get(what) or ())
    return model, sorted(set(found))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' list of tensors that other heads have or lack (what matters of it is said by the caller) and its own progress bar."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
