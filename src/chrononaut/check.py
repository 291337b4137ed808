"""Compare versioned models with a live database: what ``chrononaut check`` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Column, Connection, Inspector, MetaData, Table, inspect
from sqlalchemy.engine.interfaces import ReflectedColumn
from sqlalchemy.types import JSON, DateTime, TypeEngine

from chrononaut._history_table import BEGAN, CHANGE_INFO, CHANGED, OPERATION, VERSION
from chrononaut._mapping import VersionedMapping, VersionedTable, versioned_mappings

__all__ = ["Difference", "check_schema"]

_MIGRATE = "Run `alembic revision --autogenerate` and `alembic upgrade head`."
_REQUIRED = (CHANGED, CHANGE_INFO, OPERATION)


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between the models and a database.

    :param table: name of the table in question.
    :param what: what differs, in words.
    :param remedy: how to mend it.
    :param severity: ``error`` if history would be refused, falsified or say more than it may; else ``note``.
    """

    table: str
    what: str
    remedy: str
    severity: Literal["error", "note"] = "error"

    def __str__(self) -> str:
        return f"{self.severity}: {self.table}: {self.what}\n    {self.remedy}"


def check_schema(connection: Connection, metadata: MetaData) -> Iterator[Difference]:
    """Compare each versioned table and its history with what the database has, and yield what differs.

    Only what matters to versioning is compared; the rest is for ``alembic check``.

    :param connection: a connection to the database.
    :param metadata: what the models are declared on, e.g. ``Base.metadata``.
    """
    inspector = inspect(connection)
    for table, mappings in _tables(metadata).items():
        if not inspector.has_table(table.live.name, table.live.schema):
            yield Difference(str(table.live), "the table does not exist.", _MIGRATE)
            continue
        live = _columns(inspector, table.live)
        if table.live_version is not None:
            yield from _check_version(table, live)
        if not inspector.has_table(table.history.name, table.history.schema):
            yield Difference(str(table.live), f"its history table {table.history} does not exist.", _MIGRATE)
            continue
        history = _columns(inspector, table.history)
        if table.live_version is not None and VERSION in history and not {BEGAN, OPERATION} & history.keys():
            yield _from_0_2(table)
            continue
        yield from _check_columns(table, history)
        yield from _check_left_over(mappings, table, history)
        yield from _check_types(connection, table, live, history)
        yield from _check_constraints(inspector, table)


def _tables(metadata: MetaData) -> dict[VersionedTable, list[VersionedMapping]]:
    tables: dict[VersionedTable, list[VersionedMapping]] = {}
    for mapping in versioned_mappings(metadata):
        tables.setdefault(mapping.tables[-1], []).append(mapping)
    return tables


def _columns(inspector: Inspector, table: Table) -> dict[str, ReflectedColumn]:
    return {column["name"]: column for column in inspector.get_columns(table.name, table.schema)}


def _from_0_2(table: VersionedTable) -> Difference:
    return Difference(
        str(table.history),
        "it has neither `began` nor `operation`, as the history tables of chrononaut 0.2 have not.",
        "Run `chrononaut import 0.2`, then `alembic revision --autogenerate`. See the how-to on upgrading from 0.2.",
    )


def _check_version(table: VersionedTable, live: dict[str, ReflectedColumn]) -> Iterator[Difference]:
    name = str(table.live)
    version = live.get(VERSION)
    if version is None:
        yield Difference(name, "it has no column `version`.", _MIGRATE)
    elif version["nullable"]:
        yield Difference(
            name,
            "`version` may be NULL, and a row whose version is NULL cannot be changed.",
            "Make the column NOT NULL by a migration that calls `chrononaut.alembic.fill_versions` first.",
        )
    elif version["default"] is None:
        yield Difference(
            name,
            "`version` has no default, so rows that are not inserted by SQLAlchemy need to name it.",
            "Give the column the server default 0 by a migration.",
            "note",
        )


def _check_columns(table: VersionedTable, history: dict[str, ReflectedColumn]) -> Iterator[Difference]:
    name = str(table.history)
    for column in table.history.c:
        found = history.get(column.name)
        if found is None:
            yield Difference(name, f"it has no column `{column.name}`, so no change could be recorded.", _MIGRATE)
        elif column.primary_key:
            continue
        elif column.nullable and not found["nullable"]:
            yield Difference(
                name,
                f"`{column.name}` is NOT NULL, but a birth has no data, and older states may lack the column.",
                f"Make the column nullable. {_MIGRATE}",
            )
        elif column.name in _REQUIRED and found["nullable"]:
            yield Difference(name, f"`{column.name}` may be NULL, but every state needs it.", _MIGRATE)


