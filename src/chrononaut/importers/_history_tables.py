"""Bring the history tables of chrononaut 0.2 up to date, in place."""

from __future__ import annotations

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    MetaData,
    String,
    and_,
    case,
    column,
    func,
    inspect,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy import table as lightweight_table

from chrononaut._history_table import BEGAN, CHANGE_INFO, CHANGED, OPERATION, VERSION
from chrononaut._mapping import VersionedTable, versioned_mappings
from chrononaut.exceptions import ChrononautException
from chrononaut.importers._result import ImportResult
from chrononaut.typing import Progress


def upgrade_history_tables(engine: Engine, metadata: MetaData, *, progress: Progress | None = None) -> ImportResult:
    """Bring the history tables that chrononaut 0.2 left up to date, each in a transaction of its own.

    See ``upgrade_history_table``. Tables that are up to date, or do not exist, stay as they are.

    :param engine: the database, a PostgreSQL one as chrononaut 0.2 knew no other.
    :param metadata: what the models are declared on, e.g. ``Base.metadata``.
    :param progress: told after every table how many are done.
    :raises ChrononautException: if the database is not PostgreSQL.
    """
    tables = list(dict.fromkeys(table for mapping in versioned_mappings(metadata) for table in mapping.tables))
    records = rows = 0
    for number, table in enumerate(tables, 1):
        with engine.begin() as connection:
            result = upgrade_history_table(connection, table)
        records, rows = records + result.records, rows + result.rows
        if progress is not None:
            progress("history tables", number, len(tables))
    return ImportResult(records, rows)


def upgrade_history_table(connection: Connection, table: VersionedTable) -> ImportResult:
    """Give a history table of chrononaut 0.2, and its live table, what they lack.

    ``began`` becomes the end of the state before; it stays NULL for the first, of which 0.2 did not know. ``operation``
    becomes ``delete`` for the last state of a record that is gone, else ``update``. Where a clock went backwards,
    ``changed`` is raised to ``began``. A live ``version`` that was NULL becomes 0, and one that does not follow the
    history, because the key was used again, is made to. The rest is for ``alembic revision --autogenerate``.

    :param connection: a connection to PostgreSQL; it takes an exclusive lock on both tables until its transaction ends.
    :param table: a live table and its history.
    :raises ChrononautException: if the database is not PostgreSQL.
    """
    if connection.dialect.name != "postgresql":
        raise ChrononautException("chrononaut 0.2 kept history on PostgreSQL only; this is another database.")
    inspector = inspect(connection)
    name, schema = table.history.name, table.history.schema
    if not inspector.has_table(name, schema):
        return ImportResult(0, 0)
    columns = {found["name"]: found for found in inspector.get_columns(name, schema)}
    if CHANGE_INFO not in columns or OPERATION in columns:
        return ImportResult(0, 0)
    for key in inspector.get_foreign_keys(name, schema):
        _alter_history(connection, table, f"DROP CONSTRAINT {_quoted(connection, key['name'] or '')}")
    for copy in table.history.c:
        if copy.nullable and copy.name in columns and not columns[copy.name]["nullable"]:
            _alter_history(connection, table, f"ALTER COLUMN {_quoted(connection, copy.name)} DROP NOT NULL")
    if table.live_version is None:
        return ImportResult(0, 0)
    _alter_history(connection, table, f"ADD COLUMN {BEGAN} TIMESTAMP WITH TIME ZONE")
    _alter_history(connection, table, f"ADD COLUMN {OPERATION} VARCHAR(6)")
    rows = _fill(connection, table)
    for own in (CHANGED, CHANGE_INFO, OPERATION):
        _alter_history(connection, table, f"ALTER COLUMN {own} SET NOT NULL")
    _number_live_rows(connection, table)
    records = select(func.count()).select_from(select(*table.history_key).distinct().subquery())
    return ImportResult(connection.scalar(records) or 0, rows)


def _fill(connection: Connection, table: VersionedTable) -> int:
    key = [history.name for history in table.history_key]
    history = lightweight_table(
        table.history.name,
        *(column(each.name, each.type) for each in table.history.c),
        schema=table.history.schema,
    )
    live = table.live
    record = [history.c[name] for name in key]
    version = history.c[VERSION]
    ended = func.max(history.c[CHANGED]).over(partition_by=record, order_by=version, rows=(None, 0))
    first = func.min(history.c[CHANGED]).over(partition_by=record)
    following = func.lead(version).over(partition_by=record, order_by=version)
    states = select(
        *record,
        version,
        func.coalesce(ended, first, func.now()).label("ended"),
        following.is_(None).label("is_last"),
    ).cte("states")
    began = func.lag(states.c.ended).over(partition_by=[states.c[name] for name in key], order_by=states.c[VERSION])
    chain = select(*states.c, began.label("began")).cte("chain")
    same_record = and_(*(mine == chain.c[name] for mine, name in zip(table.key, key, strict=True)))
    lives_on = select(1).where(same_record, func.coalesce(live.c[VERSION], 0) > chain.c[VERSION]).exists()
    operation = case((and_(chain.c.is_last, ~lives_on), literal("delete", String())), else_=literal("update", String()))
    statement = (
        update(history)
        .where(*(history.c[name] == chain.c[name] for name in key), history.c[VERSION] == chain.c[VERSION])
        .values(
            {
                BEGAN: chain.c.began,
                CHANGED: chain.c.ended,
                OPERATION: operation,
                CHANGE_INFO: func.coalesce(history.c[CHANGE_INFO], text("'{}'::jsonb")),
            }
        )
    )
    return connection.execute(statement).rowcount


def _number_live_rows(connection: Connection, table: VersionedTable) -> None:
    live, version = table.live, table.live.c[VERSION]
    keys = zip(table.key, table.history_key, strict=True)
    last = (
        select(func.max(table.history.c[VERSION]))
        .where(*(history == mine for mine, history in keys))
        .correlate(live)
        .scalar_subquery()
    )
    following: ColumnElement[int] = func.coalesce(last + 1, 0)
    connection.execute(update(live).where(or_(version.is_(None), version != following)).values({VERSION: following}))
    name = connection.dialect.identifier_preparer.format_table(live)
    for change in ("SET DEFAULT 0", "SET NOT NULL"):
        connection.execute(text(f"ALTER TABLE {name} ALTER COLUMN {VERSION} {change}"))


def _alter_history(connection: Connection, table: VersionedTable, change: str) -> None:
    name = connection.dialect.identifier_preparer.format_table(table.history)
    connection.execute(text(f"ALTER TABLE {name} {change}"))


def _quoted(connection: Connection, name: str) -> str:
    return connection.dialect.identifier_preparer.quote(name)
