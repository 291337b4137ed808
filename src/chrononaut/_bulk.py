"""Set-based capture: lock, copy and raise the version of all rows that meet a condition, without reading them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnElement,
    Connection,
    CursorResult,
    FromClause,
    Select,
    Text,
    and_,
    bindparam,
    case,
    exists,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    tuple_,
    type_coerce,
)
from sqlalchemy.sql.visitors import replacement_traverse

from chrononaut._capture import (
    Key,
    amend,
    as_json,
    copied_columns,
    ended_states,
    live_version,
    lock_rows,
    not_before,
)
from chrononaut._change_info import ChangeInfoSource
from chrononaut._dialect import is_mariadb
from chrononaut._history_table import CHANGE_INFO, CHANGED, VERSION, RecordChangesColumn
from chrononaut._mapping import VersionedTable
from chrononaut._transaction import OWN, InstantSource, instant_expression
from chrononaut._types import UTCDateTime
from chrononaut.exceptions import RecordLockedError
from chrononaut.typing import Operation

Value = TypeVar("Value")
_KEEP = OWN | {"preserve_rowcount": True}


class Owner(Protocol):
    """What rows belong to: a model, or a versioned table without a class."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    @property
    def base(self) -> VersionedTable:
        """The table that holds the version."""
        ...

    @property
    def family_tables(self) -> tuple[VersionedTable, ...]:
        """The tables that a record may be spread over, the base first."""
        ...

    @property
    def lock_column(self) -> ColumnElement[bool] | None:
        """The live column that locks a record."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one table that are about to change.

    :param mapping: what they belong to.
    :param table: one of its tables.
    :param criteria: which rows of the table.
    :param is_plain: whether the criteria read no other table, so that they can stand where these rows are read.
    :param changes: which of them really change; None for all.
    """

    mapping: Owner
    table: VersionedTable
    criteria: ColumnElement[bool]
    is_plain: bool
    changes: ColumnElement[bool] | None = None

    @property
    def base(self) -> VersionedTable:
        """The table that holds their version."""
        return self.mapping.base

    def matching(self) -> ColumnElement[bool]:
        """Return the criteria as a condition on the base table."""
        return self.on_base(self.criteria) if self.is_plain else self._in_subquery(self.criteria)

    def on_base(self, condition: ColumnElement[bool]) -> ColumnElement[bool]:
        """Return a condition on rows of the table, which reads no other, as one on the base table."""
        return condition if self.table is self.base else self._in_subquery(condition)

    def _in_subquery(self, condition: ColumnElement[bool]) -> ColumnElement[bool]:
        return are_in(self.base.key, select(*self.table.key).where(condition))

    def changing(self) -> ColumnElement[bool]:
        """Return the condition on the base table that a row matches and really changes."""
        if self.changes is None:
            return self.matching()
        return replace(self, criteria=and_(self.criteria, self.changes), changes=None).matching()


class Counts(NamedTuple):
    """How many rows match, and how many of them really change."""

    matching: int
    changing: int


