"""What asks the database has a form to be awaited, and says so where it is called without one."""

import gc
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from chrononaut import (
    ChrononautException,
    Lockable,
    RecordChanges,
    Versioned,
    append_change_info,
    changes,
    history_class,
    hold,
    lock_where,
    rationale,
    select_versions,
)
from chrononaut.exceptions import NotAwaitedError, RecordHeldError
from tests.fix_async import create_tables

# SQLAlchemy drops the driver's coroutine that could not be awaited; it is collected here, not in a later test.
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
NOW = datetime(2100, 1, 1, tzinfo=timezone.utc)


class Base(DeclarativeBase):
    pass


class Page(Lockable, RecordChanges, Versioned, Base):
    __tablename__ = "page"
    __chrononaut_hidden__ = ["secret"]
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None] = mapped_column(sa.String(50))
    secret: Mapped[str | None] = mapped_column(sa.String(50))
    text: Mapped[str | None] = mapped_column(sa.String(50), deferred=True)


class Tag(Versioned, Base):
    __tablename__ = "tag"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
async def factory(async_engine: AsyncEngine, async_session_factory: async_sessionmaker[AsyncSession]) -> Any:
    """Versioned sessions on a database with a page that has two ended states."""
    await create_tables(async_engine, Base.metadata)
    async with async_session_factory() as session:
        page = Page(id=1, title="0", text="t0", secret="s0")
        session.add(page)
        await session.commit()
        for number in (1, 2):
            page.title, page.text, page.secret = f"{number}", f"t{number}", f"s{number}"
            await session.commit()
    yield async_session_factory
    gc.collect()


METHODS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Awaitable[Any]], Any]] = {
    "versions": (lambda p, r: p.versions(), lambda p, r: p.awaitable_history.versions(), 2),
    "version_at": (lambda p, r: p.version_at(NOW), lambda p, r: p.awaitable_history.version_at(NOW), Page),
    "previous_version": (lambda p, r: p.previous_version(), lambda p, r: p.awaitable_history.previous_version(), r"1"),
    "has_changed_since": (
        lambda p, r: p.has_changed_since(NOW),
        lambda p, r: p.awaitable_history.has_changed_since(NOW),
        False,
    ),
    "diff": (
        lambda p, r: p.diff(r, include_hidden=True),
        lambda p, r: p.awaitable_history.diff(r, include_hidden=True),
        {"title": ("0", "2"), "text": ("t0", "t2"), "secret": (None, "s2"), "is_locked": None},
    ),
    "revert_to": (lambda p, r: p.revert_to(r), lambda p, r: p.awaitable_history.revert_to(r), None),
    "timeline": (lambda p, r: p.timeline(), lambda p, r: p.awaitable_history.timeline(), 3),
    "lock": (lambda p, r: p.lock("why"), lambda p, r: p.awaitable_history.lock("why"), None),
    "unlock": (lambda p, r: p.unlock("why"), lambda p, r: p.awaitable_history.unlock("why"), None),
}


@pytest.mark.parametrize("name", METHODS)
async def test_every_method_of_an_expired_record_can_be_awaited(
    factory: async_sessionmaker[AsyncSession], name: str
) -> None:
    """Called without ``await`` it names the form to use, which then does what the method does."""
    call, awaited, expected = METHODS[name]
    async with factory() as session:
        page = await session.get_one(Page, 1)
        row = (await session.scalars(select_versions(page))).first()
        session.expire_all()
        with pytest.raises(NotAwaitedError, match=rf"`await record\.awaitable_history\.{name}\(\.\.\.\)`"):
            call(page, row)
        await session.rollback()
        found = await awaited(page, row)
        if isinstance(expected, int) and not isinstance(expected, bool):
            assert len(found) == expected
        elif expected is Page:
            assert found is page
        elif isinstance(expected, dict):
            assert found == {key: value for key, value in expected.items() if value is not None}
        elif isinstance(expected, str):
            assert found.title == expected
        else:
            assert found == expected
        await session.commit()
        await session.refresh(page, ["title", "text", "version", "is_locked"])
        changed = {"revert_to": ("0", "t0", 3, False), "lock": ("2", "t2", 3, True)}
        assert (page.title, page.text, page.version, page.is_locked) == changed.get(name, ("2", "t2", 2, False))


