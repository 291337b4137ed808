"""Capture what a flush changes.

The unit of work tells each record that it is about to write (``collect_*``, called by mapper events) before
it emits the first statement for them. That statement finds the list complete, and has the states that it
will end copied first, by one statement per history table. So nothing needs to be predicted: what
relationships, cascades and other listeners change during the flush is in the list as well.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, cast

from sqlalchemy import Column, Connection, event, inspect
from sqlalchemy.orm import InstanceState, Session, object_session
from sqlalchemy.orm.attributes import PASSIVE_NO_INITIALIZE, get_history, set_committed_value
from sqlalchemy.sql.dml import UpdateBase

from chrononaut._capture import (
    FIRST_BIRTH,
    Birth,
    Key,
    copy_states,
    find_last_states,
    insert_births,
    read_current,
    renumber,
)
from chrononaut._change_info import ChangeInfoSource, spend_appended_info
from chrononaut._history_table import CHANGE_INFO, CHANGED_ATTRIBUTE, VERSION
from chrononaut._mapping import VersionedMapping, VersionedTable, find_mapping
from chrononaut._suppression import is_suppressed
from chrononaut._transaction import TransactionState, config_of, find_config, transaction_of
from chrononaut._types import assume_utc
from chrononaut._wanted import WantedRecord
from chrononaut.exceptions import ChrononautException, StaleVersionError, UnattachedSessionError
from chrononaut.typing import Operation


_FLUSH = "_chrononaut_flush"


class _Ending(NamedTuple):
    """A state that the flush is about to end."""

    mapping: VersionedMapping
    record: WantedRecord
    operation: Operation


class _NewLife(NamedTuple):
    """A record that the flush inserts."""

    mapping: VersionedMapping
    target: object
    is_key_given: bool
    is_suppressed: bool
    previous_key: Mapping[str, Any] | None


class Flush:
    """What one flush changes, and the writing of its history."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = find_config(session)
        self._endings: dict[Connection, list[_Ending]] = defaultdict(list)
        self._lives: dict[tuple[Connection, VersionedTable], list[_NewLife]] = defaultdict(list)
        self._collected: set[InstanceState[Any]] = set()
        self._old_values: dict[InstanceState[Any], dict[str, Any]] = {}

    @cached_property
    def info(self) -> ChangeInfoSource:
        """The change info; asks the provider when first used."""
        config = self.config or config_of(None, type(self.session))
        return ChangeInfoSource(config.change_info, config.require_extra_change_info)

    @cached_property
    def transaction(self) -> TransactionState:
        """The transaction that the flush is part of."""
        return transaction_of(self.session, self.config or config_of(None, type(self.session)))

    # --- before anything is written

    def prepare(self) -> None:
        """Refuse what can be refused, and read what is not loaded, while nothing is written yet."""
        if is_suppressed():
            return
        unread: dict[VersionedMapping, list[InstanceState[Any]]] = defaultdict(list)
        for target in self.session.dirty:
            mapping = find_mapping(type(target))
            if mapping is not None:
                state = _state(target)
                changes = _changed_names(mapping, state)
                if changes:
                    self.info.of_object(target)
                    if not _is_known(mapping, state, changes):
                        unread[mapping].append(state)
        for target in self.session.deleted:
            mapping = find_mapping(type(target))
            if mapping is not None:
                self.info.of_object(target)
                if VERSION not in _state(target).dict:
                    unread[mapping].append(_state(target))
        for target in self.session.new:
            mapping = find_mapping(type(target))
            if mapping is not None and mapping.track_inserts:
                self.info.of_object(target)
        for mapping, states in unread.items():
            self._read(self.session.connection(bind_arguments={"mapper": mapping.mapper}), mapping, states)

    def _read(
        self, connection: Connection, mapping: VersionedMapping, states: Iterable[InstanceState[Any]]
    ) -> None:
        """Read and lock what the database holds of records whose version or old values are not loaded."""
        by_key = {_identity(state): state for state in states}
        names = {name for state in by_key.values() for name in _changed_names(mapping, state)}
        names.update(mapping.bookkeeping)
        columns = {name: cast("Column[Any]", mapping.mapper.columns[name]) for name in sorted(names)}
        for row in read_current(connection, mapping.tables, by_key, list(columns.values())):
            state = by_key[row.key]
            values = dict(zip(columns, row.values, strict=True))
            self._old_values[state] = values
            for name in mapping.bookkeeping:
                if name not in state.dict:
                    set_committed_value(state.obj(), name, values[name])

    # --- told by the unit of work, before it writes

    def collect_insert(self, connection: Connection, mapping: VersionedMapping, target: object) -> None:
        """A record is about to be inserted, or to take the place of one of the same key that is deleted."""
        replaced = self._replaced(mapping, target)
        if replaced is None:
            self._begin(connection, mapping, target)
            if mapping.has_marks and not is_suppressed():
                self._mark(connection, target, self.info.of_object(target))
        elif not is_suppressed():
            hidden = {name for name in mapping.hidden if replaced.dict.get(name) != _state(target).dict.get(name)}
            info = self.info.of_object(target, hidden)
            version = self._end(connection, mapping, replaced, "update", info)
            self._collected.add(_state(target))
            _set(target, VERSION, version + 1)
            if mapping.has_marks:
                self._mark(connection, target, info, replaced.dict.get(CHANGED_ATTRIBUTE))
        else:
            _set(target, VERSION, self._version(connection, mapping, replaced))

    def collect_update(self, connection: Connection, mapping: VersionedMapping, target: object) -> None:
        """A record is about to be updated, perhaps without any change that counts."""
        state = _state(target)
        changes = _changed_names(mapping, state)
        if not changes or is_suppressed():
            return
        if not _is_known(mapping, state, changes) and state not in self._old_values:
            self._read(connection, mapping, [state])
        changes = {name for name in changes if self._is_net(mapping, state, name)}
        if not changes:
            return
        info = self.info.of_object(target, changes & mapping.hidden)
        if changes & set(mapping.key_attributes):
            self._end(connection, mapping, state, "delete", info)
            _set(target, VERSION, 0)
            previous = dict(zip(mapping.key_attributes, map(_plain, _identity(state)), strict=True))
            self._begin(connection, mapping, target, previous)
        else:
            version = self._end(connection, mapping, state, "update", info)
            _set(target, VERSION, version + 1)
        if mapping.has_marks:
            self._mark(connection, target, info, state.dict.get(CHANGED_ATTRIBUTE))

    def collect_delete(self, connection: Connection, mapping: VersionedMapping, target: object) -> None:
        """A record is about to be deleted."""
        if not is_suppressed():
            self._end(connection, mapping, _state(target), "delete", self.info.of_object(target))

    def check_updated(self, mapping: VersionedMapping, target: object) -> None:
        """A record was updated: refuse changes that were made after it had been collected."""
        state = _state(target)
        if is_suppressed() or state in self._collected:
            return
        late = sorted(name for name in _changed_names(mapping, state) if self._is_net(mapping, state, name))
        if late:
            raise ChrononautException(
                f"{mapping.name}({_key_text(state)}): {', '.join(late)} changed in a `before_update` listener that was "
                "registered after the mappers were configured, too late to record it. Register the listener "
                "before the first query, or change the record in a `before_flush` listener."
            )

    def collect_marks(self, connection: Connection, target: object) -> None:
        """A record that has change marks but no versions is about to be inserted or updated."""
        if not _state(target).persistent or self.session.is_modified(target, include_collections=False):
            self._mark(connection, target, self.info.of_object(target))
            self._collected.add(_state(target))

    def _mark(self, connection: Connection, target: object, info: str, not_before: datetime | None = None) -> None:
        """Set what ``RecordChanges`` keeps on the live row."""
        at = self.transaction.instant.value(connection)
        if not_before is not None:
            at = max(at, assume_utc(not_before))
        _set(target, CHANGE_INFO, json.loads(info))
        _set(target, CHANGED_ATTRIBUTE, at)

    def _begin(
        self,
        connection: Connection,
        mapping: VersionedMapping,
        target: object,
        previous_key: Mapping[str, Any] | None = None,
    ) -> None:
        state = _state(target)
        is_given = all(state.dict.get(name) is not None for name in mapping.key_attributes)
        life = _NewLife(mapping, target, is_given, is_suppressed(), previous_key)
        self._lives[connection, mapping.base].append(life)
        self._collected.add(state)
        _set(target, VERSION, 0)

    def _end(
        self,
        connection: Connection,
        mapping: VersionedMapping,
        state: InstanceState[Any],
        operation: Operation,
        info: str,
    ) -> int:
        version = self._version(connection, mapping, state)
        record = WantedRecord(_identity(state), version, info)
        self._endings[connection].append(_Ending(mapping, record, operation))
        self._collected.add(state)
        self._listen(connection)
        return version

    def _version(self, connection: Connection, mapping: VersionedMapping, state: InstanceState[Any]) -> int:
        if state.dict.get(VERSION) is None:
            self._read(connection, mapping, [state])
        version: int | None = state.dict.get(VERSION)
        if version is None:
            raise StaleVersionError(mapping.name, _identity(state), None, None)
        return version

    def _replaced(self, mapping: VersionedMapping, target: object) -> InstanceState[Any] | None:
        key = mapping.mapper.identity_key_from_instance(target)
        existing = None if None in key[1] else self.session.identity_map.get(key)
        if existing is None or existing is target or _state(existing).deleted:
            return None
        return _state(existing)

    def _is_net(self, mapping: VersionedMapping, state: InstanceState[Any], name: str) -> bool:
        """Tell whether an attribute that was touched really has another value than the row."""
        added, _, deleted = get_history(state.obj(), name, PASSIVE_NO_INITIALIZE)
        old_values = self._old_values.get(state)
        if deleted or not added or old_values is None or name not in old_values:
            return True
        column = cast("Column[Any]", mapping.mapper.columns[name])
        return column.type.compare_values(old_values[name], added[0]) is not True

    # --- at the first statement that changes what was collected

    def _listen(self, connection: Connection) -> None:
        if connection not in self.transaction.listeners:
            listener = _listener(self.session)
            event.listen(connection, "before_execute", listener)
            self.transaction.listeners[connection] = listener

    def write(self, connection: Connection) -> None:
        """Copy the states that are about to end.

        :raises StaleVersionError: if a record does not have the version that it was read with.
        """
        endings = self._endings.pop(connection, None)
        if endings is None:
            return
        instant = self.transaction.instant.source(connection)
        groups: dict[tuple[VersionedTable, Operation], list[_Ending]] = defaultdict(list)
        for ending in endings:
            for table in ending.mapping.tables:
                groups[table, ending.operation].append(ending)
        for (table, operation), group in groups.items():
            records = [ending.record for ending in group]
            if copy_states(connection, table, records, operation, instant) != len(records):
                _raise_stale(connection, group)

    # --- after the flush

    def finish(self) -> None:
        """Record the births, and make sure that nothing was missed."""
        if self._endings:
            left = next(iter(self._endings.values()))[0]
            raise ChrononautException(f"A change of {left.mapping.name}({left.record.key}) was announced but not made.")
        for (connection, table), lives in self._lives.items():
            self._number(connection, table, lives)
        for state in self._collected:
            spend_appended_info(state)

    def _number(self, connection: Connection, table: VersionedTable, lives: list[_NewLife]) -> None:
        """Number new records, after the history that their key may already have, and record their births."""
        keys = [tuple(life.mapping.mapper.primary_key_from_instance(life.target)) for life in lives]
        used = [key for key, life in zip(keys, lives, strict=True) if _may_be_used(connection, table, life)]
        last = find_last_states(connection, table, used) if used else {}
        births: dict[VersionedTable, list[Birth]] = defaultdict(list)
        renumbered: dict[Key, int] = {}
        for key, life in zip(keys, lives, strict=True):
            ended = last.get(key)
            version = FIRST_BIRTH if ended is None else ended.version + 1
            if life.mapping.track_inserts and not life.is_suppressed:
                began = None if ended is None else ended.changed
                info = self.info.of_object(life.target, previous_key=life.previous_key)
                birth = Birth(key, version, began, info, _discriminator(life))
                for each in life.mapping.tables:
                    births[each].append(birth)
                version += 1
            if max(version, 0) != 0:
                renumbered[key] = version
                set_committed_value(life.target, VERSION, version)
        if renumbered:
            renumber(connection, table, renumbered)
        instant = self.transaction.instant.source(connection)
        for each, rows in births.items():
            insert_births(connection, each, rows, lives[0].mapping.discriminator, instant)


