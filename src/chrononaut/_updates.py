"""Capture UPDATE and DELETE statements: lock the rows, copy them, let the statement write what was copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from sqlalchemy import Column, ColumnElement, Result, Table, Update
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.visitors import iterate

from chrononaut._assignments import attributes_of, changes_by, is_noticed, read_assignments
from chrononaut._bulk import Rows, as_text, name_hidden
from chrononaut._capture import Key
from chrononaut._cascades import Cascade
from chrononaut._execution import Disagreement, kind_of, mapping_in
from chrononaut._history_table import VERSION, RecordChangesColumn, VersionColumn
from chrononaut._listing import Listing
from chrononaut._mapping import VersionedMapping, VersionedTable, model_of, target_of
from chrononaut._present import bring_up_to_date, versions_in_session, versions_that_end
from chrononaut._sending import Captured, Sending
from chrononaut._unversioned import UnversionedChange
from chrononaut.exceptions import UntrackedStatementError
from chrononaut.typing import Operation

Assignments = Mapping[Column[Any], ColumnElement[Any]]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a statement is going to do, as far as it tells by itself.

    :param assignments: what it sets.
    :param noticed: what of that makes a version.
    :param is_touching: whether each row that it writes gets a new value in some other column that makes a version.
    :param is_locking: whether it locks or unlocks records, and does nothing else.
    """

    operation: Operation
    mapping: VersionedMapping
    table: VersionedTable
    assignments: Assignments = field(default_factory=dict[Column[Any], ColumnElement[Any]])
    noticed: Assignments = field(default_factory=dict[Column[Any], ColumnElement[Any]])
    is_touching: bool = False
    is_locking: bool = False

    @property
    def is_recorded(self) -> bool:
        """Whether it makes versions."""
        return self.operation == "delete" or bool(self.noticed) or self.is_touching


