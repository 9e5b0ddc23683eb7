"""Versions of data sets, deleted examples, generations of indexes.

Revision: 0002, after 0001
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _json() -> postgresql.JSONB:
    return postgresql.JSONB(none_as_null=True, astext_type=sa.Text())


def upgrade() -> None:
    """Every data set there is becomes a first version, every index a first generation."""
    op.add_column("dataset", sa.Column("parent_id", sa.String(), nullable=True))
    op.add_column("dataset", sa.Column("version", sa.BigInteger(), server_default="1", nullable=False))
    op.create_foreign_key(op.f("fk_dataset_parent_id"), "dataset", "dataset", ["parent_id"], ["id"])
    op.create_index(op.f("ix_dataset_parent_id"), "dataset", ["parent_id"], unique=False)
    op.create_table(
        "deleted_example",
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("row", sa.BigInteger(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["dataset.id"], name=op.f("fk_deleted_example_dataset_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("dataset_id", "row", name=op.f("pk_deleted_example")),
    )
    op.add_column("attribution_index", sa.Column("generation", sa.BigInteger(), server_default="1", nullable=False))
    op.add_column("attribution_index", sa.Column("training_examples", sa.BigInteger(), nullable=True))
    op.add_column("attribution_index", sa.Column("drift", _json(), nullable=True))
    op.add_column("attribution_index", sa.Column("pending", _json(), nullable=True))
    op.create_table(
        "index_generation",
        sa.Column("index_id", sa.String(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("left_out", _json(), nullable=False),
        sa.Column("base", _json(), nullable=True),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["dataset_id"], ["dataset.id"], name=op.f("fk_index_generation_dataset_id")),
        sa.ForeignKeyConstraint(
            ["index_id"], ["attribution_index.id"], name=op.f("fk_index_generation_index_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("index_id", "number", name=op.f("pk_index_generation")),
    )
    op.create_index(op.f("ix_index_generation_dataset_id"), "index_generation", ["dataset_id"], unique=False)
    op.create_index(op.f("ix_index_generation_job_id"), "index_generation", ["job_id"], unique=False)
    op.execute(
        "INSERT INTO index_generation (index_id, number, dataset_id, left_out, fingerprint, job_id) "
        "SELECT id, 1, dataset_id, '[]', fingerprint, job_id FROM attribution_index"
    )
    op.execute(
        "UPDATE attribution_index SET training_examples = dataset.num_examples FROM dataset "
        "WHERE dataset.id = attribution_index.dataset_id AND attribution_index.status = 'ready'"
    )


def downgrade() -> None:
    """Drop what was added."""
    op.drop_index(op.f("ix_index_generation_job_id"), table_name="index_generation")
    op.drop_index(op.f("ix_index_generation_dataset_id"), table_name="index_generation")
    op.drop_table("index_generation")
    for name in ("pending", "drift", "training_examples", "generation"):
        op.drop_column("attribution_index", name)
    op.drop_table("deleted_example")
    op.drop_index(op.f("ix_dataset_parent_id"), table_name="dataset")
    op.drop_constraint(op.f("fk_dataset_parent_id"), "dataset", type_="foreignkey")
    op.drop_column("dataset", "version")
    op.drop_column("dataset", "parent_id")
