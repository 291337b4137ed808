"""Capture INSERT statements: number the new records, and record their births."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import Column, Insert, Result, Table, bindparam, select
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm.attributes import set_committed_value

from chrononaut._assignments import read_assignments
from chrononaut._births import beginning_after
from chrononaut._capture import (
    Birth,
    Key,
    amend,
    find_last_states,
    insert_births,
    may_be_used,
    renumber,
)
from chrononaut._execution import Execution, mapping_in
from chrononaut._history_table import CHANGE_INFO, CHANGED, CHANGED_ATTRIBUTE, VERSION, RecordChangesColumn
from chrononaut._mapping import VersionedMapping, VersionedTable, model_of, target_of
from chrononaut._present import versions_in_session
from chrononaut._suppression import is_suppressed
from chrononaut._wanted import keys_in
from chrononaut.exceptions import UntrackedStatementError


class Insertion(Execution):
    """An INSERT."""

    def insert(self) -> Result[Any] | None:
        """Execute it and record the births; None if there is nothing to capture."""
        table: Any = target_of(self.statement)
        mapping = model_of(table)
        if mapping is None:
            return self._insert_unversioned(table)
        if mapping.tables[-1].history is table:
            return None
        if self.mapper is not None:
            mapping = mapping_in(mapping, self.mapper)
        self._refuse(mapping, table)
        returns_objects = self.is_of_model and len(self.statement.exported_columns) > 0
        before = self._loaded(mapping) if returns_objects else set[Key]()
        result, keys, are_given = self._run(mapping, table)
        with self.transaction.passing():
            versions = self._record(mapping, keys, are_given)
        if versions and returns_objects:
            frozen = result.freeze()  # the objects must be there
            self._renumber_objects(mapping, versions, before)
            result = frozen()
        return result

    # --- what cannot be captured

    def _refuse(self, mapping: VersionedMapping, table: Table) -> None:
        versioned = mapping.tables[-1]
        if versioned.live_version is None and not (self.is_of_model and self._is_listed):
            raise UntrackedStatementError(
                f"An INSERT into {table.name} adds half of each {mapping.name}. Add the records to the session, or "
                f"execute `insert({mapping.name})` with a list of parameters."
            )
        for names in (*self._given(), self._assigned(versioned)):
            self._refuse_own(mapping, names)

    def _refuse_own(self, mapping: VersionedMapping, names: Iterable[str]) -> None:
        own = {VERSION} | {name for name in (CHANGE_INFO, CHANGED, CHANGED_ATTRIBUTE) if mapping.has_marks}
        if given := own & set(names):
            raise UntrackedStatementError(
                f"{mapping.name}.{min(given)} is chrononaut's own: a statement cannot set it."
            )

    def _given(self) -> Iterable[Mapping[str, Any]]:
        """Return the parameters of each row."""
        if self.state.is_executemany:
            return cast("Sequence[Mapping[str, Any]]", self.state.parameters)
        return [self.parameters] if self.parameters else []

    @property
    def _is_listed(self) -> bool:
        """Whether the rows are the parameters; a model's are so even if there is only one."""
        return self.state.is_executemany or (self.is_of_model and bool(self.parameters))

    def _assigned(self, table: VersionedTable) -> set[str]:
        """Return the columns that the statement itself gives values to, if it does so for one row."""
        if cast("Insert", self.statement).select is not None:
            return set()
        return {column.key for column in read_assignments(cast("Any", self.statement), table, {})}

    # --- which records are new

    def _run(self, mapping: VersionedMapping, table: Table) -> tuple[Result[Any], list[Key], bool]:
        """Execute the statement; return its result, the keys of the new records, and whether they were given."""
        statement = cast("Insert", self.statement)
        has_returning = len(statement.exported_columns) > 0
        # Not all of its rows are new then; nor are they if it updates some while versioning is suppressed.
        skips = any(node.__visit_name__.startswith("on_") for node in statement.get_children())
        names = mapping.key_attributes if self.is_of_model else tuple(column.key for column in mapping.base.key)
        given = [tuple(row.get(name) for name in names) for row in self._given()]
        is_select = statement.select is not None
        if not skips and self._is_listed and all(None not in key for key in given):
            return self.run(), given, True
        if not (skips or is_select or has_returning or self._is_listed) and (
            self.parameters or self._assigned(mapping.tables[-1])
        ):
            result = self.run()
            return result, [tuple(cast("Any", result).inserted_primary_key)], True
        if not self.connection.dialect.insert_returning or (
            self.state.is_executemany and not self.connection.dialect.insert_executemany_returning
        ):
            raise UntrackedStatementError(
                f"This database does not tell which keys an INSERT into {table.name} makes, so the births of the "
                "records cannot be recorded. Give the keys, or add the records to the session."
            )
        key: Sequence[Any] = tuple(table.primary_key)
        if self.is_of_model and (has_returning or self._is_listed):
            attributes = cast("Any", mapping.mapper.attrs)
            key = [attributes[name].class_attribute for name in mapping.key_attributes]
            result = self.run(cast("Any", statement).returning(*key))
        else:
            with self.transaction.passing():
                # SQLite knows how many rows there are only after they were read.
                keep = self.writer.dialect != "sqlite"
                result = self.state.invoke_statement(
                    statement=statement.returning(*key),
                    execution_options={"dml_strategy": "raw", "preserve_rowcount": keep},
                )
        if not has_returning:
            keys = [tuple(row) for row in result]
        else:
            frozen = result.freeze()
            width = len(frozen.metadata.keys) - len(key)
            keys = [tuple(row)[width:] for row in frozen.data]
            result = frozen().columns(*range(width))
        # What values() gives is not known here.
        return result, keys, not self._is_listed or any(part is not None for each in given for part in each)

    # --- their history

    def _record(self, mapping: VersionedMapping, keys: list[Key], are_given: bool) -> dict[Key, int]:
        """Number the new records, and write their births; return the versions of those whose key was used before."""
        base, connection = mapping.base, self.connection
        used = keys if may_be_used(connection, base, are_given) else []
        last = find_last_states(connection, base, used) if used else {}
        is_recorded = mapping.track_inserts and not is_suppressed()
        kinds = self._discriminators(mapping, keys) if is_recorded else {}
        info = self.info.of_class(mapping.mapper.class_) if is_recorded or mapping.has_marks else ""
        births: list[Birth] = []
        versions: dict[Key, int] = {}
        for key in keys:
            absence, began, first = beginning_after(last.get(key), is_recorded)
            if is_recorded:
                births.append(Birth(key, absence, began, info, kinds.get(key)))
            if first != 0:
                versions[key] = first
        if versions:
            renumber(connection, base, versions)
        for table in mapping.tables if births else ():
            insert_births(connection, table, births, mapping.discriminator, self.writer.instant)
        if mapping.has_marks and keys and not is_suppressed():
            self._mark(mapping, keys)
        return versions

    def _loaded(self, mapping: VersionedMapping) -> set[Key]:
        """Return the keys of the objects in the session that keep the state they have, whatever is returned."""
        if self.state.execution_options.get("populate_existing"):
            return set()
        return {cast("Key", state.identity) for state in versions_in_session(self.session, mapping)}

    def _renumber_objects(self, mapping: VersionedMapping, versions: Mapping[Key, int], before: set[Key]) -> None:
        """Give the objects that the statement returned the versions of their new lives."""
        for state in versions_in_session(self.session, mapping) if versions else ():
            key = cast("Key", state.identity)
            target = state.obj()
            if target is not None and key in versions and key not in before:
                set_committed_value(target, VERSION, versions[key])

    def _discriminators(self, mapping: VersionedMapping, keys: list[Key]) -> dict[Key, Any]:
        column, base = mapping.discriminator, mapping.base
        found: dict[Key, Any] = {}
        for condition in keys_in(base.key, keys, self.writer.dialect) if column is not None else ():
            rows = self.connection.execute(select(*base.key, cast("Column[Any]", column)).where(condition))
            found |= {tuple(row)[:-1]: tuple(row)[-1] for row in rows}
        return found

    def _mark(self, mapping: VersionedMapping, keys: list[Key]) -> None:
        live = mapping.base.live
        marks = {column.key: column for column in live.c if isinstance(column, RecordChangesColumn)}
        names = [f"marked_key_{number}" for number in range(len(mapping.base.key))]
        pairs = zip(mapping.base.key, names, strict=True)
        condition = (column == bindparam(name, type_=column.type) for column, name in pairs)
        statement = amend(live).where(*condition).values(self.marks(live, marks))
        self.connection.execute(statement, [dict(zip(names, key, strict=True)) for key in keys])

    # --- tables that are not versioned

    def _insert_unversioned(self, table: Any) -> Result[Any] | None:
        marks = {column.key: column for column in getattr(table, "c", ()) if isinstance(column, RecordChangesColumn)}
        if not marks or is_suppressed():
            return None
        values = self.marks(table, marks)
        statement = cast("Insert", self.statement)
        if self._is_listed:
            by_name = {column.key: value.value for column, value in values.items()}
            if self.is_of_model:
                by_name = {CHANGE_INFO: by_name[CHANGE_INFO], CHANGED_ATTRIBUTE: by_name[CHANGED]}
            every = [by_name] * len(cast("Sequence[Any]", self.state.parameters))
            return self.run(self._marking(table, statement), every if self.state.is_executemany else by_name)
        try:
            marked = statement.values(values)
            str(marked)  # a list of values shows only now
        except InvalidRequestError as error:
            raise UntrackedStatementError(
                f"An INSERT into {table.name} from a SELECT, or with a list of values(), cannot be given its "
                "change marks. Execute it with a list of parameters."
            ) from error
        return self.run(self._marking(table, marked))

    def _marking(self, table: Any, statement: Insert) -> Insert:
        """Return the statement that is executed, which gives new rows their marks."""
        return statement
