"""Read the history of one record: each question is one indexed query."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from datetime import datetime
from typing import Any, TypeVar, cast

from sqlalchemy import ColumnElement, FromClause, Integer, Select, and_, bindparam, func, inspect, select
from sqlalchemy.orm import InstanceState, Query, Session, object_session

from chrononaut._history_record import HistoryRecord
from chrononaut._history_table import CHANGED, VERSION
from chrononaut._mapping import VersionedMapping, VersionedTable, mapping_of
from chrononaut._run_sync import to_be_awaited
from chrononaut._types import UTCDateTime, as_utc
from chrononaut.exceptions import ChrononautException

Model = TypeVar("Model")

#: From how many versions of a record on it pays not to look through them from the first.
_MANY = 16


def history_class(model: type[Model]) -> type[HistoryRecord[Model]]:
    """Return the class of the history rows of a versioned model.

    It is mapped like any other class. E.g.::

        UserHistory = history_class(User)
        session.scalars(select(UserHistory).where(UserHistory.changed >= last_week))

    :param model: a class with the ``Versioned`` mixin.
    :raises ChrononautException: if the class is not versioned.
    """
    return mapping_of(model).history_class


@to_be_awaited("await session.flush()")
def select_versions(record: object, before: datetime | None = None, after: datetime | None = None) -> Select[Any]:
    """Return the query for a record's ended states, oldest first, to be run by any session.

    The same as ``record.versions(...)`` for ``session.scalars(...)`` and for an ``AsyncSession``. E.g.::

        rows = await session.scalars(select_versions(user))

    :param record: an instance of a versioned model that has been flushed at least once.
    :param before: only states that ended at or before this instant (inclusive; aware).
    :param after: only states that ended at or after this instant (inclusive; aware).
    :raises NaiveDatetimeError: if an instant has no zone.
    :raises ChrononautException: if the record is not versioned, or was never flushed.
    """
    mapping = mapping_of(type(record))
    history = mapping.history_class
    query = select(history).where(is_record(record), *_ended(history, before, after), history.operation != "insert")
    return query.order_by(history.version)


def query_versions(
    record: Model, before: datetime | None = None, after: datetime | None = None
) -> Query[HistoryRecord[Model]]:
    """Return the same as a legacy ``Query`` of the record's session."""
    history = mapping_of(type(record)).history_class
    query = session_of(record).query(history).filter(is_record(record), *_ended(history, before, after))
    query = query.filter(history.operation != "insert").order_by(history.version)
    return cast("Query[HistoryRecord[Model]]", query)


def read_version_at(record: Model, at: datetime) -> HistoryRecord[Model] | Model | None:
    """Return the state that was valid at an instant: see ``Versioned.version_at``."""
    at = as_utc(at, "at")
    versions = cast("InstanceState[Any]", inspect(record)).dict.get(VERSION, 0)
    if versions < _MANY:
        row = _read(record, _build_ended_later, at=at)
    else:
        # A power of two, so that there are not many statements to be prepared.
        number = 1 << (versions.bit_length() // 2)
        marks = {f"mark_{each}": each * versions // number for each in range(number)}
        row = _read(record, _build_ended_later_of_many, number, at=at, **marks)
    if row is None:
        return None if _is_gone(record) else record
    if row.operation == "insert" or (row.began is not None and row.began > at):
        return None
    return cast("HistoryRecord[Model]", row)


def read_previous_version(record: Model) -> HistoryRecord[Model] | None:
    """Return the latest ended state: see ``Versioned.previous_version``."""
    return cast("HistoryRecord[Model] | None", _read(record, _build_latest))


def read_has_changed_since(record: object, since: datetime) -> bool:
    """Tell whether any state ended later: see ``Versioned.has_changed_since``."""
    return _read(record, _build_has_ended_later, at=as_utc(since, "since")) is not None


def _read(record: object, build: Callable[..., Select[Any]], *arguments: Hashable, **values: Any) -> Any:
    """Return the answer of a query about a record, which is built once for each model."""
    mapping = mapping_of(type(record))
    session = session_of(record)
    key = {f"key_{number}": part for number, part in enumerate(key_of(mapping, record))}
    return session.scalar(mapping.base.statement(build, mapping, *arguments), key | values)


def _build_ended_later(base: VersionedTable, mapping: VersionedMapping) -> Select[Any]:
    history = mapping.history_class
    return select(history).where(*_has_key(base), _ends_later(base.history)).order_by(history.version).limit(1)


def _build_ended_later_of_many(base: VersionedTable, mapping: VersionedMapping, number: int) -> Select[Any]:
    """Look at some versions here and there first, and then only behind the last of them that had ended."""
    marks = base.history.alias("marks")
    is_mark = marks.c[VERSION].in_([bindparam(f"mark_{each}", type_=Integer()) for each in range(number)])
    # Added to, so that no database goes backwards through all versions to find it.
    last = select(func.max(marks.c[VERSION] + 0)).where(*_has_key(base, marks), is_mark, ~_ends_later(marks))
    start = func.coalesce(last.scalar_subquery(), -1)
    return _build_ended_later(base, mapping).where(base.history.c[VERSION] >= start)


def _build_has_ended_later(base: VersionedTable, mapping: VersionedMapping) -> Select[Any]:
    # Not EXISTS: a session that chooses the database by mapper would not find one in it.
    return select(mapping.history_class.version).where(*_has_key(base), _ends_later(base.history)).limit(1)


def _build_latest(base: VersionedTable, mapping: VersionedMapping) -> Select[Any]:
    history = mapping.history_class
    latest = select(history).where(*_has_key(base), history.operation != "insert")
    return latest.order_by(history.version.desc()).limit(1)


def _has_key(base: VersionedTable, history: FromClause | None = None) -> Iterator[ColumnElement[bool]]:
    for number, column in enumerate(base.history_key):
        own = column if history is None else history.c[column.key]
        yield own == bindparam(f"key_{number}", type_=column.type)


def _ends_later(history: FromClause) -> ColumnElement[bool]:
    return history.c[CHANGED] > bindparam("at", type_=UTCDateTime())


def is_record(record: object) -> ColumnElement[bool]:
    """Return the condition that a history row is of a record.

    :raises ChrononautException: if the record has no key yet.
    """
    mapping = mapping_of(type(record))
    columns = mapping.base.history_key
    return and_(*(column == part for column, part in zip(columns, key_of(mapping, record), strict=True)))


def key_of(mapping: VersionedMapping, record: object) -> tuple[Any, ...]:
    """Return the primary key of a record that has been flushed at least once."""
    state = cast("InstanceState[Any]", inspect(record))
    if state.pending and state.session is not None:
        state.session.flush()
    if state.identity is None:
        raise ChrononautException(
            f"This {mapping.name} is not in the database yet, so it has no history: add it to a session and flush."
        )
    return state.identity


def session_of(record: object) -> Session:
    """Return the session of a record.

    :raises ChrononautException: if it has none.
    """
    session = object_session(record)
    if session is None:
        raise ChrononautException(
            f"This {type(record).__name__} is not attached to a session, which its history is read with. "
            "Add or merge it, or run `session.scalars(select_versions(record))`."
        )
    return session


def _ended(history: type[HistoryRecord[Any]], before: datetime | None, after: datetime | None) -> list[Any]:
    bounds: list[Any] = []
    if before is not None:
        bounds.append(history.changed <= as_utc(before, "before"))
    if after is not None:
        bounds.append(history.changed >= as_utc(after, "after"))
    return bounds


def _is_gone(record: object) -> bool:
    state = cast("InstanceState[Any]", inspect(record))
    return state.deleted or state.was_deleted
