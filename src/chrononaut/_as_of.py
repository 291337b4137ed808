"""Read the whole database as it was at an instant."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn, cast, overload

from sqlalchemy import Connection, Engine, Table, event, inspect
from sqlalchemy.orm import Mapper, ORMExecuteState, Query, Session, scoped_session
from sqlalchemy.sql.functions import FunctionElement

from chrononaut._history_record import HistoryRecord
from chrononaut._left_out import forget_left_out
from chrononaut._mapping import mapping_of
from chrononaut._past_checks import row_lock_error
from chrononaut._past_statements import AS_OF, Past, Unversioned, home_of, mark_past
from chrononaut._types import as_utc
from chrononaut.exceptions import ChrononautException, ReadOnlyError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session


@overload
def as_of(
    target: Session | scoped_session[Any] | Engine | Connection, at: datetime, *, unversioned: Unversioned = "live"
) -> AbstractContextManager[Session]: ...


@overload
def as_of(
    target: AsyncSession | async_scoped_session[Any] | AsyncEngine | AsyncConnection,
    at: datetime,
    *,
    unversioned: Unversioned = "live",
) -> AbstractAsyncContextManager[AsyncSession]: ...


def as_of(target: Any, at: datetime, *, unversioned: Unversioned = "live") -> Any:
    """Open a read-only session in which everything is as it was at an instant.

    It is an ordinary session with its own identity map: real instances of the models come back, and every query, lazy
    load, eager load and join sees the past. History itself is as it was, too. E.g.::

        with as_of(session, last_friday) as past:
            user = past.get(User, 1)
            print(user.email, [post.title for post in user.posts])

    :param target: a session, whose connection and transaction are used and left as they are, so that what it has
        flushed is seen; or an engine or connection. Given an asynchronous one, use ``async with``. A session's
        ``do_orm_execute`` listeners hear the statements about the past, too, e.g. to filter by tenant, and find a copy
        of its ``info`` there; ``info["chrononaut_as_of"]`` is the instant. A session of the past stands for the one
        that it was opened on.
    :param at: the instant (aware). A state is seen from when it began (inclusive) to when it ended (exclusive); e.g.
        the ``changed`` of a history row shows what came after that row.
    :param unversioned: ``"live"`` shows tables that are not versioned as they are now, ``"raise"`` refuses them.
    :return: a context manager.
    :raises NaiveDatetimeError: if the instant has no zone.
    :raises ReadOnlyError: in the session, for any attempt to write or to lock rows, for textual SQL, and for
        ``connection()``; at the end of the block, if objects of the past were changed.
    :raises HiddenAttributeError: in the session, where a hidden attribute is read or queried.
    :raises UntrackedAttributeError: in the session, where an untracked attribute is read or queried.
    """
    past = Past(as_utc(at, "at"), unversioned)
    if unversioned not in ("live", "raise"):
        raise ChrononautException(f"as_of(unversioned=...) is 'live' or 'raise', not {unversioned!r}.")
    given: Any = target  # not narrowed: a checker forgets the type arguments then
    if isinstance(target, scoped_session):
        given = given()
    if isinstance(given, Session | Engine | Connection):
        return _open(given, past)
    # SQLAlchemy's asyncio needs greenlet, which not everybody has; who passes one of its classes has imported it.
    if "sqlalchemy.ext.asyncio" in sys.modules:
        from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session

        if isinstance(target, async_scoped_session):
            given = given()
        if isinstance(given, AsyncSession | AsyncEngine | AsyncConnection):
            return _open_async(given, past)
    raise ChrononautException(f"as_of() reads through a session, an engine or a connection, not through {target!r}.")


@contextmanager
def _open(target: Session | Engine | Connection, past: Past) -> Generator[Session]:
    if isinstance(target, Engine):
        with target.connect() as connection, _open(connection, past) as session:
            yield session
        return
    outer = target if isinstance(target, Session) else None
    session = _PastSession(None if outer else cast("Connection", target), past=past, outer=outer)
    try:
        yield session
        session.flush()
    finally:
        session.close()


@asynccontextmanager
async def _open_async(target: AsyncSession | AsyncEngine | AsyncConnection, past: Past) -> AsyncGenerator[AsyncSession]:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    if isinstance(target, AsyncEngine):
        async with target.connect() as connection, _open_async(connection, past) as session:
            yield session
        return
    outer = target.sync_session if isinstance(target, AsyncSession) else None
    bind = None if isinstance(target, AsyncSession) else target
    session = AsyncSession(bind, sync_session_class=_PastSession, past=past, outer=outer)
    try:
        yield session
        await session.flush()
    finally:
        await session.close()


class _PastSession(Session):
    """A session that reads the past."""

    def __init__(
        self, bind: Connection | None = None, *, binds: None = None, past: Past, outer: Session | None = None
    ) -> None:
        _refuse_shards(outer)
        if isinstance(outer, _PastSession):
            # Another instant of the same database: nothing is seen through two pasts.
            bind, outer = cast("Connection | None", outer.bind), outer.outer
        query_class = Query if outer is None else type(outer.query())
        super().__init__(bind, expire_on_commit=False, join_transaction_mode="rollback_only", query_cls=query_class)
        self._past = past
        self.outer: Session | None = outer
        self._connections: list[Connection] = []
        self._options: dict[Any, dict[str, Any]] = {}
        event.listen(self, "do_orm_execute", _refuse_writing)
        if outer is not None:
            self._hear(outer)
        # The last, so that it sees what the others have made of the statement.
        event.listen(self, "do_orm_execute", _do_orm_execute)
        event.listen(self, "loaded_as_persistent", _loaded_as_persistent)
        mark_past(self, past)
        if bind is not None:
            self._listen(bind)

    def _hear(self, outer: Session) -> None:
        """Have the outer session's listeners to statements hear ours, and find what they keep in its ``info``."""
        heard = set(self.dispatch.do_orm_execute)
        for listener in outer.dispatch.do_orm_execute:
            if listener not in heard:
                event.listen(self, "do_orm_execute", _without_answers(listener))
        self.info.update((key, value) for key, value in outer.info.items() if not _is_ours(key))

    # --- where statements go

    def get_bind(self, mapper: Any = None, *, clause: Any = None, bind: Any = None, **kw: Any) -> Any:
        if self.outer is None:
            return super().get_bind(mapper, clause=clause, bind=bind, **kw)
        cls: Any = getattr(inspect(mapper, raiseerr=False), "class_", None)
        if cls is not None and issubclass(cls, HistoryRecord):
            # History is where the model is.
            mapper = mapping_of(cls.__chrononaut_model__).mapper
        arguments = {"mapper": mapper, "clause": clause, "bind": bind, **kw}
        known = {name: value for name, value in arguments.items() if value is not None}
        connection = self.outer.connection(bind_arguments=known)
        if connection not in self._connections:
            self._listen(connection)
        return connection

    def _listen(self, connection: Connection) -> None:
        if any(other.engine is connection.engine for other in self._connections):
            # The outer session has ended its transaction, and our part in it is over as well.
            super().commit()
            self._stop_listening()
        event.listen(connection, "before_cursor_execute", self._past.rewrite, retval=True)
        self._connections.append(connection)

    def _stop_listening(self) -> None:
        for connection in self._connections:
            if not connection.closed:
                event.remove(connection, "before_cursor_execute", self._past.rewrite)
        self._connections.clear()

    def close(self) -> None:
        super().close()
        self._stop_listening()

    def prepare_statement(self, state: ORMExecuteState) -> None:
        """Make a statement one about the past."""
        statement: Any = state.statement  # not narrowed: a checker forgets the type arguments then
        # Not state.execution_options, which is older than what other listeners have made of them.
        given = {**statement.get_execution_options(), **state.local_execution_options}
        if given.get("populate_existing"):
            self.expire_all()
        mapper = state.bind_mapper
        home = _home(mapper) or home_of(statement)
        schemas = self._past.schemas_of(given)
        memo = (mapper, home, state.is_column_load, None if schemas is None else tuple(schemas.items()))
        if memo not in self._options:
            if schemas is None:
                bind: Any = self.get_bind(**state.bind_arguments)
                schemas = bind.get_execution_options().get("schema_translate_map")
            self._options[memo] = self._past.execution_options(home, schemas or {}, state.is_column_load)
        state.update_execution_options(**self._options[memo])

    # --- what is read only

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        changed = [*self.new, *self.deleted, *(instance for instance in self.dirty if self.is_modified(instance))]
        if changed:
            names = ", ".join(sorted({type(instance).__name__ for instance in changed}))
            raise ReadOnlyError(
                f"The past cannot be changed, but objects of this as_of() session were ({names}). Change those of the "
                "live session, e.g. by `live.revert_to(row)`."
            )

    def connection(self, *args: Any, **kw: Any) -> NoReturn:
        raise ReadOnlyError("A connection reads the present: pass the statement to this session, which reads the past.")

    def _refuse_to_write(self, *args: Any, **kw: Any) -> NoReturn:
        raise ReadOnlyError("The past cannot be changed.")

    bulk_save_objects = bulk_insert_mappings = bulk_update_mappings = _refuse_to_write

    def rollback(self) -> None:
        """Forget what was changed here. The transaction is somebody else's."""
        for instance in [*self.new, *self.deleted]:
            self.expunge(instance)
        self.expire_all()

    # --- what history does not hold stays unloaded

    def refresh(self, instance: Any, attribute_names: Any = None, with_for_update: Any = None) -> None:
        if with_for_update:
            raise row_lock_error()
        super().refresh(instance, attribute_names)
        self._forget_left_out()

    def expire(self, instance: Any, *args: Any, **kw: Any) -> None:
        super().expire(instance, *args, **kw)
        self._forget_left_out()

    def expire_all(self) -> None:
        super().expire_all()
        self._forget_left_out()

    def _forget_left_out(self) -> None:
        for instance in self:
            forget_left_out(instance)


