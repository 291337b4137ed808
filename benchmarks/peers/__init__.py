"""One module for each library that is measured; each runs in an environment and a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session


@dataclass(frozen=True)
class Peer:
    """What a scenario needs to know of a library.

    :param model: the mapped class; has ``id``, ``name``, ``email``, ``amount``, ``note``.
    :param create: makes all tables.
    :param session: makes a session.
    :param history_tables: the tables that it writes history to.
    :param versions: reads all versions of a record.
    :param version_at: reads the version of a record that was valid at an instant.
    :param as_of: opens a session on the past.
    :param does_not: what it does not record or do: those cells are marked, not timed as a win.
    """

    model: Any
    create: Callable[[Engine], None]
    session: Callable[[Engine], Session]
    history_tables: tuple[str, ...] = ()
    versions: Callable[[Session, Any], list[Any]] | None = None
    version_at: Callable[[Session, Any, datetime], Any] | None = None
    as_of: Callable[[Session, datetime], Any] | None = None
    does_not: dict[str, str] = field(default_factory=dict)
