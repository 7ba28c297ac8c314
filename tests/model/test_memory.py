"""model/memory.py: memory of freed tensors is taken again, in order, and nothing of it is lost or shared."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch

from atoll.model.memory import _tensors, keep_freed_memory, release_memory

MIB = 1 << 20

HOLES = """
import torch
from atoll.model.memory import keep_freed_memory

keep_freed_memory()
first, second, third, last = (torch.empty(4 << 20, dtype=torch.uint8) for _ in range(4))
place = first.data_ptr()
assert last.data_ptr() == place + (12 << 20)
del first
again = torch.empty(3 << 20, dtype=torch.uint8)
assert again.data_ptr() == place
del second, third, again
assert torch.empty(12 << 20, dtype=torch.uint8).data_ptr() == place
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone")


@pytest.fixture(autouse=True)
def kept() -> None:
    keep_freed_memory()
    held = block(1)
    if not tensor_bytes():
        pytest.skip("no compiler")
    del held


def tensor_bytes() -> int:
    """Bytes of large tensors in the memory of their own; 0 where there is none."""
    found = (ctypes.c_size_t * 2)()
    if (library := _tensors()) is not None:
        library.atoll_tensors_bytes(found)
    return int(found[0])


def block(mib: float, value: int = 0) -> torch.Tensor:
    return torch.full((int(mib * MIB),), value, dtype=torch.uint8)


def test_the_lowest_hole_that_fits_is_taken_and_neighbours_merge() -> None:
    """So a step that frees all and takes other sizes finds one piece again, not many. In a process where nothing else is taken."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_what_is_held_is_counted() -> None:
    """Small tensors are elsewhere, and so are those that no machine should promise."""
    before = tensor_bytes()
    kept = [block(4), torch.zeros(100), block(300)]
    assert tensor_bytes() - before == 4 * MIB
    del kept
    assert tensor_bytes() == before


def test_tensors_keep_their_values_through_a_release() -> None:
    """Only pages of holes go back; a tensor beside them stays."""
    tensors = [block(1, value) for value in range(16)]
    gone = tensors[::2]
    del tensors[::2], gone
    release_memory()
    assert [int(tensor.unique()) for tensor in tensors] == list(range(1, 16, 2))
    assert int(torch.zeros(2 * MIB, dtype=torch.uint8).max()) == 0


def test_a_storage_may_grow_and_shrink() -> None:
    """As gradients do in every step, whichever memory the storage began in."""
    tensor = torch.ones(MIB)
    storage = tensor.untyped_storage()
    for _ in range(3):
        storage.resize_(0)
        storage.resize_(4 * MIB)
        tensor.fill_(7.0)
    assert float(tensor.sum()) == 7.0 * MIB


def test_threads_get_memory_apart() -> None:
    """Each finds what it wrote."""
    wrong: list[int] = []

    def work(value: int) -> None:
        for round_number in range(200):
            tensors = [block(0.2 + (round_number * 7 + k) % 5 / 4, value) for k in range(4)]
            if any(int(tensor[0]) != value or int(tensor[-1]) != value for tensor in tensors):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_fork_has_memory_of_its_own() -> None:
    """While another thread takes and frees: its lock must not be inherited."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            block(1)

    thread = threading.Thread(target=churn)
    thread.start()
    mine = block(2, 5)
    try:
        for _ in range(20):
            process_id = os.fork()
            if not process_id:
                mine.fill_(9)
                os._exit(0 if int(block(3, 4).max()) == 4 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()
    assert int(mine.max()) == 5
