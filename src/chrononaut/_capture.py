"""The set-based statements that write history: copies of what the database holds, and births."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Connection,
    FromClause,
    Insert,
    Integer,
    Select,
    String,
    Table,
    Text,
    Update,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal,
    select,
    type_coerce,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects.postgresql import JSONB

from chrononaut._dialect import by_key, is_mariadb, reuses_generated_keys
from chrononaut._history_table import BEGAN, CHANGE_INFO, CHANGED, OPERATION, VERSION
from chrononaut._mapping import VersionedTable
from chrononaut._transaction import OWN, InstantKind, InstantSource, instant_expression
from chrononaut._types import UTCDateTime, read_type
from chrononaut._wanted import (
    Shape,
    Wanted,
    WantedRecord,
    choose_shape,
    keys_in,
    wanted_parameters,
    wanted_records,
)
from chrononaut.typing import Operation

Key = tuple[Any, ...]

#: The version of the row that ends the absence of a record that never was before.
FIRST_BIRTH = -1


class Birth(NamedTuple):
    """A record that was just inserted, and the row that ends its absence."""

    key: Key
    version: int
    began: datetime | None
    info: str
    discriminator: Any


class LastState(NamedTuple):
    """The end of the history that a key already has: its highest version, and when that ended."""

    version: int
    changed: datetime


# --- states that end


def copy_states(
    connection: Connection,
    table: VersionedTable,
    records: Sequence[WantedRecord],
    operation: Operation,
    instant: InstantSource,
) -> int:
    """Copy the rows of records into history as the database holds them, and lock them until the transaction ends.

    :param table: a base table; a joined-inheritance child's after its base's.
    :param records: what to copy. A row that does not have the wanted version is left out.
    :param operation: what is about to end these states.
    :return: how many rows were copied.
    """
    dialect = connection.dialect
    shape = choose_shape(dialect, table.key, records)
    parameters = wanted_parameters(dialect, table.key, records, shape)
    if table.live_version is None:
        statement = table.statement(_build_child_copy, shape)
    else:
        statement = table.statement(_build_copy, shape, operation, instant.kind, dialect.name)
        parameters = [row | instant.parameters for row in parameters]
    return connection.execute(statement, parameters, execution_options=OWN | {"preserve_rowcount": True}).rowcount


def _build_copy(
    table: VersionedTable, shape: Shape, operation: Operation, instant_kind: InstantKind, dialect: str
) -> Insert:
    version, wanted = live_version(table), wanted_records(table.key, shape)
    columns, rows, before = ended_states(
        table, _wanted_rows(table, wanted), operation, wanted.info, instant_expression(instant_kind), dialect
    )
    query = select(*columns.values()).select_from(rows).where(version == wanted.version, *_if_bound(table, wanted))
    query = _in_order(query, shape, table.live, before)
    return insert(table.history).from_select(list(columns), lock_rows(query, table, operation, dialect))


def ended_states(
    table: VersionedTable,
    rows: FromClause,
    operation: Operation,
    info: ColumnElement[str],
    instant: ColumnElement[datetime],
    dialect: str,
) -> tuple[dict[str, ColumnElement[Any]], FromClause, FromClause]:
    """Return the history of live rows whose state ends now: its columns, where from, and what went before.

    :param table: a base table.
    :param rows: the live table, or a join of it.
    :param info: the change info as JSON text.
    """
    version = live_version(table)
    before = table.history.alias("before")
    precedes = and_(
        *(
            before.c[copy.key] == _as_copied(live, copy)
            for copy, live in zip(table.history_key, table.key, strict=True)
        ),
        before.c[VERSION] == version - 1,
    )
    columns = copied_columns(table) | {
        VERSION: version,
        BEGAN: before.c[CHANGED],
        CHANGED: not_before(before.c[CHANGED], instant, dialect),
        CHANGE_INFO: as_json(info, dialect),
        OPERATION: literal(operation, String()),
    }
    return columns, rows.outerjoin(before, precedes), before


def _build_child_copy(table: VersionedTable, shape: Shape) -> Insert:
    wanted = wanted_records(table.key, shape)
    columns = copied_columns(table) | {VERSION: wanted.version}
    query = select(*columns.values()).select_from(_wanted_rows(table, wanted)).where(*_if_bound(table, wanted))
    return insert(table.history).from_select(list(columns), _in_order(query, shape, table.live))


def _in_order(query: Select[Any], shape: Shape, *tables: FromClause) -> Select[Any]:
    """Make MariaDB go through the list of wanted records, and look up each in the tables."""
    return by_key(query.prefix_with("STRAIGHT_JOIN"), *tables) if isinstance(shape, tuple) else query


def _wanted_rows(table: VersionedTable, wanted: Wanted) -> FromClause:
    return table.live if wanted.source is None else wanted.source.join(table.live, wanted.is_key(table.key))


def _if_bound(table: VersionedTable, wanted: Wanted) -> list[ColumnElement[bool]]:
    return [wanted.is_key(table.key)] if wanted.source is None else []


def copied_columns(table: VersionedTable) -> dict[str, ColumnElement[Any]]:
    """Return what history copies of a live table, by the history column."""
    return {copy.key: _as_copied(live, copy) for live, copy in table.copied}


def _as_copied(live: Column[Any], copy: Column[Any]) -> ColumnElement[Any]:
    """Return what history holds of a live column."""
    return live if copy.type is live.type or isinstance(live.type, Boolean) else sql_cast(live, copy.type)


def live_version(table: VersionedTable) -> Column[int]:
    """Return the version column of a base table."""
    return cast("Column[int]", table.live_version)


def lock_rows(query: Select[Any], table: VersionedTable, operation: Operation, dialect: str) -> Select[Any]:
    """Make a query lock the live rows that it reads, in the key's order, so that writers cannot deadlock."""
    if dialect == "sqlite":  # has one writer at a time, and no row locks
        return query
    if is_mariadb(dialect):  # locks all that it reads, as it reads it
        return query.with_for_update()
    # An update does not block those who insert rows that refer to this one; a deletion must.
    return query.order_by(*table.key).with_for_update(of=table.live, key_share=operation == "update")


