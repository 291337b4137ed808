"""The versions of objects that are in a session while a statement changes their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from sqlalchemy.orm import InstanceState, Session
from sqlalchemy.orm.attributes import instance_state, set_committed_value

from chrononaut._bulk import Rows, Writer, versions_of
from chrononaut._capture import Key
from chrononaut._history_table import CHANGE_INFO, CHANGED_ATTRIBUTE, VERSION
from chrononaut._mapping import VersionedMapping
from chrononaut._wanted import keys_in

#: The version of each object, as far as it is known.
Versions = Mapping[InstanceState[Any], int]


def versions_in_session(session: Session, mapping: VersionedMapping) -> dict[InstanceState[Any], int]:
    """Return the versions of a model's objects."""
    return {state: state.dict[VERSION] for state in _in_session(session, mapping)}


def versions_that_end(session: Session, mapping: VersionedMapping, writer: Writer, rows: Rows) -> dict[Key, int]:
    """Return the versions of those rows that change whose objects are in the session, to be brought up to date."""
    keys = [cast("Key", state.identity) for state in _in_session(session, mapping)]
    return versions_of(writer.connection, rows, keys_in(rows.base.key, keys, writer.dialect)) if keys else {}


def bring_up_to_date(session: Session, mapping: VersionedMapping, before: Versions, ended: Mapping[Key, int]) -> None:
    """Give the objects their new version; one that was stale before stays so.

    SQLAlchemy expires the version of all that matched, for an expression set it: a stale object whose version
    was then read anew would pass for one that has seen the latest state.

    :param before: the versions that they had before the statement.
    :param ended: the versions that the statement ended.
    """
    for state, version in before.items():
        target = state.obj()
        if target is None:
            continue
        is_raised = ended.get(cast("Key", state.identity)) == version
        if state.dict.get(VERSION) != version + is_raised:
            set_committed_value(target, VERSION, version + is_raised)
        if is_raised and CHANGED_ATTRIBUTE in mapping.mapper.columns:
            session.expire(target, [CHANGE_INFO, CHANGED_ATTRIBUTE])


def _in_session(session: Session, mapping: VersionedMapping) -> Iterator[InstanceState[Any]]:
    """Yield the objects of a model in a session whose version is known."""
    for target in session.identity_map.values():
        state: InstanceState[Any] = instance_state(target)
        if isinstance(target, mapping.mapper.class_) and VERSION in state.dict:
            yield state
