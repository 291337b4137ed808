"""What the past refuses to be asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import CTE, Column, Select, Table
from sqlalchemy.sql import ClauseElement, visitors
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import TextClause
from sqlalchemy.sql.selectable import ForUpdateArg, Join

from chrononaut._history_table import history_table_of
from chrononaut._mapping import VersionedMapping, versioned_models
from chrononaut._past_tables import left_out_columns, names_behind
from chrononaut.exceptions import (
    ChrononautException,
    HiddenAttributeError,
    ReadOnlyError,
    UntrackedAttributeError,
)

#: What makes text more than a fragment over the columns of the statement that it stands in.
_READS = re.compile(r"\b(select|from|join|table|with|insert|update|delete|call|exec|execute)\b", re.IGNORECASE)


def check_statement(invoked: ClauseElement, made: Any) -> tuple[set[Table], set[str]]:
    """Refuse a statement that the past cannot answer.

    :param invoked: the statement as the application wrote it.
    :param made: the state of its compilation by the ORM, if that had to do with it.
    :return: the tables that it names, and the names of its CTEs in lower case.
    """
    tables: set[Any] = set()
    ctes: set[str] = set()
    for element in visitors.iterate(invoked):
        tables.update(_check_element(element))
        if isinstance(element, CTE):
            ctes.add(element.name.lower())
    if made is not None and made.statement is not None:
        # What the ORM has added: eager loads, the joins along relationships, with_loader_criteria().
        for element in visitors.iterate(made.statement):
            part: Any = element
            if isinstance(element, Table):
                tables.add(part)
            condition = _condition_of(part)
            for part in () if condition is None else visitors.iterate(condition):
                tables.update(_check_element(part))
    return tables, ctes


def row_lock_error() -> ReadOnlyError:
    """Return the error about a row lock."""
    return ReadOnlyError("Rows of the past cannot be locked (with_for_update): nobody can change them anyway.")


def unversioned_error(name: str) -> ChrononautException:
    """Return the error about a table that has no history."""
    return ChrononautException(
        f"{name} is not versioned, so it cannot be read as it was. Version it, leave it out of the query, or pass "
        "`unversioned='live'` to see it as it is now."
    )


def _check_element(element: Any) -> Sequence[Any]:
    """Refuse what the past cannot answer; return the tables."""
    given = element  # not narrowed: a checker forgets the type arguments then
    if isinstance(element, Table):
        return (given,)
    if isinstance(element, UpdateBase):
        raise ReadOnlyError(
            "The past cannot be changed: a statement that reads it contains an INSERT, UPDATE or DELETE."
        )
    if isinstance(element, ForUpdateArg):
        raise row_lock_error()
    if isinstance(element, TextClause):
        if _READS.search(element.text):
            raise ReadOnlyError(
                "Textual SQL would read the present, not the past: write it with select(), or run it in the live "
                "session."
            )
    elif isinstance(element, Column):
        for column in given.base_columns:
            _check_column(column)
    return ()


def check_names(table: Table, ctes: set[str]) -> None:
    """Refuse a CTE that takes the name of a table that the past is read from."""
    for name in names_behind(table) if ctes else ():
        if name.lower() in ctes:
            raise ChrononautException(
                f"The past of {table.name} is read from {name}, and this query has a CTE of that name: give it another."
            )


def _condition_of(element: Any) -> ClauseElement | None:
    given = element  # not narrowed: a checker forgets the type arguments then
    if isinstance(element, Join):
        return element.onclause
    if isinstance(element, Select):
        condition: ClauseElement | None = given.whereclause
        return condition
    return None


def _check_column(column: Any) -> None:
    table: Any = getattr(column, "table", None)
    if not _is_versioned(table):
        return
    if any(column.key == other.key for other in left_out_columns(table)):
        raise _left_out_error(_mapping_of_table(table), table, column.key)


def _mapping_of_table(table: Table) -> VersionedMapping | None:
    return next((m for m in versioned_models() if any(each.live is table for each in m.tables)), None)


def _left_out_error(
    mapping: VersionedMapping | None, table: Table, key: str
) -> HiddenAttributeError | UntrackedAttributeError:
    if mapping is None:
        return UntrackedAttributeError(table.name, key)
    column = table.c[key]
    name = next((name for name, own in mapping.mapper.columns.items() if own is column), key)
    error = HiddenAttributeError if name in mapping.hidden else UntrackedAttributeError
    return error(mapping.name, name)


def _is_versioned(table: Any) -> bool:
    given = table  # not narrowed: a checker forgets the type arguments then
    return isinstance(table, Table) and history_table_of(given) is not None
