"""Records that another writer changed meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from sqlalchemy import Column, ColumnElement, Connection, Enum, and_, select, type_coerce

from chrononaut._capture import Key, read_current
from chrononaut._dialect import may_read_the_past
from chrononaut._history_table import VERSION
from chrononaut._mapping import VersionedMapping, VersionedTable, mapped_columns
from chrononaut._types import LenientEnum
from chrononaut._wanted import WantedRecord
from chrononaut.exceptions import ChrononautException, StaleVersionError
from chrononaut.typing import Operation


def raise_stale(
    connection: Connection,
    table: VersionedTable,
    endings: Mapping[tuple[VersionedMapping, Operation], Sequence[WantedRecord]],
) -> NoReturn:
    """Find the record that does not have the version that it was read with, and say so.

    :param endings: the records, by what was about to end their states.
    :raises StaleVersionError: with what the other writer changed.
    """
    for (mapping, _), records in endings.items():
        keys = [key for key, _, _ in records]
        current = read_current(connection, [mapping.base], keys, lock=may_read_the_past(connection))
        found = {row.key: row.version for row in current}
        for key, version, _ in records:
            if found.get(key) != version:
                changes = _read_conflict(connection, mapping, key, version)
                raise StaleVersionError(mapping.name, key, version, found.get(key), changes)
    raise ChrononautException(
        f"Not all rows of {table.live.name} could be copied to {table.history.name}, although each has the version "
        "that was expected. Is a column type lossy, so that a key read from the database does not find its row?"
    )


def _read_conflict(
    connection: Connection, mapping: VersionedMapping, key: Key, expected: int
) -> dict[str, tuple[Any, Any]]:
    """Return what changed in a record since a version, as ``{attribute: (then, now)}``, without hidden columns."""
    changes: dict[str, tuple[Any, Any]] = {}
    names = {column: name for name, column in mapped_columns(mapping.mapper).items() if name in mapping.tracked}
    for table in mapping.tables:
        copied = [(live, copy) for live, copy in table.copied if live in names]
        then = _row(connection, [copy for _, copy in copied], copied, _is_state(table, key, expected))
        now = _row(connection, [live for live, _ in copied], copied, _is_record(table, key))
        if then is None or now is None:
            continue
        for (live, _), before, after in zip(copied, then, now, strict=True):
            if mapping.comparisons[names[live]](before, after) is not True:
                changes[names[live]] = (before, after)
    return changes


def _is_state(table: VersionedTable, key: Key, version: int) -> ColumnElement[bool]:
    same = (column == part for column, part in zip(table.history_key, key, strict=True))
    return and_(*same, table.history.c[VERSION] == version)


def _is_record(table: VersionedTable, key: Key) -> ColumnElement[bool]:
    return and_(*(column == part for column, part in zip(table.key, key, strict=True)))


def _row(
    connection: Connection,
    columns: Sequence[Column[Any]],
    copied: Sequence[tuple[Column[Any], Column[Any]]],
    condition: ColumnElement[bool],
) -> Sequence[Any] | None:
    read: list[ColumnElement[Any]] = [
        type_coerce(column, LenientEnum(live.type)) if isinstance(live.type, Enum) and column is not live else column
        for column, (live, _) in zip(columns, copied, strict=True)
    ]
    query = select(*read).where(condition)
    if may_read_the_past(connection):
        query = query.with_for_update(read=True)  # which reads what is committed now
    return connection.execute(query).first()
