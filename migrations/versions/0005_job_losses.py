"""How many workers a job has cost, so that one which ends its worker each time is not tried for ever.

Revision: 0005, after 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("job", sa.Column("losses", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("job", "losses")
