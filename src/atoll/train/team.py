"""The processes that train one job together, each with its share of every batch, and what they tell each other.

Only an adapter is trained, so what travels in a step is its gradient: one flat vector, summed over the processes by torch.distributed. What each of
them has is already its rows' part in the mean over the label tokens of the whole batch, which all know, so the sum is the gradient of one process
however unequal the shares are. Every process has the base, or a part of each of its blocks and gathers the rest (model.sharded). The first one alone
reads and writes the job's folder.

All that several processes do goes through `together`: where it fails in one of them it fails in all, with that one's sentence.

Used by job.py, loop.py and workflows.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from atoll.errors import AtollError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from atoll.model.sharded import Share

Found = TypeVar("Found")
_GIVEN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and its like tell each process
_SOURCE = re.compile(r"^\[\S*\.(?:cpp|cc):\d+\] ")  # the place in torch's source where an error was met


@dataclass(frozen=True)
class Team:
    """This process's place among `count`: index from 0, and local_index among those of its machine. The default is a process on its own.

    Every method but `share` and `device` must be called by all of the team at the same point, and returns the same in each.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes: checkpoints, logs, progress, the hub."""
        return self.index == 0

    def device(self, name: str) -> str:
        """Where this process computes: of a machine's GPUs its own."""
        return f"cuda:{self.local_index}" if self.count > 1 and name == "cuda" else name

    def share(self, indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """This process's rows of `indices`: the longest first, each goes to the process that has the fewest tokens. May be empty."""
        if self.count == 1:
            return list(indices)
        tokens, mine = [0] * self.count, []
        for index in sorted(indices, key=lambda index: (-lengths[index], index)):
            process = tokens.index(min(tokens))
            tokens[process] += lengths[index]
            if process == self.index:
                mine.append(index)
        return mine

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        if self.count > 1:
            import torch.distributed as dist

            _reached(lambda: dist.all_reduce(tensor))

    def sums(self, *numbers: float) -> list[float]:
        """The sum of each number over the processes, in float64."""
        if self.count == 1:
            return list(numbers)
        import torch

        found = torch.tensor(numbers, dtype=torch.float64)
        self.add_up(found)
        return [float(number) for number in found]

    def any(self, asked: bool) -> bool:
        """Whether one of them says yes."""
        return self.sums(float(asked))[0] > 0

    def copy_first(self, tensor: Tensor) -> None:
        """Replace a tensor by the first process's."""
        if self.count > 1:
            import torch.distributed as dist

            _reached(lambda: dist.broadcast(tensor, src=0))

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        import torch
        import torch.distributed as dist

        found = torch.tensor(number)
        _reached(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return int(found)

    @property
    def base_share(self) -> Share | None:
        """This process's share of a base that the team holds together; None for one on its own, which holds all of it."""
        from atoll.model.sharded import Share

        return Share(self.index, self.count, _gather) if self.count > 1 else None

    def together(self, work: Callable[[], Found]) -> Found:
        """What `work` returns. Where it raises in a process, that one raises its error and the others a TrainingError that quotes it."""
        if self.count == 1:
            return work()
        import torch.distributed as dist

        result: list[Found] = []
        error: Exception | None = None
        try:
            result.append(work())
        except Exception as found:
            error = found
        if self.any(error is not None):
            told: list[Any] = [None] * self.count
            mine = (
                None if error is None else (error.message, error.hint) if isinstance(error, AtollError) else (str(error) or type(error).__name__, "")
            )
            _reached(lambda: dist.all_gather_object(told, mine))
            if error is not None:
                raise error
            index, (message, hint) = next((index, each) for index, each in enumerate(told) if each is not None)
            raise TrainingError(f"process {index + 1} of {self.count} failed: {message}", hint=hint)
        return result[0]

    def from_first(self, work: Callable[[], Found]) -> Found:
        """What `work` returns in the first process, which alone does it; others get a copy. Raises as `together`."""
        if self.count == 1:
            return work()
        import torch.distributed as dist

        result: list[Any] = [self.together(work if self.is_first else lambda: None)]
        _reached(lambda: dist.broadcast_object_list(result, src=0))
        found: Found = result[0]
        return found

    def agree(self, digest: str) -> None:
        """Raises TrainingError where the processes are about to train different jobs."""
        first = self.from_first(lambda: digest)

        def compare() -> None:
            if digest != first:
                raise TrainingError("its config, its data or its base differ from the first one's", hint="give all machines the same files")

        self.together(compare)


ALONE = Team()


@contextlib.contextmanager
def launched_team() -> Iterator[Team]:
    """The team that torchrun, or whatever else sets torch's variables, has started this process in; ALONE where nothing has.

    A process group that the caller has made is used, and left. One of our own is gone afterwards with its threads: one of gloo's that still lets go
    of a tensor while the interpreter ends would abort the process. Raises TrainingError where the others cannot be reached.
    """
    if _number("WORLD_SIZE", 1) < 2 or any(name not in os.environ for name in _GIVEN):
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    own = not dist.is_initialized()
    if own:
        import torch.distributed.nn  # its functions keep the group of the time of its import as a default: ours would outlive the team

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        _reached(lambda: dist.init_process_group(backend))
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), _number("LOCAL_RANK", dist.get_rank()))
    finally:
        if own:
            dist.destroy_process_group()


def _gather(out: Tensor, part: Tensor) -> Callable[[], None]:
    """Begin to fill `out` with every process's part; returns what waits for it."""
    import torch.distributed as dist

    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    begun: list[Any] = []
    _reached(lambda: begun.append(all_gather(out, part, async_op=True)))
    return lambda: _reached(lambda: begun.pop().wait())  # popped: an error's frames would keep the group alive beyond the team


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _reached(work: Callable[[], object]) -> None:
    """Raises TrainingError for torch's when another process is gone."""
    try:
        work()
        return
    except RuntimeError as error:  # not kept as the cause: its frames hold the group, which is to end with the team
        said = _SOURCE.sub("", str(error).splitlines()[0]).partition(". ")[0]
    raise TrainingError(
        f"another process of this training has ended or cannot be reached: {said}",
        hint="its own message says why; run the same command again to go on from the last checkpoint",
    )
