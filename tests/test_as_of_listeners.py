"""What a session's own listeners to statements hear of the past that is read through it."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
    with_loader_criteria,
)

from chrononaut import ChrononautException, UntrackedAttributeError, Versioned, as_of, versioned_session
from chrononaut.exceptions import ReadOnlyError
from tests.fix_models import Clock


class Models:
    """Notes of two tenants, in folders that they share."""

    def __init__(self, base: type[DeclarativeBase]) -> None:
        class Folder(Versioned, base):
            __tablename__ = "folder"
            id: Mapped[int] = mapped_column(primary_key=True)
            notes: Mapped[list["Note"]] = relationship(order_by="Note.id")

        class Note(Versioned, base):
            __tablename__ = "note"
            __chrononaut_untracked__ = ["owner"]
            id: Mapped[int] = mapped_column(primary_key=True)
            tenant: Mapped[str]
            text: Mapped[str]
            owner: Mapped[str] = mapped_column(default="somebody")
            folder_id: Mapped[int] = mapped_column(sa.ForeignKey("folder.id"))

        self.Folder, self.Note = Folder, Note

    def fill(self, session: Session, clock: Clock) -> datetime:
        """Write a note for each of two tenants, change them, and return the instant before."""
        notes = [self.Note(id=n, tenant=tenant, text="old") for n, tenant in enumerate(["mine", "theirs"], start=1)]
        session.add(self.Folder(id=1, notes=notes))
        session.commit()
        then = clock.now
        clock.advance()
        for note in notes:
            note.text = "new"
        session.commit()
        return then


@pytest.fixture
def models(base: type[DeclarativeBase], engine: sa.Engine) -> Models:
    models = Models(base)
    base.metadata.create_all(engine)
    return models


@pytest.fixture
def then(models: Models, engine: sa.Engine, clock: Clock) -> datetime:
    """An instant after which everything has changed."""
    with versioned_session(Session(engine), clock=clock) as session:
        return models.fill(session, clock)


@pytest.fixture
def factory(engine: sa.Engine) -> sessionmaker[Session]:
    return versioned_session(sessionmaker(engine, info={"tenant": "mine"}))


Listener = Callable[[ORMExecuteState], None]


@pytest.fixture
def only_mine(models: Models) -> Listener:
    """What keeps each tenant to its own notes, as the manual of SQLAlchemy has it."""

    def only_mine(state: ORMExecuteState) -> None:
        """Fire before a session executes a statement."""
        if state.is_select and not state.is_column_load and not state.is_relationship_load:
            tenant = state.session.info["tenant"]
            criteria = with_loader_criteria(models.Note, lambda cls: cls.tenant == tenant, include_aliases=True)
            state.statement = state.statement.options(criteria)

    return only_mine


def _texts(models: Models, session: Session) -> list[list[str]]:
    Folder, Note = models.Folder, models.Note
    return [
        [note.text for note in session.scalars(sa.select(Note).order_by(Note.id))],
        [note.text for note in session.scalars(sa.select(Folder)).one().notes],
        [] if session.get(Note, 2) is None else ["leaked"],
        [str(count) for count in session.scalars(sa.select(sa.func.count(Note.id)))],
    ]


@pytest.mark.parametrize("on", ["factory", "scoped", "class", "instance"])
def test_the_filter_of_a_tenant_holds_in_the_past(
    on: str, models: Models, factory: sessionmaker[Session], only_mine: Listener, then: datetime, clock: Clock
) -> None:
    """A ``do_orm_execute`` listener of a session, a class or a factory filters the past as it does the present."""
    session = factory()
    target: Any = {"factory": factory, "scoped": scoped_session(factory), "class": type(session), "instance": session}[
        on
    ]
    event.listen(target, "do_orm_execute", only_mine)
    with session:
        assert _texts(models, session) == [["new"], ["new"], [], ["1"]]
        with as_of(session, then) as past:
            assert _texts(models, past) == [["old"], ["old"], [], ["1"]]
            with as_of(past, clock.now) as later:
                assert _texts(models, later) == [["new"], ["new"], [], ["1"]]
    with as_of(factory.kw["bind"], then) as past:  # an engine has no listeners
        assert past.scalars(sa.select(models.Note.text)).all() == ["old", "old"]


def test_a_listener_of_all_sessions_is_called_once(models: Models, factory: Any, then: datetime) -> None:
    """What listens to ``Session`` itself hears each statement about the past once."""
    heard: list[ORMExecuteState] = []
    listener = heard.append
    event.listen(Session, "do_orm_execute", listener)
    try:
        with factory() as session, as_of(session, then) as past:
            past.scalars(sa.select(models.Note.text)).all()
    finally:
        event.remove(Session, "do_orm_execute", listener)
    assert len(heard) == 1


def test_a_criterion_on_what_history_does_not_hold_is_refused(
    models: Models, factory: sessionmaker[Session], then: datetime
) -> None:
    """A listener that filters by an untracked column raises, for it would find what was not so."""

    def by_owner(state: ORMExecuteState) -> None:
        """Fire before a session executes a statement."""
        criteria = with_loader_criteria(models.Note, models.Note.owner == "somebody")
        state.statement = state.statement.options(criteria)

    event.listen(factory, "do_orm_execute", by_owner)
    with factory() as session, as_of(session, then) as past:
        for query in (sa.select(models.Note), sa.select(models.Folder.id).join(models.Folder.notes)):
            with pytest.raises(UntrackedAttributeError, match=r"Note\.owner"):
                past.execute(query)


def test_a_listener_may_choose_the_schema(models: Models, factory: sessionmaker[Session], then: datetime) -> None:
    """A listener that maps schemas decides where the past is read, as it does for the present."""

    def nowhere(state: ORMExecuteState) -> None:
        """Fire before a session executes a statement."""
        state.update_execution_options(schema_translate_map={None: "nowhere"})

    event.listen(factory, "do_orm_execute", nowhere)
    with factory() as session, as_of(session, then) as past, pytest.raises(sa.exc.DBAPIError, match="nowhere"):
        past.scalars(sa.select(models.Note.text)).all()


def test_a_listener_cannot_answer_from_its_cache(
    models: Models, factory: sessionmaker[Session], then: datetime
) -> None:
    """A listener that returns a result of its own is refused in the past, unless it leaves the past alone."""
    leaves_alone = False

    def answer(state: ORMExecuteState) -> Any:
        """Fire before a session executes a statement."""
        if leaves_alone and "chrononaut_as_of" in state.session.info:
            assert state.session.info["chrononaut_as_of"] == then
            return None
        return state.invoke_statement().freeze()()

    event.listen(factory, "do_orm_execute", answer)
    query = sa.select(models.Note.text)
    with factory() as session:
        assert session.scalars(query).all() == ["new", "new"]
        with as_of(session, then) as past:
            with pytest.raises(ReadOnlyError, match=r"answer answered .*chrononaut_as_of"):
                past.scalars(query)
            leaves_alone = True
            assert past.scalars(query).all() == ["old", "old"]
        assert "chrononaut_as_of" not in session.info


def test_nothing_of_a_write_reaches_the_listeners(
    models: Models, factory: sessionmaker[Session], then: datetime
) -> None:
    """DML is refused before a listener hears of it, and listeners to flushes hear nothing of the past."""
    heard: list[Any] = []
    event.listen(factory, "do_orm_execute", heard.append)
    event.listen(factory, "before_flush", lambda *arguments: heard.append(arguments))
    with factory() as session, as_of(session, then) as past:
        with pytest.raises(ReadOnlyError):
            past.execute(sa.update(models.Note).values(text="x"))
        past.flush()
    assert heard == []


def test_a_session_of_several_shards_is_refused(engine: sa.Engine, then: datetime) -> None:
    """The past of a ShardedSession would be that of one shard, so it is refused instead."""
    session = ShardedSession(
        shard_chooser=lambda *arguments, **named: "one",
        identity_chooser=lambda *arguments, **named: ["one"],
        execute_chooser=lambda context: ["one"],
        shards={"one": engine},
    )
    with session, pytest.raises(ChrononautException, match="on the engine of each"), as_of(session, then):
        pass


@pytest.fixture
async def async_models(base: type[DeclarativeBase], async_engine: AsyncEngine) -> Models:
    models = Models(base)
    async with async_engine.begin() as connection:
        await connection.run_sync(base.metadata.create_all)
    return models


@pytest.mark.anyio
async def test_an_async_session_is_heard_through_its_sync_class(
    async_models: Models, async_engine: AsyncEngine, clock: Clock
) -> None:
    """The listeners of an AsyncSession's own synchronous sessions hear the past, too; pasts nest."""
    Note = async_models.Note
    factory = versioned_session(async_sessionmaker(async_engine, info={"tenant": "mine"}), clock=clock)
    async with factory() as session:
        then = await session.run_sync(async_models.fill, clock)

    def only_mine(state: ORMExecuteState) -> None:
        """Fire before a session executes a statement."""
        state.statement = state.statement.options(
            with_loader_criteria(Note, Note.tenant == state.session.info["tenant"])
        )

    async with factory() as session:
        event.listen(type(session.sync_session), "do_orm_execute", only_mine)
        async with as_of(session, then) as past, as_of(past, clock.now) as later:
            assert (await past.scalars(sa.select(Note.text))).all() == ["old"]
            assert (await later.scalars(sa.select(Note.text))).all() == ["new"]
    async with as_of(async_engine, then) as past, as_of(past, clock.now) as later:
        assert (await past.scalars(sa.select(Note.text))).all() == ["old", "old"]
        assert (await later.scalars(sa.select(Note.text))).all() == ["new", "new"]