async def test_restoring_can_be_awaited(factory: async_sessionmaker[AsyncSession]) -> None:
    """Called without ``await``, ``restore()`` names the form of the row."""
    async with factory() as session:
        page = await session.get_one(Page, 1)
        await session.delete(page)
        await session.commit()
        query = sa.select(history_class(Page)).where(history_class(Page).operation == "delete")
        row = (await session.scalars(query)).one()
        session.expire_all()
        with pytest.raises(NotAwaitedError, match=r"`await row\.awaitable_history\.restore\(\.\.\.\)`"):
            row.restore()
        await session.rollback()
        await row.awaitable_history.restore()
        await session.commit()
        again = await session.get_one(Page, 1)
        assert (again.title, again.version) == ("2", 4)


async def test_a_pending_record_is_flushed_before_its_history_is_asked_for(
    factory: async_sessionmaker[AsyncSession],
) -> None:
    """``select_versions`` cannot flush it, and says what to await."""
    async with factory() as session:
        page = Page(id=2)
        session.add(page)
        with pytest.raises(NotAwaitedError, match=r"`await session\.flush\(\)`"):
            select_versions(page)
        await session.rollback()
        session.add(page)
        assert await page.awaitable_history.versions() == []


async def test_only_what_is_lockable_is_locked(factory: async_sessionmaker[AsyncSession]) -> None:
    """The awaitable form is there on every versioned record, and refuses those without the mixin."""
    async with factory() as session:
        tag = Tag(id=1)
        session.add(tag)
        with pytest.raises(ChrononautException, match="Tag is not Lockable"):
            await tag.awaitable_history.lock()


async def test_nothing_that_only_writes_needs_awaiting(factory: async_sessionmaker[AsyncSession]) -> None:
    """Values, reasons and infos are given to an expired record without I/O."""
    async with factory() as session:
        page = await session.get_one(Page, 1)
        session.expire_all()
        with rationale("why"), append_change_info(page, ticket=7):
            page.title, page.text, page.secret = "3", "t3", "s3"
            await session.commit()
        row = await page.awaitable_history.previous_version()
        assert row is not None
        assert row.change_info["extra"] == {"rationale": "why", "ticket": 7}
        assert row.change_info["hidden_cols_changed"] == ["secret"]
        assert (row.title, await session.scalar(sa.select(history_class(Page).text).filter_by(version=2))) == (
            "2",
            "t2",
        )


@pytest.fixture(params=["session", "scoped"])
async def opened(request: pytest.FixtureRequest, factory: async_sessionmaker[AsyncSession]) -> Any:
    """An asynchronous session, or a scoped one, which stands for it."""
    if request.param == "session":
        async with factory() as session:
            yield session
    else:
        scoped = async_scoped_session(factory, scopefunc=lambda: 1)
        yield scoped
        await scoped.remove()


async def test_functions_of_a_session_take_an_asynchronous_one(opened: Any) -> None:
    """``hold`` is entered, ``lock_where`` awaited, and ``changes`` iterated over asynchronously."""
    page = await opened.get_one(Page, 1)
    async with hold(opened, page) as held:
        assert held is page
        page.title = "held"
        await opened.commit()
    assert await lock_where(opened, Page.id == 1, "closed") == 1
    await opened.commit()
    since = [change async for change in changes(opened, page_size=2, models=[Page])]
    assert [change.version for change in since] == [-1, 0, 1, 2, 3]
    assert (since[-1].rationale, since[-2].diff) == ("closed", {"title": ("2", "held")})
    assert [change.version async for change in changes(opened, after=since[3], models=[Page])] == [3]
    assert [change async for change in changes(opened, models=[])] == []


async def test_a_record_that_is_held_is_told_of(factory: async_sessionmaker[AsyncSession], driver: str) -> None:
    """A second session is refused, and its transaction can go on."""
    if driver == "aiosqlite":
        pytest.skip("there, the second transaction waits before it begins")
    async with factory() as one, factory() as two:
        mine, theirs = await one.get_one(Page, 1), await two.get_one(Page, 1)
        async with hold(one, mine):
            with pytest.raises(RecordHeldError):
                async with hold(two, theirs, nowait=True):
                    pass
            with pytest.raises(RecordHeldError):
                async with hold(two, theirs, timeout=0.1):
                    pass
            assert await two.scalar(sa.select(sa.func.count()).select_from(Page)) == 1
            await one.commit()
        async with hold(two, theirs, timeout=5):
            theirs.title = "later"
            await two.commit()


