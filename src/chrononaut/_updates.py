"""Capture UPDATE and DELETE statements: lock the rows, copy them, let the statement write what was copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import (
    Column,
    ColumnElement,
    CursorResult,
    Delete,
    Result,
    Table,
    Update,
    and_,
    event,
    func,
    select,
    true,
)
from sqlalchemy.orm import InstanceState, Session
from sqlalchemy.orm.attributes import instance_state, set_committed_value
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.visitors import iterate

from chrononaut._assignments import attributes_of, changes_by, is_noticed, read_assignments
from chrononaut._bulk import Counts, Rows, as_text, count_written, name_hidden, versions_of, with_values
from chrononaut._capture import Key
from chrononaut._cascades import Cascade, dependents_of, refuse_key_change
from chrononaut._execution import Execution, kind_of, mapping_in
from chrononaut._history_table import (
    CHANGE_INFO,
    CHANGED_ATTRIBUTE,
    VERSION,
    RecordChangesColumn,
    VersionColumn,
)
from chrononaut._listing import Listing
from chrononaut._mapping import VersionedMapping, VersionedTable, model_of, target_of
from chrononaut._wanted import keys_in
from chrononaut.exceptions import UntrackedStatementError
from chrononaut.typing import Operation

#: How often a statement is tried while others keep making rows match.
_ATTEMPTS = 5


class _Disagreement(Exception):
    """Other rows were written than copied."""


class Change(Execution):
    """An UPDATE or DELETE."""

    def change(self) -> Result[Any] | None:
        """Capture an UPDATE or DELETE, and execute it; None if there is nothing to capture."""
        table: Any = target_of(self.statement)
        known: Any = table  # not narrowed: a checker forgets the type arguments then
        if not isinstance(table, Table):
            self._refuse_joins(table)
            return None
        mapping = model_of(known)
        if mapping is None or mapping.tables[-1].history is known:
            return self._change_unversioned(known) if mapping is None else None
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
        return self._delete(mapping, versioned) if self.state.is_delete else self._update(mapping, versioned)

    def _delete(self, mapping: VersionedMapping, table: VersionedTable) -> Result[Any]:
        if table.live_version is None:
            raise UntrackedStatementError(
                f"A DELETE of {table.live.name} removes half of each {mapping.name}. Delete rows of "
                f"{mapping.base.live.name}, or through the session."
            )
        self.flush()
        with self.transaction.passing():
            return self._delete_captured(mapping, table)

    def _delete_captured(self, mapping: VersionedMapping, table: VersionedTable) -> Result[Any]:
        criteria, is_plain = self._criteria(table.live, ())
        rows = Rows(mapping, table, criteria, is_plain)
        return self._execute(rows, "delete", as_text(self.info.of_class(mapping.mapper.class_)))

    def _update(self, mapping: VersionedMapping, table: VersionedTable) -> Result[Any] | None:
        statement = cast("Update", self.statement)
        assignments = read_assignments(statement, table, self.parameters)
        self._refuse_bookkeeping(mapping, assignments)
        noticed = {column: value for column, value in assignments.items() if is_noticed(mapping, table, column)}
        is_touching = _has_onupdate(mapping, table, assignments)
        is_locking = {column.key for column in noticed} == {_lock_key(mapping)} and len(assignments) == 1
        self.flush()
        if not noticed and not is_touching and mapping.lock_column is None:
            return self.run()
        with self.transaction.passing():
            criteria, is_plain = self._criteria(table.live, tuple(assignments.values()))
            changes = changes_by(noticed, self.writer.dialect) if is_plain and not is_touching else None
            rows = Rows(mapping, table, criteria, is_plain, changes)
            return self._update_captured(rows, noticed, is_touching, is_locking)

    def _update_captured(
        self,
        rows: Rows,
        noticed: Mapping[Column[Any], ColumnElement[Any]],
        is_touching: bool,
        is_locking: bool,
    ) -> Result[Any]:
        if not noticed and not is_touching:
            self.writer.lock(rows, "update", may_be_locked=is_locking)
            return self.run()
        return self._execute(rows, "update", self._info(rows, noticed), is_locking)

    def _execute(
        self, rows: Rows, operation: Operation, info: ColumnElement[str], is_locking: bool = False
    ) -> Result[Any]:
        """Lock, copy and write; again, if others made rows match in between."""
        before = self._versions_before(rows.mapping) if operation == "update" else {}
        for _ in range(_ATTEMPTS):
            count = self.writer.lock(rows, operation, may_be_locked=is_locking)
            # SQLite has one writer at a time, so that nothing comes between, and starts no transaction by a savepoint.
            savepoint = None if self.writer.dialect == "sqlite" else self.connection.begin_nested()
            try:
                present = self._copy(rows, operation, info, count)
                result = self._write(rows, operation, info, count)
            except _Disagreement as error:
                if savepoint is None:
                    self.session.rollback()
                    raise self._refusal(rows) from error
                savepoint.rollback()
            except BaseException:
                if savepoint is not None and savepoint.is_active:
                    savepoint.rollback()
                raise
            else:
                if savepoint is not None:
                    savepoint.commit()
                self._bring_up_to_date(rows, before, present)
                return result
        raise self._refusal(rows)

    def _refusal(self, rows: Rows) -> UntrackedStatementError:
        return UntrackedStatementError(
            f"History and the rows of {rows.table.live.name} would not agree, so the statement was rolled back. "
            "Does its condition change from one moment to the next, or does a listener add to it?"
        )

    def _copy(self, rows: Rows, operation: Operation, info: ColumnElement[str], count: Counts) -> dict[Key, int]:
        """Copy what changes; return the versions of those whose objects are in the session."""
        present: dict[Key, int] = {}
        if count.changing:
            if self.writer.copy(rows, operation, info) != count.changing:
                raise _Disagreement
            present = self._present(rows) if operation == "update" else {}
            if rows.table.live_version is None and self.writer.raise_version(rows, info) != count.changing:
                raise _Disagreement
        if operation == "delete":
            self._cascade(rows.table.live, rows.criteria)
        return present

    def _write(self, rows: Rows, operation: Operation, info: ColumnElement[str], count: Counts) -> Result[Any]:
        """Execute the statement, which raises the version too.

        :raises _Disagreement: if it wrote other rows than were counted; before SQLAlchemy tells its objects.
        """
        written: list[UpdateBase] = []

        def rewrite(statement: UpdateBase) -> UpdateBase:
            if target_of(statement) is rows.table.live:
                self.transaction.rewrite = None
                if operation == "update" and rows.table.live_version is not None:
                    statement = cast("Update", statement).values(self.writer.bookkeeping(rows, info))
                written.append(statement)
            return statement

        def after_execute(
            conn: object, clauseelement: object, multi: object, params: object, opts: object, result: Any
        ) -> None:
            """Fire when a statement was executed, before its result is used."""
            if written and clauseelement is written[0] and result.rowcount != count.matching:
                raise _Disagreement

        # SQLite knows how many rows it returned only after they were read.
        is_late = self.writer.dialect == "sqlite"
        self.transaction.rewrite = rewrite
        if not is_late:
            event.listen(self.connection, "after_execute", after_execute)
        try:
            result = self.run()
        finally:
            self.transaction.rewrite = None
            if not is_late:
                event.remove(self.connection, "after_execute", after_execute)
        return self._counted(result, count.matching) if is_late else result

    def _counted(self, result: Result[Any], expected: int) -> Result[Any]:
        """Return the result again after counting the rows that were written."""
        if len(self.statement.exported_columns):
            frozen = result.freeze()
            result, written = frozen(), len(frozen.data)
        else:
            written = count_written(self.connection, cast("CursorResult[Any]", result))
        if written != expected:
            raise _Disagreement
        return result

    def _criteria(self, live: Table, values: Sequence[ColumnElement[Any]]) -> tuple[ColumnElement[bool], bool]:
        """Return which rows the statement is about, and whether it reads no other table besides."""
        statement = cast("Update | Delete", self.statement)
        given = statement.whereclause
        conditions = [] if given is None else [with_values(given, self.parameters)]
        if self.mapper is not None and self.mapper.single and isinstance(self.mapper.polymorphic_on, Column):
            identities = [each.polymorphic_identity for each in self.mapper.self_and_descendants]
            conditions.append(self.mapper.polymorphic_on.in_(identities))
        criteria = and_(true(), *conditions)
        froms = select(*live.primary_key, *values).where(criteria).get_final_froms()
        return criteria, all(each == live for each in froms)

    def _info(self, rows: Rows, noticed: Mapping[Column[Any], ColumnElement[Any]]) -> ColumnElement[str]:
        """Return the change info of the rows; it names the hidden columns that each row's change is about."""
        mapping, cls = rows.mapping, rows.mapping.mapper.class_
        hidden: dict[str, dict[Column[Any], ColumnElement[Any]]] = {}
        for column, value in noticed.items():
            for each, name in attributes_of(mapping, column):
                if name in each.hidden:
                    hidden[name] = {column: value}
        if rows.changes is None:
            return as_text(self.info.of_class(cls, hidden))
        changes = {name: changes_by(values, self.writer.dialect) for name, values in hidden.items()}
        conditions = {name: rows.on_base(each) for name, each in changes.items() if each is not None}
        return name_hidden(self.info, cls, conditions)

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
            before = self._versions_before(mapping)
            self.transaction.listed += before
            parameters = listing.capture(self.writer, self.info, self.transaction.instant)
            result = self.run(parameters=parameters)
        for state, version in before.items():
            found = listing.found.get(cast("Key", state.identity))
            target = state.obj()
            if target is not None and found is not None and version != found:  # it was stale before, and stays so
                set_committed_value(target, VERSION, version)
        return result

    # --- what is in the session

    @property
    def _is_synchronized(self) -> bool:
        return self.is_of_model and self.state.execution_options.get("synchronize_session", "auto") is not False

    def _versions_before(self, mapping: VersionedMapping) -> dict[InstanceState[Any], int]:
        """Return the versions that the objects in the session have, before SQLAlchemy brings them up to date."""
        if not self._is_synchronized:
            return {}
        return {state: state.dict[VERSION] for state in _in_session(self.session, mapping)}

    def _present(self, rows: Rows) -> dict[Key, int]:
        """Return the version of those rows that change whose objects are in the session, to be brought up to date."""
        if not self._is_synchronized:
            return {}
        keys = [state.identity for state in _in_session(self.session, rows.mapping)]
        return versions_of(self.connection, rows, keys_in(rows.base.key, cast("list[Key]", keys), self.writer.dialect))

    def _bring_up_to_date(
        self, rows: Rows, before: Mapping[InstanceState[Any], int], changed: Mapping[Key, int]
    ) -> None:
        """Give the objects in the session their new version; one that was stale before stays so.

        SQLAlchemy expires the version of all that matched, for an expression set it: a stale object whose version
        was then read anew would pass for one that has seen the latest state.
        """
        for state, version in before.items():
            target = state.obj()
            if target is None:
                continue
            is_raised = changed.get(cast("Key", state.identity)) == version
            if state.dict.get(VERSION) != version + is_raised:
                set_committed_value(target, VERSION, version + is_raised)
            if is_raised and CHANGED_ATTRIBUTE in rows.mapping.mapper.columns:
                self.session.expire(target, [CHANGE_INFO, CHANGED_ATTRIBUTE])

    # --- tables that are not versioned themselves

    def _change_unversioned(self, table: Table) -> Result[Any] | None:
        if self.state.is_update:
            return self._update_unversioned(table)
        if not dependents_of(table):
            return None
        if self.state.is_executemany:
            raise UntrackedStatementError(
                f"With rows of {table.name} the database changes versioned ones, which cannot be captured for a list "
                "of parameters. Execute the DELETE once for each."
            )
        self.flush()
        with self.transaction.passing():
            return self._delete_unversioned(table)

    def _delete_unversioned(self, table: Table) -> Result[Any]:
        criteria, _ = self._criteria(table, ())
        matching = self.connection.scalar(select(func.count()).select_from(table).where(criteria))
        self._cascade(table, criteria)
        try:
            return self._counted(self.run(), cast("int", matching))
        except _Disagreement as error:
            self.session.rollback()
            raise UntrackedStatementError(
                f"Other rows of {table.name} were deleted than history was written for, so the transaction was rolled "
                "back. Does the statement's condition change from one moment to the next?"
            ) from error

    def _update_unversioned(self, table: Table) -> Result[Any] | None:
        marks = {column.key: column for column in table.c if isinstance(column, RecordChangesColumn)}
        dependents = dependents_of(table)
        if not marks and not dependents:
            return None
        if dependents:
            plain = VersionedTable(table, table, tuple(table.primary_key), set())
            given = self.state.parameters if self.state.is_executemany else [self.parameters]
            names = {key for each in cast("Iterable[Mapping[str, Any]]", given) for key in each}
            names |= {column.key for column in read_assignments(cast("Update", self.statement), plain, {})}
            if not self._is_by_key:
                refuse_key_change(table, frozenset(names))
        if marks:
            self.flush()
            self.state.statement = cast("Update", self.statement).values(self.marks(table, marks))
            return self.run(self.state.statement)
        return None

    @property
    def _is_by_key(self) -> bool:
        return self.state.is_executemany and self.is_of_model

    def _cascade(self, table: Table, criteria: ColumnElement[bool]) -> None:
        Cascade(self.writer, lambda: self.info).capture(table, criteria)

    # --- what cannot be captured

    def _refuse_joins(self, target: Any) -> None:
        tables = [each for each in iterate(target) if model_of(each) is not None]
        if tables:
            raise UntrackedStatementError(
                f"This {kind_of(self.statement)} is about {target}, which cannot be captured: name the model itself."
            )

    def _refuse_bookkeeping(
        self, mapping: VersionedMapping, assignments: Mapping[Column[Any], ColumnElement[Any]]
    ) -> None:
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


def _lock_key(mapping: VersionedMapping) -> str | None:
    return None if mapping.lock_column is None else mapping.lock_column.key


def _has_onupdate(mapping: VersionedMapping, table: VersionedTable, assignments: Mapping[Column[Any], Any]) -> bool:
    """Tell whether any update changes a column that makes a version."""
    return any(
        column.onupdate is not None or column.server_onupdate is not None
        for column in table.live.c
        if column not in assignments and is_noticed(mapping, table, column)
    )


def _in_session(session: Session, mapping: VersionedMapping) -> Iterator[InstanceState[Any]]:
    """Yield the objects of a model in a session whose version is known."""
    for target in session.identity_map.values():
        state: InstanceState[Any] = instance_state(target)
        if isinstance(target, mapping.mapper.class_) and VERSION in state.dict:
            yield state
