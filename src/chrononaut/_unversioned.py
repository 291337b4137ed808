"""Statements about tables that are not versioned, as far as the database changes versioned rows with theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from sqlalchemy import Result, Table, Update, func, select
from sqlalchemy.sql.dml import UpdateBase

from chrononaut._assignments import read_assignments
from chrononaut._cascades import Cascade, dependents_of, refuse_key_change
from chrononaut._execution import Disagreement
from chrononaut._history_table import RecordChangesColumn
from chrononaut._mapping import VersionedTable
from chrononaut._sending import Captured, Sending
from chrononaut.exceptions import UntrackedStatementError


class UnversionedChange(Sending):
    """An UPDATE or DELETE of such a table."""

    def change(self, table: Table) -> Result[Any] | None:
        """Capture what follows from it, and execute it; None if nothing does."""
        return self._update(table) if self.state.is_update else self._delete(table)

    def _delete(self, table: Table) -> Result[Any] | None:
        if not dependents_of(table):
            return None
        if self.state.is_executemany:
            raise UntrackedStatementError(
                f"With rows of {table.name} the database changes versioned ones, which cannot be captured for a list "
                "of parameters. Execute the DELETE once for each."
            )
        self.flush()
        try:
            with self.transaction.passing():
                return self.send(table, lambda statement: self._capture(statement, table))
        except Disagreement as error:
            self.session.rollback()
            raise UntrackedStatementError(
                f"Other rows of {table.name} were deleted than history was written for, so the transaction was rolled "
                "back. Does the statement's condition change from one moment to the next?"
            ) from error

    def _capture(self, statement: UpdateBase, table: Table) -> Captured:
        condition, _ = self.criteria(statement, table)
        matching = self.connection.scalar(select(func.count()).select_from(table).where(condition))
        Cascade(self.writer, lambda: self.info).capture(table, condition)
        return Captured(statement, matching)

    def _update(self, table: Table) -> Result[Any] | None:
        marks = {column.key: column for column in table.c if isinstance(column, RecordChangesColumn)}
        dependents = dependents_of(table)
        if not marks and not dependents:
            return None
        if dependents and not (self.state.is_executemany and self.is_of_model):  # which cannot change a key
            plain = VersionedTable(table, table, tuple(table.primary_key), set())
            given = self.state.parameters if self.state.is_executemany else [self.parameters]
            names = {key for each in cast("Iterable[Mapping[str, Any]]", given) for key in each}
            names |= {column.key for column in read_assignments(cast("Update", self.statement), plain, {})}
            refuse_key_change(table, frozenset(names))
        if not marks:
            return None
        self.flush()
        self.state.statement = cast("Update", self.statement).values(self.marks(table, marks))
        return self.run(self.state.statement)