# --- attributes are what they are on unversioned models


class Unversioned:
    pass


def _family(mixin: type) -> Any:
    class Family(DeclarativeBase):
        pass

    class Parent(mixin, Family):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None] = mapped_column(sa.String(20))
        late: Mapped[str | None] = mapped_column(sa.String(20), deferred=True)
        count: Mapped[int] = mapped_column(server_default="0")
        children: Mapped[list["Child"]] = relationship(back_populates="parent", cascade="all, delete-orphan")

    class Child(mixin, Family):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int] = mapped_column(sa.ForeignKey("parent.id"))
        parent: Mapped[Parent] = relationship(back_populates="children")

    Family.parent, Family.child = Parent, Child
    return Family


def _set(record: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(record, name, value)


def _set_twice(parent: Any, child: Any) -> None:
    parent.name = "one"
    parent.name = "two"


def _read_after_setting(parent: Any, child: Any) -> None:
    parent.name = "new"
    assert parent.count == 0


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "set": lambda parent, child: _set(parent, name="new"),
    "set to the same": lambda parent, child: _set(parent, name="old"),
    "set deferred": lambda parent, child: _set(parent, late="new"),
    "set to an expression": lambda parent, child: _set(parent, count=type(parent).count + 1),
    "set the key": lambda parent, child: _set(parent, id=9),
    "set twice": _set_twice,
    "delete": lambda parent, child: delattr(parent, "name"),
    "read": lambda parent, child: parent.name,
    "read deferred": lambda parent, child: parent.late,
    "read after setting": _read_after_setting,
    "replace a collection": lambda parent, child: _set(parent, children=[]),
    "add to a collection": lambda parent, child: parent.children.append(type(child)(id=2)),
    "set a parent": lambda parent, child: setattr(child, "parent", type(parent)(id=7, name="other")),
    "set a foreign key": lambda parent, child: setattr(child, "parent_id", 5),
    "add a child": lambda parent, child: type(child)(id=2, parent=parent),
}


async def _outcome(factory: async_sessionmaker[AsyncSession], family: Any, operation: Callable[[Any, Any], Any]) -> Any:
    """Return what an operation on expired records does, at once, to the flush, and to the database."""
    async with factory() as session:
        session.add_all([family.parent(id=1, name="old", late="old"), family.parent(id=5)])
        await session.flush()
        session.add(family.child(id=1, parent_id=1))
        await session.commit()
        parent, child = await session.get_one(family.parent, 1), await session.get_one(family.child, 1)
        session.expire_all()
        steps: list[str] = []
        try:
            operation(parent, child)
            steps.append("done")
            await session.commit()
            steps.append("committed")
        except Exception as error:  # whatever it is: SQLAlchemy itself has more than its own here
            steps.append("MissingGreenlet" if "greenlet_spawn" in str(error) else type(error).__name__)
            await session.rollback()
        tables: Any = family.parent, family.child
        columns = ("id", "name", "late", "count"), ("id", "parent_id")
        for model, names in zip(tables, columns, strict=True):
            query = sa.select(*(getattr(model, name) for name in names)).order_by(model.id)
            steps += [str(tuple(row)) for row in await session.execute(query)]
        return steps


@pytest.mark.parametrize("name", OPERATIONS)
async def test_expired_attributes_are_what_they_are_on_an_unversioned_model(
    async_engine: AsyncEngine, async_session_factory: async_sessionmaker[AsyncSession], name: str
) -> None:
    """Whatever is assigned, read or added, versioning neither adds an error nor takes one away."""
    outcomes = []
    for mixin in (Unversioned, Versioned):
        family = _family(mixin)
        await create_tables(async_engine, family.metadata)
        outcomes.append(await _outcome(async_session_factory, family, OPERATIONS[name]))
        async with async_engine.begin() as connection:
            await connection.run_sync(family.metadata.drop_all)
    assert outcomes[0] == outcomes[1]
    if name in ("set", "set deferred", "set twice", "set to an expression", "set a foreign key"):
        assert outcomes[1][:2] == ["done", "committed"]
    gc.collect()
