"""The tables, as SQLAlchemy declarative classes; `migrations/` holds the same as steps of change.

Nothing here is particular to one database. Rows of results go with their model (ON DELETE CASCADE).
"""

from datetime import UTC, datetime
from typing import Annotated, Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

PUBLISHING, READY, REMOVING = "publishing", "ready", "removing"


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, stored in UTC without its zone, since SQLite keeps none."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    # Later migrations find constraints by name.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime(), dict[str, Any]: JSON(), int: BigInteger()}  # noqa: RUF012


Id = Annotated[int, mapped_column(Integer, primary_key=True)]
ModelId = Annotated[int, mapped_column(Integer, ForeignKey("models.id", ondelete="CASCADE"), index=True)]
Sha256 = Annotated[str, mapped_column(String(64), index=True)]
LongText = Annotated[str, mapped_column(Text)]
OptionalText = Annotated[str | None, mapped_column(Text)]
When = Annotated[datetime, mapped_column(index=True)]


class ModelRow(Base):
    """A model. `state` is "ready" once its files are in place; `path` is relative to the models root
    unless `external`; `staging_path` is where the files come from, or go to, while a publish or a
    removal is under way."""

    __tablename__ = "models"

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(String(96))
    name_key: Mapped[str] = mapped_column(String(96), unique=True)
    state: Mapped[str] = mapped_column(String(16), index=True)
    path: Mapped[str] = mapped_column(Text, unique=True)
    external: Mapped[bool]
    staging_path: Mapped[OptionalText]

    source: Mapped[LongText]
    source_sha256: Mapped[Sha256]
    source_repository: Mapped[OptionalText]
    source_revision: Mapped[OptionalText]
    source_size_bytes: Mapped[int | None]
    architecture: Mapped[str] = mapped_column(String(64), index=True)
    parameters: Mapped[int]
    quantized_parameters: Mapped[int | None]
    licence: Mapped[OptionalText]

    method: Mapped[str] = mapped_column(String(64))
    bits: Mapped[int | None]
    group_size: Mapped[int | None]
    bits_per_weight: Mapped[float]
    seed: Mapped[int]
    recipe: Mapped[dict[str, Any]]
    recipe_sha256: Mapped[Sha256]
    format_version: Mapped[int]
    size_bytes: Mapped[int]

    versions: Mapped[dict[str, Any]]
    hardware: Mapped[LongText]
    seconds: Mapped[float | None]
    peak_memory_bytes: Mapped[int | None]
    created_at: Mapped[When]

    files: Mapped[list["FileRow"]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True, lazy="selectin", order_by="FileRow.path"
    )
    parents: Mapped[list["LineageRow"]] = relationship(
        cascade="all, delete-orphan",
        passive_deletes=True,
        lazy="selectin",
        order_by="LineageRow.id",
        foreign_keys="LineageRow.model_id",
    )
    aliases: Mapped[list["AliasRow"]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True, lazy="selectin", order_by="AliasRow.alias"
    )
    tags: Mapped[list["TagRow"]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True, lazy="selectin", order_by="TagRow.tag"
    )


class FileRow(Base):
    """A file of a model, by its path inside the model's folder."""

    __tablename__ = "files"
    __table_args__ = (UniqueConstraint("model_id", "path"),)

    id: Mapped[Id]
    model_id: Mapped[ModelId]
    path: Mapped[LongText]
    size_bytes: Mapped[int]
    sha256: Mapped[Sha256]


class LineageRow(Base):
    """What a model was made from. The name stays when a registered parent is removed."""

    __tablename__ = "lineage"

    id: Mapped[Id]
    model_id: Mapped[ModelId]
    parent_id: Mapped[int | None] = mapped_column(Integer, ForeignKey("models.id", ondelete="SET NULL"), index=True)
    name: Mapped[LongText]
    relation: Mapped[str] = mapped_column(String(32))


class AliasRow(Base):
    """Another name of a model."""

    __tablename__ = "aliases"

    id: Mapped[Id]
    model_id: Mapped[ModelId]
    alias: Mapped[str] = mapped_column(String(96))
    alias_key: Mapped[str] = mapped_column(String(96), unique=True)


class TagRow(Base):
    """A word put on a model."""

    __tablename__ = "tags"
    __table_args__ = (UniqueConstraint("model_id", "tag"),)

    id: Mapped[Id]
    model_id: Mapped[ModelId]
    tag: Mapped[str] = mapped_column(String(96), index=True)


class EvaluationRow(Base):
    """Quality of a model, or of a baseline beside it, on one text."""

    __tablename__ = "evaluations"

    id: Mapped[Id]
    model_id: Mapped[ModelId]
    dataset: Mapped[LongText]
    dataset_sha256: Mapped[Sha256]
    windows: Mapped[int]
    seq_len: Mapped[int]
    tokens: Mapped[int]
    method: Mapped[str] = mapped_column(String(64))
    baseline: Mapped[bool]
    bits: Mapped[int | None]
    group_size: Mapped[int | None]
    bits_per_weight: Mapped[float | None]
    size_bytes: Mapped[int | None]
    ppl: Mapped[float]
    ppl_stderr: Mapped[float | None]
    kl: Mapped[float | None]
    top1: Mapped[float | None]
    reference: Mapped[OptionalText]
    device: Mapped[LongText]
    backend: Mapped[LongText]
    kernel_path: Mapped[LongText]
    created_at: Mapped[When]


class SpeedRow(Base):
    """Speed of one generation."""

    __tablename__ = "speeds"

    id: Mapped[Id]
    model_id: Mapped[ModelId]
    device: Mapped[LongText]
    backend: Mapped[LongText]
    kernel_path: Mapped[LongText]
    prompt_tokens: Mapped[int]
    generation_tokens: Mapped[int]
    prompt_tokens_per_s: Mapped[float | None]
    generation_tokens_per_s: Mapped[float | None]
    context_tokens: Mapped[int | None]
    peak_memory_bytes: Mapped[int | None]
    cache: Mapped[LongText]
    cache_bytes: Mapped[int | None]
    created_at: Mapped[When]


class CacheComparisonRow(Base):
    """One key-value cache on one prompt; rows of one comparison share `run`."""

    __tablename__ = "cache_comparisons"

    id: Mapped[Id]
    model_id: Mapped[ModelId]
    run: Mapped[str] = mapped_column(String(32), index=True)
    cache: Mapped[LongText]
    k_bits: Mapped[int | None]
    v_bits: Mapped[int | None]
    group_size: Mapped[int | None]
    prompt_tokens: Mapped[int]
    max_tokens: Mapped[int]
    prompt_sha256: Mapped[str] = mapped_column(String(64))
    cache_bytes: Mapped[int]
    compression: Mapped[float]
    tokens_per_s: Mapped[float | None]
    kl: Mapped[float | None]
    top1: Mapped[float | None]
    text: Mapped[LongText]
    device: Mapped[LongText]
    backend: Mapped[LongText]
    kernel_path: Mapped[LongText]
    created_at: Mapped[When]
