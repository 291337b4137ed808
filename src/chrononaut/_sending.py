"""An UPDATE or DELETE that is captured at the moment it is sent, with all that listeners have added to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from sqlalchemy import ColumnElement, CursorResult, Delete, Result, Table, Update, and_, event, select, true
from sqlalchemy.sql.dml import UpdateBase

from chrononaut._bulk import count_written, with_values
from chrononaut._execution import Disagreement, Execution
from chrononaut._mapping import target_of


class Captured(NamedTuple):
    """A statement that may be sent, and how many rows it must write; None if that does not matter."""

    statement: UpdateBase
    matching: int | None


class Criteria(NamedTuple):
    """Which rows a statement is about, and whether it reads no other table besides."""

    condition: ColumnElement[bool]
    is_plain: bool


class Sending(Execution):
    """An UPDATE or DELETE."""

    def send(self, live: Table, capture: Callable[[UpdateBase], Captured]) -> Result[Any]:
        """Execute the statement, captured when SQLAlchemy is about to send it.

        :param live: the table that it is about.
        :param capture: called with the statement as it is about to be sent; returns it as it is sent.
        :raises Disagreement: if it wrote other rows than were captured; where the database knows at once, before
            SQLAlchemy tells its objects.
        """
        sent: list[Captured] = []

        def rewrite(statement: UpdateBase) -> UpdateBase:
            if target_of(statement) is not live:
                return statement
            self.transaction.rewrite = None
            sent.append(capture(statement))
            return sent[0].statement

        def after_execute(
            conn: object, clauseelement: object, multi: object, params: object, opts: object, result: Any
        ) -> None:
            """Fire when a statement was executed, before its result is used."""
            if sent and clauseelement is sent[0].statement and sent[0].matching not in (None, result.rowcount):
                raise Disagreement

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
        if not sent:
            raise Disagreement
        return self._counted(result, sent[0].matching) if is_late else result

    def _counted(self, result: Result[Any], expected: int | None) -> Result[Any]:
        """Return the result again after counting the rows that were written."""
        if expected is None:
            return result
        if len(self.statement.exported_columns):
            frozen = result.freeze()
            result, written = frozen(), len(frozen.data)
        else:
            written = count_written(self.connection, cast("CursorResult[Any]", result))
        if written != expected:
            raise Disagreement
        return result

    def criteria(self, statement: UpdateBase, live: Table, values: Sequence[ColumnElement[Any]] = ()) -> Criteria:
        """Return which rows a statement is about: also by ``with_loader_criteria`` and by the class it names.

        :param values: what else is read for each row.
        """
        given: Update | Delete = cast("Any", statement)
        if self.is_of_model:
            # SQLAlchemy adds them when it compiles the statement, and tells them by what it made of it.
            compiled: Any = statement.compile(dialect=self.connection.dialect, column_keys=[*self.parameters] or None)
            given = compiled.compile_state.statement
        condition = true() if given.whereclause is None else with_values(given.whereclause, self.parameters)
        froms = select(*live.primary_key, *values).where(condition).get_final_froms()
        return Criteria(and_(true(), condition), all(each == live for each in froms))
