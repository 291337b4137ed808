"""Hold a record for as long as a transaction lasts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from sqlalchemy import Connection, text, update
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import InstanceState, Session, scoped_session
from sqlalchemy.orm.attributes import instance_state

from chrononaut._capture import live_version
from chrononaut._mapping import VersionedMapping, mapping_of
from chrononaut._run_sync import async_session_in, session_in
from chrononaut._transaction import config_of, transaction_of
from chrononaut.exceptions import ChrononautException, RecordHeldError, StaleVersionError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

Model = TypeVar("Model")

#: What databases call "somebody else holds the row": SQLSTATE, error number, or SQLite's words.
_HELD = ("55P03", "1205", "3572", "database is locked", "database table is locked")


@overload
def hold(
    session: Session | scoped_session[Any], record: Model, *, nowait: bool = False, timeout: float | None = None
) -> AbstractContextManager[Model]: ...


@overload
def hold(
    session: AsyncSession | async_scoped_session[Any],
    record: Model,
    *,
    nowait: bool = False,
    timeout: float | None = None,
) -> AbstractAsyncContextManager[Model]: ...


def hold(session: Any, record: Any, *, nowait: bool = False, timeout: float | None = None) -> Any:
    """Keep everybody else from changing a record until the transaction ends, and bring it up to date.

    The record's row is read again by SELECT ... FOR UPDATE; changes that are pending are flushed first. The
    hold ends with the transaction, not with the block: commit or roll back soon after it. E.g.::

        with hold(session, account, timeout=2):
            account.balance -= amount
            session.commit()

    SQLite has no row locks: there, the whole database is held, as by any write.

    :param session: the session that the record is in. With an ``AsyncSession``, use ``async with``.
    :param record: a versioned record that is in the database.
    :param nowait: raise at once if somebody else holds it.
    :param timeout: raise if somebody else still holds it after so many seconds (on MariaDB, whole ones, and at least
        one); wait as long as the database is set to if None.
    :return: a context manager, which gives the record.
    :raises RecordHeldError: if somebody else holds it. The transaction can go on.
    :raises StaleVersionError: if it was deleted.
    :raises ChrononautException: if it is not in this session, or both ``nowait`` and ``timeout`` are given.
    """
    asynchronous = async_session_in(session)
    if asynchronous is not None:
        return _hold_async(asynchronous, record, nowait, timeout)
    return _hold(session_in(session), record, nowait, timeout)


@contextmanager
def _hold(session: Session, record: Model, nowait: bool, timeout: float | None) -> Generator[Model]:
    _take(session, record, nowait, timeout)
    yield record


@asynccontextmanager
async def _hold_async(
    session: AsyncSession, record: Model, nowait: bool, timeout: float | None
) -> AsyncGenerator[Model]:
    await session.run_sync(_take, record, nowait, timeout)
    yield record


def _take(session: Session, record: object, nowait: bool, timeout: float | None) -> None:
    mapping = mapping_of(type(record))
    state: InstanceState[object] = instance_state(record)
    if nowait and timeout is not None:
        raise ChrononautException("hold() takes nowait or timeout, not both.")
    if state.session is not session or not state.has_identity:
        raise ChrononautException(f"hold() needs a {mapping.name} that is in this session and in the database.")
    session.flush()
    connection = session.connection(bind_arguments={"mapper": mapping.mapper})
    key = tuple(state.identity or ())
    try:
        if connection.dialect.name == "sqlite":
            _hold_sqlite(session, connection, mapping, key, 0 if nowait else timeout)
            session.refresh(record)
        else:
            with connection.begin_nested(), _patience(connection, timeout):
                session.refresh(record, with_for_update={"nowait": nowait})
    except DBAPIError as error:
        if any(sign in f"{getattr(error.orig, 'sqlstate', '')} {error.orig}" for sign in _HELD):
            raise RecordHeldError(mapping.name, key) from error
        raise
    except InvalidRequestError as error:
        raise StaleVersionError(mapping.name, key, cast("int | None", state.dict.get("version")), None) from error


@contextmanager
def _patience(connection: Connection, timeout: float | None) -> Generator[None]:
    """Let statements wait for locks for so many seconds."""
    if timeout is None:
        yield
    elif connection.dialect.name == "postgresql":
        # Inside a savepoint, which undoes it if the wait fails.
        before = connection.scalar(text("SELECT current_setting('lock_timeout')"))
        wait = text("SELECT set_config('lock_timeout', :time, true)")
        connection.execute(wait, {"time": f"{max(1, round(timeout * 1000))}ms"})
        yield
        connection.execute(wait, {"time": before})
    else:
        before = connection.scalar(text("SELECT @@SESSION.innodb_lock_wait_timeout"))
        connection.execute(text(f"SET SESSION innodb_lock_wait_timeout = {max(1, round(timeout))}"))
        try:
            yield
        finally:
            connection.execute(text(f"SET SESSION innodb_lock_wait_timeout = {before}"))


def _hold_sqlite(
    session: Session, connection: Connection, mapping: VersionedMapping, key: tuple[object, ...], wait: float | None
) -> None:
    """Take the write lock by an update that changes nothing."""
    base = mapping.base
    version = live_version(base)
    same = (column == part for column, part in zip(base.key, key, strict=True))
    before = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
    if wait is not None:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {round(wait * 1000)}")
    try:
        with transaction_of(session, config_of(session, mapping.mapper.class_)).passing():
            connection.execute(update(base.live).where(*same).values({version: version}))
    finally:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {before}")
