"""Public protocols and aliases."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, Protocol, TypeAlias

__all__ = ["ChangeInfo", "ChangeInfoProvider", "Clock", "Operation", "Progress"]

ChangeInfo: TypeAlias = dict[str, Any]
"""Who ended a state and why: ``user_id`` and ``remote_addr`` (text or ``None``), the application's
own keys, ``extra`` (a dict) if extra info was given, and ``hidden_cols_changed`` (a list of names)
if hidden columns changed."""

Operation: TypeAlias = Literal["insert", "update", "delete"]
"""What ended a state."""


class ChangeInfoProvider(Protocol):
    """Tell who is changing things right now.

    Called without arguments whenever a flush or statement captures something. What it returns
    is recorded as change info, so JSON must be able to hold it. E.g.::

        def current_worker() -> dict[str, Any]:
            return {"user_id": "nightly-import", "remote_addr": None, "host": gethostname()}
    """

    def __call__(self) -> Mapping[str, Any]:
        """Return who is changing things."""
        ...


class Clock(Protocol):
    """Tell the time. Must return an aware datetime."""

    def __call__(self) -> datetime:
        """Return the time."""
        ...


class Progress(Protocol):
    """Hear how far a long run over a table has come."""

    def __call__(self, what: str, done: int, total: int, /) -> None:
        """Be told after every chunk.

        :param what: what is being done, e.g. the name of the table.
        :param done: how many of its rows are done.
        :param total: how many there were at the start.
        """
        ...