def _listener(session: Session) -> Any:
    def before_execute(conn: Connection, clauseelement: Any, *_: Any) -> None:
        """Fire before any statement of the transaction: what it ends must be copied first."""
        flush: Flush | None = session.info.get(_FLUSH)
        if flush is not None and isinstance(clauseelement, UpdateBase):
            flush.write(conn)

    return before_execute


def flush_of(target: object) -> Flush | None:
    """Return the capture of the flush that a record is part of; None if nothing of it is to be captured.

    :raises UnattachedSessionError: if its session was never attached.
    """
    session = object_session(target)
    if session is not None and find_config(session) is not None:
        return current_flush(session)
    if is_suppressed():
        return None
    raise UnattachedSessionError(type(target).__name__)


def current_flush(session: Session) -> Flush:
    """Return the capture of the session's current flush."""
    flush: Flush | None = session.info.get(_FLUSH)
    return begin_flush(session) if flush is None else flush


def begin_flush(session: Session) -> Flush:
    """Start capturing a flush."""
    flush = session.info[_FLUSH] = Flush(session)
    return flush


def end_flush(session: Session) -> None:
    """Forget the session's current flush."""
    session.info.pop(_FLUSH, None)


def _changed_names(mapping: VersionedMapping, state: InstanceState[Any]) -> set[str]:
    """Return the names of attributes whose change counts, by what is loaded."""
    touched = mapping.noticed.difference(state.unmodified_intersection(mapping.noticed))
    if not touched:
        return set()
    target = state.obj()
    return {name for name in touched if any(get_history(target, name, PASSIVE_NO_INITIALIZE)[::2])}


