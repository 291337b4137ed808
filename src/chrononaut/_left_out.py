"""Attributes of objects of the past that history does not hold: reading one raises its own error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.orm import InstrumentedAttribute, LoaderCallableStatus, Mapper
from sqlalchemy.orm.attributes import instance_state

from chrononaut._mapping import VersionedMapping, find_mapping
from chrononaut.exceptions import HiddenAttributeError, UntrackedAttributeError

_INFO_KEY = "chrononaut_left_out"
_ATTRIBUTE = "__chrononaut_left_out__"

LeftOut = Mapping[str, str]


# SQLAlchemy's class has its __doc__ declared, which no subclass can match.
class _LeftOutAttribute(InstrumentedAttribute[Any]):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A hidden or untracked attribute of a live model, or a relationship that depends on one."""

    __slots__ = ()
    inherit_cache = True

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is not None:
            # Not state.info: it makes a dictionary for each object that has none.
            notes = vars(instance_state(instance)).get("info")
            if notes is not None and _INFO_KEY in notes:
                _raise(instance, notes[_INFO_KEY][self.key])
        return super().__get__(instance, owner)


def forget_left_out(instance: object) -> None:
    """Let an object of the past know nothing of what history does not hold.

    The attributes raise when they are read; and they count neither as loaded, lest a merge into the live session would
    put nothing in their place, nor as expired, lest they would be loaded together with others.
    """
    left_out = _left_out_of(type(instance))
    if not left_out:
        return
    state = instance_state(instance)
    state.info[_INFO_KEY] = left_out
    for name in left_out:
        state.dict.pop(name, None)
        state.expired_attributes.discard(name)
        state.committed_state[name] = LoaderCallableStatus.NO_VALUE


def _left_out_of(cls: type) -> LeftOut:
    """Return the attributes of a class that history does not hold, each with the column attribute that is to blame."""
    left_out: LeftOut | None = vars(cls).get(_ATTRIBUTE)
    if left_out is None:
        mapping = find_mapping(cls)
        left_out = {} if mapping is None else dict(_find_left_out(mapping))
        for name in left_out:
            attribute = vars(cls).get(name)
            if type(attribute) is InstrumentedAttribute:
                # Still the same attribute to the mapper and to queries.
                attribute.__class__ = _LeftOutAttribute
        type.__setattr__(cls, _ATTRIBUTE, left_out)
    return left_out


def _find_left_out(mapping: VersionedMapping) -> Iterator[tuple[str, str]]:
    names = mapping.hidden | mapping.untracked
    for name in names:
        yield name, name
    mapper: Mapper[Any] = inspect(mapping.mapper.class_)
    columns: dict[Any, str] = {mapper.columns[name]: name for name in sorted(names)}
    for relationship in mapper.relationships:
        culprit = next((columns[column] for column in relationship.local_columns if column in columns), None)
        if culprit is not None:
            yield relationship.key, culprit


def _raise(instance: object, name: str) -> None:
    mapping = find_mapping(type(instance))
    if mapping is not None:
        error = HiddenAttributeError if name in mapping.hidden else UntrackedAttributeError
        raise error(mapping.name, name)
