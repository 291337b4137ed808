"""The SQL of a table as it was at an instant."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Dialect,
    Exists,
    FromClause,
    Table,
    and_,
    exists,
    literal,
    literal_column,
    null,
    or_,
    select,
    true,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.expression import CompoundSelect, Select

from chrononaut._history_table import (
    BEGAN,
    CHANGE_INFO,
    CHANGED,
    OPERATION,
    VERSION,
    RecordChangesColumn,
    VersionColumn,
    is_tracked,
    versioned_tables,
)
from chrononaut._types import UTCDateTime, instant_type
from chrononaut.exceptions import ChrononautException

#: Stands for the instant in the SQL of a table's past, which is written once for all instants.
AT = "chrononaut_at()"
_at: ColumnElement[datetime] = literal_column(AT)

SchemaMap = Mapping[str | None, str | None]


def render_past(table: Table, dialect: Dialect, schemas: SchemaMap) -> str | None:
    """Return the query for what a table held at an instant, for which ``AT`` stands.

    Of a live table these are the states that were current then; of a history table, those that had ended by then.

    :param schemas: by which names the application reaches its schemas.
    :return: None if the table is neither versioned nor history.
    """
    tables = versioned_tables(table.metadata)
    if table in tables:
        return _render(_live_past(table, tables, dialect), dialect, schemas)
    live = next((live for live, history in tables.items() if history is table), None)
    return None if live is None else _render(_history_past(live, tables), dialect, schemas)


def render_instant(at: datetime, dialect: Dialect) -> str:
    """Return an instant as the literal that history's columns are compared with."""
    value: ColumnElement[Any] = literal(at, UTCDateTime())
    if dialect.name == "postgresql":
        value = sql_cast(value, instant_type())
    return _render(value, dialect, {})


def left_out_columns(table: Table) -> list[Column[Any]]:
    """Return the columns of a versioned table that its history does not hold, ours aside."""
    history = versioned_tables(table.metadata)[table]
    return [column for column in table.c if is_tracked(column) and column.key not in history.c]


def names_behind(table: Table) -> set[str]:
    """Return the names of the other tables that the past of a table is read from."""
    tables = versioned_tables(table.metadata)
    if table in tables:
        base = _base(table, tables)
        return {each.name for each in (tables[table], base, tables[base]) if each is not table}
    live = next((live for live, history in tables.items() if history is table), None)
    return set() if live is None else {tables[_base(live, tables)].name} - {table.name}


def _render(statement: ClauseElement, dialect: Dialect, schemas: SchemaMap) -> str:
    how: dict[str, Any] = {"schema_translate_map": dict(schemas), "render_schema_translate": True} if schemas else {}
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}, **how))


def _live_past(table: Table, tables: Mapping[Table, Table], dialect: Dialect) -> CompoundSelect[Any]:
    live, history = table.alias("l"), tables[table].alias("h")
    columns = [_live_column(table, column, live, tables) for column in table.c]
    # Not NOT EXISTS, which PostgreSQL makes a join of, with parallel workers for a few rows. As a value it is looked up
    # for each row if they are few, and if they are many it is hashed, provided that little has changed since.
    is_current = _began_later(table, tables, live).is_not(true())
    current = select(*columns).where(is_current)
    return current.union_all(_ended_states(table, tables, history, dialect))


def _began_later(table: Table, tables: Mapping[Table, Table], live: FromClause) -> Exists:
    """Return whether a live row's state began after the instant: that is when its predecessor ended."""
    base = _base(table, tables)
    before = tables[base].alias("p")
    later = exists().where(*_same_key(table, tables, live, before), before.c[CHANGED] > _at)
    version = next((column.key for column in base.c if isinstance(column, VersionColumn)), None)
    if version is None:
        return later
    if table is base:
        return later.where(before.c[VERSION] == live.c[version] - 1)
    top = base.alias("b")
    return later.where(*_same_key(table, tables, live, top), before.c[VERSION] == top.c[version] - 1)


def _ended_states(table: Table, tables: Mapping[Table, Table], history: FromClause, dialect: Dialect) -> Select[Any]:
    base: FromClause = history
    source: FromClause = history
    if CHANGED not in history.c:
        # A joined-inheritance child: when its states lived is in its base's history.
        base = tables[_base(table, tables)].alias("b")
        source = history.join(base, _same_state(table, tables, history, base))
    columns = [_ended_column(table, tables, column, history, base, dialect) for column in table.c]
    began = base.c[BEGAN]
    return (
        select(*columns)
        .select_from(source)
        .where(
            base.c[CHANGED] > _at,
            or_(began <= _at, began.is_(None)),
            base.c[OPERATION] != literal_column("'insert'"),
        )
    )


