"""Read the history of one record: each question is one indexed query."""

from __future__ import annotations

from datetime import datetime
from typing import Any, TypeVar, cast

from sqlalchemy import ColumnElement, Select, and_, inspect, select
from sqlalchemy.orm import InstanceState, Query, Session, object_session

from chrononaut._history_record import HistoryRecord
from chrononaut._mapping import VersionedMapping, mapping_of
from chrononaut._run_sync import to_be_awaited
from chrononaut._types import as_utc
from chrononaut.exceptions import ChrononautException

Model = TypeVar("Model")


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
    history = mapping_of(type(record)).history_class
    at = as_utc(at, "at")
    session = session_of(record)
    ended_later = select(history).where(is_record(record), history.changed > at).order_by(history.version).limit(1)
    row = session.scalar(ended_later)
    if row is None:
        return None if _is_gone(record) else record
    if row.operation == "insert" or (row.began is not None and row.began > at):
        return None
    return cast("HistoryRecord[Model]", row)


def read_previous_version(record: Model) -> HistoryRecord[Model] | None:
    """Return the latest ended state: see ``Versioned.previous_version``."""
    history = mapping_of(type(record)).history_class
    latest = select(history).where(is_record(record), history.operation != "insert")
    row = session_of(record).scalar(latest.order_by(history.version.desc()).limit(1))
    return cast("HistoryRecord[Model] | None", row)


def read_has_changed_since(record: object, since: datetime) -> bool:
    """Tell whether any state ended later: see ``Versioned.has_changed_since``."""
    history = mapping_of(type(record)).history_class
    # Not EXISTS: a session that chooses the database by mapper would not find one in it.
    ended_later = select(history.version).where(is_record(record), history.changed > as_utc(since, "since")).limit(1)
    return session_of(record).scalar(ended_later) is not None


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
