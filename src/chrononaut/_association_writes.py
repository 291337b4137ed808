"""Capture what changes the versioned tables that have no class.

No mapper event tells of their rows, so each statement that changes them is captured where it is executed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BindParameter,
    Column,
    Connection,
    Delete,
    Insert,
    TextClause,
    Update,
    literal,
    select,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import BinaryExpression
from sqlalchemy.sql.visitors import iterate

from chrononaut._associations import Association, find_association
from chrononaut._births import beginning_after
from chrononaut._capture import (
    Birth,
    Key,
    copy_states,
    find_last_states,
    insert_births,
    live_version,
    lock_rows,
    read_current,
    renumber,
)
from chrononaut._change_info import ChangeInfoSource
from chrononaut._hearing import Parameters
from chrononaut._history_table import VERSION
from chrononaut._mapping import VersionedTable
from chrononaut._suppression import is_suppressed
from chrononaut._transaction import TransactionState, is_own
from chrononaut.exceptions import ChrononautException, UntrackedStatementError
from chrononaut.typing import Operation

_OVERWRITES = re.compile(r"\bDO UPDATE\b|\bON DUPLICATE KEY\b|\bOR REPLACE\b", re.IGNORECASE)


@dataclass(slots=True)
class _Pending:
    """A statement that is being executed.

    :param keys: those of the rows that an INSERT makes; None where the database tells them.
    :param count: how many rows an UPDATE or DELETE was found to match; None if the result does not tell.
    """

    statement: UpdateBase
    association: Association
    keys: list[Key] | None = None
    count: int | None = None


class AssociationHearer:
    """Captures what the statements of a session's transaction do to versioned tables without a class.

    :param info: returns the change info of what is being executed.
    """

    def __init__(self, transaction: TransactionState, info: Callable[[], ChangeInfoSource]) -> None:
        self._transaction = transaction
        self._info = info
        self._pending: _Pending | None = None

    def before_execute(
        self, connection: Connection, statement: Any, parameters: Parameters, options: Mapping[str, Any]
    ) -> Any:
        """Copy what a statement ends, and have it tell what it makes."""
        association = find_association(statement.table) if isinstance(statement, Insert | Update | Delete) else None
        if association is None or statement.table is not association.base.live or is_own(options):
            return statement
        if isinstance(statement, Insert):
            return self._before_insert(association, statement, parameters)
        return statement if is_suppressed() else self._before_change(connection, association, statement, parameters)

    def after_execute(self, connection: Connection, statement: Any, result: Any) -> None:
        """Record the births, and count what was changed."""
        pending = self._pending
        if pending is None or pending.statement is not statement:
            return
        self._pending = None
        if isinstance(statement, Insert):
            keys = pending.keys
            self._begin(connection, pending.association, list(map(tuple, result)) if keys is None else keys)
        elif pending.count is not None and pending.count != result.rowcount >= 0:
            raise ChrononautException(
                f"{result.rowcount} rows of {pending.association.base.live.name} changed, but {pending.count} were "
                "found before: others were added at the same time. Roll back and try again."
            )

    def before_cursor_execute(self, connection: Connection, sql: str, context: Any) -> None:
        """There is nothing to do."""

    # --- rows that appear

    def _before_insert(
        self, association: Association, statement: Insert, parameters: Sequence[Mapping[str, Any]]
    ) -> Insert:
        tables = association.base
        names = [column.key for column in tables.key]
        keys: list[Key] | None = None
        if all(name in row for row in parameters for name in names) and _is_plain(statement):
            keys = [tuple(row[name] for name in names) for row in parameters]
        elif len(statement.exported_columns):
            raise UntrackedStatementError(
                f"An INSERT into {tables.live.name} with RETURNING must be given its rows as parameters: "
                "`session.execute(insert(table).returning(...), [{...}, ...])`."
            )
        elif _OVERWRITES.search(str(statement)):
            raise UntrackedStatementError(
                f"An INSERT that overwrites rows of {tables.live.name} cannot be captured. Delete them first."
            )
        else:
            statement = statement.returning(*tables.key)
        self._pending = _Pending(statement, association, keys)
        return statement

    def _begin(self, connection: Connection, association: Association, keys: list[Key]) -> None:
        """Record the births of rows that were inserted, and number those whose key was used before."""
        tables, suppressed = association.base, is_suppressed()
        last = find_last_states(connection, tables, keys)
        births: list[Birth] = []
        renumbered: dict[Key, int] = {}
        for key in keys:
            absence, began, first = beginning_after(last.get(key), not suppressed)
            if not suppressed:
                births.append(Birth(key, absence, began, self._info().of_class(association.hooks), None))
            if first != 0:
                renumbered[key] = first
        if renumbered:
            renumber(connection, tables, renumbered)
        if births:
            instant = self._transaction.instant.source(connection)
            insert_births(connection, tables, births, None, instant)

    # --- rows that change or go

    def _before_change(
        self,
        connection: Connection,
        association: Association,
        statement: Update | Delete,
        parameters: Sequence[Mapping[str, Any]],
    ) -> Update | Delete:
        tables = association.base
        operation: Operation = "delete"
        if isinstance(statement, Update):
            operation = "update"
            if _sets_key(statement, tables, parameters):
                raise UntrackedStatementError(
                    f"An UPDATE that changes the key of rows of {tables.live.name} cannot be captured: "
                    "remove them, and add the new ones."
                )
        info = self._info().of_class(association.hooks)
        versions = dict(_matching(connection, tables, statement, parameters, operation))
        if versions:
            instant = self._transaction.instant.source(connection)
            wanted = [(key, version, info) for key, version in versions.items()]
            if copy_states(connection, tables, wanted, operation, instant) != len(wanted):
                raise ChrononautException(f"Not all rows of {tables.live.name} could be copied to their history.")
        if isinstance(statement, Update):
            statement = statement.values({VERSION: live_version(tables) + 1})
        # A driver does not count the rows of a list of parameters.
        self._pending = _Pending(statement, association, count=len(versions) if len(parameters) == 1 else None)
        return statement


def _matching(
    connection: Connection,
    tables: VersionedTable,
    statement: Update | Delete,
    parameters: Sequence[Mapping[str, Any]],
    operation: Operation,
) -> Iterator[tuple[Key, int]]:
    """Yield the key and version of the rows that a statement matches, and lock them."""
    where = statement.whereclause
    if _asks_for_key(where, tables.key):
        keys = [tuple(row[column.key] for column in tables.key) for row in parameters]
        for row in read_current(connection, [tables], keys):
            yield row.key, row.version
        return
    query = select(*tables.key, live_version(tables))
    if where is not None:
        query = query.where(where)
    query = lock_rows(query, tables, operation, connection.dialect.name)
    for each in parameters:
        for found in connection.execute(query, each):
            yield tuple(found[:-1]), found[-1]


def _asks_for_key(where: Any, key: Iterable[Column[Any]]) -> bool:
    """Tell whether a condition is that of a removal: each part of the key is the parameter of its name."""
    if getattr(where, "operator", None) not in (operators.eq, operators.and_):
        return False
    parts: dict[Any, list[Any]] = defaultdict(list)
    for element in iterate(where):
        if isinstance(element, BinaryExpression):
            left, right = element.left, element.right
            if element.operator is not operators.eq or not isinstance(right, BindParameter):
                return False
            parts[left].append(right)
        elif not isinstance(element, BindParameter | Column) and element is not where:
            return False
    return set(parts) == set(key) and all(
        len(binds) == 1 and binds[0].key == column.key and binds[0].required for column, binds in parts.items()
    )


def _sets_key(statement: Update, tables: VersionedTable, parameters: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether an UPDATE sets a part of the key: by its parameters, or by values that it would lose to others."""
    if any(column.key in row for row in parameters for column in tables.key):
        return True
    children = set(map(id, statement.get_children()))
    for column in tables.key:
        after = set(map(id, statement.values({column.key: literal(0)}).get_children()))
        if children - after:
            return True
    return False


def _is_plain(statement: Insert) -> bool:
    """Tell whether an INSERT makes each of its rows, or fails."""
    return type(statement) is Insert and not any(isinstance(child, TextClause) for child in statement.get_children())
