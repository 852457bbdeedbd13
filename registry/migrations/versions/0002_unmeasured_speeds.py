"""Speeds may be absent, and are where too few tokens were made to tell them."""

import sqlalchemy as sa
from alembic import op

DOUBLE: sa.Double[float] = sa.Double()

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("speeds") as speeds:
        speeds.alter_column("prompt_tokens_per_s", existing_type=DOUBLE, nullable=True)
        speeds.alter_column("generation_tokens_per_s", existing_type=DOUBLE, nullable=True)
    with op.batch_alter_table("cache_comparisons") as comparisons:
        comparisons.alter_column("tokens_per_s", existing_type=DOUBLE, nullable=True)
    op.execute("UPDATE speeds SET prompt_tokens_per_s = NULL WHERE prompt_tokens < 2")
    op.execute("UPDATE speeds SET generation_tokens_per_s = NULL WHERE generation_tokens < 3")
    op.execute("UPDATE cache_comparisons SET tokens_per_s = NULL WHERE max_tokens < 3")


def downgrade() -> None:
    raise NotImplementedError("Restore the backup that was made before the migration instead.")