@dataclass(frozen=True, slots=True)
class Writer:
    """Where and when history is written.

    :param connection: the connection.
    :param instant: when the changes happen.
    """

    connection: Connection
    instant: InstantSource

    @property
    def at(self) -> ColumnElement[datetime]:
        """The instant."""
        return with_values(instant_expression(self.instant.kind), self.instant.parameters)

    @property
    def dialect(self) -> str:
        """The database's kind."""
        return self.connection.dialect.name

    # --- the three steps

    def lock(self, rows: Rows, operation: Operation, may_be_locked: bool = False) -> Counts:
        """Lock the rows until the transaction ends, and count them.

        By a statement of its own: the copy must see what others committed while this waited for them.

        :param may_be_locked: whether locked records may change too.
        :raises RecordLockedError: if one of them is a locked record.
        """
        base = rows.base
        lock = rows.mapping.lock_column
        is_locked = false() if lock is None or may_be_locked else lock.is_(True)
        changes = rows.changes if rows.changes is not None and rows.table is base and rows.is_plain else None
        flags = (true() if changes is None else changes, is_locked)
        named: list[Any] = [flag.label(name) for flag, name in zip(flags, ("changes", "locked"), strict=True)]
        query: Any = select(*named).select_from(base.live).where(rows.matching())
        query = lock_rows(query, base, operation, self.dialect)
        found = query.subquery("found")
        counts: list[Any] = [func.count(), *(func.count(case((found.c[name], 1))) for name in ("changes", "locked"))]
        matching, changing, locked = tuple(self.connection.execute(select(*counts).select_from(found)).one())
        if locked:
            self._refuse_locked(rows, is_locked)
        if rows.changes is not None and changes is None and matching:
            changing = self.connection.scalar(select(func.count()).select_from(base.live).where(rows.changing()))
        return Counts(matching, changing or 0)

    def _refuse_locked(self, rows: Rows, is_locked: ColumnElement[bool]) -> None:
        base = rows.base
        key = self.connection.execute(select(*base.key).where(rows.matching(), is_locked).limit(1)).first()
        raise RecordLockedError(rows.mapping.name, () if key is None else tuple(key))

    def copy(self, rows: Rows, operation: Operation, info: ColumnElement[str], only_new: bool = False) -> int:
        """Copy the rows that change into history, those of all tables that a record is spread over.

        :param only_new: leave out what is in history already, because something else ends it too.
        :return: how many records were copied.
        """
        copied = 0
        for table in rows.mapping.family_tables:
            if table.live_version is None:
                self._copy_child(rows, table, only_new)
            else:
                copied = self._copy_base(rows, operation, info, only_new)
        return copied

    def _copy_base(self, rows: Rows, operation: Operation, info: ColumnElement[str], only_new: bool) -> int:
        base = rows.base
        columns, source, _ = ended_states(base, base.live, operation, info, self.at, self.dialect)
        query = select(*columns.values()).select_from(source).where(rows.changing())
        if only_new:
            query = query.where(~is_copied(base))
        return self._insert(base, list(columns), query)

    def _copy_child(self, rows: Rows, table: VersionedTable, only_new: bool) -> None:
        base = rows.base
        link = and_(*(own == up for own, up in zip(table.key, base.key, strict=True)))
        columns = copied_columns(table) | {VERSION: live_version(base)}
        source: FromClause = table.live.join(base.live, link)
        # Those alone whose record was copied just now.
        query = select(*columns.values()).select_from(source).where(rows.changing(), is_copied(base))
        if only_new:
            query = query.where(~is_copied(base, table))
        self._insert(table, list(columns), query)

    def _insert(self, table: VersionedTable, columns: Sequence[str], query: Select[Any]) -> int:
        statement = insert(table.history).from_select(list(columns), query)
        return count_written(self.connection, self.connection.execute(statement, execution_options=_KEEP))

    def raise_version(self, rows: Rows, info: ColumnElement[str]) -> int:
        """Raise the version of the rows that change, and mark them, by a statement of its own."""
        statement = amend(rows.base.live).where(rows.changing(), is_copied(rows.base))
        values = self.bookkeeping(replace(rows, changes=None), info)
        return count_written(self.connection, self.connection.execute(statement.values(values), execution_options=OWN))

    def bookkeeping(self, rows: Rows, info: ColumnElement[str]) -> dict[Any, Any]:
        """Return what an update of the base table must set besides what it was told: version and marks."""
        base, raised = rows.base, live_version(rows.base) + 1
        marks = {column.key: column for column in base.live.c if isinstance(column, RecordChangesColumn)}
        values: dict[Any, Any] = {live_version(base): raised}
        if is_mariadb(self.dialect):
            if rows.changes is not None:
                values = {live_version(base): case((is_copied(base), raised), else_=live_version(base))}
            return values | {mark: self._as_in_copy(base, mark) for mark in marks.values()}
        if marks:
            values[marks[CHANGE_INFO]] = as_json(info, self.dialect)
            values[marks[CHANGED]] = self._not_before_last(marks[CHANGED])
        if rows.changes is None:
            return values
        return {column: case((rows.changes, value), else_=column) for column, value in values.items()}

    def _as_in_copy(self, base: VersionedTable, mark: Column[Any]) -> ColumnElement[Any]:
        """Return a mark as the copy has it that was just made of a row; else as it is.

        MySQL and MariaDB assign one column after the other, in the table's order: what is computed from the row sees
        new values, perhaps those of the version too.
        """
        copy = base.history.alias("just_copied")
        columns = list(base.live.c)
        version = live_version(base)
        is_raised = columns.index(version) < columns.index(mark)
        same = (copy.c[own.key] == live for own, live in zip(base.history_key, base.key, strict=True))
        ended = copy.c[VERSION] == (version - 1 if is_raised else version)
        found = select(copy.c[mark.key]).where(*same, ended, copy.c[CHANGED] >= self.at)
        return func.coalesce(found.scalar_subquery(), mark)

    def _not_before_last(self, changed: ColumnElement[Any]) -> ColumnElement[Any]:
        last = type_coerce(changed, UTCDateTime())
        return case((last.is_(None), self.at), else_=not_before(last, self.at, self.dialect))


