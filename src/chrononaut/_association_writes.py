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
    event,
    literal,
    select,
)
from sqlalchemy.orm import Session
from sqlalchemy.sql import operators
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import BinaryExpression
from sqlalchemy.sql.visitors import iterate

from chrononaut._associations import Association, find_association
from chrononaut._capture import (
    FIRST_BIRTH,
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
from chrononaut._history_table import VERSION
from chrononaut._mapping import VersionedTable
from chrononaut._suppression import is_suppressed
from chrononaut._transaction import SessionConfig, is_own, transaction_of
from chrononaut.exceptions import ChrononautException, UntrackedStatementError
from chrononaut.typing import Operation

_LISTENING = "_chrononaut_associations"
_OVERWRITES = re.compile(r"\bDO UPDATE\b|\bON DUPLICATE KEY\b|\bOR REPLACE\b", re.IGNORECASE)


def listen_to_associations(
    session: Session, connection: Connection, config: SessionConfig, info: Callable[[], ChangeInfoSource]
) -> None:
    """Capture what is executed on a connection until the session's transaction ends.

    :param info: returns the change info of what is being executed.
    """
    listening: dict[Connection, _Listener] = session.info.setdefault(_LISTENING, {})
    if connection not in listening:
        listener = listening[connection] = _Listener(session, config, info)
        event.listen(connection, "before_execute", listener.before_execute, retval=True)
        event.listen(connection, "after_execute", listener.after_execute)


def forget_associations(session: Session) -> None:
    """Stop listening, now that the transaction has ended."""
    listening: dict[Connection, _Listener] | None = session.info.pop(_LISTENING, None)
    for connection, listener in listening.items() if listening is not None else ():
        if not connection.closed:
            event.remove(connection, "before_execute", listener.before_execute)
            event.remove(connection, "after_execute", listener.after_execute)


@dataclass(slots=True)
class _Pending:
    """A statement that is being executed.

    :param keys: those of the rows that an INSERT makes; None where the database tells them.
    :param count: how many rows an UPDATE or DELETE was found to match.
    """

    statement: UpdateBase
    association: Association
    keys: list[Key] | None = None
    count: int | None = None


class _Listener:
    """Captures the statements on one connection, during one transaction of a session."""

    def __init__(self, session: Session, config: SessionConfig, info: Callable[[], ChangeInfoSource]) -> None:
        self._session = session
        self._config = config
        self._info = info
        self._pending: _Pending | None = None

    def before_execute(
        self, connection: Connection, statement: Any, multiparams: Any, params: Any, options: Mapping[str, Any]
    ) -> tuple[Any, Any, Any]:
        """Fire before a statement is executed: copy what it ends, and have it tell what it makes."""
        association = find_association(statement.table) if isinstance(statement, Insert | Update | Delete) else None
        if association is not None and statement.table is association.base.live and not is_own(options):
            parameters = list(multiparams) or [params]
            if isinstance(statement, Insert):
                statement = self._before_insert(association, statement, parameters)
            elif not is_suppressed():
                statement = self._before_change(connection, association, statement, parameters)
        return statement, multiparams, params

    def after_execute(
        self, connection: Connection, statement: Any, multiparams: Any, params: Any, options: Any, result: Any
    ) -> None:
        """Fire after a statement was executed."""
        pending, is_ours = self._pending, self._pending is not None and self._pending.statement is statement
        if pending is None or not is_ours:
            return
        self._pending = None
        if isinstance(statement, Insert):
            keys = pending.keys
            self._begin(connection, pending.association, list(map(tuple, result)) if keys is None else keys)
        elif not multiparams and pending.count != result.rowcount >= 0:
            raise ChrononautException(
                f"{result.rowcount} rows of {pending.association.base.live.name} changed, but {pending.count} were "
                "found before: others were added at the same time. Roll back and try again."
            )

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
            ended = last.get(key)
            version = FIRST_BIRTH if ended is None else ended.version + 1
            if not suppressed:
                began = None if ended is None else ended.changed
                births.append(Birth(key, version, began, self._info().of_class(association.hooks), None))
                version += 1
            if max(version, 0) != 0:
                renumbered[key] = version
        if renumbered:
            renumber(connection, tables, renumbered)
        if births:
            instant = transaction_of(self._session, self._config).instant.source(connection)
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
            instant = transaction_of(self._session, self._config).instant.source(connection)
            wanted = [(key, version, info) for key, version in versions.items()]
            if copy_states(connection, tables, wanted, operation, instant) != len(wanted):
                raise ChrononautException(f"Not all rows of {tables.live.name} could be copied to their history.")
        if isinstance(statement, Update):
            statement = statement.values({VERSION: live_version(tables) + 1})
        self._pending = _Pending(statement, association, count=len(versions))
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
