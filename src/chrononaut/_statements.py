"""Capture the statements that a session executes: which rows they change is for the database to tell."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Result
from sqlalchemy.orm import ORMExecuteState
from sqlalchemy.sql.dml import UpdateBase

from chrononaut._inserts import Insertion
from chrononaut._suppression import is_suppressed
from chrononaut._transaction import find_config
from chrononaut._updates import Change


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
        return Insertion(state, config).insert()
    return None if is_suppressed() else Change(state, config).change()