def count_written(connection: Connection, result: CursorResult[Any]) -> int:
    """Return how many rows a statement wrote."""
    if result.rowcount < 0 and connection.dialect.name == "sqlite":  # the driver does not count if it begins by WITH
        return cast("int", connection.exec_driver_sql("SELECT changes()").scalar_one())
    return result.rowcount


def is_copied(base: VersionedTable, table: VersionedTable | None = None) -> ColumnElement[bool]:
    """Return the condition that history holds a live row's current version, so that it may be written.

    :param table: whose history; the base table's if None.
    """
    holder = base if table is None else table
    copy = holder.history.alias("copied")
    same = (copy.c[own.key] == live for own, live in zip(holder.history_key, base.key, strict=True))
    return exists(select(literal(1)).select_from(copy).where(*same, copy.c[VERSION] == live_version(base)))


def are_in(columns: Sequence[ColumnElement[Any]], query: Select[Any]) -> ColumnElement[bool]:
    """Return the condition that columns are among the rows of a query, which stands alone."""
    query = query.correlate(None)
    return columns[0].in_(query) if len(columns) == 1 else tuple_(*columns).in_(query)


def with_values(expression: ColumnElement[Value], parameters: Mapping[str, Any]) -> ColumnElement[Value]:
    """Return an expression that holds the values of its parameters, so that it can stand in another statement."""

    def replace_parameter(element: Any, **kw: Any) -> Any:
        bound: Any = element  # not narrowed: a checker forgets the type arguments then
        if isinstance(element, BindParameter) and bound.key in parameters:
            value = parameters[bound.key]
            return bindparam(None, value, type_=bound.type, unique=True, expanding=bound.expanding)
        return None

    if not parameters:
        return expression
    return replacement_traverse(expression, {}, replace_parameter)


def as_text(info: str) -> ColumnElement[str]:
    """Return change info as an expression."""
    return literal(info, Text())


def name_hidden(
    source: ChangeInfoSource, cls: type, conditions: Mapping[str, ColumnElement[bool]]
) -> ColumnElement[str]:
    """Return change info that names, for each row, the hidden columns that change in it.

    :param conditions: when each of them changes.
    """
    plain = as_text(source.of_class(cls))
    if not conditions:
        return plain
    names = sorted(conditions)
    parts = [case((conditions[name], as_text(f", {json.dumps(name)}")), else_=as_text("")) for name in names]
    listed: ColumnElement[str] = parts[0]
    for part in parts[1:]:
        listed = listed.concat(part)
    # The list is the last thing that the change info of a statement holds.
    head = source.of_class(cls, names).removesuffix(json.dumps(names) + "}")
    text = as_text(head + "[").concat(func.substr(listed, 3)).concat(as_text("]}"))
    return case((or_(*conditions.values()), text), else_=plain)


def versions_of(connection: Connection, rows: Rows, conditions: Iterable[ColumnElement[bool]]) -> dict[Key, int]:
    """Return the versions of those of the rows that change that meet any of the conditions."""
    base, found = rows.base, dict[Key, int]()
    for condition in conditions:
        query = select(*base.key, live_version(base)).select_from(base.live).where(condition, rows.changing())
        found |= {tuple(row[:-1]): row[-1] for row in connection.execute(query)}
    return found
