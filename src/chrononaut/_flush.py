"""Capture what a flush changes.

The unit of work tells each record that it is about to write (``collect_*``, called by mapper events) before
it emits the first statement for them. That statement finds the list complete, and has the states that it
will end copied first, by one statement per history table. So nothing needs to be predicted: what
relationships, cascades and other listeners change during the flush is in the list as well.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from functools import cached_property
from typing import Any, cast

from sqlalchemy import Connection, Insert, Update
from sqlalchemy.orm import InstanceState, LoaderCallableStatus, Session
from sqlalchemy.orm.attributes import instance_state, set_attribute, set_committed_value
from sqlalchemy.sql.dml import UpdateBase

from chrononaut._association_writes import AssociationHearer
from chrononaut._births import NewLife, begin_lives
from chrononaut._bulk import Writer
from chrononaut._capture import (
    Key,
    copy_states,
    lock_records,
    read_current,
)
from chrononaut._cascades import Cascade, dependents_of, refuse_key_change
from chrononaut._change_info import ChangeInfoSource
from chrononaut._conflict import raise_stale
from chrononaut._gate import refuse_replacing, refuse_untracked
from chrononaut._hearing import Parameters, hear
from chrononaut._history_table import CHANGE_INFO, CHANGED_ATTRIBUTE, VERSION
from chrononaut._mapping import VersionedMapping, VersionedTable, find_mapping, mapping_of, target_of
from chrononaut._post_update import find_post_updates
from chrononaut._suppression import is_suppressed
from chrononaut._transaction import PAST, SessionConfig, TransactionState, is_own, transaction_of
from chrononaut._types import assume_utc
from chrononaut._wanted import WantedRecord, keys_in
from chrononaut.exceptions import ChrononautException, RecordLockedError, StaleVersionError, UnattachedSessionError
from chrononaut.typing import ChangeInfo, Operation

_FLUSH = "_chrononaut_flush"
NO_VALUE = LoaderCallableStatus.NO_VALUE
_NO_NAMES: frozenset[str] = frozenset()


class Flush:
    """What one flush changes, and the writing of its history."""

    def __init__(self, session: Session, config: SessionConfig) -> None:
        self.session = session
        self._config = config
        self._is_suppressed = is_suppressed()
        self._info: ChangeInfoSource | None = None
        self._endings: dict[Connection, dict[tuple[VersionedMapping, Operation], list[WantedRecord]]] = {}
        self._lives: dict[tuple[Connection, VersionedTable], list[NewLife]] = defaultdict(list)
        self._old_values: dict[InstanceState[Any], dict[str, Any]] = {}
        self._passed_over: list[tuple[VersionedMapping, InstanceState[Any]]] = []
        self._post_updates: dict[InstanceState[Any], frozenset[str]] = {}
        self._ended: set[InstanceState[Any]] = set()

    @cached_property
    def transaction(self) -> TransactionState:
        """The transaction; not to be asked before anything is written, when it may not have begun."""
        return transaction_of(self.session, self._config)

    @property
    def info(self) -> ChangeInfoSource:
        """The change info; asks the provider when first used."""
        # Not a cached_property: before Python 3.12 that has one lock for all threads, held while the provider works.
        if self._info is None:
            self._info = ChangeInfoSource(self._config.change_info, self._config.require_extra_change_info)
        return self._info

    # --- before anything is written

    def prepare(self) -> None:
        """Refuse what can be refused, and read what is not loaded, while nothing is written yet."""
        if self._is_suppressed:
            return
        unread: dict[VersionedMapping, list[InstanceState[Any]]] = defaultdict(list)
        checked: set[VersionedMapping] = set()
        lockable: list[tuple[VersionedMapping, InstanceState[Any]]] = []
        target: object
        for target in self.session.dirty:
            mapping = find_mapping(type(target))
            if mapping is None:
                continue
            state = instance_state(target)
            if mapping.lock is not None:
                lockable.append((mapping, state))
            is_known = _is_known(mapping, state)
            if (not is_known or mapping not in checked or "info" in vars(state)) and _changed_names(mapping, state)[0]:
                if self.info.check(state):
                    checked.add(mapping)
                if not is_known:
                    unread[mapping].append(state)
        for mapping, state in _versioned(self.session.deleted):
            if mapping.lock is not None:
                lockable.append((mapping, state))
            self.info.check(state)
            if VERSION not in state.dict:
                unread[mapping].append(state)
        if self.session.deleted:
            self._lock_all()
        for mapping, state in _versioned(self.session.new):
            if mapping.track_inserts:
                self.info.check(state)
        for mapping, states in unread.items():
            self._read(self._connection(mapping), mapping, states)
        for mapping, state in lockable:
            self._refuse_locked(self._connection(mapping), mapping, state)
        self._post_updates = find_post_updates(self.session)
        for state in self._post_updates.keys() & set(map(instance_state, self.session.deleted)):
            # Its own foreign key is set to NULL before it goes: its last state must be copied before that.
            mapping = mapping_of(state.class_)
            self.collect_delete(self._connection(mapping), mapping, state)
            self._ended.add(state)

    def _connection(self, mapping: VersionedMapping) -> Connection:
        return self.session.connection(bind_arguments={"mapper": mapping.mapper})

    def _lock_all(self) -> None:
        """Lock all records of a flush that changes some and deletes others, in the one order that all flushes take.

        The unit of work changes first and deletes later, so that two such flushes could wait for each other.
        """
        keys: dict[VersionedTable, tuple[VersionedMapping, list[Key]]] = {}
        dirty = [each for each in _versioned(self.session.dirty) if _changed_names(*each)[0]]
        for mapping, state in (*dirty, *_versioned(self.session.deleted)) if dirty else ():
            keys.setdefault(mapping.base, (mapping, []))[1].append(_identity(state))
        for table in sorted(keys, key=lambda each: each.live.fullname):
            mapping, records = keys[table]
            lock_records(self._connection(mapping), table, records)

    def _refuse_locked(
        self, connection: Connection, mapping: VersionedMapping, state: InstanceState[Any], is_deleted: bool = False
    ) -> None:
        """Refuse to change a locked record, but for unlocking it.

        :raises RecordLockedError: if it is locked.
        """
        lock = cast("str", mapping.lock)
        columns = mapping.mapper.columns
        touched = {name for name in state.committed_state if name in columns} - {VERSION, lock}
        if not touched and not (is_deleted or state.obj() in self.session.deleted):
            return
        was_locked = state.committed_state.get(lock, state.dict.get(lock, NO_VALUE))
        if was_locked is NO_VALUE:
            if lock not in self._old_values.get(state, {}):
                self._read(connection, mapping, [state])
            was_locked = self._old_values.get(state, {}).get(lock)
        if not was_locked:
            return
        for name in touched - mapping.bookkept:
            old = state.committed_state[name]
            if old is NO_VALUE or columns[name].type.compare_values(old, state.dict.get(name)) is not True:
                raise RecordLockedError(mapping.name, _identity(state))
        if is_deleted or state.obj() in self.session.deleted:
            raise RecordLockedError(mapping.name, _identity(state))

    def _read(self, connection: Connection, mapping: VersionedMapping, states: Iterable[InstanceState[Any]]) -> None:
        """Read and lock what the database holds of records whose version or old values are not loaded."""
        by_key = {_identity(state): state for state in states}
        names = {name for state in by_key.values() for name in _changed_names(mapping, state)[0]}
        names = (names | mapping.bookkept) - {VERSION}
        if mapping.lock is not None:
            names |= {mapping.lock}
        columns = {name: mapping.mapper.columns[name] for name in sorted(names)}
        for row in read_current(connection, mapping.tables, by_key, list(columns.values())):
            state = by_key[row.key]
            self._old_values[state] = values = dict(zip(columns, row.values, strict=True))
            # The key's attributes too: the unit of work would read them one record at a time.
            known = values | {VERSION: row.version} | dict(zip(mapping.key_attributes, row.key, strict=True))
            for name in (*mapping.bookkeeping, *mapping.key_attributes):
                if name not in state.dict:
                    set_committed_value(state.obj(), name, known[name])

    # --- told by the unit of work, before it writes

    def collect_insert(self, connection: Connection, mapping: VersionedMapping, state: InstanceState[Any]) -> None:
        """A record is about to be inserted, or to take the place of one of the same key that is deleted."""
        replaced = self._replaced(mapping, state)
        if replaced is not None and mapping.lock is not None:
            self._refuse_locked(connection, mapping, replaced, is_deleted=True)
        if replaced is None:
            self._begin(connection, mapping, state)
            if mapping.has_marks and not self._is_suppressed:
                self._mark(connection, state, self.info.of_object(state))
        elif self._is_suppressed:
            _set(state, VERSION, self._version(connection, mapping, replaced))
        else:
            info = self.info.of_object(state, _hidden_names_replaced(mapping, replaced, state))
            version = self._end(connection, mapping, replaced, "update", info)
            _set(state, VERSION, version + 1)
            if mapping.has_marks:
                self._mark(connection, state, info, replaced.dict.get(CHANGED_ATTRIBUTE))

    def collect_update(self, connection: Connection, mapping: VersionedMapping, state: InstanceState[Any]) -> None:
        """A record is about to be updated, perhaps without any change that counts."""
        if mapping.lock is not None:
            self._refuse_locked(connection, mapping, state)
        names, are_known = _changed_names(mapping, state)
        if not are_known or self._is_suppressed:
            names = self._net_names(connection, mapping, state, names)
        if self._post_updates:
            names |= self._post_updates.get(state, frozenset())
        if not names:
            self._passed_over.append((mapping, state))
            return
        info = self.info.of_object(state, names & mapping.hidden if mapping.hidden else _NO_NAMES)
        if names.isdisjoint(mapping.key_attributes):
            version = self._end(connection, mapping, state, "update", info)
            _set(state, VERSION, version + 1)
        else:
            self._end(connection, mapping, state, "delete", info)
            previous = dict(zip(mapping.key_attributes, map(_plain, _identity(state)), strict=True))
            self._begin(connection, mapping, state, previous)
        if mapping.has_marks:
            if CHANGED_ATTRIBUTE not in state.dict:
                self._read(connection, mapping, [state])
            self._mark(connection, state, info, state.dict.get(CHANGED_ATTRIBUTE))

    def collect_delete(self, connection: Connection, mapping: VersionedMapping, state: InstanceState[Any]) -> None:
        """A record is about to be deleted."""
        if mapping.lock is not None:
            self._refuse_locked(connection, mapping, state, is_deleted=True)
        if not self._is_suppressed and state not in self._ended:
            self._end(connection, mapping, state, "delete", self.info.of_object(state))

    def collect_marks(self, connection: Connection, state: InstanceState[Any]) -> None:
        """A record that has change marks but no versions is about to be inserted or updated."""
        if not state.persistent or self.session.is_modified(state.obj(), include_collections=False):
            self._mark(connection, state, self.info.of_object(state))

    def _net_names(
        self, connection: Connection, mapping: VersionedMapping, state: InstanceState[Any], names: frozenset[str]
    ) -> frozenset[str]:
        """Return those attributes whose change counts, after reading the old values that are not loaded."""
        if not names or self._is_suppressed:
            return _NO_NAMES
        if state not in self._old_values:
            self._read(connection, mapping, [state])
        return frozenset(name for name in names if self._is_net(mapping, state, name))

    def _begin(
        self,
        connection: Connection,
        mapping: VersionedMapping,
        state: InstanceState[Any],
        previous_key: ChangeInfo | None = None,
    ) -> None:
        is_given = all(state.dict.get(name) is not None for name in mapping.key_attributes)
        self._lives[connection, mapping.base].append(
            NewLife(mapping, state, is_given, self._is_suppressed, previous_key)
        )
        _set(state, VERSION, 0)

    def _end(
        self,
        connection: Connection,
        mapping: VersionedMapping,
        state: InstanceState[Any],
        operation: Operation,
        info: str,
    ) -> int:
        version = state.dict.get(VERSION)
        if version is None:
            version = self._version(connection, mapping, state)
        endings = self._endings.get(connection)
        if endings is None:
            endings = self._endings[connection] = defaultdict(list)
            hear_transaction(self.session, self._config, connection)
        key: Any = state.key
        endings[mapping, operation].append((key[1], version, info))
        return version

    def _version(self, connection: Connection, mapping: VersionedMapping, state: InstanceState[Any]) -> int:
        """Return the version that a record was read with, or has now if it was not read."""
        if VERSION not in state.dict:
            self._read(connection, mapping, [state])
        version: int | None = state.dict.get(VERSION)
        if version is None:
            raise StaleVersionError(mapping.name, _identity(state), None, None)
        return version

    def _mark(
        self, connection: Connection, state: InstanceState[Any], info: str, not_before: datetime | None = None
    ) -> None:
        """Set what ``RecordChanges`` keeps on the live row."""
        at = self.transaction.instant.value(connection)
        if not_before is not None:
            at = max(at, assume_utc(not_before))
        _set(state, CHANGE_INFO, json.loads(info))
        _set(state, CHANGED_ATTRIBUTE, at)

    def _replaced(self, mapping: VersionedMapping, state: InstanceState[Any]) -> InstanceState[Any] | None:
        if any(state.dict.get(name) is None for name in mapping.key_attributes):
            return None
        key = mapping.mapper.identity_key_from_instance(state.obj())
        existing = self.session.identity_map.get(key)
        if existing is None or existing is state.obj() or instance_state(existing).deleted:
            return None
        return instance_state(existing)

    def _is_net(self, mapping: VersionedMapping, state: InstanceState[Any], name: str) -> bool:
        """Tell whether an attribute that was touched really has another value than the row."""
        old_values = self._old_values.get(state)
        if state.committed_state[name] is not NO_VALUE or old_values is None or name not in old_values:
            return True
        return mapping.comparisons[name](old_values[name], state.dict.get(name, NO_VALUE)) is not True

    # --- at the first statement that changes what was collected

    def write(self, connection: Connection) -> None:
        """Copy the states that are about to end.

        :raises StaleVersionError: if a record does not have the version that it was read with.
        """
        endings = self._endings.pop(connection, None)
        if endings is None:
            return
        with self.transaction.passing():
            self._copy(connection, endings)

    def _copy(
        self, connection: Connection, endings: Mapping[tuple[VersionedMapping, Operation], list[WantedRecord]]
    ) -> None:
        instant = self.transaction.instant.source(connection)
        groups: dict[tuple[VersionedTable, Operation], list[WantedRecord]] = {}
        for (mapping, operation), records in endings.items():
            for table in mapping.tables:
                held = groups.get((table, operation))
                groups[table, operation] = records if held is None else [*held, *records]
        for (table, operation), records in groups.items():
            if copy_states(connection, table, records, operation, instant) != len(records):
                raise_stale(connection, table, endings)

    def cascade(self, connection: Connection, statement: UpdateBase, parameters: Sequence[Mapping[str, Any]]) -> None:
        """Capture what the database itself will do to the rows that refer to those of a statement."""
        table: Any = target_of(statement)
        if isinstance(statement, Insert) or self._is_suppressed or not dependents_of(table):
            return
        if isinstance(statement, Update):
            refuse_key_change(table, frozenset(key for each in parameters for key in each))
            return
        key = tuple(table.primary_key)
        writer = Writer(connection, self.transaction.instant.source(connection))
        with self.transaction.passing():
            keys = [tuple(each[column.key] for column in key) for each in parameters]
            for condition in keys_in(key, keys, connection.dialect.name):
                Cascade(writer, lambda: self.info).capture(table, condition)

    # --- after the flush

    def finish(self) -> None:
        """Record the births, and make sure that nothing was missed."""
        if self._endings:
            raise ChrononautException("A change was announced by the unit of work, but not made.")
        for mapping, state in self._passed_over:
            self._refuse_late_changes(mapping, state)
        with self.transaction.passing() if self._lives else nullcontext():
            for (connection, table), lives in self._lives.items():
                instant = self.transaction.instant.source(connection)
                begin_lives(connection, table, lives, lambda: self.info, instant)
        if self._info is not None:
            self._info.spend_appended()

    def _refuse_late_changes(self, mapping: VersionedMapping, state: InstanceState[Any]) -> None:
        late = sorted(name for name in _changed_names(mapping, state)[0] if self._is_net(mapping, state, name))
        if late and not self._is_suppressed:
            raise ChrononautException(
                f"{mapping.name}{_identity(state)!r}: {', '.join(late)} changed in a `before_update` listener that was "
                "registered after the mappers were configured, too late to record it. Register the listener "
                "before the first query, or change the record in a `before_flush` listener."
            )


def hear_transaction(session: Session, config: SessionConfig, connection: Connection) -> None:
    """Hear what a session executes on a connection, until its transaction ends."""
    state = transaction_of(session, config)
    if connection not in state.hearers:
        associations = AssociationHearer(state, lambda: _change_info_of(session, config))
        state.hearers[connection] = (_FlushHearer(session, state), associations)
        hear(connection, state.hearers[connection])


class _FlushHearer:
    """Has copied what the statements of a session's transaction are about to end, and refuses what cannot be."""

    def __init__(self, session: Session, transaction: TransactionState) -> None:
        self._session = session
        self._transaction = transaction

    def before_execute(
        self, connection: Connection, statement: Any, parameters: Parameters, options: Mapping[str, Any]
    ) -> Any:
        """Copy the states that a statement ends."""
        if not isinstance(statement, UpdateBase):
            return statement
        flush: Flush | None = self._session.info.get(_FLUSH)
        if flush is not None:
            flush.write(connection)
            if _is_of_unit_of_work(options):
                flush.cascade(connection, statement, parameters)
        rewrite = self._transaction.rewrite
        return statement if rewrite is None else rewrite(statement)

    def after_execute(self, connection: Connection, statement: Any, result: Any) -> None:
        """There is nothing to do."""

    def before_cursor_execute(self, connection: Connection, sql: str, context: Any) -> None:
        """Refuse what would change versioned tables past their history."""
        if context.isinsert:
            refuse_replacing(sql, context)
        # What reads the past on this connection is for the past to allow or refuse.
        options = context.execution_options
        if not self._transaction.lets_pass and PAST not in options and not is_own(options):
            is_announced = _FLUSH in self._session.info and _is_of_unit_of_work(options)
            refuse_untracked(self._session, connection, sql, context, is_announced)


