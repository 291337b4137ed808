"""What differs between two states of a record."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import inspect, select
from sqlalchemy.orm import InstanceState

from chrononaut._history_record import HistoryRecord
from chrononaut._mapping import VersionedMapping, mapping_of
from chrononaut._reader import is_record, key_of, session_of
from chrononaut.exceptions import ChrononautException


def diff_states(record: object, from_model: object, to: object, include_hidden: bool) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two states of a record: see ``Versioned.diff``."""
    mapping = mapping_of(type(record))
    source = from_model  # not narrowed: a checker forgets the type arguments then
    start = own_version(mapping, record, from_model)
    if not isinstance(from_model, HistoryRecord):
        raise ChrononautException(f"diff() starts from a history row of this {mapping.name}, not from itself.")
    end = None if to is None or to is record else own_version(mapping, record, to)
    if end is not None and end < start:
        raise ChrononautException(
            f"diff() was asked for the way from version {start} back to the older version {end}: swap the two."
        )
    target = record if end is None else to
    differences: dict[str, tuple[Any, Any]] = {}
    for name in sorted(mapping.tracked):
        values = (getattr(source, name), getattr(target, name))
        if not _are_equal(mapping, name, *values):
            differences[name] = values
    if include_hidden:
        for name in _changed_hidden(mapping, record, start, end):
            differences[name] = (None, getattr(record, name) if end is None else None)
    return differences


def own_version(mapping: VersionedMapping, record: object, state: object) -> int:
    """Return the version of a history row, which must be one of the record's own."""
    if not isinstance(state, HistoryRecord):
        if state is record:
            return -1
        raise ChrononautException(
            f"diff() compares history rows of one record, and this is a {type(state).__name__}: "
            "pass what versions(), version_at() or previous_version() return."
        )
    key = cast("InstanceState[Any]", inspect(state)).identity
    own = key_of(mapping, record)
    if not isinstance(state, mapping.history_class) or key is None or tuple(key[: len(own)]) != own:
        raise ChrononautException(f"{state!r} is not part of the history of {mapping.name}{own!r}.")
    return state.version


def _are_equal(mapping: VersionedMapping, name: str, one: Any, other: Any) -> bool:
    return mapping.comparisons[name](one, other) is True


def _changed_hidden(mapping: VersionedMapping, record: object, start: int, end: int | None) -> list[str]:
    """Return the hidden attributes that changed after one version, and up to another."""
    history = mapping.history_class
    query = select(history.change_info).where(is_record(record), history.version >= start)
    if end is not None:
        query = query.where(history.version < end)
    changed = {name for info in session_of(record).scalars(query) for name in info.get("hidden_cols_changed", ())}
    return sorted(changed & mapping.hidden)
