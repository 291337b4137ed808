"""Capture INSERT statements that update the rows that are there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import BindParameter, Column, ColumnElement, Insert, Result, Table, literal_column
from sqlalchemy.sql.visitors import cloned_traverse

from chrononaut._assignments import attributes_of, read_assignments
from chrononaut._bulk import Rows, as_text
from chrononaut._capture import CurrentRow, Key, amend, copy_states, live_version, read_current
from chrononaut._dialect import is_mariadb
from chrononaut._execution import Disagreement
from chrononaut._history_table import RecordChangesColumn
from chrononaut._inserts import Insertion
from chrononaut._mapping import VersionedMapping
from chrononaut._on_conflict import (
    ON_CONFLICT,
    ON_DUPLICATE,
    UNKNOWN,
    GivenRow,
    OnConflict,
    find_by_targets,
    has_default,
    match,
    name_of,
    pairs_of,
    read_on_conflict,
)
from chrononaut._wanted import WantedRecord, keys_in
from chrononaut.exceptions import RecordLockedError, UntrackedStatementError


class Upsertion(Insertion):
    """An INSERT that updates the rows that it conflicts with.

    The rows that are there are locked, read, and copied if they really change. The statement raises the version of
    each row that it updates, and a new row has version 0. So the versions tell afterwards which rows are new, and
    whether one was updated that somebody else had inserted in between: then all is rolled back and done again. The
    version of a row that is to keep its values is lowered before, so that it comes out as it was.
    """

    def _refuse(self, mapping: VersionedMapping, table: Table) -> None:
        super()._refuse(mapping, table)
        if len(mapping.tables) > 1:
            raise UntrackedStatementError(
                f"An upsert of {mapping.name}, which is spread over several tables, cannot be captured. "
                "Add the records to the session, or `session.merge()` them."
            )

    def _run(self, mapping: VersionedMapping, table: Table) -> tuple[Result[Any], list[Key], bool]:
        clause = read_on_conflict(cast("Insert", self.statement), mapping)
        given = clause.checked([GivenRow(row) for row in self._rows(mapping, table)])
        is_key_given = any(row.values.get(column) is not None for row in given for column in mapping.base.key)
        self.flush()
        with self.transaction.passing():
            result, keys = self._execute(mapping, clause, given)
        return result, keys, is_key_given

    # --- what is given

    def _rows(self, mapping: VersionedMapping, table: Table) -> list[dict[Column[Any], Any]]:
        """Return the values of each row, by column; of those that the statement gives."""
        statement = cast("Insert", self.statement)
        if statement.select is not None:
            raise UntrackedStatementError(
                f"An upsert of {table.name} from a SELECT cannot be captured. Execute it with a list of parameters."
            )
        columns: Any = mapping.mapper.columns if self.is_of_model else table.c
        parameters = [dict(row) for row in self._given()]
        for name in {name for row in parameters for name in row} - set(columns.keys()):
            raise UntrackedStatementError(
                f"An upsert of {table.name} with a parameter {name!r} that is no column cannot be captured. "
                "Give the value itself, in place of the parameter."
            )
        if not parameters and (listed := self._listed_values(mapping, table)):
            return listed
        own = {
            column: value.effective_value if isinstance(value, BindParameter) else UNKNOWN
            for column, value in read_assignments(cast("Any", statement), mapping.base, {}).items()
        }
        # SQLAlchemy leaves None out of a model's list, so that defaults take its place.
        leaves_out_none = self.is_of_model and self._is_listed
        return [
            own
            | {
                columns[name]: UNKNOWN if value is None and leaves_out_none and has_default(columns[name]) else value
                for name, value in row.items()
            }
            for row in parameters or [{}]
        ]

    def _listed_values(self, mapping: VersionedMapping, table: Table) -> list[dict[Column[Any], Any]]:
        """Return the rows of a list of values(), which SQLAlchemy shows in the compiled statement only."""
        compiled = self.statement.compile(dialect=self.connection.dialect).params
        columns = [column for column in table.c if f"{column.key}_m0" in compiled]
        self._refuse_own(mapping, (column.key for column in columns))
        rows: list[dict[Column[Any], Any]] = []
        while row := {
            column: compiled[name] for column in columns if (name := f"{column.key}_m{len(rows)}") in compiled
        }:
            # What is missing is an expression, or has a default.
            rows.append(dict.fromkeys(table.c, UNKNOWN) | row)
        return rows

    # --- lock, copy, write, and see

    def _execute(
        self, mapping: VersionedMapping, clause: OnConflict, given: Sequence[GivenRow]
    ) -> tuple[Result[Any], list[Key]]:
        statement = _extended(
            cast("Insert", self.statement),
            # No parameter, which would keep drivers from sending many rows at once.
            lambda _: {live_version(mapping.base): live_version(mapping.base) + literal_column("1")},
        )
        refusal = UntrackedStatementError(
            f"This upsert wrote other rows of {mapping.base.live.name} than it was given plain values for, so it was "
            "undone. Are two rows of its list the same to the database? Do they conflict by a column of which only the "
            "database knows the value?"
        )

        def attempt(is_again: bool) -> tuple[Result[Any], list[Key]]:
            found = self._read(mapping, clause, given, lock_missing=is_again)
            versions = self._prepare(mapping, clause, found)
            result = self.run(statement)
            return result, self._new_keys(mapping, clause, given, versions)

        return self.until_agreed(attempt, refusal)

    def _read(
        self, mapping: VersionedMapping, clause: OnConflict, given: Sequence[GivenRow], lock_missing: bool
    ) -> list[tuple[GivenRow, dict[Column[Any], Any], CurrentRow]]:
        """Lock the rows that are there, and return what they hold, each with what is given for it."""
        base, connection = mapping.base, self.connection
        lock = () if mapping.lock_column is None else (cast("Column[Any]", mapping.lock_column),)
        columns = list(dict.fromkeys((*clause.sources, *lock, *(part for target in clause.targets for part in target))))
        keys: Iterable[Key]
        if clause.targets == (base.key,) and not is_mariadb(self.writer.dialect):
            keys = [key for row in given if (key := row.target(base.key)) is not None]
        else:
            # MariaDB would lock the gap where a row is missing, so that two upserts of the same row wait for each
            # other in a circle. Only where a row has come in between, its snapshot may not show what is there.
            is_locking = lock_missing and is_mariadb(self.writer.dialect)
            keys = find_by_targets(connection, base, clause.targets, given, is_locking)
        current = list(read_current(connection, [base], keys, columns))

        def find_one(row: GivenRow) -> Iterable[Key]:
            return find_by_targets(connection, base, clause.targets, [row])

        pairs = match(mapping, clause.targets, given, current, columns, find_one)
        return [(row, dict(zip(columns, each.values, strict=True)), each) for row, each in pairs]

    def _prepare(
        self,
        mapping: VersionedMapping,
        clause: OnConflict,
        found: Sequence[tuple[GivenRow, dict[Column[Any], Any], CurrentRow]],
    ) -> dict[Key, int]:
        """Copy the rows that change, and lower the version of those that do not; return what each comes out with.

        :raises RecordLockedError: if one of them is locked.
        """
        base = mapping.base
        wanted: list[WantedRecord] = []
        unchanged: list[Key] = []
        lock = cast("Column[Any] | None", mapping.lock_column)
        for row, values, current in found:
            if lock is not None and values[lock] and clause.assigned - {lock}:
                raise RecordLockedError(mapping.name, current.key)
            changed = clause.changed(row, values)
            if changed or clause.is_touching:
                hidden = {
                    name for column in changed for each, name in attributes_of(mapping, column) if name in each.hidden
                }
                wanted.append((current.key, current.version, self.info.of_class(mapping.mapper.class_, hidden)))
            else:
                unchanged.append(current.key)
        for table in mapping.family_tables if wanted else ():
            copied = copy_states(self.connection, table, wanted, "update", self.writer.instant)
            if table is base and copied != len(wanted):
                raise UntrackedStatementError(f"Not all rows of {table.live.name} could be copied to history.")
        self._mark_changed(mapping, wanted)
        self._lower_versions(mapping, unchanged)
        versions = {current.key: current.version for _, _, current in found}
        return versions | {key: version + 1 for key, version, _ in wanted}

    def _lower_versions(self, mapping: VersionedMapping, keys: Sequence[Key]) -> None:
        version = live_version(mapping.base)
        for condition in keys_in(mapping.base.key, keys, self.writer.dialect):
            statement = amend(mapping.base.live).where(condition).values({version: version - 1})
            self.connection.execute(statement)

    def _mark_changed(self, mapping: VersionedMapping, wanted: Sequence[WantedRecord]) -> None:
        base = mapping.base
        if not mapping.has_marks:
            return
        for text in dict.fromkeys(info for _, _, info in wanted):
            keys = [key for key, _, info in wanted if info == text]
            for condition in keys_in(base.key, keys, self.writer.dialect):
                values = self.writer.bookkeeping(Rows(mapping, base, condition, is_plain=True), as_text(text))
                del values[live_version(base)]
                self.connection.execute(amend(base.live).where(condition).values(values))

    def _new_keys(
        self,
        mapping: VersionedMapping,
        clause: OnConflict,
        given: Sequence[GivenRow],
        versions: Mapping[Key, int],
    ) -> list[Key]:
        """Return the keys of the rows that were inserted.

        :raises Disagreement: if another row was updated, or not all are there.
        """
        found = find_by_targets(self.connection, mapping.base, clause.targets, given)
        if len(found) != len(given) or any(version != versions.get(key, 0) for key, version in found.items()):
            raise Disagreement
        return [key for key in found if key not in versions]

    # --- tables that are not versioned

    def _marking(self, table: Any, statement: Insert) -> Insert:
        """Return the statement that is executed, which gives the rows that it updates the marks of new ones."""
        marks = [column for column in table.c if isinstance(column, RecordChangesColumn)]
        return _extended(statement, lambda inserted: {column: inserted[column.key] for column in marks})


def _extended(statement: Insert, more: Callable[[Any], Mapping[Column[Any], ColumnElement[Any]]]) -> Insert:
    """Return an upsert that sets more columns of the rows that are there already.

    :param more: what it sets, from the columns of the given row.
    """

    def extend_conflict(clause: Any) -> None:
        added, values = more(cast("Any", statement).excluded), clause.update_values_to_set
        kept = [(key, value) for key, value in pairs_of(values) if name_of(key) not in _keys(added)]
        clause.update_values_to_set = type(values)([*kept, *added.items()])

    def extend_duplicate(clause: Any) -> None:
        added = more(clause.inserted_alias.c)
        kept = {key: value for key, value in clause.update.items() if name_of(key) not in _keys(added)}
        clause.update = kept | {column.key: value for column, value in added.items()}

    return cloned_traverse(statement, {}, {ON_CONFLICT: extend_conflict, ON_DUPLICATE: extend_duplicate})


def _keys(added: Mapping[Column[Any], Any]) -> set[str]:
    return {column.key for column in added}
