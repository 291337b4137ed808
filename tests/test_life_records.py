"""The life of a record: born, changed, moved to another key, deleted, born again, in every kind of session."""

import pickle
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import ChrononautException, StaleVersionError, Versioned, history_class, versioned_session
from tests.fix_models import Clock


class Base(DeclarativeBase):
    """A base that lasts, so that its instances can be pickled."""


class User(Versioned, Base):
    __tablename__ = "appuser"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(sa.String(20))
    note: Mapped[str | None] = mapped_column(sa.String(20))


@pytest.fixture(autouse=True)
def _tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


def life(session: Session, key: int) -> list[tuple[int, str, str | None]]:
    """All rows of a key's history."""
    history = history_class(User)
    rows = session.scalars(sa.select(history).where(history.id == key).order_by(history.version))
    return [(row.version, row.operation, row.name) for row in rows]


def born(session: Session, **values: Any) -> User:
    user = User(**{"id": 1, "name": "a", **values})
    session.add(user)
    session.commit()
    return user


def test_a_changed_key_ends_one_history_and_begins_another(session: Session) -> None:
    """A new primary key deletes the old key's record and gives birth to the new one's, which says where from."""
    user = born(session)
    user.id = 2
    session.commit()
    user.name = "b"
    session.commit()
    assert life(session, 1) == [(-1, "insert", None), (0, "delete", "a")]
    assert life(session, 2) == [(-1, "insert", None), (0, "update", "a")]
    history = history_class(User)
    birth = session.scalars(sa.select(history).where(history.id == 2, history.version == -1)).one()
    assert birth.change_info["previous_key"] == {"id": 1}
    user.id = 1
    session.commit()
    assert life(session, 1)[2:] == [(1, "insert", None)]
    assert user.version == 2


def test_delete_and_add_of_one_key_in_a_flush_is_an_update(session: Session) -> None:
    """SQLAlchemy makes an UPDATE of it, and so does history."""
    user = born(session)
    session.delete(user)
    session.add(User(id=1, name="b"))
    session.commit()
    assert life(session, 1) == [(-1, "insert", None), (0, "update", "a")]
    assert session.get_one(User, 1).version == 1


def test_delete_and_add_of_one_key_in_two_flushes_is_two_lives(session: Session) -> None:
    """Between two flushes of one transaction the record was gone, for no time at all."""
    user = born(session)
    session.delete(user)
    session.flush()
    session.add(User(id=1, name="b"))
    session.commit()
    assert life(session, 1) == [(-1, "insert", None), (0, "delete", "a"), (1, "insert", None)]
    assert session.get_one(User, 1).version == 2


def test_merge_of_a_detached_changed_copy(session_factory: sessionmaker[Session]) -> None:
    """Merging a detached, changed record makes one version; merging a stale one is refused."""
    with session_factory() as session:
        user = born(session)
        session.refresh(user)
        session.expunge(user)
    with session_factory() as session:
        user.name = "b"
        merged = session.merge(user)
        session.commit()
        assert merged.version == 1
        assert life(session, 1) == [(-1, "insert", None), (0, "update", "a")]
        session.merge(merged)
        session.commit()
        assert merged.version == 1
    with session_factory() as session:
        old = User(id=1, name="c", version=0)
        session.merge(old)
        with pytest.raises(StaleVersionError):
            session.flush()


def test_merge_of_a_new_copy_without_its_version(session: Session) -> None:
    """Merging a plain copy of a record, which knows no version, changes the record as it is now."""
    born(session)
    session.merge(User(id=1, name="b"))
    session.commit()
    assert life(session, 1) == [(-1, "insert", None), (0, "update", "a")]
    session.merge(User(id=2, name="c"))
    session.commit()
    assert life(session, 2) == [(-1, "insert", None)]


def test_expired_records_are_changed_and_deleted(session: Session) -> None:
    """An expired record can be changed, by one attribute alone, and deleted, without loading it first."""
    user = born(session, note="n")
    session.expire(user)
    user.name = "b"
    session.commit()
    session.expire(user)
    session.delete(user)
    session.commit()
    assert life(session, 1) == [(-1, "insert", None), (0, "update", "a"), (1, "delete", "b")]


def test_pickled_records_go_on(session_factory: sessionmaker[Session]) -> None:
    """A record that was pickled and added to another session is changed as if it had never left."""
    with session_factory() as session:
        user = born(session)
        session.refresh(user)
        user.name = "b"
        session.flush()
        session.refresh(user)
        pickled = pickle.dumps(user)
        session.commit()
    again: User = pickle.loads(pickled)
    assert (again.version, again.name) == (1, "b")
    with session_factory() as session:
        session.add(again)
        again.name = "c"
        session.commit()
        assert life(session, 1)[1:] == [(0, "update", "a"), (1, "update", "b")]
        row = again.versions()[0]
        session.refresh(row)
        copied = pickle.loads(pickle.dumps(row)) if _is_importable(type(row)) else row
        assert copied.name == "a"


def _is_importable(cls: type) -> bool:
    return getattr(__import__(cls.__module__, fromlist=["x"]), cls.__name__, None) is cls


def test_two_flushes_of_one_transaction(session_factory: sessionmaker[Session], clock: Clock) -> None:
    """Each flush makes a version, and all end at one instant."""
    versioned_session(session_factory, clock=clock)
    with session_factory() as session:
        user = born(session)
        clock.advance()
        user.name = "b"
        session.flush()
        clock.advance()
        user.name = "c"
        session.flush()
        session.commit()
        first, second = user.versions()
        assert (first.name, second.name) == ("a", "b")
        assert first.changed == second.began == second.changed


