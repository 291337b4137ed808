"""Capture the statements that a session executes: which rows they change is for the database to tell."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Result
from sqlalchemy.orm import ORMExecuteState
from sqlalchemy.sql.dml import UpdateBase

from chrononaut._inserts import Insertion
from chrononaut._on_conflict import is_upsert
from chrononaut._suppression import is_suppressed
from chrononaut._transaction import find_config
from chrononaut._updates import Change
from chrononaut._upserts import Upsertion


def capture_statement(state: ORMExecuteState) -> Result[Any] | None:
    """Capture what a statement changes, and execute it; None if there is nothing to capture.

    :raises UntrackedStatementError: if it cannot be captured; nothing is executed then.
    :raises RecordLockedError: if it would change a locked record.
    """
    if not isinstance(state.statement, UpdateBase):
        return None
    config = find_config(state.session)
    if config is None:
        return None
    if state.is_insert:
        is_captured_upsert = is_upsert(state.statement) and not is_suppressed()
        return (Upsertion if is_captured_upsert else Insertion)(state, config).insert()
    return None if is_suppressed() else Change(state, config).change()
