"""Attaching versioning to sessions, and sessions that were never attached."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from chrononaut import ChrononautException, select_versions, versioned_session
from chrononaut.unsafe import suppress_versioning
from tests.fix_models import Clock
from tests.models import Base, User, Visit


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


def change_twice(session: Session) -> User:
    user = User(email="a")
    session.add(user)
    session.commit()
    user.email = "b"
    session.commit()
    return user


def worker(name: str) -> Any:
    return lambda: {"user_id": name}


# --- what can be attached


def test_session_is_attached_and_returned(engine: sa.Engine) -> None:
    """One session alone."""
    session = Session(engine)
    assert versioned_session(session) is session
    with session:
        assert len(change_twice(session).versions()) == 1


def test_session_maker_is_attached_and_returned(engine: sa.Engine) -> None:
    """All sessions that a factory makes, also after."""
    factory = sessionmaker(engine)
    assert versioned_session(factory) is factory
    with factory() as session:
        assert len(change_twice(session).versions()) == 1


def test_sessions_made_before_their_factory_was_attached_are_attached(engine: sa.Engine) -> None:
    """It makes no difference which came first."""
    factory = sessionmaker(engine)
    with factory() as session:
        versioned_session(factory)
        assert len(change_twice(session).versions()) == 1


def test_session_class_is_attached(engine: sa.Engine) -> None:
    """A class of sessions, and what derives from it."""

    class MySession(Session):
        pass

    class Derived(MySession):
        pass

    assert versioned_session(MySession) is MySession
    for cls in (MySession, Derived):
        with cls(engine) as session:
            assert len(change_twice(session).versions()) == 1


def test_scoped_session_is_attached(engine: sa.Engine) -> None:
    """The registry of sessions for threads."""
    scoped = scoped_session(sessionmaker(engine))
    assert versioned_session(scoped) is scoped
    try:
        user = User(email="a")
        scoped.add(user)
        scoped.commit()
        user.email = "b"
        scoped.commit()
        assert len(user.versions()) == 1
    finally:
        scoped.remove()


def test_anything_else_is_refused() -> None:
    """The message says what can be attached."""
    with pytest.raises(ChrononautException, match="sessionmaker"):
        versioned_session(object())


def test_attaching_twice_is_attaching_once(engine: sa.Engine) -> None:
    """The later settings count, and nothing is captured twice."""
    calls = []

    def provider() -> dict[str, Any]:
        calls.append(1)
        return {"user_id": "later"}

    factory = versioned_session(sessionmaker(engine), change_info=worker("earlier"))
    versioned_session(factory, change_info=provider)
    with factory() as session:
        user = change_twice(session)
        [row] = user.versions()
    assert row.change_info["user_id"] == "later"
    assert len(calls) == 2


def test_a_session_attached_by_itself_wins_over_its_factory(engine: sa.Engine) -> None:
    """Its own settings count, and nothing is captured twice."""
    factory = versioned_session(sessionmaker(engine), change_info=worker("factory"))
    with versioned_session(factory(), change_info=worker("session")) as session:
        [row] = change_twice(session).versions()
        assert row.change_info["user_id"] == "session"
    with factory() as session:
        [row] = change_twice(session).versions()
        assert row.change_info["user_id"] == "factory"


def test_many_factories_come_and_go(engine: sa.Engine) -> None:
    """A factory is attached although one that is gone had the same id (the memory is used again)."""
    for _ in range(5):
        with versioned_session(sessionmaker(engine))() as session:
            session.add(User(email="a"))
            session.commit()
        del session
        gc.collect()


def test_other_factories_stay_as_they_are(engine: sa.Engine) -> None:
    """Attaching one attaches no other."""
    versioned_session(sessionmaker(engine))
    with sessionmaker(engine)() as session:
        session.add(User(email="a"))
        with pytest.raises(ChrononautException, match="not attached"):
            session.flush()


# --- asyncio


@pytest.fixture
def async_url(engine: sa.Engine) -> Iterator[sa.URL]:
    if engine.dialect.name == "postgresql":
        yield engine.url.set(drivername="postgresql+psycopg")
    else:
        yield engine.url.set(drivername="sqlite+aiosqlite")


async def change_twice_async(session: AsyncSession) -> list[Any]:
    user = User(email="a")
    session.add(user)
    await session.commit()
    user.email = "b"  # expired, and set without being read
    await session.commit()
    await session.refresh(user)
    return list(await session.scalars(select_versions(user)))


@pytest.mark.backends("sqlite-file", "postgresql")  # each connection to memory is a database of its own
@pytest.mark.parametrize("kind", ["session", "class", "factory", "scoped"])
def test_async_sessions_are_attached(async_url: sa.URL, kind: str) -> None:
    """An ``AsyncSession``, a class of them, and what makes them; others stay as they are."""

    async def run() -> None:
        engine = create_async_engine(async_url)

        class MySession(AsyncSession):
            pass

        target: Any
        session: Any
        if kind == "session":
            target = session = AsyncSession(engine)
        elif kind == "class":
            target, session = MySession, MySession(engine)
        elif kind == "factory":
            target = async_sessionmaker(engine)
            session = target()
        else:
            target = session = async_scoped_session(async_sessionmaker(engine), scopefunc=lambda: 1)
        assert versioned_session(target) is target
        if kind in ("class", "factory"):
            session = target(engine) if kind == "class" else target()
        rows = await change_twice_async(session)
        assert [row.email for row in rows] == ["a"]
        await session.close()
        async with AsyncSession(engine) as other:
            other.add(User(email="a"))
            with pytest.raises(ChrononautException, match="not attached"):
                await other.flush()
        await engine.dispose()

    asyncio.run(run())


# --- what was never attached


@pytest.fixture
def plain_session(engine: sa.Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def test_unattached_session_cannot_insert(plain_session: Session) -> None:
    """The message names the model and the way out."""
    plain_session.add(User(email="a"))
    with pytest.raises(ChrononautException, match=r"User is versioned.*versioned_session\("):
        plain_session.flush()


@pytest.mark.parametrize("how", ["update", "delete"])
def test_unattached_session_cannot_change(session: Session, plain_session: Session, how: str) -> None:
    """Neither update nor delete; what is in the database stays."""
    session.add(User(id=1, email="a"))
    session.commit()
    user = plain_session.get_one(User, 1)
    if how == "update":
        user.email = "b"
    else:
        plain_session.delete(user)
    with pytest.raises(ChrononautException, match="not attached"):
        plain_session.flush()
    plain_session.rollback()
    assert plain_session.get_one(User, 1).email == "a"


def test_unattached_session_reads_history(session: Session, plain_session: Session) -> None:
    """Reading needs no attaching."""
    user = change_twice(session)
    assert [row.email for row in plain_session.get_one(User, user.id).versions()] == ["a"]


def test_unattached_session_writes_inside_suppress_versioning(plain_session: Session) -> None:
    """Whoever takes the loss upon them need not attach."""
    with suppress_versioning():
        plain_session.add(User(id=1, email="a"))
        plain_session.commit()
    assert plain_session.get_one(User, 1).version == 0


def test_unattached_session_cannot_leave_change_marks_out(plain_session: Session) -> None:
    """Nor can a model that only records changes be written without."""
    plain_session.add(Visit(note="a"))
    with pytest.raises(ChrononautException, match="not attached"):
        plain_session.flush()


def test_clock_must_know_its_zone(engine: sa.Engine) -> None:
    """A naive time from the clock is refused before anything is written."""
    with versioned_session(sessionmaker(engine), clock=lambda: datetime(2024, 1, 1))() as session:
        session.add(User(id=1, email="a"))
        with pytest.raises(ChrononautException, match="clock"):
            session.flush()
        session.rollback()
        assert session.get(User, 1) is None


def test_clock_of_any_zone_is_recorded_in_utc(engine: sa.Engine, clock: Clock) -> None:
    """The same instant, whatever zone the clock tells it in."""
    there = timezone(timedelta(hours=5, minutes=45))
    with versioned_session(sessionmaker(engine), clock=lambda: clock.now.astimezone(there))() as session:
        [row] = change_twice(session).versions()
        assert row.changed == clock.now
        assert row.changed.utcoffset() == timedelta(0)
