"""The first schema: models, their files, lineage, names, evaluations, speeds, cache comparisons."""

import sqlalchemy as sa
from alembic import op

DOUBLE: sa.Double[float] = sa.Double()

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("name_key", sa.String(96), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("external", sa.Boolean(), nullable=False),
        sa.Column("staging_path", sa.Text(), nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("source_sha256", sa.String(64), nullable=False),
        sa.Column("source_repository", sa.Text(), nullable=True),
        sa.Column("source_revision", sa.Text(), nullable=True),
        sa.Column("source_size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("architecture", sa.String(64), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("quantized_parameters", sa.BigInteger(), nullable=True),
        sa.Column("licence", sa.Text(), nullable=True),
        sa.Column("method", sa.String(64), nullable=False),
        sa.Column("bits", sa.BigInteger(), nullable=True),
        sa.Column("group_size", sa.BigInteger(), nullable=True),
        sa.Column("bits_per_weight", DOUBLE, nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("recipe_sha256", sa.String(64), nullable=False),
        sa.Column("format_version", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.Column("hardware", sa.Text(), nullable=False),
        sa.Column("seconds", DOUBLE, nullable=True),
        sa.Column("peak_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.UniqueConstraint("name_key", name="uq_models_name_key"),
        sa.UniqueConstraint("path", name="uq_models_path"),
    )
    op.create_index("ix_models_architecture", "models", ["architecture"])
    op.create_index("ix_models_created_at", "models", ["created_at"])
    op.create_index("ix_models_recipe_sha256", "models", ["recipe_sha256"])
    op.create_index("ix_models_source_sha256", "models", ["source_sha256"])
    op.create_index("ix_models_state", "models", ["state"])
    op.create_table(
        "aliases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(96), nullable=False),
        sa.Column("alias_key", sa.String(96), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_aliases_model_id_models", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_aliases"),
        sa.UniqueConstraint("alias_key", name="uq_aliases_alias_key"),
    )
    op.create_index("ix_aliases_model_id", "aliases", ["model_id"])
    op.create_table(
        "cache_comparisons",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("run", sa.String(32), nullable=False),
        sa.Column("cache", sa.Text(), nullable=False),
        sa.Column("k_bits", sa.BigInteger(), nullable=True),
        sa.Column("v_bits", sa.BigInteger(), nullable=True),
        sa.Column("group_size", sa.BigInteger(), nullable=True),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("max_tokens", sa.BigInteger(), nullable=False),
        sa.Column("prompt_sha256", sa.String(64), nullable=False),
        sa.Column("cache_bytes", sa.BigInteger(), nullable=False),
        sa.Column("compression", DOUBLE, nullable=False),
        sa.Column("tokens_per_s", DOUBLE, nullable=False),
        sa.Column("kl", DOUBLE, nullable=True),
        sa.Column("top1", DOUBLE, nullable=True),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("kernel_path", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_id"], ["models.id"], name="fk_cache_comparisons_model_id_models", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_cache_comparisons"),
    )
    op.create_index("ix_cache_comparisons_created_at", "cache_comparisons", ["created_at"])
    op.create_index("ix_cache_comparisons_model_id", "cache_comparisons", ["model_id"])
    op.create_index("ix_cache_comparisons_run", "cache_comparisons", ["run"])
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("dataset", sa.Text(), nullable=False),
        sa.Column("dataset_sha256", sa.String(64), nullable=False),
        sa.Column("windows", sa.BigInteger(), nullable=False),
        sa.Column("seq_len", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("method", sa.String(64), nullable=False),
        sa.Column("baseline", sa.Boolean(), nullable=False),
        sa.Column("bits", sa.BigInteger(), nullable=True),
        sa.Column("group_size", sa.BigInteger(), nullable=True),
        sa.Column("bits_per_weight", DOUBLE, nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("ppl", DOUBLE, nullable=False),
        sa.Column("ppl_stderr", DOUBLE, nullable=True),
        sa.Column("kl", DOUBLE, nullable=True),
        sa.Column("top1", DOUBLE, nullable=True),
        sa.Column("reference", sa.Text(), nullable=True),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("kernel_path", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_evaluations_model_id_models", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
    )
    op.create_index("ix_evaluations_created_at", "evaluations", ["created_at"])
    op.create_index("ix_evaluations_dataset_sha256", "evaluations", ["dataset_sha256"])
    op.create_index("ix_evaluations_model_id", "evaluations", ["model_id"])
    op.create_table(
        "files",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_files_model_id_models", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.UniqueConstraint("model_id", "path", name="uq_files_model_id_path"),
    )
    op.create_index("ix_files_model_id", "files", ["model_id"])
    op.create_index("ix_files_sha256", "files", ["sha256"])
    op.create_table(
        "lineage",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("relation", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_lineage_model_id_models", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["parent_id"], ["models.id"], name="fk_lineage_parent_id_models", ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name="pk_lineage"),
    )
    op.create_index("ix_lineage_model_id", "lineage", ["model_id"])
    op.create_index("ix_lineage_parent_id", "lineage", ["parent_id"])
    op.create_table(
        "speeds",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("kernel_path", sa.Text(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("generation_tokens", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens_per_s", DOUBLE, nullable=False),
        sa.Column("generation_tokens_per_s", DOUBLE, nullable=False),
        sa.Column("context_tokens", sa.BigInteger(), nullable=True),
        sa.Column("peak_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("cache", sa.Text(), nullable=False),
        sa.Column("cache_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_speeds_model_id_models", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_speeds"),
    )
    op.create_index("ix_speeds_created_at", "speeds", ["created_at"])
    op.create_index("ix_speeds_model_id", "speeds", ["model_id"])
    op.create_table(
        "tags",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("tag", sa.String(96), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_tags_model_id_models", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_tags"),
        sa.UniqueConstraint("model_id", "tag", name="uq_tags_model_id_tag"),
    )
    op.create_index("ix_tags_model_id", "tags", ["model_id"])
    op.create_index("ix_tags_tag", "tags", ["tag"])


def downgrade() -> None:
    raise NotImplementedError("Restore the backup that was made before the migration instead.")