def _check_left_over(
    mappings: Sequence[VersionedMapping], table: VersionedTable, history: dict[str, ReflectedColumn]
) -> Iterator[Difference]:
    name = str(table.history)
    expected = {column.name for column in table.history.c}
    hidden = {mapping.mapper.columns[each].name for mapping in mappings for each in mapping.hidden}
    untracked = {mapping.mapper.columns[each].name for mapping in mappings for each in mapping.untracked}
    for column, found in history.items():
        if column in expected:
            continue
        if column in hidden:
            yield Difference(
                name,
                f"`{column}` is hidden, but history still holds its older values.",
                f"Drop the column from {name} by a migration. Older backups hold it too.",
            )
        elif not found["nullable"] and found["default"] is None:
            yield Difference(
                name,
                f"`{column}`, which no model maps, is NOT NULL, so no change could be recorded.",
                "Make the column nullable, or drop it.",
            )
        else:
            why = "is untracked now" if column in untracked else "is in no model"
            yield Difference(
                name,
                f"`{column}` {why}; it keeps what it held.",
                "Drop the column when nobody needs it any more.",
                "note",
            )


def _check_types(
    connection: Connection,
    table: VersionedTable,
    live: dict[str, ReflectedColumn],
    history: dict[str, ReflectedColumn],
) -> Iterator[Difference]:
    def text(type_: TypeEngine[Any]) -> str:
        return type_.compile(connection.dialect)

    name = str(table.history)
    for column, copy in table.copied:
        if column.name in live and copy.name in history and column.type is copy.type:
            mine, its = text(live[column.name]["type"]), text(history[copy.name]["type"])
            if mine != its:
                what = f"`{copy.name}` is {its} there but {mine} in {table.live}."
                yield Difference(name, what, f"Give both the same type. {_MIGRATE}")
    for own in (BEGAN, CHANGED):
        type_ = history[own]["type"] if own in history and own in table.history.c else None
        knows_zones = connection.dialect.name == "postgresql"
        if type_ is not None and not (isinstance(type_, DateTime) and (type_.timezone or not knows_zones)):
            yield Difference(name, f"`{own}` is {text(type_)}, not a point in time with a zone.", _MIGRATE)
    info = history.get(CHANGE_INFO)
    if connection.dialect.name == "postgresql" and info is not None and not isinstance(info["type"], JSON):
        yield Difference(name, f"`{CHANGE_INFO}` is {text(info['type'])}, not JSONB.", _MIGRATE)


def _check_constraints(inspector: Inspector, table: VersionedTable) -> Iterator[Difference]:
    name = str(table.history)
    schema = table.history.schema
    key = [column.name for column in _history_key(table)]
    found = inspector.get_pk_constraint(table.history.name, schema)["constrained_columns"]
    if set(found) == {*key, CHANGED}:
        what = f"its primary key has `{CHANGED}` too, as PostgreSQL demands where that partitions it."
        yield Difference(name, what, "Nothing has to be done.", "note")
    elif set(found) != set(key):
        yield Difference(
            name,
            f"its primary key is ({', '.join(found)}), not ({', '.join(key)}).",
            "Replace the primary key by a migration.",
        )
    for foreign_key in inspector.get_foreign_keys(table.history.name, schema):
        columns, other = ", ".join(foreign_key["constrained_columns"]), foreign_key["referred_table"]
        yield Difference(
            name,
            f"({columns}) refers to {other} by a foreign key, which would keep rows there from being deleted.",
            f"Drop the foreign key. {_MIGRATE}",
        )
    for unique in inspector.get_unique_constraints(table.history.name, schema):
        columns = ", ".join(unique["column_names"])
        yield Difference(
            name,
            f"({columns}) is unique, but a record has the same value in many states.",
            f"Drop the constraint {unique['name']}. {_MIGRATE}",
        )


def _history_key(table: VersionedTable) -> list[Column[Any]]:
    return [*table.history_key, table.history.c[VERSION]]
