"""The ``__chrononaut_*__`` options of a class as one frozen, validated value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import event, inspect
from sqlalchemy.ext.declarative import AbstractConcreteBase
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.exc import UnmappedClassError

from chrononaut.exceptions import MappingError

#: The reserved names: ours on a history row, so a model column cannot have them.
RESERVED = frozenset({"version", "began", "changed", "change_info", "operation"})


def reserved_name_error(cls: type, name: str) -> MappingError:
    """Return the error for a model column that has one of the reserved names."""
    return MappingError(
        f"{cls.__name__} has a column {name!r} of its own, which history needs for itself. "
        f"Rename both attribute and column, e.g. `{name}_ = mapped_column('{name}_', ...)`."
    )


_OLDER_SPELLING = {
    "__chrononaut_untracked__": "__version_untracked__",
    "__chrononaut_hidden__": "__version_hidden__",
    "__chrononaut_tablename__": "__version_tablename__",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What a class says about its versioning. Names are as written there, not resolved yet."""

    untracked: frozenset[str]
    hidden: frozenset[str]
    tablename: str | None
    disabled_indexes: frozenset[str]
    copy_validators: bool
    track_inserts: bool


def read_options(cls: type) -> Options:
    """Read the options of a class, those of its bases included.

    Lists of names add up along the bases, so that a subclass can never uncover by accident what its base hides.
    The table name counts only where it does not belong to another mapped class.

    :raises MappingError: if an option has the wrong type.
    """
    return Options(
        untracked=_names(cls, "__chrononaut_untracked__"),
        hidden=_names(cls, "__chrononaut_hidden__"),
        tablename=_tablename(cls),
        disabled_indexes=_names(cls, "__chrononaut_disable_indices__"),
        copy_validators=bool(getattr(cls, "__chrononaut_copy_validators__", False)),
        track_inserts=bool(getattr(cls, "__chrononaut_track_inserts__", True)),
    )


def after_mapping(cls: type, listener: Callable[[Mapper[Any], type], None]) -> None:
    """Call a listener as soon as a class is mapped, which it may be already.

    :raises MappingError: if its mapping is put off to a time that cannot be listened for.
    """
    if AbstractConcreteBase in cls.__bases__:
        return  # all its rows are in the tables of its subclasses
    mapper = find_mapper(cls)
    if mapper is not None:
        listener(mapper, cls)
        return
    try:
        event.listen(cls, "after_mapper_constructed", listener)
    except UnmappedClassError as error:
        raise MappingError(
            f"{cls.__name__} is to be mapped at a later time (DeferredReflection), so it cannot be versioned. "
            "Reflect its table first: `__table__ = Table(..., autoload_with=engine)`."
        ) from error


def find_mapper(cls: type) -> Mapper[Any] | None:
    """Return the mapper of a class; None if it has none, or none yet."""
    try:
        return cast("Mapper[Any] | None", inspect(cls, raiseerr=False))
    except UnmappedClassError:  # an AbstractConcreteBase, which is mapped after all its subclasses
        return None


def _spellings(option: str) -> Iterator[str]:
    yield option
    if option in _OLDER_SPELLING:
        yield _OLDER_SPELLING[option]


def _names(cls: type, option: str) -> frozenset[str]:
    names: set[str] = set()
    for base in cls.__mro__:
        for spelling in _spellings(option):
            if spelling in vars(base):
                names |= _validated(cls, spelling, getattr(base, spelling))
    return frozenset(names)


def _validated(cls: type, option: str, value: Any) -> set[str]:
    elements: Any = value  # not narrowed: a checker forgets the type arguments then
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise MappingError(f"{cls.__name__}.{option} must be a list of column names, not {value!r}.")
    names = set(elements)
    if not all(isinstance(name, str) for name in names):
        raise MappingError(f"{cls.__name__}.{option} must be a list of column names as strings.")
    return names


def _tablename(cls: type) -> str | None:
    for base in cls.__mro__:
        if base is not cls and find_mapper(base) is not None:
            return None
        for spelling in _spellings("__chrononaut_tablename__"):
            if spelling in vars(base):
                value = getattr(cls, spelling)
                if not isinstance(value, str) or not value:
                    raise MappingError(f"{cls.__name__}.{spelling} must be a table name, not {value!r}.")
                return value
    return None
