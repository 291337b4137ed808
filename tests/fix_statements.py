"""``statements``: what a block sends to the database."""

import contextlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

TRANSACTION_CONTROL = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE")

#: What each transaction that writes asks MariaDB once: it is part of the transaction, not of what is done in it.
CLOCK = "SELECT UTC_TIMESTAMP(6)"


@dataclass(frozen=True, slots=True)
class Statement:
    """One round trip to the database."""

    sql: str
    parameters: Any
    executemany: bool

    @property
    def verb(self) -> str:
        """The first word, e.g. ``"INSERT"``."""
        return self.sql.split(None, 1)[0].upper()


class StatementLog(list[Statement]):
    """The statements of a block, in order; it fills while the block runs."""

    def matching(self, pattern: str) -> list[Statement]:
        """The statements in which a regular expression is found, without regard to case."""
        return [s for s in self if re.search(pattern, s.sql, re.IGNORECASE)]

    @property
    def verbs(self) -> list[str]:
        """The first word of each statement."""
        return [s.verb for s in self]


RecordStatements = Callable[..., AbstractContextManager[StatementLog]]
"""``statements(on=engine, transaction_control=False)``."""


@contextlib.contextmanager
def record_statements(on: sa.Engine | sa.Connection, *, transaction_control: bool = False) -> Iterator[StatementLog]:
    """Record the statements executed on an engine or connection while the block runs.

    :param transaction_control: record SAVEPOINT and its like, and the question for the time, as well. The BEGIN and
        COMMIT that a driver sends by itself are never seen.
    """
    log = StatementLog()

    def record(
        _connection: sa.Connection,
        _cursor: object,
        sql: str,
        parameters: Any,
        _context: object,
        executemany: bool,
    ) -> None:
        statement = Statement(sql, parameters, executemany)
        if transaction_control or (statement.verb not in TRANSACTION_CONTROL and sql != CLOCK):
            log.append(statement)

    event.listen(on, "before_cursor_execute", record)
    try:
        yield log
    finally:
        event.remove(on, "before_cursor_execute", record)


@pytest.fixture
def statements(engine: sa.Engine) -> RecordStatements:
    """A recorder, used as ``with statements() as log: ...``."""

    def start(
        on: sa.Engine | sa.Connection = engine, *, transaction_control: bool = False
    ) -> AbstractContextManager[StatementLog]:
        return record_statements(on, transaction_control=transaction_control)

    return start
