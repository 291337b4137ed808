"""Run what asks the database where it can be awaited."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from sqlalchemy.exc import MissingGreenlet, StatementError
from sqlalchemy.orm import Session, object_session, scoped_session

from chrononaut.exceptions import ChrononautException, NotAwaitedError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

Answer = TypeVar("Answer")
Parameters = ParamSpec("Parameters")


async def run_sync(record: object, call: Callable[[], Answer]) -> Answer:
    """Return what a function returns that asks the database through a record's ``AsyncSession``.

    :raises ChrononautException: if the record is in an ordinary session.
    """
    # Imported where it is used: SQLAlchemy's asyncio needs greenlet, which not everybody has.
    from sqlalchemy.ext.asyncio import async_session

    session = object_session(record)
    if session is None:
        return call()  # which says what is wrong
    found = async_session(session)
    if found is None:
        raise ChrononautException(
            f"This {type(record).__name__} is in a Session, not in an AsyncSession, so there is nothing to await: "
            "call the record's own method of that name."
        )
    return await found.run_sync(lambda _: call())


def to_be_awaited(
    form: str = "await record.awaitable_history.{}(...)",
) -> Callable[[Callable[Parameters, Answer]], Callable[Parameters, Answer]]:
    """Make a function that asks the database say how to await it, where it must be.

    :param form: what to write instead; ``{}`` stands for the function's name.
    """

    def decorate(function: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
        name = function.__name__

        @wraps(function)
        def call(*args: Parameters.args, **kw: Parameters.kwargs) -> Answer:
            try:
                return function(*args, **kw)
            except (MissingGreenlet, StatementError) as error:
                if isinstance(error, NotAwaitedError):
                    raise
                if isinstance(error, MissingGreenlet) or isinstance(error.orig, MissingGreenlet):
                    raise NotAwaitedError(name, form.format(name)) from error
                raise

        return call

    return decorate


def async_session_in(session: Any) -> AsyncSession | None:
    """Return an ``AsyncSession``, opened if it is a scoped one; None if it is a session of another kind."""
    # SQLAlchemy's asyncio needs greenlet, which not everybody has; who passes one of its classes has imported it.
    if "sqlalchemy.ext.asyncio" not in sys.modules:
        return None
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    opened: Any = session  # not narrowed: a checker forgets the type arguments then
    if isinstance(session, async_scoped_session):
        opened = opened()
    return opened if isinstance(opened, AsyncSession) else None


def session_in(session: Any) -> Session:
    """Return a session, opened if it is a scoped one."""
    opened: Any = session
    return cast("Session", opened() if isinstance(session, scoped_session) else opened)
