"""Writers who have not seen the latest state."""

from __future__ import annotations

import pickle

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.exc import StaleDataError

from chrononaut import ChrononautException, StaleVersionError
from chrononaut.unsafe import suppress_versioning
from tests.models import Animal, Base, Dog, Setting, User


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


@pytest.fixture
def user(session: Session) -> User:
    """A user who is loaded in ``session``, and whom somebody else has changed since."""
    user = User(id=1, email="a", name="n", password="p")
    session.add(user)
    session.commit()
    assert user.email == "a"
    return user


def change_elsewhere(session: Session, factory: sessionmaker[Session]) -> None:
    """Change the user, by another session; ``session`` keeps what it has loaded."""
    loaded = session.get_one(User, 1)
    state = {name: getattr(loaded, name) for name in ("id", "version", "email", "name", "password")}
    session.commit()
    with factory() as other:
        other.get_one(User, 1).email = "other"
        other.commit()
    for name, value in state.items():
        set_committed_value(loaded, name, value)


@pytest.mark.parametrize("how", ["update", "delete", "hidden", "replace"])
def test_stale_write_is_refused(session: Session, session_factory: sessionmaker[Session], user: User, how: str) -> None:
    """The error says of which record, what was expected, and what is there."""
    change_elsewhere(session, session_factory)
    if how == "update":
        user.name = "m"
    elif how == "delete":
        session.delete(user)
    elif how == "hidden":
        user.password = "q"
    else:
        session.delete(user)
        session.add(User(id=1, email="new"))
    with pytest.raises(StaleVersionError) as caught:
        session.flush()
    error = caught.value
    assert isinstance(error, StaleDataError)
    assert isinstance(error, ChrononautException)
    assert (error.model, error.key, error.expected, error.found) == ("User", (1,), 0, 1)
    assert "User(1)" in str(error)
    session.rollback()
    assert (user.email, user.version) == ("other", 1)
    assert [row.email for row in user.versions()] == ["a"]


def test_work_goes_on_after_a_stale_write_was_caught(
    session: Session, session_factory: sessionmaker[Session], user: User
) -> None:
    """Rolled back, read again, and done."""
    change_elsewhere(session, session_factory)
    user.name = "m"
    with pytest.raises(StaleVersionError):
        session.commit()
    session.rollback()
    user.name = "m"
    session.commit()
    assert [(row.email, row.name) for row in user.versions()] == [("a", "n"), ("other", "n")]
    assert user.version == 2


def test_nothing_of_a_stale_flush_stays(session: Session, session_factory: sessionmaker[Session], user: User) -> None:
    """Neither of its history nor of its rows, whatever came first."""
    session.add(Setting(name="x", value="1"))
    session.commit()
    assert user.email == "a"
    setting = session.get_one(Setting, "x")
    assert setting.value == "1"
    change_elsewhere(session, session_factory)
    setting.value = "2"
    session.add(Setting(name="y"))
    user.name = "m"
    with pytest.raises(StaleVersionError):
        session.flush()
    session.rollback()
    session.commit()
    assert session.scalars(sa.select(Setting.value)).all() == ["1"]
    assert session.scalar(sa.text("SELECT count(*) FROM setting_history")) == 1
    assert session.scalar(sa.text("SELECT count(*) FROM appuser_history")) == 2


def test_stale_write_inside_a_savepoint_loses_the_savepoint_alone(
    session: Session, session_factory: sessionmaker[Session], user: User
) -> None:
    """What came before it is committed."""
    change_elsewhere(session, session_factory)
    session.add(Setting(name="before"))
    session.flush()
    with pytest.raises(StaleVersionError), session.begin_nested():
        session.add(Setting(name="inside"))
        user.name = "m"
        session.flush()
    session.commit()
    assert session.scalars(sa.select(Setting.name)).all() == ["before"]
    assert [row.email for row in user.versions()] == ["a"]


def test_merge_of_a_stale_copy_is_refused(session_factory: sessionmaker[Session], user: User, session: Session) -> None:
    """A copy that was detached before somebody else changed the record."""
    with session_factory() as elsewhere:
        copy = elsewhere.get_one(User, 1)
        assert copy.version == 0
    copy.name = "from the copy"
    user.email = "b"
    session.commit()
    with session_factory() as other:
        other.merge(copy)
        with pytest.raises(StaleVersionError) as caught:
            other.flush()
    assert (caught.value.expected, caught.value.found) == (0, 1)


@pytest.mark.parametrize("version", [-1, 7, 0])
def test_version_that_the_caller_altered_is_stale(session: Session, user: User, version: int) -> None:
    """It is not what the row has; the same number is none."""
    user.version = version
    user.email = "b"
    if version == 0:
        session.commit()
        assert user.version == 1
        return
    with pytest.raises(StaleVersionError) as caught:
        session.flush()
    assert (caught.value.expected, caught.value.found) == (version, 0)


def test_version_alone_altered_is_stale(session: Session, user: User) -> None:
    """Although nothing else changes."""
    user.version = 5
    with pytest.raises(StaleVersionError):
        session.flush()


def test_expired_record_is_never_stale(session: Session, session_factory: sessionmaker[Session], user: User) -> None:
    """Who has not looked cannot have seen anything old."""
    session.commit()
    with session_factory() as other:
        other.get_one(User, 1).email = "other"
        other.commit()
    user.name = "m"
    session.commit()
    assert [(row.email, row.name) for row in user.versions()] == [("a", "n"), ("other", "n")]


def test_stale_one_among_many_is_named(session: Session) -> None:
    """The right one of them."""
    session.add_all([User(id=n, email="a") for n in range(1, 51)])
    session.commit()
    users = session.scalars(sa.select(User)).all()
    with suppress_versioning():
        session.execute(sa.text("UPDATE appuser SET version = 3 WHERE id = 33"))
    for user in users:
        user.email = "b"
    with pytest.raises(StaleVersionError) as caught:
        session.flush()
    assert (caught.value.key, caught.value.expected, caught.value.found) == ((33,), 0, 3)


def test_joined_subclass_is_stale(session: Session) -> None:
    """The version is in the base's table."""
    dog = Dog(id=1, name="rex", trick="sit")
    session.add(dog)
    session.commit()
    assert dog.trick == "sit"
    with suppress_versioning():
        session.execute(sa.text("UPDATE animal SET version = 1"))
    dog.trick = "roll"
    with pytest.raises(StaleVersionError) as caught:
        session.flush()
    assert (caught.value.model, caught.value.key) == ("Dog", (1,))
    session.rollback()
    assert session.get_one(Animal, 1).version == 0


def test_error_pickles() -> None:
    """With all it knows."""
    error = StaleVersionError("User", (1,), 0, 2, {"email": ("a", "b")})
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.key, copy.expected, copy.found, copy.changes) == ((1,), 0, 2, {"email": ("a", "b")})
