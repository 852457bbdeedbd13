"""Finding models: by name, by filters such as `bits<=3`, sorted, page by page."""

import base64
import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, and_, case, func, or_, select
from sqlalchemy.orm import Session

from registry.errors import RegistryError
from registry.tables import READY, AliasRow, EvaluationRow, ModelRow, SpeedRow, TagRow

Kind = Literal["number", "text", "date", "flag", "tag"]
Value = str | float | bool | datetime | None

CONDITION = re.compile(r"\s*([A-Za-z_0-9]+)\s*(<=|>=|!=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
OPERATORS: dict[Kind, str] = {
    "number": "<= >= != = < >",
    "date": "<= >= != = < >",
    "text": "= != ~",
    "flag": "= !=",
    "tag": "= !=",
}
MAX_LIMIT = 500


@dataclass(frozen=True)
class Field:
    kind: Kind
    column: ColumnElement[Any]


def _latest(table: type[EvaluationRow] | type[SpeedRow], name: str) -> ColumnElement[Any]:
    """One number of the newest result that a model itself has; a speed, of the newest that has it."""
    column = getattr(table, name)
    newest = select(column).where(table.model_id == ModelRow.id)
    newest = newest.where(EvaluationRow.baseline.is_(False) if table is EvaluationRow else column.is_not(None))
    return newest.order_by(table.id.desc()).limit(1).correlate(ModelRow).scalar_subquery()


def _fields() -> dict[str, Field]:
    kinds: dict[Kind, str] = {
        "text": "name architecture source source_repository source_revision source_sha256 recipe_sha256 "
        "method licence hardware",
        "number": "bits group_size bits_per_weight size_bytes source_size_bytes parameters "
        "quantized_parameters seed format_version seconds peak_memory_bytes",
        "date": "created_at",
        "flag": "external",
    }
    found = {name: Field(kind, getattr(ModelRow, name)) for kind, names in kinds.items() for name in names.split()}
    measured = {name: Field("number", _latest(EvaluationRow, name)) for name in MEASURED}
    timed = {name: Field("number", _latest(SpeedRow, name)) for name in TIMED}
    return {**found, **measured, **timed, "tag": Field("tag", TagRow.tag.expression)}


MEASURED = ("ppl", "kl", "top1")
TIMED = ("prompt_tokens_per_s", "generation_tokens_per_s")
FIELDS = _fields()
FILTER_FIELDS = tuple(FIELDS)
SORT_FIELDS = tuple(name for name, field in FIELDS.items() if field.kind != "tag")


def filter_help() -> str:
    """How to write filters and sort orders, for help texts."""
    by_kind = {kind: ", ".join(n for n, f in FIELDS.items() if f.kind == kind) for kind in OPERATORS}
    return (
        "A filter is FIELD OPERATOR VALUE; of several, all must hold. "
        f"Numbers ({by_kind['number']}) and dates ({by_kind['date']}, as 2026-01-31 or with a time, UTC) "
        f"take <= >= != = < >; texts ({by_kind['text']}) take =, != and ~ (contains, in any case); "
        f"{by_kind['flag']} takes =true or =false; {by_kind['tag']} takes = and !=. "
        f"{', '.join((*MEASURED, *TIMED))} are the latest measured. "
        "Examples: bits<=3, architecture=llama, name~tiny, created_at>=2026-01-31. "
        "Sort by any field but tag, with - before it for descending: ppl, -created_at."
    )


def parse_filter(text: str) -> ColumnElement[bool]:
    """One condition on models. Raises RegistryError for what is not of the form, or not known."""
    match = CONDITION.fullmatch(text)
    if match is None or not match[3]:
        raise RegistryError(
            f"{text!r} is not a filter. Write FIELD OPERATOR VALUE, such as bits<=3 or architecture=llama."
        )
    name, operator, raw = match.groups()
    field = _field(name, FILTER_FIELDS, "filter")
    if operator not in OPERATORS[field.kind].split():
        raise RegistryError(f"{operator!r} does not go with {name} ({field.kind}); allowed: {OPERATORS[field.kind]}.")
    return _condition(field, operator, _value(name, field.kind, raw))


def _condition(field: Field, operator: str, value: Value) -> ColumnElement[bool]:
    column = field.column
    if field.kind == "tag":
        tagged = ModelRow.tags.any(TagRow.tag == value)
        return tagged if operator == "=" else ~tagged
    match operator:
        case "~":
            return func.lower(column).contains(str(value).lower(), autoescape=True)
        case "=":
            return column == value
        case "!=":
            return column.is_distinct_from(value)  # a missing value is also another one
        case "<=":
            return column <= value
        case ">=":
            return column >= value
        case "<":
            return column < value
        case _:
            return column > value


def _field(name: str, allowed: Sequence[str], use: str) -> Field:
    if name not in allowed:
        raise RegistryError(f"There is no {use} field {name!r}.{_near(name, allowed)} All: {', '.join(allowed)}.")
    return FIELDS[name]


def _value(name: str, kind: Kind, raw: str) -> Value:
    try:
        if kind == "number":
            return int(raw) if re.fullmatch(r"[+-]?\d{1,18}", raw) else _finite(raw)
        if kind == "date":
            return _date(raw)
        if kind == "flag":
            return {"true": True, "false": False}[raw.lower()]
    except (ValueError, KeyError) as error:
        forms = {"number": "a number", "date": "a date such as 2026-01-31", "flag": "true or false"}
        raise RegistryError(f"{raw!r} is not a value for {name}: give {forms[kind]}.") from error
    return raw


def _date(raw: str) -> datetime:
    """A date in UTC, which it is where it names no time zone."""
    date = datetime.fromisoformat(raw)
    try:
        return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except OverflowError as error:
        raise ValueError(raw) from error


def _finite(raw: str) -> float:
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", raw):
        raise ValueError(raw)
    return float(raw)


@dataclass(frozen=True)
class Listing:
    """A parsed request for models; `cursor` is the opaque text that the page before ended with."""

    filters: tuple[str, ...]
    sort: str
    limit: int
    cursor: str | None

    def conditions(self) -> list[ColumnElement[bool]]:
        return [ModelRow.state == READY, *(parse_filter(text) for text in self.filters)]

    def count(self) -> Select[int]:
        return select(func.count()).select_from(ModelRow).where(*self.conditions())

    def page(self) -> Select[ModelRow, Any]:
        """Rows with their sort value, one more than `limit` where there is a next page."""
        if not 1 <= self.limit <= MAX_LIMIT:
            raise RegistryError(f"The limit {self.limit} is out of range: 1 to {MAX_LIMIT}.")
        column = self.column()
        order = column.desc() if self.sort.startswith("-") else column.asc()
        query = select(ModelRow, column).where(*self.conditions())
        if self.cursor is not None:
            query = query.where(self._after(column))
        return query.order_by(_missing(column), order, ModelRow.id).limit(self.limit + 1)

    def column(self) -> ColumnElement[Any]:
        return _field(self.sort.removeprefix("-"), SORT_FIELDS, "sort").column

    def next_cursor(self, value: Any, model_id: int) -> str:
        plain = value.isoformat() if isinstance(value, datetime) else value
        text = json.dumps([*self._identity(), plain, model_id])
        return base64.urlsafe_b64encode(text.encode()).decode()

    def _identity(self) -> list[Any]:
        return [list(self.filters), self.sort]

    def _after(self, column: ColumnElement[Any]) -> ColumnElement[bool]:
        value, model_id = self._position()
        if value is None:
            return and_(column.is_(None), ModelRow.id > model_id)
        beyond = column < value if self.sort.startswith("-") else column > value
        return or_(column.is_(None), beyond, and_(column == value, ModelRow.id > model_id))

    def _position(self) -> tuple[Value, int]:
        try:
            *identity, value, model_id = json.loads(base64.urlsafe_b64decode(self.cursor or ""))
            if FIELDS[self.sort.removeprefix("-")].kind == "date":
                value = _date(value)
            good = identity == self._identity() and isinstance(model_id, int)
        except (ValueError, TypeError):
            good, value, model_id = False, None, 0
        if not good:
            raise RegistryError(
                "The cursor does not belong to this listing. Repeat the filters and the sort order of the "
                "page that gave it, or start again without a cursor."
            )
        return value, model_id


def _missing(column: ColumnElement[Any]) -> ColumnElement[int]:
    return case((column.is_(None), 1), else_=0)


def ready_id(name: str) -> Select[int]:
    return select(ModelRow.id).where(ModelRow.name_key == name.casefold(), ModelRow.state == READY)


def find_model(session: Session, name: str, *, any_state: bool = False) -> ModelRow | None:
    """A model by its name or one of its aliases."""
    key = name.casefold()
    aliased = select(AliasRow.model_id).where(AliasRow.alias_key == key)
    query = select(ModelRow).where(or_(ModelRow.name_key == key, ModelRow.id.in_(aliased)))
    return session.scalars(query if any_state else query.where(ModelRow.state == READY)).one_or_none()


def require_model(session: Session, name: str, *, any_state: bool = False) -> ModelRow:
    """Raises RegistryError with the nearest names for one that is unknown."""
    row = find_model(session, name, any_state=any_state)
    if row is None:
        names = session.scalars(select(ModelRow.name).where(ModelRow.state == READY))
        aliases = session.scalars(select(AliasRow.alias).join(ModelRow).where(ModelRow.state == READY))
        near = _near(name, sorted({*names, *aliases}))
        raise RegistryError(f"There is no model {name!r} in the registry.{near} List them to see all.")
    return row


def _near(name: str, known: Sequence[str]) -> str:
    by_key = {text.casefold(): text for text in known}
    keys = difflib.get_close_matches(name.casefold(), by_key, n=5, cutoff=0.5)
    inside = [key for key in by_key if name.casefold() in key]
    nearest = list(dict.fromkeys([*keys, *inside]))[:5]
    return f" Nearest: {', '.join(by_key[key] for key in nearest)}." if nearest else ""
