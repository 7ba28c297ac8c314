"""Threads and quiet libraries."""

from __future__ import annotations

import os

import pytest

from atoll.cli.environment import prepare, usable_cores


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1), ("nonsense", None)])
def test_a_container_s_quota_limits_the_threads(tmp_path, monkeypatch, quota, cores):
    """Eight threads on a quota of two cores are slower than two."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert usable_cores(file) == (cores or 8)
    assert usable_cores(tmp_path / "absent") == 8


def test_what_the_user_has_set_is_kept_unless_the_option_says_otherwise(monkeypatch):
    """OMP_NUM_THREADS is how a cluster hands out cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    prepare(None)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["TRANSFORMERS_VERBOSITY"]) == ("5", "info")
    monkeypatch.delenv("OMP_NUM_THREADS")
    prepare(None)
    assert os.environ["OMP_NUM_THREADS"] == str(usable_cores())
    monkeypatch.delenv("OMP_NUM_THREADS")
