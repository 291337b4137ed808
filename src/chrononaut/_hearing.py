"""Hear what is executed on the connections of attached sessions.

To listen on a connection anew for each transaction costs as much as a flush does. So each engine gets one set of
listeners, once, and a connection tells by an execution option who hears it at the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, event

#: The execution option of a connection that names its hearers.
_HEARERS = "chrononaut_hearers"
#: The execution option of an engine that holds our listeners.
_EARS = "chrononaut_ears"
#: What a statement is executed with, once for each.
Parameters = Sequence[Mapping[str, Any]]


class Hearer(Protocol):
    """Hears what is executed on a connection."""

    def before_execute(
        self, connection: Connection, statement: Any, parameters: Parameters, options: Mapping[str, Any]
    ) -> Any:
        """Return the statement that is executed instead of the one that is about to be."""
        ...

    def after_execute(self, connection: Connection, statement: Any, result: Any) -> None:
        """Take note of the result, before anybody else uses it."""
        ...

    def before_cursor_execute(self, connection: Connection, sql: str, context: Any) -> None:
        """Take note of what is sent to the database."""
        ...


class _Ears:
    """The listeners on one engine. Those made of it by ``Engine.execution_options`` have them too."""

    def before_execute(
        self, conn: Connection, clauseelement: Any, multiparams: Any, params: Any, execution_options: Mapping[str, Any]
    ) -> Any:
        """Fire before any statement."""
        for hearer in self._hearers(execution_options):
            clauseelement = hearer.before_execute(conn, clauseelement, multiparams or [params], execution_options)
        return clauseelement, multiparams, params

    def after_execute(
        self,
        conn: Connection,
        clauseelement: Any,
        multiparams: Any,
        params: Any,
        execution_options: Mapping[str, Any],
        result: Any,
    ) -> None:
        """Fire after any statement."""
        for hearer in self._hearers(execution_options):
            hearer.after_execute(conn, clauseelement, result)

    def before_cursor_execute(
        self, conn: Connection, cursor: object, statement: str, parameters: object, context: Any, executemany: bool
    ) -> None:
        """Fire before anything is sent to the database."""
        for hearer in self._hearers(context.execution_options):
            hearer.before_cursor_execute(conn, statement, context)

    def _hearers(self, options: Mapping[str, Any]) -> Sequence[Hearer]:
        ears, hearers = options.get(_HEARERS, _NOBODY)
        # An engine may have listeners of its own beside those of the one that it was made of.
        return hearers if ears is self else ()


#: What a connection's option holds: the listeners of its engine, and who hears it.
_Heard = tuple[_Ears | None, tuple[Hearer, ...]]
_NOBODY: _Heard = (None, ())


def hear(connection: Connection, hearers: Sequence[Hearer]) -> None:
    """Let some hear what is executed on a connection, until ``stop_hearing``."""
    ears, heard = _heard(connection)
    if ears is None:
        ears = _ears_of(connection.engine)
    connection.execution_options(**{_HEARERS: (ears, (*heard, *hearers))})


def stop_hearing(connection: Connection, hearers: Sequence[Hearer]) -> None:
    """Let them hear no more."""
    ears, heard = _heard(connection)
    connection.execution_options(**{_HEARERS: (ears, tuple(each for each in heard if each not in hearers))})


def _heard(connection: Connection) -> _Heard:
    heard: _Heard = connection.get_execution_options().get(_HEARERS, _NOBODY)
    return heard


def _ears_of(engine: Engine) -> _Ears:
    """Return the listeners on an engine; made once."""
    ears: _Ears | None = engine.get_execution_options().get(_EARS)
    if ears is None:
        ears = _Ears()
        event.listen(engine, "before_execute", ears.before_execute, retval=True)
        event.listen(engine, "after_execute", ears.after_execute)
        event.listen(engine, "before_cursor_execute", ears.before_cursor_execute)
        # At last, so that if another thread does the same, those that are found do listen.
        engine.update_execution_options(**{_EARS: ears})
    return ears
