"""Writing without history, and history that cannot be written."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

import chrononaut
from chrononaut import ChrononautException, history_class, versioned_session
from chrononaut.unsafe import suppress_versioning
from tests.models import Base, Setting, User


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


@pytest.fixture
def user(session: Session) -> User:
    """With one version behind it."""
    user = User(id=1, email="a", password="p")
    session.add(user)
    session.commit()
    user.email = "b"
    session.commit()
    return user


def operations(session: Session, table: str = "appuser") -> list[tuple[Any, ...]]:
    rows = session.execute(sa.text(f"SELECT version, operation FROM {table}_history ORDER BY version"))
    return [tuple(row) for row in rows]


# --- suppress_versioning


def test_suppress_versioning_is_found_under_unsafe_only() -> None:
    """So that a search finds every use."""
    assert not hasattr(chrononaut, "suppress_versioning")


def test_suppressed_changes_leave_no_trace(session: Session, user: User) -> None:
    """The current state is amended in place, under its version; what follows is captured again."""
    with suppress_versioning():
        user.email = "c"
        user.password = "q"
        session.commit()
    assert (user.email, user.version) == ("c", 1)
    assert [row.email for row in user.versions()] == ["a"]
    user.email = "d"
    session.commit()
    assert [row.email for row in user.versions()] == ["a", "c"]


def test_what_counts_is_when_it_is_flushed(session: Session, user: User) -> None:
    """Not when it was set."""
    with suppress_versioning():
        user.email = "c"
    session.commit()
    assert [row.email for row in user.versions()] == ["a", "b"]


def test_suppressed_insert_and_delete(session: Session) -> None:
    """Neither a birth nor an end; and a key that comes back later does not collide."""
    with suppress_versioning():
        setting = Setting(name="x", value="1")
        session.add(setting)
        session.commit()
        session.delete(setting)
        session.commit()
    assert operations(session, "setting") == []
    session.add(Setting(name="x", value="2"))
    session.commit()
    assert operations(session, "setting") == [(-1, "insert")]


def test_suppressed_insert_of_a_used_key_is_numbered(session: Session) -> None:
    """The next update would collide with the former life else."""
    session.add(Setting(name="x", value="1"))
    session.commit()
    session.delete(session.get_one(Setting, "x"))
    session.commit()
    setting = Setting(name="x", value="2")
    with suppress_versioning():
        session.add(setting)
        session.commit()
    setting.value = "3"
    session.commit()
    assert [row.value for row in setting.versions()] == ["1", "2"]
    versions = [version for version, _ in operations(session, "setting")]
    assert setting.version == versions[-1] + 1
    assert versions == list(range(-1, len(versions) - 1))


def test_suppressed_replacement_keeps_the_version(session: Session, user: User) -> None:
    """A delete and an add of the same key in one flush."""
    with suppress_versioning():
        session.delete(user)
        session.add(new := User(id=1, email="z"))
        session.commit()
    assert (new.version, new.email) == (1, "z")
    new.email = "y"
    session.commit()
    assert [row.email for row in new.versions()] == ["a", "z"]


def test_suppression_ends_with_its_block(session: Session, user: User) -> None:
    """Also by an exception; and blocks nest."""
    with pytest.raises(ZeroDivisionError), suppress_versioning():
        raise ZeroDivisionError
    with suppress_versioning():
        with suppress_versioning():
            pass
        user.email = "c"
        session.commit()
    user.email = "d"
    session.commit()
    assert [row.email for row in user.versions()] == ["a", "c"]


def test_suppression_is_of_one_thread(session: Session, user: User, engine: sa.Engine) -> None:
    """Others go on recording."""
    seen: list[bool] = []

    def elsewhere() -> None:
        from chrononaut._suppression import is_suppressed

        seen.append(is_suppressed())

    with suppress_versioning():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen == [False]


def test_suppressed_changes_need_no_extra_info(engine: sa.Engine, user: User) -> None:
    """Nothing is recorded, so nothing is missing."""
    with versioned_session(sessionmaker(engine), require_extra_change_info=True)() as session:
        with suppress_versioning():
            session.get_one(User, 1).email = "c"
            session.commit()
        assert session.get_one(User, 1).version == 1


# --- history is read-only


@pytest.mark.parametrize("how", ["change", "delete", "add"])
@pytest.mark.parametrize("suppressed", [False, True])
@pytest.mark.parametrize("attached", [True, False])
def test_history_cannot_be_written(
    session: Session, engine: sa.Engine, user: User, how: str, suppressed: bool, attached: bool
) -> None:
    """Through no session, nor by suppressing versioning alone."""
    session.commit()
    with session if attached else Session(engine) as writer:
        [row] = writer.scalars(sa.select(history_class(User)).where(history_class(User).version == 0))
        if how == "change":
            setattr(row, "email", "never was")  # noqa: B010  # a checker would refuse it, too
        elif how == "delete":
            writer.delete(row)
        else:
            history: Any = history_class(User)
            writer.add(history(id=1, version=7))
        if suppressed:
            with suppress_versioning(), pytest.raises(ChrononautException, match="read-only"):
                writer.flush()
        else:
            with pytest.raises(ChrononautException, match="read-only"):
                writer.flush()
        writer.rollback()
        assert operations(writer) == [(-1, "insert"), (0, "update")]


def test_history_can_be_deleted_when_that_is_allowed(session: Session, user: User) -> None:
    """To erase a person: deleted only, never changed."""
    [row] = user.versions()
    with suppress_versioning(allow_deleting_history=True):
        session.delete(row)
        session.commit()
    assert operations(session) == [(-1, "insert")]
    user.email = "c"
    session.commit()
    [row] = user.versions()
    setattr(row, "email", "never was")  # noqa: B010  # a checker would refuse it, too
    with suppress_versioning(allow_deleting_history=True), pytest.raises(ChrononautException, match="read-only"):
        session.flush()


def test_permission_to_delete_history_is_not_lost_inside(session: Session, user: User) -> None:
    """An inner block does not take it back."""
    [row] = user.versions()
    with suppress_versioning(allow_deleting_history=True), suppress_versioning():
        session.delete(row)
        session.commit()
    assert operations(session) == [(-1, "insert")]


def test_deleting_history_and_record_together_erases_all(session: Session, user: User) -> None:
    """Nothing is left of it."""
    with suppress_versioning(allow_deleting_history=True):
        for row in session.scalars(sa.select(history_class(User))):
            session.delete(row)
        session.delete(user)
        session.commit()
    assert operations(session) == []
    assert session.scalars(sa.select(User)).all() == []
