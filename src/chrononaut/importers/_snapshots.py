"""Turn what other libraries record, a state when it begins, into history: a state when it has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Column, Connection, insert, select

from chrononaut._capture import FIRST_BIRTH, Key, read_current, renumber
from chrononaut._history_table import BEGAN, CHANGE_INFO, CHANGED, OPERATION, VERSION
from chrononaut._mapping import VersionedMapping, VersionedTable
from chrononaut._wanted import keys_in
from chrononaut.typing import ChangeInfo, Operation

#: The change info of the end of a record that is gone although nothing says when and why.
UNRECORDED_END: ChangeInfo = {
    "user_id": None,
    "remote_addr": None,
    "extra": {"rationale": "The record is gone, but its deletion was not recorded before the import."},
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A change as another library recorded it.

    :param at: when it was made; None for a first state of which nobody knows when it began.
    :param info: who made it and why.
    :param operation: what it did.
    :param values: the state that it led to (that it ended, if it was a deletion), by column of the live table.
    """

    at: datetime | None
    info: ChangeInfo
    operation: Operation
    values: Mapping[Column[Any], Any]


class HistoryRow(NamedTuple):
    """A state that has ended, or an absence."""

    values: Mapping[Column[Any], Any]
    version: int
    began: datetime | None
    changed: datetime
    info: ChangeInfo
    operation: Operation


@dataclass(slots=True)
class Chain:
    """The history rows of one record, and the version of its live row."""

    rows: list[HistoryRow] = field(default_factory=list[HistoryRow])
    live_version: int | None = None


def build_chain(snapshots: Sequence[Snapshot], is_alive: bool) -> Chain:
    """Return the history that a record's changes amount to.

    :param snapshots: its changes in their order.
    :param is_alive: whether the record exists now.
    """
    chain = Chain()
    version = 0
    state: Snapshot | None = None
    began: datetime | None = None  # of the state, or of the absence, that goes on

    def end(values: Mapping[Column[Any], Any], at: datetime | None, info: ChangeInfo, operation: Operation) -> None:
        nonlocal version, began
        changed = max(each for each in (at, began) if each is not None)
        chain.rows.append(HistoryRow(values, version, began, changed, info, operation))
        version, began = version + 1, changed

    for snapshot in snapshots:
        if state is not None and snapshot.operation == "insert":
            end(state.values, state.at or snapshot.at, UNRECORDED_END, "delete")
            state = None
        if state is not None:
            end(state.values, snapshot.at, snapshot.info, "delete" if snapshot.operation == "delete" else "update")
        elif snapshot.operation == "delete":
            end(snapshot.values, snapshot.at, snapshot.info, "delete")
        elif chain.rows or snapshot.operation == "insert":
            version = version if chain.rows else FIRST_BIRTH
            end({}, snapshot.at, snapshot.info, "insert")
        elif snapshot.at is not None:
            end({}, snapshot.at, snapshot.info, "update")  # all that is known of the state before is that there was one
        state = None if snapshot.operation == "delete" else snapshot
    if state is not None and not is_alive:
        end(state.values, state.at, UNRECORDED_END, "delete")
    if is_alive:
        chain.live_version = version
    return chain


@dataclass(frozen=True, slots=True)
class Record:
    """One record, and what another library recorded of it.

    :param mapping: its class.
    :param snapshots: its changes in their order.
    :param last_is_deletion_if_gone: whether the last change, not known to be one, was the deletion if there was one.
    """

    mapping: VersionedMapping
    snapshots: Sequence[Snapshot]
    last_is_deletion_if_gone: bool = False

    def snapshots_of(self, is_alive: bool) -> Sequence[Snapshot]:
        """Return the changes, now that it is known whether the record exists."""
        if is_alive or not self.last_is_deletion_if_gone:
            return self.snapshots
        return [*self.snapshots[:-1], replace(self.snapshots[-1], operation="delete")]


def older_than_recorded(table: str, source: str) -> str:
    """Return the note on records whose first recorded change is no insertion."""
    return (
        f"{table}: some records are older than what {source} holds of them. What they were before their first "
        "recorded change is not known, so every column of that state reads as None."
    )


def find_imported(connection: Connection, table: VersionedTable, keys: Sequence[Key]) -> set[Key]:
    """Return those keys that have history already."""
    columns = table.history_key
    found: set[Key] = set()
    for condition in keys_in(columns, keys, connection.dialect.name):
        found.update(tuple(row) for row in connection.execute(select(*columns).where(condition).distinct()))
    return found


def write_records(connection: Connection, base: VersionedTable, records: Mapping[Key, Record]) -> tuple[int, int]:
    """Write the history of records that have none, and number their live rows accordingly.

    :param base: their base table; the live rows are locked until the transaction ends.
    :param records: by primary key.
    :return: how many records were given a history, and how many rows it has.
    """
    given = 0
    live = {row.key: row.version for row in read_current(connection, [base], records)}
    rows: dict[VersionedTable, list[dict[str, Any]]] = {}
    renumbered: dict[Key, int] = {}
    for key, record in records.items():
        chain = build_chain(record.snapshots_of(key in live), key in live)
        given += bool(chain.rows)
        for table in record.mapping.tables:
            columns = _columns(record.mapping, table, key)
            rows.setdefault(table, []).extend(_stored(table, columns, row) for row in chain.rows)
        if chain.live_version is not None and chain.live_version != live[key]:
            renumbered[key] = chain.live_version
    for table, values in rows.items():
        if values:
            connection.execute(insert(table.history), values)
    if renumbered:
        renumber(connection, base, renumbered)
    return given, len(rows.get(base, ()))


def _columns(mapping: VersionedMapping, table: VersionedTable, key: Key) -> dict[str, Any]:
    """Return what even a row without data holds: the key, and the discriminator."""
    columns = dict(zip((copy.key for copy in table.history_key), key, strict=True))
    if mapping.discriminator is not None and table is mapping.base:
        columns[mapping.discriminator.key] = mapping.mapper.polymorphic_identity
    return columns


def _stored(table: VersionedTable, columns: Mapping[str, Any], row: HistoryRow) -> dict[str, Any]:
    stored = {copy.key: row.values.get(live) for live, copy in table.copied} | dict(columns) | {VERSION: row.version}
    if table.live_version is not None:
        stored |= {BEGAN: row.began, CHANGED: row.changed, CHANGE_INFO: row.info, OPERATION: row.operation}
    return stored
