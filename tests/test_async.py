"""Versioned models under AsyncSession, with every asynchronous driver."""

import asyncio
import gc
import subprocess
import sys
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncAttrs,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.orm.attributes import set_committed_value

from chrononaut import (
    ChrononautException,
    StaleVersionError,
    Versioned,
    append_change_info,
    extra_change_info,
    history_class,
    rationale,
    select_versions,
    versioned_session,
)
from tests.fix_async import create_tables
from tests.fix_models import Clock

pytestmark = pytest.mark.anyio


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Account(Versioned, Base):
    __tablename__ = "account"
    __chrononaut_hidden__ = ["secret"]
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(50))
    secret: Mapped[str | None] = mapped_column(sa.String(50))
    notes: Mapped[str | None] = mapped_column(sa.String(50), deferred=True)
    entries: Mapped[list["Entry"]] = relationship(back_populates="account", cascade="all, delete-orphan")


class Entry(Versioned, Base):
    __tablename__ = "entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int] = mapped_column(sa.ForeignKey("account.id"))
    text: Mapped[str] = mapped_column(sa.String(50))
    account: Mapped[Account] = relationship(back_populates="entries")


class Plain(Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(50))


@pytest.fixture
async def factory(
    async_engine: AsyncEngine, async_session_factory: async_sessionmaker[AsyncSession]
) -> async_sessionmaker[AsyncSession]:
    """Versioned sessions on a database that has the tables."""
    await create_tables(async_engine, Base.metadata)
    return async_session_factory


async def names_of(session: AsyncSession, account: Account) -> list[str]:
    return [row.name for row in await session.scalars(select_versions(account))]


async def test_each_change_is_captured(factory: async_sessionmaker[AsyncSession]) -> None:
    """Inserts, updates and deletions leave their history, of one record and of many."""
    async with factory.begin() as session:
        accounts = [Account(id=number, name=f"a{number}") for number in range(1, 4)]
        accounts[0].entries = [Entry(text="one"), Entry(text="two")]
        session.add_all(accounts)
    async with factory.begin() as session:
        for account in await session.scalars(sa.select(Account)):
            account.name += "!"
    async with factory.begin() as session:
        account = await session.get_one(Account, 1)
        (await account.awaitable_attrs.entries).pop()
    async with factory.begin() as session:
        await session.delete(await session.get_one(Account, 1))
    async with factory() as session:
        history: Any = history_class(Account)
        rows = await session.scalars(sa.select(history).order_by(history.id, history.version))
        told = [(row.id, row.version, row.operation, row.name) for row in rows]
        assert told == [
            (1, -1, "insert", None),
            (1, 0, "update", "a1"),
            (1, 1, "delete", "a1!"),
            (2, -1, "insert", None),
            (2, 0, "update", "a2"),
            (3, -1, "insert", None),
            (3, 0, "update", "a3"),
        ]
        entries = await session.scalars(sa.select(history_class(Entry).operation))
        assert sorted(entries) == ["delete", "delete", "insert", "insert"]


async def test_assigning_to_an_expired_attribute_reads_nothing(factory: async_sessionmaker[AsyncSession]) -> None:
    """After a commit, attributes can be set as on an unversioned model; the old values are read by the flush."""
    async with factory() as session:
        account, plain = Account(name="old", notes="x", secret="s"), Plain(name="old")
        session.add_all([account, plain])
        await session.commit()
        for text in ("one", "two"):
            plain.name = account.name = text
            account.notes = text
            account.secret = text
            await session.commit()
        await session.refresh(account)
        assert await names_of(session, account) == ["old", "one"]
        await session.commit()
        await session.delete(account)
        await session.commit()


async def test_every_read_has_an_awaitable_form(async_engine: AsyncEngine, clock: Clock) -> None:
    """``awaitable_history`` has the record's methods under their names."""
    await create_tables(async_engine, Base.metadata)
    factory = versioned_session(async_sessionmaker(async_engine), clock=clock)
    async with factory() as session:
        account = Account(name="one", secret="s")
        session.add(account)
        await session.commit()
        born = clock()
        clock.advance()
        account.name, account.secret = "two", "t"
        await session.commit()
        history = account.awaitable_history
        (row,) = await history.versions()
        assert row.name == "one"
        assert await history.versions(before=born) == []
        assert await history.version_at(born) is row
        assert await history.version_at(clock()) is account
        assert await history.previous_version() is row
        assert await history.has_changed_since(born)
        assert not await history.has_changed_since(clock())
        assert await history.diff(row) == {"name": ("one", "two")}
        session.expire(account)
        assert await history.diff(row, include_hidden=True) == {"name": ("one", "two"), "secret": (None, "t")}
        naive = datetime(2024, 1, 1)
        with pytest.raises(ValueError, match="naive"):
            await history.version_at(naive)


async def test_the_way_back_can_be_awaited(factory: async_sessionmaker[AsyncSession]) -> None:
    """A record is put back, expired or not, and a deleted one is brought back."""
    async with factory() as session:
        account = Account(id=1, name="one", notes="n")
        session.add(account)
        await session.commit()
        account.name = "two"
        await session.commit()
        (row,) = await account.awaitable_history.versions()
        session.expire_all()
        await account.awaitable_history.revert_to(row)
        await session.commit()
        await session.delete(account)
        await session.commit()
        row = (await session.scalars(select_versions(account).where(history_class(Account).name == "two"))).one()
        again = await row.awaitable_history.restore()
        await session.commit()
        await session.refresh(again)
        assert (again.name, again.version) == ("two", 4)