def not_before(
    earliest: ColumnElement[datetime], instant: ColumnElement[datetime], dialect: str
) -> ColumnElement[datetime]:
    """Return the instant, or the earliest time it may have, so that time never goes backwards along a record."""
    if dialect == "postgresql":
        return func.greatest(earliest, instant)
    return case((type_coerce(earliest, UTCDateTime()) > instant, earliest), else_=instant)


def as_json(text: ColumnElement[str], dialect: str) -> ColumnElement[Any]:
    """Return JSON text as what a change info column holds."""
    return sql_cast(text, JSONB) if dialect == "postgresql" else text


# --- records that appear


def insert_births(
    connection: Connection,
    table: VersionedTable,
    births: Sequence[Birth],
    discriminator: Column[Any] | None,
    instant: InstantSource,
) -> None:
    """Write the rows that end the absence of new records.

    :param discriminator: the live column that tells their class, if there is one.
    """
    is_base = table.live_version is not None
    discriminator = discriminator if is_base else None
    statement = table.statement(_build_birth, discriminator, instant.kind, connection.dialect.name)
    rows = [
        {
            **{f"birth_key_{number}": part for number, part in enumerate(birth.key)},
            "birth_version": birth.version,
        }
        for birth in births
    ]
    if is_base:
        for row, birth in zip(rows, births, strict=True):
            row |= {"birth_began": birth.began, "birth_info": birth.info}
            if instant.kind == "value":
                at = instant.parameters["chrononaut_instant"]
                row["birth_changed"] = at if birth.began is None else max(at, birth.began)
            else:
                row |= instant.parameters
            if discriminator is not None:
                row["birth_discriminator"] = birth.discriminator
    connection.execute(statement, rows, execution_options=OWN)


def _build_birth(
    table: VersionedTable, discriminator: Column[Any] | None, instant_kind: InstantKind, dialect: str
) -> Insert:
    values: dict[str, Any] = {
        column.key: bindparam(f"birth_key_{number}", type_=column.type)
        for number, column in enumerate(table.history_key)
    }
    values[VERSION] = bindparam("birth_version", type_=Integer())
    if table.live_version is not None:
        began = bindparam("birth_began", type_=UTCDateTime())
        # Where the instant is known, nothing is left to compute: MariaDB's drivers then send all rows at once.
        is_known = instant_kind == "value"
        changed = bindparam("birth_changed", type_=UTCDateTime())
        values |= {
            BEGAN: began,
            CHANGED: changed if is_known else not_before(began, instant_expression(instant_kind), dialect),
            CHANGE_INFO: as_json(bindparam("birth_info", type_=Text()), dialect),
            OPERATION: literal("insert", String()),
        }
    if discriminator is not None:
        values[discriminator.key] = bindparam("birth_discriminator", type_=read_type(discriminator.type))
    return insert(table.history).values(values)