def _is_of_unit_of_work(options: Mapping[str, Any]) -> bool:
    """Tell the unit of work's own statements, which have a cache of their own, from those that a listener executes."""
    return options.get("compiled_cache") is not None


def flush_of(state: InstanceState[Any]) -> Flush | None:
    """Return the capture of the flush that a record is part of; None if nothing of it is to be captured.

    :raises UnattachedSessionError: if its session was never attached.
    """
    session = state.session
    flush: Flush | None = None if session is None else session.info.get(_FLUSH)
    if flush is None and not is_suppressed():
        raise UnattachedSessionError(state.class_.__name__)
    return flush


def begin_flush(session: Session, config: SessionConfig) -> Flush:
    """Start capturing a flush."""
    flush = session.info[_FLUSH] = Flush(session, config)
    return flush


def _change_info_of(session: Session, config: SessionConfig) -> ChangeInfoSource:
    """Return the change info of what a session does now: that of its flush, if it is in one."""
    flush: Flush | None = session.info.get(_FLUSH)
    return ChangeInfoSource(config.change_info, config.require_extra_change_info) if flush is None else flush.info


def end_flush(session: Session) -> Flush | None:
    """Stop capturing a flush."""
    return cast("Flush | None", session.info.pop(_FLUSH, None))


def _versioned(targets: Iterable[object]) -> Iterator[tuple[VersionedMapping, InstanceState[Any]]]:
    for target in targets:
        mapping = find_mapping(type(target))
        if mapping is not None:
            yield mapping, instance_state(target)