async def test_awaitable_form_needs_an_async_session(factory: async_sessionmaker[AsyncSession]) -> None:
    """In no session, or in an ordinary one, the error says what to do."""
    account = Account(id=1, name="one")
    with pytest.raises(ChrononautException, match="not attached to a session"):
        await account.awaitable_history.versions()
    with versioned_session(Session()) as session:
        session.add(account)
        with pytest.raises(ChrononautException, match="call the record's own method"):
            await account.awaitable_history.versions()


# SQLAlchemy drops the driver's coroutine that could not be awaited; it is collected here, not in a later test.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_plain_form_says_how_to_await(factory: async_sessionmaker[AsyncSession]) -> None:
    """A read that is not awaited is refused with the name of the form that is."""
    async with factory() as session:
        account = Account(name="one")
        session.add(account)
        await session.commit()
        now = datetime.now(timezone.utc)
        calls: dict[str, Callable[[], object]] = {
            "versions": account.versions,
            "previous_version": account.previous_version,
            "version_at": lambda: account.version_at(now),
            "has_changed_since": lambda: account.has_changed_since(now),
        }
        for name, call in calls.items():
            with pytest.raises(ChrononautException, match=rf"await record\.awaitable_history\.{name}\("):
                call()
        row = await account.awaitable_history.previous_version()
        assert row is None
    gc.collect()


async def test_stale_record_is_refused(factory: async_sessionmaker[AsyncSession]) -> None:
    """Two sessions that change the same record: the second is told."""
    async with factory.begin() as session:
        session.add(Account(id=1, name="old"))
    async with factory() as one:
        mine = await one.get_one(Account, 1)
        await one.commit()
        await one.refresh(mine)
        version = mine.version
        await one.rollback()
        async with factory.begin() as other:
            (await other.get_one(Account, 1)).name = "other"
        await one.refresh(mine)
        set_committed_value(mine, "version", version)
        mine.name = "mine"
        with pytest.raises(StaleVersionError):
            await one.flush()


@pytest.mark.parametrize("kind", ["instance", "class", "scoped", "sessionmaker", "sessionmaker of class"])
async def test_everything_asynchronous_can_be_attached(async_engine: AsyncEngine, kind: str) -> None:
    """Sessions of each asynchronous kind record, attached once or twice; others stay as they are."""
    await create_tables(async_engine, Base.metadata)

    class Own(AsyncSession):
        pass

    made: Any
    if kind == "instance":
        made = versioned_session(versioned_session(AsyncSession(async_engine)))
        session: Any = made
    elif kind == "class":
        assert versioned_session(versioned_session(Own)) is Own
        session = Own(async_engine)
    elif kind == "scoped":
        made = async_scoped_session(async_sessionmaker(async_engine), scopefunc=asyncio.current_task)
        session = versioned_session(versioned_session(made))
    elif kind == "sessionmaker":
        session = versioned_session(versioned_session(async_sessionmaker(async_engine)))()
    else:
        session = versioned_session(async_sessionmaker(async_engine, class_=Own))()
    session.add(Account(id=1, name="one"))
    await session.commit()
    (await session.get_one(Account, 1)).name = "two"
    await session.commit()
    rows = (await session.scalars(sa.select(history_class(Account)))).all()
    assert sorted(row.version for row in rows) == [-1, 0]
    await session.close()
    async with AsyncSession(async_engine) as other:
        (await other.get_one(Account, 1)).name = "three"
        with pytest.raises(ChrononautException, match="not attached"):
            await other.commit()


user_of_task: ContextVar[str] = ContextVar("user_of_task")


async def test_tasks_never_mix_their_contexts(async_engine: AsyncEngine) -> None:
    """200 tasks at once, each with a user, a reason and an extra of its own, record just those."""
    await create_tables(async_engine, Base.metadata)
    factory = versioned_session(async_sessionmaker(async_engine), change_info=lambda: {"user_id": user_of_task.get()})

    async def work(number: int) -> None:
        user_of_task.set(f"user {number}")
        async with factory() as session:
            with rationale(f"reason {number}"):
                account = Account(id=number, name="0")
                session.add(account)
                await asyncio.sleep(0)
                await session.commit()
                await asyncio.sleep(0)
                with extra_change_info(task=number):
                    append_change_info(account, appended=number)
                    account.name = "1"
                    await session.commit()
            account.name = "2"
            await session.commit()

    await asyncio.gather(*(work(number) for number in range(1, 201)))
    async with factory() as session:
        history: Any = history_class(Account)
        rows = (await session.scalars(sa.select(history).order_by(history.id, history.version))).all()
    assert len(rows) == 600
    for row in rows:
        expected: dict[str, Any] = {"user_id": f"user {row.id}", "remote_addr": None}
        if row.version < 1:
            expected["extra"] = {"rationale": f"reason {row.id}"}
        if row.version == 0:
            expected["extra"] |= {"task": row.id, "appended": row.id}
        assert row.change_info == expected


async def test_streaming_and_savepoints(factory: async_sessionmaker[AsyncSession]) -> None:
    """A savepoint that is rolled back takes its history along; history can be streamed."""
    async with factory() as session:
        account = Account(id=1, name="one")
        session.add(account)
        await session.commit()
        async with session.begin_nested():
            account.name = "two"
        savepoint = await session.begin_nested()
        account.name = "three"
        await session.flush()
        await savepoint.rollback()
        await session.refresh(account)
        account.name = "four"
        await session.commit()
        rows = await session.stream_scalars(select_versions(account))
        assert [row.name async for row in rows] == ["one", "two"]


def test_importing_needs_no_greenlet() -> None:
    """``import chrononaut`` works where greenlet is missing, and does not import SQLAlchemy's asyncio."""
    code = (
        "import sys; sys.modules['greenlet'] = None; import chrononaut; "
        "sys.exit('sqlalchemy.ext.asyncio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
