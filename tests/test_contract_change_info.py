"""Who changed something, and why."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import (
    ChrononautException,
    Versioned,
    append_change_info,
    extra_change_info,
    rationale,
    versioned_session,
)
from tests.fix_statements import RecordStatements
from tests.models import Base, Setting, Team, User, Visit

NOBODY = {"user_id": None, "remote_addr": None}


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


@pytest.fixture
def user(session: Session) -> User:
    user = User(id=1, email="a", password="p")
    session.add(user)
    session.commit()
    return user


def change(session: Session, user: User) -> dict[str, Any]:
    """Change a user and return the change info that was recorded."""
    user.email = f"{user.email}x"
    session.commit()
    return user.versions()[-1].change_info


def all_infos(session: Session, table: str = "appuser") -> list[Any]:
    query = sa.text(f"SELECT change_info FROM {table}_history ORDER BY version, 1").columns(change_info=sa.JSON)
    return list(session.scalars(query))


# --- the provider


def test_nobody_is_recorded_as_nobody(session: Session, user: User) -> None:
    """Without a provider the keys are there, empty; and no others."""
    assert change(session, user) == NOBODY


def test_provider_says_who(engine: sa.Engine) -> None:
    """Its keys are recorded with updates, births and deletions; asked once for each flush."""
    calls = []

    def provider() -> Mapping[str, Any]:
        calls.append(1)
        return {"user_id": "ann", "host": {"name": "h", "load": [1, 2.5, None, True]}}

    with versioned_session(sessionmaker(engine), change_info=provider)() as session:
        users = [User(email=str(n)) for n in range(5)]
        session.add_all([*users, Setting(name="x")])
        session.commit()
        assert len(calls) == 1
        for user in users:
            user.email = "z"
        session.commit()
        assert len(calls) == 2
        session.delete(users[0])
        session.commit()
        assert len(calls) == 3
        expected = {**NOBODY, "user_id": "ann", "host": {"name": "h", "load": [1, 2.5, None, True]}}
        assert all_infos(session) == [expected] * 11
        assert all_infos(session, "setting") == [expected]


def test_provider_is_not_asked_for_nothing(engine: sa.Engine) -> None:
    """Reading, and a flush that makes no version, do not ask it."""

    def provider() -> Mapping[str, Any]:
        raise AssertionError("asked")

    versioned = versioned_session(sessionmaker(engine))
    with versioned() as session:
        session.add(User(id=1, email="a"))
        session.commit()
    with versioned_session(sessionmaker(engine), change_info=provider)() as session:
        user = session.get_one(User, 1)
        user.login_count = 3
        session.add(Team(name="red"))
        session.commit()


def test_provider_that_fails_fails_the_flush(engine: sa.Engine) -> None:
    """History without the one who did it would not be true; nothing is written."""
    with versioned_session(sessionmaker(engine), change_info=lambda: 1 / 0)() as session:  # type: ignore[arg-type]
        session.add(User(id=1, email="a"))
        with pytest.raises(ZeroDivisionError):
            session.flush()
        session.rollback()
        assert session.get(User, 1) is None


def test_unicode_is_kept(session: Session, user: User) -> None:
    """In keys and values."""
    with extra_change_info(grund="größer als 漢字 🎉", ключ="\u2028"):
        assert change(session, user)["extra"] == {"grund": "größer als 漢字 🎉", "ключ": "\u2028"}


# --- extra_change_info and rationale


def test_extra_change_info_is_recorded_under_extra(session: Session, user: User) -> None:
    """For what is flushed in the block, and nothing after it."""
    with extra_change_info(ticket=4711, tags=["a", {"b": None}]):
        assert change(session, user) == {**NOBODY, "extra": {"ticket": 4711, "tags": ["a", {"b": None}]}}
    assert change(session, user) == NOBODY


def test_rationale_is_extra_change_info(session: Session, user: User) -> None:
    """The reason, under its own name."""
    with rationale("because"):
        assert change(session, user)["extra"] == {"rationale": "because"}


def test_blocks_nest(session: Session, user: User) -> None:
    """An inner one adds to the outer, and wins for the same name until it ends."""
    with extra_change_info(a=1, b=1):
        with rationale("inner"), extra_change_info(b=2):
            assert change(session, user)["extra"] == {"a": 1, "b": 2, "rationale": "inner"}
        assert change(session, user)["extra"] == {"a": 1, "b": 1}


def test_block_that_fails_leaves_nothing_behind(session: Session, user: User) -> None:
    """Not even after an exception."""
    with pytest.raises(ZeroDivisionError), extra_change_info(a=1), rationale("r"):
        raise ZeroDivisionError
    assert change(session, user) == NOBODY


def test_threads_and_tasks_have_their_own(session: Session, user: User) -> None:
    """What one says, another does not hear."""
    seen: list[Any] = []

    def elsewhere() -> None:
        with extra_change_info(there=1):
            entered.set()
            left.wait(10)

    entered, left = threading.Event(), threading.Event()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    entered.wait(10)
    with extra_change_info(here=1):
        seen.append(change(session, user)["extra"])
    left.set()
    thread.join()

    async def task(name: str, turn: asyncio.Event, other: asyncio.Event) -> None:
        with extra_change_info(**{name: 1}):
            other.set()
            await turn.wait()
            seen.append(change(session, user)["extra"])
            other.set()

    async def run() -> None:
        one, two = asyncio.Event(), asyncio.Event()
        await asyncio.gather(task("one", one, two), task("two", two, one))

    asyncio.run(run())
    assert sorted(map(str, seen)) == ["{'here': 1}", "{'one': 1}", "{'two': 1}"]


def test_births_and_deletions_have_their_reason(session: Session) -> None:
    """Not only changes."""
    with rationale("created"):
        setting = Setting(name="x")
        session.add(setting)
        session.commit()
    with rationale("dropped"):
        session.delete(setting)
        session.commit()
    assert [info["extra"]["rationale"] for info in all_infos(session, "setting")] == ["created", "dropped"]


# --- append_change_info


def test_appended_info_is_recorded_with_the_next_version_of_that_object(session: Session, user: User) -> None:
    """Of that one only, and then it is spent."""
    other = User(id=2, email="o")
    session.add(other)
    session.commit()
    with append_change_info(user, why="asked for"):
        user.email = "b"
    other.email = "p"
    session.commit()
    assert user.versions()[-1].change_info["extra"] == {"why": "asked for"}
    assert other.versions()[-1].change_info == NOBODY
    assert change(session, user) == NOBODY


def test_appended_info_stays_until_a_version_is_written(session: Session, user: User) -> None:
    """Also without a block, over flushes that make no version, and added to what is there already."""
    append_change_info(user, a=1, b=1)
    append_change_info(user, b=2)
    user.login_count = 5
    session.commit()
    assert change(session, user)["extra"] == {"a": 1, "b": 2}
    assert change(session, user) == NOBODY


def test_appended_info_is_withdrawn_by_an_exception(session: Session, user: User) -> None:
    """What its block added, and only that."""
    append_change_info(user, a=1)
    with pytest.raises(ZeroDivisionError), append_change_info(user, a=2, b=2):
        raise ZeroDivisionError
    assert change(session, user)["extra"] == {"a": 1}


def test_appended_info_wins_over_the_block(session: Session, user: User) -> None:
    """It is about the object itself."""
    append_change_info(user, a="object")
    with extra_change_info(a="block", b="block"):
        assert change(session, user)["extra"] == {"a": "object", "b": "block"}


def test_appended_info_survives_a_failed_flush(session: Session, user: User) -> None:
    """No version was written, so it is not spent."""
    append_change_info(user, a=1)
    user.email = "b"
    session.add(User(id=1, email="taken"))
    with pytest.raises(Exception, match=r"(?i)conflict|unique"):
        session.flush()
    session.rollback()
    assert change(session, user)["extra"] == {"a": 1}


def test_appended_info_of_a_new_object_tells_of_its_birth(session: Session) -> None:
    """And of a deleted one, of its end."""
    setting = Setting(name="x")
    append_change_info(setting, why="born")
    session.add(setting)
    session.commit()
    append_change_info(setting, why="dead")
    session.delete(setting)
    session.commit()
    assert [info["extra"] for info in all_infos(session, "setting")] == [{"why": "born"}, {"why": "dead"}]


def test_append_change_info_needs_a_mapped_object() -> None:
    """The message says so."""
    with pytest.raises(ChrononautException, match="mapped object"):
        append_change_info(object(), a=1)


# --- require_extra_change_info


@pytest.fixture
def strict(engine: sa.Engine, user: User) -> Any:
    """A session that requires extra info, with a user who was changed once without it."""
    with versioned_session(sessionmaker(engine), require_extra_change_info=True)() as session:
        yield session


@pytest.mark.parametrize("how", ["insert", "update", "delete", "mark"])
def test_required_extra_info_is_missing(strict: Session, how: str) -> None:
    """The message says how to give it, and nothing is written."""
    user = strict.get_one(User, 1)
    if how == "insert":
        strict.add(User(email="b"))
    elif how == "update":
        user.email = "b"
    elif how == "delete":
        strict.delete(user)
    else:
        strict.add(Visit(note="a"))
    with pytest.raises(ChrononautException, match="rationale"):
        strict.flush()
    strict.rollback()
    assert strict.scalars(sa.select(User.email)).all() == ["a"]
    assert strict.scalars(sa.select(Visit)).all() == []
    assert len(all_infos(strict)) == 1


def test_required_extra_info_is_given(strict: Session) -> None:
    """By any of the three; and what makes no version needs none."""
    user = strict.get_one(User, 1)
    user.login_count = 5
    strict.commit()
    with rationale("r"):
        change(strict, user)
    with extra_change_info(a=1):
        change(strict, user)
    with append_change_info(user, b=1):
        change(strict, user)
    assert [row.change_info["extra"] for row in user.versions()] == [{"rationale": "r"}, {"a": 1}, {"b": 1}]


# --- what JSON cannot hold


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", float("nan"), float("inf"), "\ud800", {(1, 2): 3}])
@pytest.mark.parametrize("where", ["block", "object", "provider"])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(
    engine: sa.Engine, user: User, statements: RecordStatements, value: Any, where: str
) -> None:
    """The error is a ``ValueError`` too."""
    given = {"bad": value}
    provider = (lambda: given) if where == "provider" else None
    with versioned_session(sessionmaker(engine), change_info=provider)() as session:
        found = session.get_one(User, 1)
        found.email = "b"
        session.add(Setting(name="x"))
        if where == "object":
            append_change_info(found, **given)
        with (
            extra_change_info(**(given if where == "block" else {})),
            pytest.raises(ChrononautException, match="JSON") as caught,
            statements() as log,
        ):
            session.flush()
        assert isinstance(caught.value, ValueError)
        assert set(log.verbs) <= {"SELECT"}
        session.rollback()
        assert (found.email, found.version) == ("a", 0)
        assert len(all_infos(session)) == 1
        assert all_infos(session, "setting") == []


# --- the model's own hooks


def test_overridden_hooks_win_over_the_provider(engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """For the keys that each gives; as class methods, or as methods that know their object."""

    class Account(Versioned, base):
        __tablename__ = "account"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(sa.String(50))

        def _fetch_current_user_id(self) -> str | None:  # type: ignore[override]
            return f"owner of {self.name}"

        @classmethod
        def _get_custom_change_info(cls) -> Mapping[str, Any]:
            return {"model": cls.__name__}

    class Savings(Versioned, base):
        __tablename__ = "savings"
        id: Mapped[int] = mapped_column(primary_key=True)

        @classmethod
        def _capture_change_info(cls) -> Mapping[str, Any]:
            return {"user_id": "bank", "remote_addr": "vault"}

        @classmethod
        def _fetch_remote_addr(cls) -> str | None:
            return "counter"

    base.metadata.create_all(engine)
    provider = {"user_id": "provider", "remote_addr": "::1", "host": "h"}
    with versioned_session(sessionmaker(engine), change_info=lambda: provider)() as session:
        session.add_all([Account(id=1, name="one"), Account(id=2, name="two"), Savings(id=1)])
        with rationale("r"):
            session.commit()
        common = {"host": "h", "extra": {"rationale": "r"}}
        infos = sorted(all_infos(session, "account"), key=str)
        assert infos == [
            {"user_id": "owner of one", "remote_addr": "::1", "model": "Account", **common},
            {"user_id": "owner of two", "remote_addr": "::1", "model": "Account", **common},
        ]
        assert all_infos(session, "savings") == [{"user_id": "bank", "remote_addr": "counter", **common}]


# --- the layout


def test_hidden_columns_are_named_in_order(session: Session, engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """Only those that changed."""

    class Secret(Versioned, base):
        __tablename__ = "secret"
        __chrononaut_hidden__ = ["b", "a", "c"]
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[str] = mapped_column(sa.String(50))
        b: Mapped[str] = mapped_column(sa.String(50))
        c: Mapped[str] = mapped_column(sa.String(50))

    base.metadata.create_all(engine)
    secret = Secret(id=1, a="1", b="1", c="1")
    session.add(secret)
    session.commit()
    secret.b = secret.a = "2"
    session.commit()
    [row] = secret.versions()
    assert row.change_info["hidden_cols_changed"] == ["a", "b"]
    assert all_infos(session, "secret")[0] == NOBODY


def test_each_record_has_its_own_hidden_columns(session: Session, user: User) -> None:
    """In one flush that changes several."""
    other = User(id=2, email="o", password="p")
    session.add(other)
    session.commit()
    user.password = "q"
    other.email = "p"
    session.commit()
    assert user.versions()[-1].change_info["hidden_cols_changed"] == ["password"]
    assert "hidden_cols_changed" not in other.versions()[-1].change_info
