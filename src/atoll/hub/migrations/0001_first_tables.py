"""The first tables: names, versions, tags, files, parents, scores, runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create everything. Constraints are named, so that later migrations can change them on SQLite and PostgreSQL alike."""
    time = sa.DateTime(timezone=True)
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(193), nullable=False),  # as its first publisher wrote it
        sa.Column("name_key", sa.String(193), nullable=False),  # case-folded: `Intents` and `intents` are one name
        sa.Column("next_number", sa.Integer, nullable=False),  # outlives deleted versions, so no number is given twice
        sa.Column("created_at", time, nullable=False),
        sa.UniqueConstraint("name_key", name="uq_adapters_name_key"),
    )
    op.create_table(
        "versions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id", name="fk_versions_adapter_id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),  # 1, 2, 3 within a name
        sa.Column("digest", sa.String(64), nullable=False),  # sha256 over the files; two names may share one content
        sa.Column("kind", sa.String(32), nullable=False),  # lora, reft, composed
        sa.Column("base_name", sa.String(512)),  # NULL: neither manifest nor PEFT config names a base
        sa.Column("base_weights", sa.String(64)),  # finds adapters of one base whatever it is called; NULL: a stranger's adapter, unknown
        sa.Column("rank", sa.Integer),  # NULL: the kind has no rank
        sa.Column("num_parameters", sa.Integer),  # NULL: not counted
        sa.Column("size_bytes", sa.Integer, nullable=False),  # of all files, so that a listing needs no join
        sa.Column("description", sa.Text, nullable=False),  # for search; empty: none given
        sa.Column("task", sa.String(256), nullable=False),  # what it was trained on, for search; empty: not recorded
        sa.Column("licence", sa.String(256)),  # NULL: not stated, which is not the same as free
        sa.Column("message", sa.Text, nullable=False),  # what the publisher said of this version; empty: nothing
        sa.Column("created_at", time, nullable=False),
        sa.Column("yanked_at", time),  # NULL: not yanked. A yanked version is found by number or digest only
        sa.UniqueConstraint("adapter_id", "number", name="uq_versions_number"),
        sa.UniqueConstraint("adapter_id", "digest", name="uq_versions_content"),  # publishing twice gives the version that is there
    )
    op.create_index("ix_versions_digest", "versions", ["digest"])
    op.create_index("ix_versions_base_name", "versions", ["base_name"])
    op.create_table(
        "tags",
        sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id", name="fk_tags_adapter_id"), primary_key=True),
        sa.Column("tag", sa.String(64), primary_key=True),
        sa.Column("version_id", sa.Integer, sa.ForeignKey("versions.id", name="fk_tags_version_id"), nullable=False),
    )
    op.create_index("ix_tags_version_id", "tags", ["version_id"])
    op.create_table(
        "files",
        sa.Column("digest", sa.String(64), primary_key=True),  # of the version's content, not of the file
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False),  # the blob
        sa.Column("size_bytes", sa.Integer, nullable=False),
    )
    op.create_index("ix_files_sha256", "files", ["sha256"])
    op.create_table(
        "parents",
        sa.Column("digest", sa.String(64), primary_key=True),  # of the composed content
        sa.Column("position", sa.Integer, primary_key=True),  # order in the manifest
        sa.Column("parent_digest", sa.String(64)),  # NULL: the parent never was in a hub; no foreign key, since a parent may be deleted
        sa.Column("parent_name", sa.String(256)),  # NULL: known by digest only
        sa.Column("weight", sa.Float),  # composition weight; NULL: the method has none, or one a layer
    )
    op.create_index("ix_parents_parent_digest", "parents", ["parent_digest"])
    op.create_table(
        "scores",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),  # an adapter's or a base's; scores outlive what they measured
        sa.Column("task", sa.String(256), nullable=False),
        sa.Column("task_version", sa.String(64), nullable=False),  # scores compare only within one version
        sa.Column("metric", sa.String(64), nullable=False),
        sa.Column("value", sa.Float, nullable=False),
        sa.Column("stderr", sa.Float),  # NULL: the metric has no per-row values to take it from
        sa.Column("n", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),  # rows without a usable answer; they count as wrong in value
        sa.Column("options_value", sa.Float),  # accuracy by likelihood over the labels; NULL: the task has no closed label set
        sa.Column("details", sa.JSON, nullable=False),  # what produced the score: seed, prompt, engine settings
        sa.Column("created_at", time, nullable=False),
    )
    op.create_index("ix_scores_digest", "scores", ["digest"])
    op.create_index("ix_scores_task", "scores", ["task", "task_version"])
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),  # train, compose
        sa.Column("name", sa.String(193)),  # of the adapter it makes; NULL: nothing was to be published
        sa.Column("digest", sa.String(64)),  # of what it made; NULL: nothing yet, or it failed
        sa.Column("status", sa.String(16), nullable=False),  # running, finished, failed, interrupted
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("started_at", time, nullable=False),
        sa.Column("finished_at", time),  # NULL: still running, or killed
        sa.Column("seconds", sa.Float),  # working time over all resumptions, unlike finished - started; NULL: not known yet
        sa.Column("message", sa.Text, nullable=False),  # the error of a failed run; empty: none
    )
    op.create_index("ix_runs_name", "runs", ["name"])
    op.create_index("ix_runs_digest", "runs", ["digest"])