def test_insert_and_delete_in_one_transaction(session: Session) -> None:
    """A record that lived for one transaction only leaves its history, and its key can be used again."""
    user = User(id=1, name="a")
    session.add(user)
    session.flush()
    session.delete(user)
    session.commit()
    assert life(session, 1) == [(-1, "insert", None), (0, "delete", "a")]
    born(session, name="b")
    assert life(session, 1)[2:] == [(1, "insert", None)]


def test_a_savepoint_rolled_back_as_the_first_work(session: Session, session_factory: sessionmaker[Session]) -> None:
    """A savepoint that held the first versioned work of a transaction is undone, and the transaction goes on."""
    user = born(session)
    savepoint = session.begin_nested()
    user.name = "lost"
    session.flush()
    savepoint.rollback()
    assert user.name == "a"
    user.name = "b"
    with session.begin_nested():
        session.flush()
    session.add(User(id=2, name="x"))
    session.commit()
    assert life(session, 1) == [(-1, "insert", None), (0, "update", "a")]
    assert user.version == 1


def test_a_failed_flush_and_new_work(session: Session) -> None:
    """After a flush that failed, nothing of it stays, and the same session goes on."""
    user = born(session)
    user.name = "lost"
    session.add(User(id=3, name=None))
    with pytest.raises(sa.exc.IntegrityError):
        session.commit()
    session.rollback()
    assert life(session, 1) == [(-1, "insert", None)]
    user.name = "b"
    session.commit()
    assert life(session, 1) == [(-1, "insert", None), (0, "update", "a")]


def test_a_failed_flush_in_a_savepoint(session: Session) -> None:
    """A flush that failed inside a savepoint leaves the outer transaction's work whole."""
    user = born(session)
    user.name = "b"
    session.flush()
    savepoint = session.begin_nested()
    user.name = "lost"
    session.add(User(id=3, name=None))
    with pytest.raises(sa.exc.IntegrityError):
        session.flush()
    savepoint.rollback()
    user.name = "c"
    session.commit()
    assert life(session, 1)[1:] == [(0, "update", "a"), (1, "update", "b")]
    assert (user.name, user.version) == ("c", 2)


def test_sessions_joined_to_an_outer_transaction(engine: sa.Engine) -> None:
    """Under a test suite's outer transaction commits are savepoints, and a rollback undoes one test's work."""
    with engine.connect() as connection:
        outer = connection.begin()
        factory = versioned_session(sessionmaker(connection, join_transaction_mode="create_savepoint"))
        with factory() as session:
            user = born(session)
            user.name = "b"
            session.commit()
            user.name = "lost"
            session.flush()
            session.rollback()
            user.name = "c"
            session.commit()
        with factory() as session:
            assert [row[2] for row in life(session, 1)[1:]] == ["a", "b"]
            rows = session.get_one(User, 1).versions()
            assert rows[0].changed <= rows[1].changed
        outer.rollback()
        with factory() as session:
            assert life(session, 1) == []


def test_records_that_do_not_expire(engine: sa.Engine) -> None:
    """With expire_on_commit=False the version stays right from one commit to the next."""
    with versioned_session(sessionmaker(engine, expire_on_commit=False))() as session:
        user = born(session)
        for name in "bcd":
            user.name = name
            session.commit()
        assert user.version == 3
        session.delete(user)
        session.commit()
        user = User(id=1, name="e")
        session.add(user)
        session.commit()
        assert user.version == 5
        user.name = "f"
        session.commit()
        assert [row[0] for row in life(session, 1)] == [-1, 0, 1, 2, 3, 4, 5]


def test_two_phase_sessions(engine: sa.Engine) -> None:
    """A two-phase session's history is prepared and committed with its records."""
    if engine.dialect.name == "sqlite":
        with pytest.raises(NotImplementedError), versioned_session(sessionmaker(engine, twophase=True))() as session:
            born(session)
        return
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            if not int(connection.scalar(sa.text("SHOW max_prepared_transactions")) or 0):
                pytest.skip("this server has prepared transactions switched off")
    with versioned_session(sessionmaker(engine, twophase=True))() as session:
        user = born(session)
        user.name = "b"
        session.flush()
        session.prepare()
        session.commit()
        assert life(session, 1) == [(-1, "insert", None), (0, "update", "a")]


def test_a_version_set_by_hand_is_stale(session: Session) -> None:
    """A version that the caller altered matches no row."""
    user = born(session)
    user.version = 7
    user.name = "b"
    with pytest.raises(StaleVersionError):
        session.commit()
    session.rollback()
    assert life(session, 1) == [(-1, "insert", None)]


def test_a_record_without_changes_makes_no_version(session: Session) -> None:
    """Touching attributes without changing them, and dirtying only the collections, makes no version."""
    user = born(session)
    user.name = "a"
    session.commit()
    user.name = "b"
    user.name = "a"
    session.commit()
    assert user.version == 0
    assert user.versions() == []


def test_detached_records_say_what_they_lack(session: Session) -> None:
    """A detached record's history cannot be read through it, and the error says what to do."""
    user = born(session)
    session.refresh(user)
    session.expunge(user)
    with pytest.raises(ChrononautException, match="not attached to a session"):
        user.versions()


def test_a_record_deleted_and_added_back(session: Session) -> None:
    """A deleted object that is made transient and added again begins a new life."""
    user = born(session)
    session.refresh(user)
    session.delete(user)
    session.commit()
    sa.orm.make_transient(user)
    session.add(user)
    session.commit()
    assert life(session, 1) == [(-1, "insert", None), (0, "delete", "a"), (1, "insert", None)]
    assert user.version == 2
    user.name = "b"
    session.commit()
    assert life(session, 1)[3:] == [(2, "update", "a")]
