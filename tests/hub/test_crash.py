"""Two publishers at once, a kill at any point, a full disk: nothing is lost, nothing half-done is seen."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.errors import StorageError
from atoll.hub import Hub

from .conftest import write_adapter_folder

POINTS = ("copy", "staged", "blob", "locked", "folder", "row", "committed")


def _publish_many(root: str, source: str, process: int) -> None:
    hub = Hub(Path(root))
    for index in range(10):
        hub.publish(write_adapter_folder(Path(source) / f"{process}-{index}", 100 * process + index), "shared", tags=("newest",))
        hub.publish(write_adapter_folder(Path(source) / f"same-{process}-{index}", 1000 + index), "same")


def _publish_and_die(root: str, source: str, point: str) -> None:
    def fault(reached: str) -> None:
        if reached == point:
            os.kill(os.getpid(), signal.SIGKILL)

    Hub(Path(root), fault=fault).publish(Path(source), "victim")


def _start(target, *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def test_two_processes_publishing_at_once_lose_nothing(tmp_path):
    """Both open a hub that does not exist yet, and publish to the same names: every version gets its own number, equal content gets one."""
    root = tmp_path / "hub"
    processes = [_start(_publish_many, str(root), str(tmp_path), number) for number in (1, 2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    hub = Hub(root)
    assert sorted(version.number for version in hub.list("shared")) == list(range(1, 21))
    assert len({version.digest for version in hub.list("shared")}) == 20
    assert sorted(version.number for version in hub.list("same")) == list(range(1, 11))
    assert hub.verify() == () and hub.resolve("shared:newest").name == "shared"
    assert hub.gc().num_blobs == 0 and not list((root / "staging").iterdir())


@pytest.mark.parametrize("point", ["copy", "blob", "folder", "row", "committed"])
def test_a_killed_publisher_leaves_nothing_visible_and_gc_sweeps_the_rest(tmp_path, make, point):
    """SIGKILL runs no cleanup: what is visible must be whole, and what is left over must be found."""
    hub = Hub(tmp_path / "hub")
    kept = hub.publish(make(1), "kept")
    process = _start(_publish_and_die, str(hub.root), str(make(2)), point)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    visible = ["kept", "victim"] if point == "committed" else ["kept"]
    assert [version.name for version in hub.list()] == visible
    assert hub.verify() == ()
    hub.gc()
    assert hub.verify() == () and hub.path(kept).is_dir()
    assert not list((hub.root / "staging").iterdir())
    assert {path.name for path in (hub.root / "adapters").iterdir()} == {version.digest for version in hub.list()}
    assert hub.publish(make(2), "victim").number == 1


@pytest.mark.parametrize("point", POINTS[:-1])
def test_a_full_disk_at_any_step_is_one_error_and_changes_nothing(tmp_path, make, point):
    """A disk fills when it likes. The publisher gets StorageError with a way out, others see nothing, and no temporary file stays."""

    def fault(reached: str) -> None:
        if reached == point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match="disk is full") as caught:
        Hub(tmp_path / "hub", fault=fault).publish(make(1), "a")
    assert "gc" in caught.value.hint
    hub = Hub(tmp_path / "hub")
    assert hub.list() == () and not list((hub.root / "staging").iterdir())
    hub.gc()
    assert not list(hub._blobs.all()) and not list((hub.root / "adapters").iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB; skipped where one cannot be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    if (
        not hasattr(os, "geteuid")
        or os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], check=False).returncode
    ):
        pytest.skip("a small tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_really_full_disk_stops_publishing_and_deleting_makes_room(small_disk, make):
    """On a real small disk: publish until it is full, all that was published is whole, and delete plus gc gets the room back."""
    hub = Hub(small_disk / "hub")
    with pytest.raises(StorageError):
        for seed in range(100):
            hub.publish(make(seed, rows=8 * 2048), "a")
    numbers = [version.number for version in hub.list("a")]
    assert len(numbers) > 5 and hub.verify() == () and not list((hub.root / "staging").iterdir())
    for number in numbers[:3]:
        hub.delete(f"a@{number}")
    assert hub.gc().freed_bytes > 300_000
    assert hub.publish(make(100, rows=8 * 2048), "a").number == numbers[0] + 1


def test_a_disk_filled_by_somebody_else_in_mid_publish_leaves_nothing(small_disk, make):
    """The check of free space before copying cannot see what others write after it."""

    def fill(point: str) -> None:
        if point == "staged":
            with contextlib.suppress(OSError):
                (small_disk / "somebody").write_bytes(b"x" * (8 << 20))

    with pytest.raises(StorageError):
        Hub(small_disk / "hub", fault=fill).publish(make(1), "a")
    (small_disk / "somebody").unlink()
    hub = Hub(small_disk / "hub")
    assert hub.list() == () and hub.publish(make(1), "a").number == 1 and hub.verify() == ()


def test_gc_beside_publishers_never_takes_their_files(tmp_path):
    """Garbage collection finds blobs whose row is not there yet: the publisher must notice and store them again."""
    root, errors = tmp_path / "hub", []
    sources = [write_adapter_folder(tmp_path / str(seed), seed) for seed in range(8)]

    def collect_until_locked() -> Callable[[str], None]:
        seen: list[str] = []

        def fault(point: str) -> None:
            seen.append(point)
            if "locked" not in seen:  # after it, gc would wait for this very publisher
                Hub(root).gc()

        return fault

    def publish(part: list[Path]) -> None:
        try:
            for source in part:
                Hub(root, fault=collect_until_locked()).publish(source, source.name)
        except Exception as error:
            errors.append(error)

    Hub(root)
    threads = [threading.Thread(target=publish, args=(sources[half::2],)) for half in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    hub = Hub(root)
    assert len(hub.list()) == 8 and hub.verify() == ()
    assert all(version.path.is_dir() for version in hub.list())
