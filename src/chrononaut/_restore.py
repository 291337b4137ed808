"""The way back: put a record into an earlier state, or bring a deleted one back."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

from sqlalchemy import inspect
from sqlalchemy.orm import InstanceState

from chrononaut._diff import own_version
from chrononaut._history_record import HistoryRecord
from chrononaut._mapping import VersionedMapping, mapping_of
from chrononaut._reader import session_of
from chrononaut.exceptions import ChrononautException


def revert(record: object, to: object) -> None:
    """Put a record's tracked values back to those of one of its states: see ``Versioned.revert_to``."""
    mapping = mapping_of(type(record))
    state = cast("InstanceState[Any]", inspect(record))
    row: Any = to  # not narrowed: a checker forgets the type arguments then
    if not isinstance(to, HistoryRecord):
        raise ChrononautException(f"revert_to() needs a history row of this {mapping.name}, not {to!r}.")
    if state.deleted or state.was_deleted:
        raise ChrononautException(f"This {mapping.name} was deleted: bring it back by `history_row.restore()`.")
    own_version(mapping, record, row)
    _refuse_absence(row)
    # All are read before the first is set: a read may fail.
    values = {name: deepcopy(getattr(row, name)) for name in _settable(mapping) if name not in mapping.key_attributes}
    for name, value in values.items():
        setattr(record, name, value)


def restore(row: HistoryRecord[Any], values: dict[str, Any]) -> Any:
    """Add a deleted record to the history row's session again: see ``HistoryRecord.restore``."""
    mapping = mapping_of(row.__chrononaut_model__)
    session = session_of(row)
    _refuse_absence(row)
    key: list[Any] = [getattr(row, name) for name in mapping.key_attributes]
    found = session.get(mapping.mapper.class_, tuple(key) if len(key) > 1 else key[0])
    if found is not None and found not in session.deleted:
        raise ChrononautException(
            f"{mapping.name}{tuple(key)!r} exists. To put it back into an earlier state use `record.revert_to(row)`."
        )
    _refuse_values(mapping, values)
    _require_values(mapping, values)
    record = mapping.mapper.class_manager.new_instance()
    for name in _settable(mapping):
        if name not in values:
            setattr(record, name, deepcopy(getattr(row, name)))
    for name, value in values.items():
        setattr(record, name, value)
    session.add(record)
    return record


def _settable(mapping: VersionedMapping) -> Iterator[str]:
    """Yield the tracked attributes that the application, not the database, gives their value."""
    for name in sorted(mapping.tracked):
        column: Any = mapping.mapper.columns[name]
        if column.computed is None:
            yield name


def _refuse_absence(row: HistoryRecord[Any]) -> None:
    if row.operation == "insert":
        raise ChrononautException(f"{row!r} says that the record did not exist: there is no state to go back to.")


def _refuse_values(mapping: VersionedMapping, values: dict[str, Any]) -> None:
    names = set(mapping.mapper.attrs.keys()) - set(mapping.key_attributes) - set(mapping.bookkeeping)
    unknown = sorted(set(values) - names)
    if unknown:
        raise ChrononautException(
            f"restore() cannot set {', '.join(unknown)} of {mapping.name}: "
            f"pass attributes that are neither its key nor chrononaut's own ({', '.join(sorted(names))})."
        )


def _require_values(mapping: VersionedMapping, values: dict[str, Any]) -> None:
    """Refuse to bring a record back half: the database would, with a less helpful error, or invent a value."""
    missing = {
        name: "hidden" if name in mapping.hidden else "untracked"
        for name in sorted(mapping.hidden | mapping.untracked)
        if name not in values and _is_needed(mapping.mapper.columns[name])
    }
    if missing:
        listed = ", ".join(f"{name} ({why})" for name, why in missing.items())
        example = ", ".join(f"{name}=..." for name in missing)
        raise ChrononautException(
            f"History does not hold {listed} of {mapping.name}, and the row needs it: pass `restore({example})`."
        )


def _is_needed(column: Any) -> bool:
    has_default = column.default is not None or column.server_default is not None or column.identity is not None
    return not (column.nullable or has_default)
