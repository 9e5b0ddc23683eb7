"""Where a checkpoint comes from: uploaded, trained from the recipe, or unlearned.

Revision: 0004, after 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; what finished trainings and unlearnings made is told from their results."""
    op.add_column("checkpoint", sa.Column("source", sa.String(), server_default="uploaded", nullable=False))
    op.execute(
        "UPDATE checkpoint SET source = 'trained' FROM replay, jsonb_array_elements(replay.result->'runs') AS one_run "
        "WHERE replay.kind = 'training' AND one_run->'checkpoints' ? checkpoint.id"
    )
    op.execute(
        "UPDATE checkpoint SET source = 'unlearned' FROM replay, jsonb_array_elements(replay.result->'checkpoints') AS made "
        "WHERE replay.kind = 'unlearning' AND made->>'checkpoint' = checkpoint.id"
    )
    op.alter_column("checkpoint", "source", server_default=None)


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("checkpoint", "source")
