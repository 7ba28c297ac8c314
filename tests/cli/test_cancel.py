"""`atoll cancel`: what it says."""

from __future__ import annotations

from pathlib import Path

from atoll.workflows import locked
from atoll.workflows.cancelling import CANCEL_FILE, announce


def test_a_running_training_is_told_to_stop(tmp_path: Path, atoll) -> None:
    """The folder to stdout, so that a script can wait for it."""
    folder = tmp_path / "runs" / "tickets"
    with locked(folder):
        announce(folder, "tickets")
        done = atoll("cancel", "tickets", "--out", tmp_path / "runs")
        assert done.code == 0
        assert done.out.strip() == str(folder)
        assert "keeps a checkpoint" in done.err
        assert (folder / CANCEL_FILE).exists()
        wrong = atoll("cancel", "ticket", "--out", tmp_path / "runs")
    assert wrong.code == 1
    assert "no training named 'ticket' is running" in wrong.err
    assert "did you mean tickets?" in wrong.err
