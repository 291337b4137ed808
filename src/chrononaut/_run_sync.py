"""Run what asks the database where it can be awaited."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.orm import object_session

from chrononaut.exceptions import ChrononautException

Answer = TypeVar("Answer")


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
