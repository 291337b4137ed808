"""Import the table ``chrononaut_activity`` of chrononaut 0.3 to 0.5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    DateTime,
    Engine,
    Integer,
    MetaData,
    Row,
    Table,
    Text,
    func,
    inspect,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB

from chrononaut._capture import Key
from chrononaut._mapping import VersionedMapping, VersionedTable, mapped_columns, versioned_mappings
from chrononaut._pages import is_between, read_pages
from chrononaut._types import as_utc
from chrononaut.exceptions import ChrononautException
from chrononaut.importers._json import read_value
from chrononaut.importers._result import ImportResult
from chrononaut.importers._snapshots import Record, Snapshot, find_imported, older_than_recorded, write_records
from chrononaut.typing import ChangeInfo, Operation, Progress


def import_activity(
    engine: Engine,
    metadata: MetaData,
    *,
    table_name: str = "chrononaut_activity",
    schema: str | None = None,
    chunk_size: int = 1_000,
    progress: Progress | None = None,
) -> ImportResult:
    """Write history from the activity table of chrononaut 0.3 to 0.5, which stays as it is.

    Records that have history already are passed over, so that it goes on where it was interrupted; each chunk is a
    transaction of its own. Nobody should write versioned records meanwhile.

    What that library wrote as text is read as what the column holds now: numbers, dates, times, UUIDs, enums, bytes,
    lists and dictionaries.

    :param engine: the database, with both the activity table and our history tables.
    :param metadata: what the models are declared on, e.g. ``Base.metadata``.
    :param table_name: name of the activity table.
    :param schema: its schema.
    :param chunk_size: how many records are imported in one transaction.
    :param progress: told after every chunk how many records of a table are done.
    :raises ChrononautException: if there is no activity table, or a recorded value cannot be what its column holds.
    """
    if not inspect(engine).has_table(table_name, schema):
        raise ChrononautException(f"There is no table {table_name}. Is this the right database?")
    activity = _activity_table(table_name, schema)
    notes: set[str] = set()
    records = rows = 0
    for source in _sources(activity, metadata, notes):
        total, done = source.count(engine), 0
        for first, last, size in source.pages(engine, chunk_size):
            with engine.begin() as connection:
                written = write_records(connection, source.base, source.records(connection, first, last))
            records, rows = records + written[0], rows + written[1]
            done += size
            if progress is not None:
                progress(source.name, done, max(total, done))
    notes.update(_unread(engine, activity, metadata))
    return ImportResult(records, rows, tuple(sorted(notes)))


def _activity_table(name: str, schema: str | None) -> Table:
    return Table(
        name,
        MetaData(),
        Column("id", BigInteger),
        Column("table_name", Text),
        Column("changed", DateTime(timezone=True)),
        Column("version", Integer),
        *(Column(name, JSONB) for name in ("key", "data", "user_info", "extra_info")),
        schema=schema,
    )


def _sources(activity: Table, metadata: MetaData, notes: set[str]) -> Iterator[_Source]:
    by_table: dict[Table, list[VersionedMapping]] = {}
    for mapping in versioned_mappings(metadata):
        by_table.setdefault(mapping.tables[-1].live, []).append(mapping)
    for live, mappings in by_table.items():
        yield _Source(activity, live.name, mappings, notes)


def _unread(engine: Engine, activity: Table, metadata: MetaData) -> list[str]:
    known = {mapping.tables[-1].live.name for mapping in versioned_mappings(metadata)}
    with engine.connect() as connection:
        names = connection.scalars(select(activity.c.table_name).distinct()).all()
    return [f"{name}: no versioned model has this table, so its activity was left." for name in set(names) - known]


class _Source:
    """What the activity table holds of one table."""

    def __init__(self, activity: Table, name: str, mappings: Sequence[VersionedMapping], notes: set[str]) -> None:
        self._activity = activity
        self._mappings = mappings
        self._notes = notes
        self.name = name
        self.base: VersionedTable = mappings[0].base

    def count(self, engine: Engine) -> int:
        """Return how many records there are."""
        keys = self._keys().subquery()
        with engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(keys)) or 0

    def pages(self, engine: Engine, size: int) -> Iterator[tuple[Any, Any, int]]:
        """Yield the first and the last key, and the number, of the records of each page."""
        key = [self._activity.c.key]
        with engine.connect() as connection:
            for page in read_pages(connection, self._keys(), key, size):
                connection.rollback()
                yield page[0].key, page[-1].key, len(page)

    def _keys(self) -> Any:
        return select(self._activity.c.key).where(self._activity.c.table_name == self.name).distinct()

    def records(self, connection: Connection, first: Any, last: Any) -> dict[Key, Record]:
        """Return what was recorded of the records in a range of keys, but for those imported already."""
        activity = self._activity
        query = (
            select(activity)
            .where(activity.c.table_name == self.name, is_between([activity.c.key], [first], [last]))
            .order_by(activity.c.key, activity.c.id)
        )
        changes = {
            self._key(rows[0]): rows
            for rows in (list(rows) for _, rows in groupby(connection.execute(query), lambda row: row.key))
        }
        done = find_imported(connection, self.base, list(changes))
        return {key: self._record(rows) for key, rows in changes.items() if key not in done}

    def _key(self, row: Row[Any]) -> Key:
        mapper = self._mappings[0].mapper
        names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        columns = zip(names, mapper.primary_key, strict=True)
        return tuple(self._value(row, name, column, row.key[name]) for name, column in columns)

    def _value(self, row: Row[Any], name: str, column: ColumnElement[Any], value: Any) -> Any:
        try:
            return read_value(value, column.type)
        except (ValueError, SyntaxError, ArithmeticError):
            raise ChrononautException(
                f"{self._activity.name}, id {row.id}: what was recorded for {self.name}.{name} cannot be read as "
                f"{column.type!r}. Correct the recorded value, and run the import again: it goes on where it stopped."
            ) from None

    def _record(self, rows: Sequence[Row[Any]]) -> Record:
        mapping = self._mapping(rows[0])
        operations = _operations(rows)
        began_unknown = _is_converted(rows)
        if operations[0] == "update" and not began_unknown:
            self._notes.add(older_than_recorded(self.name, self._activity.name))
        times = [as_utc(row.changed, "changed") for row in rows]
        snapshots = [
            Snapshot(None if began_unknown and number == 0 else times[number], _change_info(row), operation, values)
            for number, (row, operation) in enumerate(zip(rows, operations, strict=True))
            for values in [self._values(mapping, row)]
        ]
        return Record(mapping, snapshots, _is_deletion(rows, len(rows) - 1))

    def _mapping(self, row: Row[Any]) -> VersionedMapping:
        column = self._mappings[0].discriminator
        if column is not None:
            name = self._mappings[0].mapper.get_property_by_column(column).key
            for mapping in self._mappings:
                if mapping.mapper.polymorphic_identity == row.data.get(name):
                    return mapping
        return self._mappings[0]

    def _values(self, mapping: VersionedMapping, row: Row[Any]) -> Mapping[Column[Any], Any]:
        columns = mapped_columns(mapping.mapper)
        values: dict[Column[Any], Any] = {}
        for name, value in row.data.items():
            if name in mapping.tracked:
                # One attribute may stand for columns of several tables.
                mapped: Sequence[Any] = mapping.mapper.get_property_by_column(columns[name]).columns
                values.update({column: self._value(row, name, column, value) for column in mapped})
            elif name not in columns:
                self._notes.add(f"{self.name}: {name!r} is no column now, so its values were left.")
            elif name in mapping.hidden:
                self._notes.add(f"{self.name}: {name!r} is hidden now, so its values were left.")
        return values


def _operations(rows: Sequence[Row[Any]]) -> list[Operation]:
    """Return what each change did, which is not recorded but follows from the version numbers: 0 is a new life."""
    operations: list[Operation] = []
    for number, row in enumerate(rows):
        following = rows[number + 1] if number + 1 < len(rows) else None
        if row.version == 0:
            operations.append("update" if number == 0 and _is_converted(rows) else "insert")
        elif following is not None and following.version == 0 and _is_deletion(rows, number):
            operations.append("delete")
        else:
            operations.append("update")
    return operations


def _is_converted(rows: Sequence[Row[Any]]) -> bool:
    """Tell whether that library's own converter wrote these, which gave the first state the time when it ended."""
    return len(rows) > 1 and bool(rows[0].version == 0 and rows[0].changed == rows[1].changed)


def _is_deletion(rows: Sequence[Row[Any]], number: int) -> bool:
    """Tell whether a change, if it was a record's last, was its deletion: that repeats the state before."""
    row = rows[number]
    if number == 0:
        return bool(row.version > 0)
    return row.version > 0 and _without_version(row.data) == _without_version(rows[number - 1].data)


def _without_version(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "version"}


def _change_info(row: Row[Any]) -> ChangeInfo:
    extra = dict(row.extra_info)
    hidden = extra.pop("hidden_cols_changed", None)
    info: ChangeInfo = {"user_id": None, "remote_addr": None, **row.user_info}
    if extra:
        info["extra"] = extra
    if hidden:
        info["hidden_cols_changed"] = sorted(hidden)
    return info
