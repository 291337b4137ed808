"""Write births for records that are older than their versioning: what ``chrononaut adopt`` does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Date,
    DateTime,
    Dialect,
    Engine,
    Insert,
    MetaData,
    Text,
    and_,
    bindparam,
    cast,
    func,
    insert,
    literal,
    null,
    select,
    type_coerce,
)
from sqlalchemy.types import TypeDecorator, TypeEngine

from chrononaut._capture import FIRST_BIRTH, as_json, live_version, lock_rows
from chrononaut._history_table import BEGAN, CHANGE_INFO, CHANGED, OPERATION, VERSION
from chrononaut._mapping import VersionedMapping, VersionedTable, versioned_mappings
from chrononaut._pages import is_after, is_between
from chrononaut._types import UTCDateTime, as_utc
from chrononaut.exceptions import ChrononautException
from chrononaut.typing import Progress

__all__ = ["adopt_records"]


def adopt_records(
    engine: Engine,
    metadata: MetaData,
    change_info: Mapping[str, Any],
    born: datetime | str,
    *,
    tables: Sequence[str] | None = None,
    chunk_size: int = 5_000,
    progress: Progress | None = None,
) -> int:
    """Give records without any history a birth row, as if they had been inserted under versioning.

    Without it such a record counts as having always been in its earliest known state. With it, it did not exist
    before it was born. Records that have history already, or a version above 0, stay as they are, so that running
    it again does no harm; each chunk is a transaction of its own, so that it goes on where it was interrupted.
    Others may write meanwhile. E.g.::

        adopt_records(engine, Base.metadata, {"user_id": "legacy", "remote_addr": None}, born="created_at")

    :param engine: the database.
    :param metadata: what the models are declared on, e.g. ``Base.metadata``.
    :param change_info: recorded with each birth; JSON must be able to hold it.
    :param born: when the records were inserted: an instant (aware), or the name of the column that tells it of each.
        A column without zones is taken as UTC; a record where it is NULL stays as it is.
    :param tables: names of the live tables; all versioned ones that have that column, and record births, if None.
    :param chunk_size: how many rows are looked at in one transaction.
    :param progress: told after every chunk how many live rows of a table are done.
    :return: how many births were written.
    :raises NaiveDatetimeError: if the instant has no zone.
    :raises ChrononautException: if a table is not versioned, or lacks the column, or does not record births.
    """
    if not isinstance(born, str):
        born = as_utc(born, "born")
    info = json.dumps(dict(change_info), allow_nan=False)
    return sum(
        _adopt(engine, mapping, _born(mapping.base, born, engine.dialect), info, chunk_size, progress)
        for mapping in _chosen(metadata, tables, born)
    )


def _chosen(metadata: MetaData, tables: Sequence[str] | None, born: datetime | str) -> Iterator[VersionedMapping]:
    bases: dict[str, VersionedMapping] = {}
    for mapping in versioned_mappings(metadata):
        bases.setdefault(str(mapping.base.live), mapping)
    for name in bases if tables is None else tables:
        if name not in bases:
            raise ChrononautException(f"{name} is no versioned table. There are: {', '.join(sorted(bases))}.")
        mapping = bases[name]
        why = None
        if not mapping.track_inserts:
            why = f"{mapping.name} does not record births (`__chrononaut_track_inserts__`)."
        elif isinstance(born, str) and born not in mapping.base.live.c:
            why = f"{name} has no column {born!r}."
        if why is None:
            yield mapping
        elif tables is not None:
            raise ChrononautException(why)


def _born(table: VersionedTable, born: datetime | str, dialect: Dialect) -> ColumnElement[Any]:
    if not isinstance(born, str):
        return literal(born, UTCDateTime())
    column = table.live.c[born]
    type_: TypeEngine[Any] = column.type
    if isinstance(type_, TypeDecorator):
        type_ = type_.load_dialect_impl(dialect)
    if dialect.name == "postgresql":
        has_zone = isinstance(type_, DateTime) and type_.timezone
        return column if has_zone else func.timezone("UTC", cast(column, DateTime()))
    if isinstance(type_, Date) and dialect.name == "sqlite":
        return type_coerce(column, Text()).concat(" 00:00:00.000000")
    return column


def _adopt(
    engine: Engine,
    mapping: VersionedMapping,
    born: ColumnElement[datetime],
    info: str,
    chunk_size: int,
    progress: Progress | None,
) -> int:
    table = mapping.base
    name = str(table.live)
    children = {child for each in _hierarchy(mapping) for child in each.tables[1:]}
    with engine.connect() as connection:
        total = connection.scalar(select(func.count()).select_from(table.live)) or 0
    adopted = done = 0
    after: tuple[Any, ...] | None = None
    while True:
        with engine.begin() as connection:
            keys = _next_keys(connection, table, after, chunk_size)
            if not keys:
                return adopted
            chunk = is_between(table.key, keys[0], keys[-1])
            births = _births(mapping, table, born, chunk, connection.dialect.name)
            options = {"preserve_rowcount": True}
            adopted += connection.execute(births, {"adopted_info": info}, execution_options=options).rowcount
            for child in children:
                connection.execute(_child_births(table, child, chunk))
        after = keys[-1]
        done += len(keys)
        if progress is not None:
            progress(name, done, max(total, done))


def _hierarchy(base: VersionedMapping) -> Iterator[VersionedMapping]:
    mappings = versioned_mappings(base.base.live.metadata)
    return (mapping for mapping in mappings if mapping.base is base.base)


def _next_keys(
    connection: Connection, table: VersionedTable, after: tuple[Any, ...] | None, size: int
) -> list[tuple[Any, ...]]:
    query = select(*table.key).order_by(*table.key).limit(size)
    if after is not None:
        query = query.where(is_after(table.key, after))
    return [tuple(row) for row in connection.execute(query)]


def _births(
    mapping: VersionedMapping,
    table: VersionedTable,
    born: ColumnElement[datetime],
    chunk: ColumnElement[bool],
    dialect: str,
) -> Insert:
    values: dict[str, ColumnElement[Any]] = {
        copy.key: _as_copied(live, copy) for live, copy in zip(table.key, table.history_key, strict=True)
    }
    if mapping.discriminator is not None:
        key = mapping.discriminator.key
        values[key] = _as_copied(mapping.discriminator, table.history.c[key])
    values |= {
        VERSION: literal(FIRST_BIRTH),
        BEGAN: type_coerce(null(), UTCDateTime()),
        CHANGED: born,
        CHANGE_INFO: as_json(bindparam("adopted_info", type_=Text()), dialect),
        OPERATION: literal("insert"),
    }
    query = select(*values.values()).where(
        chunk, live_version(table) == 0, born.is_not(None), ~_has_history(table, table.history.alias("earlier"))
    )
    return insert(table.history).from_select(list(values), lock_rows(query, table, "update", dialect))


def _child_births(base: VersionedTable, child: VersionedTable, chunk: ColumnElement[bool]) -> Insert:
    """Return the statement that gives the births of subclass records their part in the child's history."""
    keys = zip(child.key, base.key, strict=True)
    rows = child.live.join(base.live, and_(*(mine == theirs for mine, theirs in keys))).join(
        base.history, and_(_is_same(base, base.history), base.history.c[VERSION] == FIRST_BIRTH)
    )
    values = [_as_copied(live, copy) for live, copy in zip(child.key, child.history_key, strict=True)]
    query = select(*values, literal(FIRST_BIRTH)).select_from(rows)
    query = query.where(chunk, ~_has_history(child, child.history.alias("earlier")))
    return insert(child.history).from_select([*(copy.key for copy in child.history_key), VERSION], query)


def _has_history(table: VersionedTable, history: Any) -> ColumnElement[bool]:
    return select(1).where(_is_same(table, history)).correlate(table.live).exists()


def _is_same(table: VersionedTable, history: Any) -> ColumnElement[bool]:
    pairs = zip(table.key, table.history_key, strict=True)
    return and_(*(history.c[copy.key] == _as_copied(live, copy) for live, copy in pairs))


def _as_copied(live: Column[Any], copy: Column[Any]) -> ColumnElement[Any]:
    return live if copy.type is live.type else cast(live, copy.type)
