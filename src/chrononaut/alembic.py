"""Alembic operations on a versioned table and its history in one step.

Generated migrations need nothing of this. It is for what Alembic cannot find out by itself, a renamed column or table,
and for what would otherwise be written twice. E.g., in a migration::

    from chrononaut.alembic import rename_column

    def upgrade():
        rename_column(op, "appuser", "email", "mail")

On SQLite every change but a rename is made in batch mode. Where an operation has to look something up in the database,
it says so, and raises in Alembic's offline mode (``--sql``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from alembic.operations import BatchOperations, Operations
from sqlalchemy import Column, Connection, MetaData, inspect, table, text, update
from sqlalchemy import column as lightweight_column
from sqlalchemy.sql.schema import SchemaItem
from sqlalchemy.types import TypeEngine

from chrononaut._history_table import VERSION, history_comment, versioned_tables
from chrononaut._mapping import versioned_mappings
from chrononaut._types import stored_type
from chrononaut.exceptions import ChrononautException
from chrononaut.importers import upgrade_history_table

__all__ = [
    "add_column",
    "alter_column_type",
    "drop_column",
    "fill_versions",
    "keep_dropped_columns",
    "rename_column",
    "rename_table",
    "upgrade_history_tables",
]

IncludeObject = Callable[[SchemaItem, str | None, str, bool, SchemaItem | None], bool]


def rename_column(
    op: Operations, table_name: str, old: str, new: str, *, history: str | None = None, schema: str | None = None
) -> None:
    """Rename a column of a versioned table, and of its history, so that older states are read under the new name.

    :param op: ``alembic.op``.
    :param table_name: the live table.
    :param old: the column's name so far.
    :param new: its name from now on.
    :param history: the history table; ``<table>_history`` if None.
    :param schema: the schema of both.
    """
    for name in (table_name, history or f"{table_name}_history"):
        if _is_mariadb(op):
            # Alembic would write CHANGE, which has to repeat the whole column, and loses its checks.
            quote = op.get_context().dialect.identifier_preparer.quote
            op.execute(f"ALTER TABLE {_holder(op, schema)}{quote(name)} RENAME COLUMN {quote(old)} TO {quote(new)}")
            continue
        with _altering(op, name, schema) as batch:
            batch.alter_column(old, new_column_name=new)


def add_column(
    op: Operations, table_name: str, column: Column[Any], *, history: str | None = None, schema: str | None = None
) -> None:
    """Add a column to a versioned table, and to its history, where older states have NULL in it.

    :param op: ``alembic.op``.
    :param table_name: the live table.
    :param column: the column for the live table; history gets its name and type alone.
    :param history: the history table; ``<table>_history`` if None.
    :param schema: the schema of both.
    """
    with _altering(op, table_name, schema) as batch:
        batch.add_column(column)
    with _altering(op, history or f"{table_name}_history", schema) as batch:
        batch.add_column(Column(column.name, stored_type(column.type)))


def drop_column(
    op: Operations,
    table_name: str,
    name: str,
    *,
    keep_history: bool = False,
    history: str | None = None,
    schema: str | None = None,
) -> None:
    """Drop a column of a versioned table, and what history holds of it.

    :param op: ``alembic.op``.
    :param table_name: the live table.
    :param name: the column.
    :param keep_history: leave the column in history; see ``keep_dropped_columns``.
    :param history: the history table; ``<table>_history`` if None.
    :param schema: the schema of both.
    """
    for each in (table_name,) if keep_history else (table_name, history or f"{table_name}_history"):
        with _altering(op, each, schema) as batch:
            batch.drop_column(name)


def alter_column_type(
    op: Operations,
    table_name: str,
    name: str,
    type_: TypeEngine[Any],
    *,
    using: str | None = None,
    history: str | None = None,
    schema: str | None = None,
) -> None:
    """Give a column of a versioned table, and of its history, another type.

    MariaDB has to be told the whole column again: whether it may be NULL, its default and its comment are looked up, so
    that they stay. A check that is part of the column is dropped there; one of the table stays.

    :param op: ``alembic.op``.
    :param table_name: the live table.
    :param name: the column.
    :param type_: its new type; history gets what stands for it there (text for an enum).
    :param using: how PostgreSQL converts the values, where it does not know, e.g. ``"age::integer"``.
    :param history: the history table; ``<table>_history`` if None.
    :param schema: the schema of both.
    :raises ChrononautException: on MariaDB, in offline mode, or if the column is computed.
    """
    options: dict[str, Any] = {} if using is None else {"postgresql_using": using}
    for each, its_type in ((table_name, type_), (history or f"{table_name}_history", stored_type(type_))):
        existing = _existing(_connection(op, "alter_column_type"), each, name, schema) if _is_mariadb(op) else {}
        with _altering(op, each, schema) as batch:
            batch.alter_column(name, type_=its_type, **existing, **options)


def rename_table(
    op: Operations,
    old: str,
    new: str,
    *,
    history: str | None = None,
    new_history: str | None = None,
    schema: str | None = None,
) -> None:
    """Rename a versioned table and its history.

    Indexes of both whose names hold the table's are looked up, and renamed as well, as SQLAlchemy would name them.

    :param op: ``alembic.op``.
    :param old: the live table's name so far.
    :param new: its name from now on.
    :param history: the history table's name so far; ``<old>_history`` if None.
    :param new_history: its name from now on; ``<new>_history`` if None.
    :param schema: the schema of both.
    :raises ChrononautException: in offline mode.
    """
    connection = _connection(op, "rename_table")
    history, new_history = history or f"{old}_history", new_history or f"{new}_history"
    for name, new_name in ((history, new_history), (old, new)):
        op.rename_table(name, new_name, schema=schema)
        _rename_indexes(op, name, new_name, schema)
    if connection.dialect.supports_comments:
        op.create_table_comment(new_history, history_comment(new), existing_comment=history_comment(old), schema=schema)


def fill_versions(op: Operations, *table_names: str, schema: str | None = None) -> None:
    """Set every ``version`` that is NULL to 0, before the column is made NOT NULL.

    For tables that chrononaut 0.2 to 0.5 versioned.

    :param op: ``alembic.op``.
    :param table_names: the live tables.
    :param schema: the schema of them all.
    """
    for name in table_names:
        live = table(name, lightweight_column(VERSION), schema=schema)
        op.execute(update(live).where(live.c[VERSION].is_(None)).values({VERSION: 0}))


def upgrade_history_tables(op: Operations, metadata: MetaData) -> None:
    """Bring the history tables that chrononaut 0.2 left up to date, in the migration's transaction.

    The same as ``chrononaut import 0.2``. A migration that uses it needs the models as they were at that time; once it
    has run everywhere, it may be emptied.

    :param op: ``alembic.op``.
    :param metadata: what the models are declared on, e.g. ``Base.metadata``.
    :raises ChrononautException: in offline mode.
    """
    connection = _connection(op, "upgrade_history_tables")
    for each in dict.fromkeys(each for mapping in versioned_mappings(metadata) for each in mapping.tables):
        upgrade_history_table(connection, each)


def keep_dropped_columns(metadata: MetaData) -> IncludeObject:
    """Keep autogenerate from dropping columns of history tables, so that older states keep what they held.

    E.g., in ``env.py``::

        context.configure(..., include_object=keep_dropped_columns(Base.metadata))

    What is hidden by ``__chrononaut_hidden__`` is dropped nevertheless.

    :param metadata: what the models are declared on, e.g. ``Base.metadata``.
    """
    histories = {(history.schema, history.name): live for live, history in versioned_tables(metadata).items()}

    def include_object(
        item: SchemaItem, name: str | None, type_: str, reflected: bool, compare_to: SchemaItem | None
    ) -> bool:
        if type_ != "column" or not reflected or compare_to is not None or not isinstance(item, Column):
            return True
        live = histories.get((item.table.schema, item.table.name))
        return live is None or item.name in live.c

    return include_object


def _rename_indexes(op: Operations, old: str, new: str, schema: str | None) -> None:
    connection = op.get_bind()
    quote, holder = connection.dialect.identifier_preparer.quote, _holder(op, schema)
    for index in inspect(connection).get_indexes(new, schema):
        name, columns = index["name"], [column for column in index["column_names"] if column is not None]
        if name is None or f"_{old}_" not in name:
            continue
        new_name = name.replace(f"_{old}_", f"_{new}_")
        if connection.dialect.name == "postgresql":
            op.execute(f"ALTER INDEX {holder}{quote(name)} RENAME TO {quote(new_name)}")
        elif _is_mariadb(op):
            op.execute(f"ALTER TABLE {holder}{quote(new)} RENAME INDEX {quote(name)} TO {quote(new_name)}")
        elif len(columns) == len(index["column_names"]):
            op.drop_index(name, table_name=new, schema=schema)
            op.create_index(new_name, new, columns, unique=bool(index["unique"]), schema=schema)


def _existing(connection: Connection, table_name: str, name: str, schema: str | None) -> dict[str, Any]:
    """Return what else a column is, as ``alter_column`` wants to be told it."""
    columns = {column["name"]: column for column in inspect(connection).get_columns(table_name, schema)}
    if name not in columns:
        raise ChrononautException(f"{table_name} has no column {name!r} whose type could be altered.")
    column = columns[name]
    if "computed" in column:
        raise ChrononautException(
            f"{table_name}.{name} is computed, which MariaDB would forget: drop the column, and add it anew."
        )
    default = column["default"]
    return {
        "existing_nullable": column["nullable"],
        "existing_server_default": None if default is None else text(default.replace(":", r"\:")),
        "existing_autoincrement": column.get("autoincrement") is True,
        "existing_comment": column.get("comment"),
    }


def _connection(op: Operations, operation: str) -> Connection:
    """Return the database's connection.

    :raises ChrononautException: if there is none.
    """
    if op.get_context().as_sql:
        raise ChrononautException(
            f"{operation}() looks into the database, and there is none in offline mode (--sql): run the migration "
            "online, or write Alembic's own operations for the table and its history instead."
        )
    return op.get_bind()


def _is_mariadb(op: Operations) -> bool:
    return op.get_context().dialect.name in ("mysql", "mariadb")


def _holder(op: Operations, schema: str | None) -> str:
    """Return what stands before the names of a schema's tables."""
    return f"{op.get_context().dialect.identifier_preparer.quote(schema)}." if schema else ""


@contextmanager
def _altering(op: Operations, name: str, schema: str | None) -> Generator[BatchOperations, None, None]:
    with op.batch_alter_table(name, schema=schema) as batch:
        yield batch
