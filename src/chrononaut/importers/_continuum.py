"""Import the version tables of SQLAlchemy-Continuum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timezone
from itertools import groupby
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    DateTime,
    Engine,
    MetaData,
    RowMapping,
    Select,
    SmallInteger,
    String,
    Table,
    and_,
    cast,
    func,
    inspect,
    null,
    select,
)

from chrononaut._capture import Key
from chrononaut._mapping import VersionedMapping, VersionedTable, versioned_mappings
from chrononaut._pages import is_between, read_pages
from chrononaut.exceptions import ChrononautException
from chrononaut.importers._result import ImportResult
from chrononaut.importers._snapshots import Record, Snapshot, find_imported, older_than_recorded, write_records
from chrononaut.typing import Operation, Progress

_OPERATIONS: dict[int, Operation] = {0: "insert", 1: "update", 2: "delete"}
_TRANSACTION, _OPERATION = "transaction_id", "operation_type"


def import_continuum(
    engine: Engine,
    metadata: MetaData,
    *,
    table_name: str = "%s_version",
    transaction_table: str = "transaction",
    chunk_size: int = 1_000,
    progress: Progress | None = None,
) -> ImportResult:
    """Write history from the version tables of SQLAlchemy-Continuum, which stay as they are.

    A transaction's ``issued_at`` becomes the time of its changes, its ``remote_addr`` and ``user_id`` their change
    info. Records that have history already are passed over, so that it goes on where it was interrupted; each
    chunk is a transaction of its own. Nobody should write versioned records meanwhile.

    :param engine: the database, with both the version tables and our history tables.
    :param metadata: what the models are declared on, e.g. ``Base.metadata``.
    :param table_name: Continuum's option of that name.
    :param transaction_table: name of the table of its transactions.
    :param chunk_size: how many records are imported in one transaction.
    :param progress: told after every chunk how many records of a table are done.
    :raises ChrononautException: if a version belongs to a transaction that is not recorded.
    """
    records = rows = 0
    notes: list[str] = []
    hierarchies: dict[VersionedTable, list[VersionedMapping]] = {}
    for mapping in versioned_mappings(metadata):
        hierarchies.setdefault(mapping.base, []).append(mapping)
    for mappings in hierarchies.values():
        source = _Source(engine, mappings, table_name, transaction_table)
        if not source.exists:
            notes += source.notes
            continue
        total, done = source.count(), 0
        for keys in source.pages(chunk_size):
            with engine.begin() as connection:
                written = write_records(connection, mappings[0].base, source.records(connection, keys))
            records, rows = records + written[0], rows + written[1]
            done += len(keys)
            if progress is not None:
                progress(str(mappings[0].base.live), done, max(total, done))
        notes += source.notes
    return ImportResult(records, rows, tuple(notes))


class _Source:
    """The version tables of one hierarchy of models."""

    def __init__(
        self, engine: Engine, mappings: Sequence[VersionedMapping], table_name: str, transaction_table: str
    ) -> None:
        self._engine = engine
        self._mappings = mappings
        self._base = mappings[0].base
        self.notes: list[str] = []
        inspector = inspect(engine)
        self._tables: dict[VersionedTable, Table] = {}
        for table in dict.fromkeys(table for mapping in mappings for table in mapping.tables):
            name = table_name % table.live.name
            if not inspector.has_table(name, table.live.schema):
                self.notes.append(f"{table.live} has no version table {name}.")
                continue
            present = {column["name"] for column in inspector.get_columns(name, table.live.schema)}
            self._tables[table] = self._version_table(table, name, present)
        self.exists = self._base in self._tables
        if self.exists:
            present = {column["name"] for column in inspector.get_columns(transaction_table)}
            columns: list[Column[Any]] = [Column("id", BigInteger), Column("issued_at", DateTime)]
            columns += [Column(name, String) for name in ("remote_addr", "user_id") if name in present]
            self._transaction = Table(transaction_table, MetaData(), *columns)
            self._key = self._version_key(self._base)

    def _version_table(self, table: VersionedTable, name: str, present: set[str]) -> Table:
        copied = [(live, copy) for live, copy in table.copied if live.name in present]
        missing = sorted(live.name for live, _ in table.copied if live.name not in present)
        if missing:
            self.notes.append(f"{name} does not hold {', '.join(missing)}: imported states have None there.")
        columns: list[Column[Any]] = [Column(live.name, live.type, key=live.key) for live, _ in copied]
        own: list[Column[Any]] = [Column(_TRANSACTION, BigInteger), Column(_OPERATION, SmallInteger)]
        return Table(name, MetaData(), *columns, *own, schema=table.live.schema)

    def _version_key(self, table: VersionedTable) -> list[ColumnElement[Any]]:
        return [self._column(table, live) for live in table.key]

    def _column(self, table: VersionedTable, live: Column[Any]) -> ColumnElement[Any]:
        versions, copy = self._tables[table], table.history.c[live.key]
        if live.key not in versions.c:
            return null()
        column = versions.c[live.key]
        return column if copy.type is live.type else cast(column, copy.type)

    def count(self) -> int:
        keys = select(*self._key).distinct().subquery()
        with self._engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(keys)) or 0

    def pages(self, size: int) -> Iterator[list[Key]]:
        """Yield the keys of all records that Continuum knows, page by page."""
        query = select(*self._key).distinct()
        with self._engine.connect() as connection:
            for page in read_pages(connection, query, self._key, size):
                connection.rollback()
                yield [tuple(row) for row in page]

    def records(self, connection: Connection, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return what Continuum recorded of the records in a range of keys, but for those imported already."""
        done = find_imported(connection, self._base, keys)
        width = len(self._key)
        found: dict[Key, Record] = {}
        rows = connection.execute(self._changes(keys)).mappings()
        for key, changes in groupby(rows, lambda row: tuple(list(row.values())[:width])):
            if key not in done:
                of_record = list(changes)
                snapshots = [self._snapshot(row) for row in of_record]
                found[key] = Record(self._mapping(of_record[-1]), snapshots)
                note = older_than_recorded(str(self._base.live), self._tables[self._base].name)
                if snapshots[0].operation == "update" and note not in self.notes:
                    self.notes.append(note)
        return found

    def _changes(self, keys: Sequence[Key]) -> Select[Any]:
        versions = self._tables[self._base]
        rows: Any = versions.outerjoin(self._transaction, self._transaction.c.id == versions.c[_TRANSACTION])
        columns: list[ColumnElement[Any]] = []
        for table, own in self._tables.items():
            copied = [live for live, _ in table.copied if table is self._base or live not in table.key]
            columns += [self._column(table, live).label(f"{table.live.name}.{live.key}") for live in copied]
            if table is not self._base:
                pairs = zip(self._version_key(table), self._key, strict=True)
                same = [own.c[_TRANSACTION] == versions.c[_TRANSACTION], *(mine == up for mine, up in pairs)]
                rows = rows.outerjoin(own, and_(*same))
        about = [versions.c[_TRANSACTION], versions.c[_OPERATION], *self._transaction.c]
        return (
            select(*self._key, *columns, *(column.label(f"about.{column.key}") for column in about))
            .select_from(rows)
            .where(is_between(self._key, keys[0], keys[-1]))
            .order_by(*self._key, versions.c[_TRANSACTION])
        )

    def _mapping(self, row: RowMapping) -> VersionedMapping:
        column = self._mappings[0].discriminator
        if column is None:
            return self._mappings[0]
        value = row[f"{self._base.live.name}.{column.key}"]
        return next((each for each in self._mappings if each.mapper.polymorphic_identity == value), self._mappings[0])

    def _snapshot(self, row: RowMapping) -> Snapshot:
        issued_at = row["about.issued_at"]
        if issued_at is None:
            raise ChrononautException(
                f"A version in {self._tables[self._base].name} belongs to transaction {row['about.transaction_id']}, "
                f"which is not in {self._transaction.name}: when it was made is not known."
            )
        user = row.get("about.user_id")
        info = {
            "user_id": None if user is None else str(user),
            "remote_addr": row.get("about.remote_addr"),
        }
        values = {
            live: row[f"{table.live.name}.{live.key}"]
            for table in self._tables
            for live, _ in table.copied
            if table is self._base or live not in table.key
        }
        at = issued_at.replace(tzinfo=timezone.utc)
        return Snapshot(at, info, _OPERATIONS[row["about.operation_type"]], values)