def may_be_used(connection: Connection, table: VersionedTable, is_key_given: bool) -> bool:
    """Tell whether a new record's key may already have a history.

    :param is_key_given: whether the application chose the key.
    """
    if is_key_given:
        return True
    for column in table.key:
        if column is table.live.autoincrement_column:
            if reuses_generated_keys(connection, table.live):
                return True
        elif column.server_default is None and not getattr(column.default, "is_sequence", False):
            return True
    return False


def find_last_states(
    connection: Connection, table: VersionedTable, keys: Iterable[Key], lock: bool = False
) -> dict[Key, LastState]:
    """Return the end of the history of those keys that have any.

    :param lock: read what is committed now where a plain read may be of the past, by locking what is read.
    """
    columns = table.history_key
    highest = func.max(table.history.c[VERSION])
    ended = func.max(table.history.c[CHANGED], type_=UTCDateTime())
    found: dict[Key, LastState] = {}
    for condition in keys_in(columns, keys, connection.dialect.name):
        query = select(*columns, highest, ended).where(condition).group_by(*columns)
        rows = connection.execute(query.with_for_update(read=True) if lock else query)
        values: Iterator[tuple[Any, ...]] = map(tuple, rows)
        found |= {row[:-2]: LastState(row[-2], row[-1]) for row in values}
    return found


def renumber(connection: Connection, table: VersionedTable, versions: Mapping[Key, int]) -> None:
    """Set the version of new records whose key was used before."""
    connection.execute(
        table.statement(_build_renumbering),
        [
            {**{f"live_key_{number}": part for number, part in enumerate(key)}, "live_version": version}
            for key, version in versions.items()
        ],
        execution_options=OWN,
    )


def _build_renumbering(table: VersionedTable) -> Update:
    keys = (column == bindparam(f"live_key_{number}", type_=column.type) for number, column in enumerate(table.key))
    return amend(table.live).where(*keys).values({live_version(table).key: bindparam("live_version")})


def amend(live: Table) -> Update:
    """Return an update of our own bookkeeping, which leaves alone what any other update of a row changes besides."""
    touched = (each for each in live.c if each.onupdate is not None or each.server_onupdate is not None)
    return update(live).values({column: column for column in touched if column.computed is None})


# --- what the database holds now


class CurrentRow(NamedTuple):
    """What a live row holds now: its key, its version, and the asked columns."""

    key: Key
    version: int
    values: tuple[Any, ...]


def read_current(
    connection: Connection,
    tables: Sequence[VersionedTable],
    keys: Iterable[Key],
    columns: Sequence[Column[Any]] = (),
    lock: bool = True,
) -> Iterator[CurrentRow]:
    """Yield what the live rows of some records hold, and lock them until the transaction ends.

    :param tables: the tables that the columns are in, the base first.
    """
    base = tables[0]
    rows: FromClause = base.live
    for child in tables[1:]:
        rows = rows.outerjoin(child.live, and_(*(own == up for own, up in zip(child.key, base.key, strict=True))))
    width = len(base.key)
    for condition in keys_in(base.key, keys, connection.dialect.name):
        query = by_key(select(*base.key, live_version(base), *columns).select_from(rows).where(condition), base.live)
        if lock:
            query = lock_rows(query, base, "update", connection.dialect.name)
        for row in connection.execute(query):
            yield CurrentRow(tuple(row[:width]), row[width], tuple(row[width + 1 :]))


def lock_records(connection: Connection, table: VersionedTable, keys: Iterable[Key]) -> None:
    """Lock the live rows of some records until the transaction ends, in the key's order."""
    dialect = connection.dialect.name
    if dialect == "sqlite":  # has one writer at a time, and no row locks
        return
    for condition in keys_in(table.key, _sorted(keys), dialect):
        query = select(literal(1)).select_from(table.live).where(condition)
        connection.execute(lock_rows(query, table, "update", dialect))


def _sorted(keys: Iterable[Key]) -> list[Key]:
    try:
        return sorted(keys)
    except TypeError:
        return sorted(keys, key=repr)
