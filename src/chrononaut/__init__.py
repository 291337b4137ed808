"""Versioning, change tracking, record locking and time travel for SQLAlchemy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chrononaut._as_of import as_of
from chrononaut._associations import versioned_table
from chrononaut._change_info import append_change_info, extra_change_info, rationale
from chrononaut._changes import changes
from chrononaut._history_record import HistoryRecord
from chrononaut._hold import hold
from chrononaut._locking import Lockable, lock_where
from chrononaut._reader import history_class, select_versions
from chrononaut._record_changes import RecordChanges
from chrononaut._session import versioned_session
from chrononaut._timeline import Change
from chrononaut._versioned import Versioned
from chrononaut.exceptions import (
    ChrononautException,
    HiddenAttributeError,
    RecordLockedError,
    StaleVersionError,
    UntrackedAttributeError,
    UntrackedStatementError,
)
from chrononaut.typing import ChangeInfoProvider

if TYPE_CHECKING:
    from chrononaut.flask import VersionedSQLAlchemy

__all__ = [
    "Change",
    "ChangeInfoProvider",
    "ChrononautException",
    "HiddenAttributeError",
    "HistoryRecord",
    "Lockable",
    "RecordChanges",
    "RecordLockedError",
    "StaleVersionError",
    "UntrackedAttributeError",
    "UntrackedStatementError",
    "Versioned",
    "VersionedSQLAlchemy",
    "append_change_info",
    "as_of",
    "changes",
    "extra_change_info",
    "history_class",
    "hold",
    "lock_where",
    "rationale",
    "select_versions",
    "versioned_session",
    "versioned_table",
]


def __getattr__(name: str) -> Any:
    """Import the Flask adapter when it is first asked for, so that the core does not need Flask."""
    if name == "VersionedSQLAlchemy":
        from chrononaut.flask import VersionedSQLAlchemy

        return VersionedSQLAlchemy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
