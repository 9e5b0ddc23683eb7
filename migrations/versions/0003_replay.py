"""Banks of retrainings, replays, and indexes built on them, chosen for the caller, or of named queries.

Revision: 0003, after 0002
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_JSON = postgresql.JSONB(none_as_null=True, astext_type=sa.Text())


def _created_at() -> sa.Column[object]:
    return sa.Column(
        "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
    )


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "bank",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("protocol", _JSON, nullable=False),
        _created_at(),
        sa.ForeignKeyConstraint(["dataset_id"], ["dataset.id"], name=op.f("fk_bank_dataset_id")),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_bank_model_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bank")),
        sa.UniqueConstraint("key", name=op.f("uq_bank_key")),
    )
    op.create_index(op.f("ix_bank_dataset_id"), "bank", ["dataset_id"], unique=False)
    op.create_index(op.f("ix_bank_model_id"), "bank", ["model_id"], unique=False)
    op.create_table(
        "bank_group",
        sa.Column("bank_id", sa.String(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("artifact", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("retrainings", sa.BigInteger(), nullable=False),
        sa.Column("diverged", sa.BigInteger(), nullable=False),
        _created_at(),
        sa.ForeignKeyConstraint(["bank_id"], ["bank.id"], name=op.f("fk_bank_group_bank_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("bank_id", "ordinal", name=op.f("pk_bank_group")),
    )
    op.create_table(
        "replay",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=True),
        sa.Column("index_id", sa.String(), nullable=True),
        sa.Column("request", _JSON, nullable=False),
        sa.Column("left_out", _JSON, nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("result", _JSON, nullable=True),
        sa.Column("error", _JSON, nullable=True),
        sa.Column("job_id", sa.String(), nullable=True),
        _created_at(),
        sa.ForeignKeyConstraint(["dataset_id"], ["dataset.id"], name=op.f("fk_replay_dataset_id"), ondelete="SET NULL"),
        sa.ForeignKeyConstraint(
            ["index_id"], ["attribution_index.id"], name=op.f("fk_replay_index_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_replay_model_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_replay")),
    )
    for column in ("dataset_id", "index_id", "model_id"):
        op.create_index(op.f(f"ix_replay_{column}"), "replay", [column], unique=False)
    op.create_table(
        "index_prior",
        sa.Column("index_id", sa.String(), nullable=False),
        sa.Column("prior_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["index_id"], ["attribution_index.id"], name=op.f("fk_index_prior_index_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["prior_id"], ["attribution_index.id"], name=op.f("fk_index_prior_prior_id")),
        sa.PrimaryKeyConstraint("index_id", "prior_id", name=op.f("pk_index_prior")),
    )
    op.create_index(op.f("ix_index_prior_prior_id"), "index_prior", ["prior_id"], unique=False)
    for column in (
        sa.Column("calibration", _JSON, nullable=True),
        sa.Column("choice", _JSON, nullable=True),
        sa.Column("precision", sa.String(), server_default="float32", nullable=False),
        sa.Column("bank_id", sa.String(), nullable=True),
        sa.Column("queries_id", sa.String(), nullable=True),
    ):
        op.add_column("attribution_index", column)
    op.alter_column("attribution_index", "precision", server_default=None)
    op.create_foreign_key(op.f("fk_attribution_index_bank_id"), "attribution_index", "bank", ["bank_id"], ["id"])
    op.create_foreign_key(
        op.f("fk_attribution_index_queries_id"), "attribution_index", "dataset", ["queries_id"], ["id"]
    )
    op.create_index(op.f("ix_attribution_index_queries_id"), "attribution_index", ["queries_id"], unique=False)


def downgrade() -> None:
    """Drop what was added."""
    for column in ("queries_id", "bank_id", "precision", "choice", "calibration"):
        op.drop_column("attribution_index", column)
    for table in ("index_prior", "replay", "bank_group", "bank"):
        op.drop_table(table)
