"""Attach versioning to sessions: the only module that listens to the events of sessions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Result, event
from sqlalchemy.orm import (
    ORMExecuteState,
    Session,
    SessionTransaction,
    SessionTransactionOrigin,
    UOWTransaction,
    scoped_session,
    sessionmaker,
)

from chrononaut._flush import begin_flush, end_flush, hear_transaction
from chrononaut._history_record import HistoryRecord
from chrononaut._mapping import mapping_of
from chrononaut._statements import capture_statement
from chrononaut._transaction import (
    SessionConfig,
    configure,
    configured,
    expire_listed,
    find_config,
    forget_transaction,
)
from chrononaut.exceptions import ChrononautException
from chrononaut.typing import ChangeInfoProvider, Clock

Target = TypeVar("Target")


def versioned_session(
    target: Target,
    *,
    change_info: ChangeInfoProvider | None = None,
    require_extra_change_info: bool | Callable[[], bool] = False,
    clock: Clock | None = None,
) -> Target:
    """Let sessions record the history of versioned models.

    Attaching twice is the same as attaching once, with the later settings. E.g.::

        Session = versioned_session(sessionmaker(engine), change_info=current_user_info)

    :param target: a session, a class of sessions, or what makes sessions: ``sessionmaker``, ``scoped_session``,
        ``AsyncSession``, ``async_sessionmaker``, ``async_scoped_session``.
    :param change_info: called without arguments when something is captured; returns who is changing things, as
        a mapping that JSON can hold.
    :param require_extra_change_info: refuse changes that are made without ``extra_change_info``, ``rationale``
        or ``append_change_info``. A callable is asked at each flush, together with ``change_info``.
    :param clock: returns the time, as an aware datetime, instead of the database; called once for each
        transaction. For tests and imports.
    :return: the target.
    :raises ChrononautException: if the target is none of these.
    """
    config = SessionConfig(change_info, require_extra_change_info, clock)
    sessions = _sync_sessions(target)
    # Not event.contains(): it goes by id(), and may take a new class for one that is gone.
    is_attached = configured(sessions) is not None
    configure(sessions, config)
    if not is_attached:
        for name, listener in _LISTENERS.items():
            event.listen(sessions, name, listener)
    return target


def _sync_sessions(target: Any) -> Session | type[Session]:
    """Return the session, or the class of just those sessions, that a target stands for."""
    given = target  # not narrowed: a checker forgets the type arguments then
    if isinstance(target, Session) or (isinstance(target, type) and issubclass(target, Session)):
        return target
    if isinstance(target, sessionmaker):
        return cast("type[Session]", given.class_)
    if isinstance(target, scoped_session):
        return _sync_sessions(given.session_factory)
    # SQLAlchemy's asyncio needs greenlet, which not everybody has; who passes one of its classes has imported it.
    if "sqlalchemy.ext.asyncio" in sys.modules:
        sessions = _sync_sessions_of_async(target)
        if sessions is not None:
            return sessions
    raise ChrononautException(
        f"versioned_session() cannot attach to {target!r}. Pass a Session, a sessionmaker, a scoped_session, "
        "or their asynchronous counterparts."
    )


def _sync_sessions_of_async(target: Any) -> Session | type[Session] | None:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

    given = target  # not narrowed: a checker forgets the type arguments then
    if isinstance(target, AsyncSession):
        return target.sync_session
    if isinstance(target, async_scoped_session):
        return _sync_sessions(given.session_factory)
    if isinstance(target, async_sessionmaker):
        sessions = given.kw.get("sync_session_class", given.class_.sync_session_class)
        if not _is_ours(sessions):
            sessions = _own_subclass(sessions)
            target.configure(sync_session_class=sessions)
        return cast("type[Session]", sessions)
    if isinstance(target, type) and issubclass(target, AsyncSession):
        if not _is_ours(vars(target).get("sync_session_class")):
            target.sync_session_class = _own_subclass(target.sync_session_class)
        return target.sync_session_class
    return None


def _is_ours(cls: type | None) -> bool:
    return cls is not None and "__chrononaut_attached__" in vars(cls)


def _own_subclass(cls: type[Session]) -> type[Session]:
    """Return a class of sessions for one target alone, so that others of the same class stay as they are."""
    return type(cls.__name__, (cls,), {"__chrononaut_attached__": True})


def _before_flush(session: Session, flush_context: UOWTransaction, instances: object) -> None:
    """Fire when a flush begins, before it has looked at anything."""
    config = find_config(session)
    if config is not None:
        try:
            begin_flush(session, config).prepare()
        except BaseException:
            end_flush(session)
            raise


def _after_flush(session: Session, flush_context: UOWTransaction) -> None:
    """Fire when a flush has written everything, inside its transaction."""
    flush = end_flush(session)
    if flush is not None:
        flush.finish()


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Fire when a transaction begins on a connection."""
    config = find_config(session)
    if config is not None:
        hear_transaction(session, config, connection)


def _after_soft_rollback(session: Session, transaction: SessionTransaction) -> None:
    """Fire when a transaction or a savepoint was rolled back, and its objects expired."""
    if transaction.nested:
        expire_listed(session)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """Fire when a transaction, a savepoint or a flush has ended, one way or another."""
    if transaction.origin is SessionTransactionOrigin.SUBTRANSACTION:
        end_flush(session)
    elif transaction.parent is None:
        end_flush(session)
        forget_transaction(session)


def _do_orm_execute(state: ORMExecuteState) -> Result[Any] | None:
    """Fire before a session executes a statement."""
    _bind_history(state)
    return capture_statement(state)


def _bind_history(state: ORMExecuteState) -> None:
    """Find history where the model is, whatever a session's binds name."""
    mapper, session = state.bind_mapper, state.session
    model: Any = None if mapper is None else mapper.class_
    if model is None or not issubclass(model, HistoryRecord) or "bind" in state.bind_arguments:
        return
    # A session that finds its binds by itself sees our tables; it may not even take this argument.
    if type(session).get_bind is Session.get_bind:
        live = mapping_of(model.__chrononaut_model__).mapper
        state.bind_arguments["bind"] = session.get_bind(live)


_LISTENERS: dict[str, Callable[..., Any]] = {
    "do_orm_execute": _do_orm_execute,
    "after_begin": _after_begin,
    "before_flush": _before_flush,
    "after_flush": _after_flush,
    "after_soft_rollback": _after_soft_rollback,
    "after_transaction_end": _after_transaction_end,
}