def _changed_names(mapping: VersionedMapping, state: InstanceState[Any]) -> tuple[frozenset[str], bool]:
    """Return the attributes whose change counts, and whether their old values are loaded.

    An attribute whose old value is not loaded counts as changed.
    """
    committed, current = state.committed_state, state.dict
    names, are_known = mapping.noticed.intersection(committed), True
    for name in names:
        old = committed[name]
        if old is NO_VALUE:
            are_known = False
        elif mapping.comparisons[name](current.get(name, NO_VALUE), old) is True:
            names = names.difference((name,))
    return names, are_known


def _hidden_names_replaced(
    mapping: VersionedMapping, replaced: InstanceState[Any], state: InstanceState[Any]
) -> frozenset[str]:
    """Return the hidden attributes to which a record gives another value than the one that it takes the place of."""
    names: set[str] = set()
    for name in mapping.hidden.intersection(state.dict):  # the row keeps the others
        old = replaced.committed_state.get(name, NO_VALUE)
        if old is NO_VALUE:
            old = getattr(replaced.obj(), name)
        if mapping.comparisons[name](state.dict[name], old) is not True:
            names.add(name)
    return frozenset(names)


def _is_known(mapping: VersionedMapping, state: InstanceState[Any]) -> bool:
    """Tell whether a record's version, and the old values of what was touched, are loaded."""
    for name, old in state.committed_state.items():
        if old is NO_VALUE and name in mapping.noticed:
            return False
    return mapping.bookkept.issubset(state.dict)


def _identity(state: InstanceState[Any]) -> Key:
    return cast("Key", state.identity)


def _set(state: InstanceState[Any], name: str, value: Any) -> None:
    # Not setattr(): pydantic's models know only their own fields.
    set_attribute(state.obj(), name, value)


def _plain(part: Any) -> Any:
    """Return a part of a key as something that JSON can hold."""
    return part if isinstance(part, int | str) else str(part)
