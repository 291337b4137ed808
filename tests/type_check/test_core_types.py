"""What type checkers say of a user's program; mypy (strict) and pyright read this file, and it runs too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import datetime, timezone
from typing import Any

import pytest
from sqlalchemy import ScalarResult, create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Query, Session, mapped_column, scoped_session, sessionmaker
from typing_extensions import assert_type

from chrononaut import (
    Change,
    ChangeInfoProvider,
    HistoryRecord,
    RecordChanges,
    Versioned,
    append_change_info,
    changes,
    extra_change_info,
    history_class,
    hold,
    lock_where,
    rationale,
    select_versions,
    versioned_session,
)
from chrononaut.unsafe import suppress_versioning


class Base(DeclarativeBase):
    pass


class User(Versioned, Base):
    __tablename__ = "appuser"
    __chrononaut_untracked__ = ["login_count"]
    __chrononaut_hidden__ = ["password"]
    __chrononaut_disable_indices__ = ["email"]
    __chrononaut_tablename__ = "appuser_past"
    __chrononaut_copy_validators__ = False
    __chrononaut_track_inserts__ = True

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(index=True)
    password: Mapped[str]
    login_count: Mapped[int] = mapped_column(default=0)


class Page(RecordChanges, Base, Versioned):
    """The mixins in any order."""

    __tablename__ = "page"

    id: Mapped[int] = mapped_column(primary_key=True)


class Worker:
    """A provider may be any object that can be called."""

    def __call__(self) -> Mapping[str, Any]:
        return {"user_id": "ann"}


@pytest.fixture
def session() -> Iterator[Session]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    provider: ChangeInfoProvider = Worker()
    factory = versioned_session(sessionmaker(engine), change_info=provider)
    assert_type(factory, sessionmaker[Session])
    with factory() as session:
        yield session
    engine.dispose()


@pytest.fixture
def user(session: Session) -> User:
    user = User(id=1, email="a", password="p")
    session.add(user)
    session.commit()
    with rationale("r"), extra_change_info(ticket=1), append_change_info(user, note="n"):
        user.email = "b"
        session.commit()
    return user


def test_reading_a_record(user: User) -> None:
    """Rows are history of the record's own class."""
    now = datetime.now(timezone.utc)
    rows = user.versions()
    assert_type(rows, list[HistoryRecord[User]])
    assert_type(user.versions(before=now, after=None), list[HistoryRecord[User]])
    assert_type(user.versions(return_query=False), list[HistoryRecord[User]])
    query = user.versions(return_query=True)
    assert_type(query, Query[HistoryRecord[User]])
    assert_type(user.versions(before=now, return_query=True), Query[HistoryRecord[User]])
    at = user.version_at(now)
    assert_type(at, HistoryRecord[User] | User | None)
    previous = user.previous_version()
    assert_type(previous, HistoryRecord[User] | None)
    assert_type(user.has_changed_since(now), bool)
    assert_type(user.diff(rows[0], to=user, include_hidden=True), dict[str, tuple[Any, Any]])
    assert_type(user.version, int)
    assert at is user
    assert previous is rows[0]
    assert query.all() == rows
    assert isinstance(previous, HistoryRecord)


def test_history_row(user: User) -> None:
    """Its own attributes are typed; those of the model are there."""
    [row] = user.versions()
    assert_type(row.version, int)
    assert_type(row.began, datetime | None)
    assert_type(row.changed, datetime)
    assert_type(row.change_info, dict[str, Any])
    email: str = row.email
    assert (email, row.version) == ("a", 0)
    assert row.change_info["extra"] == {"rationale": "r", "ticket": 1, "note": "n"}
    if row.operation == "update":
        return
    raise AssertionError(row.operation)


def test_querying_history(session: Session, user: User) -> None:
    """Ordinary SQLAlchemy."""
    UserHistory = history_class(User)
    assert_type(UserHistory, type[HistoryRecord[User]])
    query = select(UserHistory).where(UserHistory.version > -1, UserHistory.email == "a")
    rows = session.scalars(query.order_by(UserHistory.changed.desc()))
    assert_type(rows, ScalarResult[HistoryRecord[User]])
    found = rows.all()
    assert_type(found, Sequence[HistoryRecord[User]])
    assert_type(session.get(UserHistory, (1, 0)), HistoryRecord[User] | None)
    direct = session.scalars(select(history_class(User)).where(history_class(User).version > -1)).one()
    assert_type(direct, HistoryRecord[User])
    assert found == [direct]


def test_select_versions(session: Session, user: User) -> None:
    """The same as a statement."""
    rows = session.scalars(select_versions(user, after=user.versions()[0].changed)).all()
    assert rows == user.versions()


def test_history_of_a_base_takes_that_of_its_subclass(user: User) -> None:
    """``HistoryRecord`` is covariant."""

    def count(rows: Sequence[HistoryRecord[Base]]) -> int:
        return len(rows)

    assert count(user.versions()) == 1


def test_what_takes_a_session_takes_an_asynchronous_one(session: Session, user: User) -> None:
    """And then what it returns is awaited, entered or iterated over asynchronously."""
    assert_type(changes(session), Iterator[Change[Any]])
    assert_type(hold(session, user), AbstractContextManager[User])
    opened = AsyncSession()
    assert_type(changes(opened), AsyncIterator[Change[Any]])
    assert_type(hold(opened, user), AbstractAsyncContextManager[User])


async def forms_that_are_awaited(session: AsyncSession, user: User, row: HistoryRecord[User]) -> None:
    """Looked at by the type checkers only."""
    assert_type(await user.awaitable_history.versions(), list[HistoryRecord[User]])
    assert_type(await user.awaitable_history.timeline(), list[Change[User]])
    assert_type(await row.awaitable_history.restore(), User)
    assert_type(await lock_where(session, select(User)), int)


def test_change_marks(session: Session) -> None:
    """Typed on the row, and columns on the class."""
    page = Page(id=1)
    session.add(page)
    session.commit()
    assert_type(page.change_info, dict[str, Any] | None)
    assert_type(page.changed, datetime | None)
    assert_type(page.versions(), list[HistoryRecord[Page]])
    assert session.scalars(select(Page.id).where(Page.changed <= datetime.now(timezone.utc))).all() == [1]


def test_versioned_session_returns_what_it_was_given() -> None:
    """With its type."""
    assert_type(versioned_session(Session()), Session)
    assert_type(versioned_session(scoped_session(sessionmaker())), scoped_session[Session])
    assert_type(versioned_session(async_sessionmaker()), async_sessionmaker[AsyncSession])
    with suppress_versioning(allow_deleting_history=True):
        pass