def _history_past(live: Table, tables: Mapping[Table, Table]) -> Select[Any]:
    history = tables[live].alias("h")
    if CHANGED in history.c:
        return select(*history.c).where(history.c[CHANGED] <= _at)
    base = tables[_base(live, tables)].alias("b")
    return select(*history.c).where(exists().where(_same_state(live, tables, history, base), base.c[CHANGED] <= _at))


def _live_column(
    table: Table, column: Column[Any], live: FromClause, tables: Mapping[Table, Table]
) -> ColumnElement[Any]:
    if is_tracked(column) and column.key not in tables[table].c:
        return sql_cast(null(), column.type).label(column.name)
    return live.c[column.key]


def _ended_column(
    table: Table,
    tables: Mapping[Table, Table],
    column: Column[Any],
    history: FromClause,
    base: FromClause,
    dialect: Dialect,
) -> ColumnElement[Any]:
    value: ColumnElement[Any]
    if isinstance(column, VersionColumn):
        value = history.c[VERSION]
    elif isinstance(column, RecordChangesColumn):
        value = base.c[BEGAN] if column.key == CHANGED else _creators_info(table, tables, base)
    elif column.key not in history.c:
        value = sql_cast(null(), column.type)
    elif _is_of_other_type(column, history.c[column.key], dialect):
        value = sql_cast(history.c[column.key], column.type)
    else:
        value = history.c[column.key]
    return value.label(column.name)


def _creators_info(table: Table, tables: Mapping[Table, Table], base: FromClause) -> ColumnElement[Any]:
    """Return who made an ended state: the one who ended its predecessor."""
    before = tables[_base(table, tables)].alias("before")
    key = [before.c[column.key] == base.c[column.key] for column in base.primary_key if column.key != VERSION]
    return select(before.c[CHANGE_INFO]).where(*key, before.c[VERSION] == base.c[VERSION] - 1).scalar_subquery()


def _is_of_other_type(column: Column[Any], copy: ColumnElement[Any], dialect: Dialect) -> bool:
    # History holds the text of enums, which PostgreSQL does not mix with them.
    if dialect.name != "postgresql" or copy.type is column.type:
        return False
    live, stored = column.type.compile(dialect), copy.type.compile(dialect)
    return live != stored and not live.startswith("VARCHAR")


# --- how the tables of a hierarchy hang together


def _base(table: Table, tables: Mapping[Table, Table]) -> Table:
    """Return the table whose history says when the states of a table lived: itself, or the base of its hierarchy."""
    while CHANGED not in tables[table].c:
        table = _parent(table, tables)
    return table


def _parent(table: Table, tables: Mapping[Table, Table]) -> Table:
    for parent in tables:
        if parent is not table and all(_referring(table, column) is not None for column in parent.primary_key):
            return parent
    raise ChrononautException(f"The primary key of {table.name!r} does not refer to that of a versioned table.")


def _referring(table: Table, column: Column[Any]) -> Column[Any] | None:
    return next((own for own in table.primary_key if own.references(column)), None)


def _key_pairs(table: Table, tables: Mapping[Table, Table]) -> list[tuple[Column[Any], Column[Any]]]:
    """Return the primary key's columns, each with its counterpart in the base table."""
    pairs = [(column, column) for column in table.primary_key]
    while CHANGED not in tables[table].c:
        parent = _parent(table, tables)
        up = {_referring(table, column): column for column in parent.primary_key}
        pairs = [(own, up[at]) for own, at in pairs if at in up]
        table = parent
    return pairs


def _same_key(
    table: Table, tables: Mapping[Table, Table], mine: FromClause, base: FromClause
) -> list[ColumnElement[bool]]:
    return [base.c[theirs.key] == mine.c[own.key] for own, theirs in _key_pairs(table, tables)]


def _same_state(table: Table, tables: Mapping[Table, Table], mine: FromClause, base: FromClause) -> ColumnElement[bool]:
    return and_(*_same_key(table, tables, mine, base), base.c[VERSION] == mine.c[VERSION])
