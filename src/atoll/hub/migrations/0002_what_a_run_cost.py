"""Runs say what they cost, how far they got and where their files are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add three columns; runs from before have none of it."""
    op.add_column("runs", sa.Column("cost", sa.JSON))  # tokens, seconds, CPU-seconds, memory, energy, price; NULL: not measured
    op.add_column("runs", sa.Column("progress", sa.JSON))  # steps and losses of a training; NULL: none was taken, or not a training
    op.add_column("runs", sa.Column("folder", sa.Text))  # of its log and checkpoints on the machine that ran it; NULL: not recorded