def _refuse_writing(state: ORMExecuteState) -> None:
    """Fire before the past session executes anything, and before the outer session's listeners do."""
    if not (state.is_select or isinstance(state.statement, FunctionElement)):
        raise ReadOnlyError(
            "The past can only be read, by select() or Query: DML would change it, and textual SQL would read the "
            "present."
        )


def _do_orm_execute(state: ORMExecuteState) -> None:
    """Fire before the past session executes anything, lazy and eager loads included."""
    _refuse_writing(state)
    cast("_PastSession", state.session).prepare_statement(state)


def _without_answers(listener: Callable[[ORMExecuteState], Any]) -> Callable[[ORMExecuteState], None]:
    """Let a listener change the statements about the past, but not answer them: what it has cached is the present."""

    def listen(state: ORMExecuteState) -> None:
        """Fire before the past session executes anything."""
        if listener(state) is not None:
            raise ReadOnlyError(
                f"The do_orm_execute listener {getattr(listener, '__qualname__', listener)} answered a statement about "
                f'the past by itself. Let it leave the past alone: `if "{AS_OF}" in state.session.info: return`.'
            )

    return listen


def _refuse_shards(session: Session | None) -> None:
    """Refuse a session of several databases at once: we would ask one of them only."""
    # Whoever has such a session has imported its module.
    if "sqlalchemy.ext.horizontal_shard" in sys.modules:
        from sqlalchemy.ext.horizontal_shard import ShardedSession

        if isinstance(session, ShardedSession):
            raise ChrononautException(
                "as_of() cannot read the past of several shards at once: open one on the engine of each."
            )


def _is_ours(key: Any) -> bool:
    return isinstance(key, str) and key.removeprefix("_").startswith("chrononaut_")


def _loaded_as_persistent(session: Session, instance: object) -> None:
    """Fire when the past session has loaded an object."""
    forget_left_out(instance)


def _home(mapper: Mapper[Any] | None) -> Any:
    table = None if mapper is None else mapper.local_table
    return table.metadata if isinstance(table, Table) else None