class Change(Sending):
    """An UPDATE or DELETE."""

    def change(self) -> Result[Any] | None:
        """Capture an UPDATE or DELETE, and execute it; None if there is nothing to capture."""
        table: Any = target_of(self.statement)
        known: Any = table  # not narrowed: a checker forgets the type arguments then
        if not isinstance(table, Table):
            self._refuse_joins(table)
            return None
        mapping = model_of(known)
        if mapping is None:
            return UnversionedChange(self.state, self.config).change(known)
        if mapping.tables[-1].history is known:
            return None
        if self.mapper is not None:
            mapping = mapping_in(mapping, self.mapper)
        if self.state.is_executemany and self.state.is_update and self.is_of_model:
            return self._update_by_key(mapping)
        if self.state.is_executemany:
            raise UntrackedStatementError(
                f"This {kind_of(self.statement)} of {table.name} has a list of parameters: that cannot be "
                "captured. Execute it once for each, or by primary key: `session.execute(update(Model), [...])`."
            )
        versioned = next(each for each in mapping.tables if each.live is table)
        plan = (self._plan_delete if self.state.is_delete else self._plan_update)(mapping, versioned)
        self.flush()
        if not plan.is_recorded and mapping.lock_column is None:
            return self.run()
        with self.transaction.passing():
            return self._execute(plan)

    # --- what it is going to do

    def _plan_delete(self, mapping: VersionedMapping, table: VersionedTable) -> _Plan:
        if table.live_version is None:
            raise UntrackedStatementError(
                f"A DELETE of {table.live.name} removes half of each {mapping.name}. Delete rows of "
                f"{mapping.base.live.name}, or through the session."
            )
        return _Plan("delete", mapping, table)

    def _plan_update(self, mapping: VersionedMapping, table: VersionedTable) -> _Plan:
        assignments = read_assignments(cast("Update", self.statement), table, self.parameters)
        self._refuse_bookkeeping(mapping, assignments)
        noticed = {column: value for column, value in assignments.items() if is_noticed(mapping, table, column)}
        is_touching = any(
            column.onupdate is not None or column.server_onupdate is not None
            for column in table.live.c
            if column not in assignments and is_noticed(mapping, table, column)
        )
        lock = None if mapping.lock_column is None else mapping.lock_column.key
        is_locking = {column.key for column in noticed} == {lock} and len(assignments) == 1
        return _Plan("update", mapping, table, assignments, noticed, is_touching, is_locking)

    def _rows(self, plan: _Plan, statement: UpdateBase) -> Rows:
        condition, is_plain = self.criteria(statement, plan.table.live, tuple(plan.assignments.values()))
        is_known = is_plain and not plan.is_touching and plan.operation == "update"
        changes = changes_by(plan.noticed, self.writer.dialect) if is_known else None
        return Rows(plan.mapping, plan.table, condition, is_plain, changes)

    def _info(self, plan: _Plan, rows: Rows) -> ColumnElement[str]:
        """Return the change info of the rows; it names the hidden columns that each row's change is about."""
        cls = plan.mapping.mapper.class_
        hidden: dict[str, Assignments] = {}
        for column, value in plan.noticed.items():
            for each, name in attributes_of(plan.mapping, column):
                if name in each.hidden:
                    hidden[name] = {column: value}
        if rows.changes is None:
            return as_text(self.info.of_class(cls, hidden))
        changes = {name: changes_by(values, self.writer.dialect) for name, values in hidden.items()}
        conditions = {name: rows.on_base(each) for name, each in changes.items() if each is not None}
        return name_hidden(self.info, cls, conditions)

    # --- lock, copy, write

    def _execute(self, plan: _Plan) -> Result[Any]:
        """Execute the statement, captured; again, if others made rows match in between."""
        is_updating_objects = plan.operation == "update" and self._is_synchronized
        before = versions_in_session(self.session, plan.mapping) if is_updating_objects else {}
        ended: dict[Key, int] = {}

        def attempt(is_again: bool) -> Result[Any]:
            ended.clear()
            return self.send(plan.table.live, partial(self._capture, plan, ended if before else None))

        result = self.until_agreed(attempt, self._refusal(plan))
        bring_up_to_date(self.session, plan.mapping, before, ended)
        return result

    def _capture(self, plan: _Plan, ended: dict[Key, int] | None, statement: UpdateBase) -> Captured:
        """Lock and copy the rows that a statement is about to write; return it so that it writes their version too.

        :param ended: takes up the versions that end of those whose objects are in the session.
        """
        rows = self._rows(plan, statement)
        count = self.writer.lock(rows, plan.operation, may_be_locked=plan.is_locking)
        if not plan.is_recorded:
            return Captured(statement, None)
        info = self._info(plan, rows)
        if count.changing:
            if self.writer.copy(rows, plan.operation, info) != count.changing:
                raise Disagreement
            if ended is not None:
                ended |= versions_that_end(self.session, plan.mapping, self.writer, rows)
            if plan.table.live_version is None and self.writer.raise_version(rows, info) != count.changing:
                raise Disagreement
        if plan.operation == "delete":
            Cascade(self.writer, lambda: self.info).capture(plan.table.live, rows.criteria)
        elif plan.table.live_version is not None:
            statement = cast("Update", statement).values(self.writer.bookkeeping(rows, info))
        return Captured(statement, count.matching)

    # --- updates of listed records

    def _update_by_key(self, mapping: VersionedMapping) -> Result[Any]:
        statement = cast("Update", self.statement)
        given = cast("list[dict[str, Any]]", self.state.parameters)
        if statement.whereclause is not None or read_assignments(statement, mapping.tables[-1], {}):
            raise UntrackedStatementError(
                f"An UPDATE of listed {mapping.name} records that has a condition or values() too cannot be captured."
            )
        listing = Listing(mapping, given)
        self.flush()
        with self.transaction.passing():
            before = versions_in_session(self.session, mapping) if self._is_synchronized else {}
            self.transaction.listed += before
            parameters = listing.capture(self.writer, self.info, self.transaction.instant)
            result = self.run(parameters=parameters)
        for state, version in before.items():
            found = listing.found.get(cast("Key", state.identity))
            target = state.obj()
            if target is not None and found is not None and version != found:  # it was stale before, and stays so
                set_committed_value(target, VERSION, version)
        return result

    @property
    def _is_synchronized(self) -> bool:
        return self.is_of_model and self.state.execution_options.get("synchronize_session", "auto") is not False

    # --- what cannot be captured

    def _refusal(self, plan: _Plan) -> UntrackedStatementError:
        return UntrackedStatementError(
            f"History and the rows of {plan.table.live.name} would not agree, so the statement was rolled back. "
            "Does its condition change from one moment to the next, or do with_loader_criteria narrow a subquery of it?"
        )

    def _refuse_joins(self, target: Any) -> None:
        tables = [each for each in iterate(target) if model_of(each) is not None]
        if tables:
            raise UntrackedStatementError(
                f"This {kind_of(self.statement)} is about {target}, which cannot be captured: name the model itself."
            )

    def _refuse_bookkeeping(self, mapping: VersionedMapping, assignments: Assignments) -> None:
        for column in assignments:
            if isinstance(column, VersionColumn | RecordChangesColumn):
                raise UntrackedStatementError(
                    f"{mapping.name}.{column.key} is chrononaut's own: a statement cannot set it."
                )
            if column.primary_key:
                raise UntrackedStatementError(
                    f"A statement that changes the primary key of {mapping.name} cannot be captured. Load the records, "
                    "and change them in the session."
                )
