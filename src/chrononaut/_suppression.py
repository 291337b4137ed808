"""Whether versioning is suppressed in this thread or task."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum


class _Level(IntEnum):
    NONE = 0
    VERSIONING = 1
    DELETING_HISTORY = 2


_level: ContextVar[_Level] = ContextVar("chrononaut_suppression", default=_Level.NONE)


@contextmanager
def suppress_versioning(*, allow_deleting_history: bool = False) -> Generator[None]:
    """Write without recording history until the block ends, in this thread or task only.

    What is flushed or executed inside leaves no trace: a record's current state is amended
    in place, under its current version. E.g. a repair of data that never were so::

        with suppress_versioning():
            user.email = user.email.strip()
            session.commit()

    :param allow_deleting_history: also allow history rows to be deleted, e.g. to erase a person.
    """
    level = _Level.DELETING_HISTORY if allow_deleting_history else _Level.VERSIONING
    token = _level.set(max(level, _level.get()))
    try:
        yield
    finally:
        _level.reset(token)


def is_suppressed() -> bool:
    """Tell whether nothing is to be recorded."""
    return _level.get() > _Level.NONE


def may_delete_history() -> bool:
    """Tell whether history rows may be deleted."""
    return _level.get() is _Level.DELETING_HISTORY