def _is_known(mapping: VersionedMapping, state: InstanceState[Any], changes: Iterable[str]) -> bool:
    """Tell whether the version and the old values are loaded."""
    if any(name not in state.dict for name in mapping.bookkeeping):
        return False
    target = state.obj()
    return all(get_history(target, name, PASSIVE_NO_INITIALIZE)[2] for name in changes)


def _may_be_used(connection: Connection, table: VersionedTable, life: _NewLife) -> bool:
    """Tell whether a new record's key may already have a history."""
    if life.is_key_given:
        return True
    for column in table.key:
        if column is table.live.autoincrement_column:
            sqlite = connection.dialect.name == "sqlite"
            if sqlite and not table.live.dialect_options["sqlite"]["autoincrement"]:
                return True
        elif column.server_default is None and not getattr(column.default, "is_sequence", False):
            return True
    return False


def _discriminator(life: _NewLife) -> Any:
    column = life.mapping.discriminator
    if column is None:
        return None
    return getattr(life.target, life.mapping.mapper.get_property_by_column(column).key)


def _raise_stale(connection: Connection, endings: Sequence[_Ending]) -> NoReturn:
    """Find the record that does not have the version that it was read with, and say so."""
    table = endings[0].mapping.base
    found = {
        row.key: row.version
        for row in read_current(connection, [table], [ending.record.key for ending in endings], lock=False)
    }
    for mapping, record, _ in endings:
        if found.get(record.key) != record.version:
            raise StaleVersionError(mapping.name, record.key, record.version, found.get(record.key))
    raise ChrononautException(
        f"Not all rows of {table.live.name} could be copied to {table.history.name}, although each has the version "
        "that was expected. Is a column type lossy, so that a key read from the database does not find its row?"
    )


def _state(target: object) -> InstanceState[Any]:
    return cast("InstanceState[Any]", inspect(target, raiseerr=True))


def _identity(state: InstanceState[Any]) -> Key:
    return cast("Key", state.identity)


def _key_text(state: InstanceState[Any]) -> str:
    return ", ".join(map(repr, _identity(state)))


def _set(target: object, name: str, value: Any) -> None:
    setattr(target, name, value)


def _plain(part: Any) -> Any:
    """Return a part of a key as something that JSON can hold."""
    return part if isinstance(part, int | str) else str(part)
