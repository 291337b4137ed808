"""Locks that stay, holds that end with the transaction, and stale writes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from chrononaut import (
    ChrononautException,
    Lockable,
    RecordLockedError,
    StaleVersionError,
    Versioned,
    hold,
    lock_where,
)
from chrononaut.exceptions import RecordHeldError
from chrononaut.unsafe import suppress_versioning

Model = Any


@pytest.fixture
def invoice(base: type[DeclarativeBase], engine: sa.Engine) -> Model:
    class Invoice(Lockable, Versioned, base):
        __tablename__ = "invoice"
        __chrononaut_hidden__ = ["secret"]
        __chrononaut_untracked__ = ["seen"]
        id: Mapped[int] = mapped_column(primary_key=True)
        total: Mapped[int] = mapped_column(default=0)
        period: Mapped[str] = mapped_column(default="2024")
        secret: Mapped[str | None]
        seen: Mapped[int | None]
        lines = relationship("Line", cascade="all, delete-orphan", back_populates="invoice")

    class Line(Lockable, Versioned, base):
        __tablename__ = "line"
        id: Mapped[int] = mapped_column(primary_key=True)
        invoice_id: Mapped[int] = mapped_column(sa.ForeignKey("invoice.id"))
        invoice = relationship("Invoice", back_populates="lines")

    Invoice.line = Line
    base.metadata.create_all(engine)
    return Invoice


@pytest.fixture
def booked(invoice: Model, session: Session) -> Any:
    """A locked invoice."""
    record = invoice(id=1, total=5)
    session.add_all([record, invoice(id=2, period="2025")])
    session.commit()
    record.lock("booked")
    session.commit()
    return record


# --- locks


def test_lock_and_unlock_are_versions(session: Session, booked: Any) -> None:
    """Their change info says why."""
    assert booked.is_locked
    assert booked.version == 1
    booked.unlock("mistake")
    session.commit()
    booked.total = 6
    session.commit()
    reasons = [row.change_info.get("extra") for row in booked.versions()]
    assert reasons == [{"rationale": "booked"}, {"rationale": "mistake"}, None]
    booked.unlock("again")
    booked.total = 7
    session.commit()
    assert booked.previous_version().change_info.get("extra") is None


@pytest.mark.parametrize("name", ["total", "secret", "seen"])
@pytest.mark.parametrize("expired", [True, False])
def test_changes_of_a_locked_record_are_refused(session: Session, booked: Any, name: str, expired: bool) -> None:
    """By a flush, whether the record is loaded or not, and whatever the column."""
    if not expired:
        session.refresh(booked)
    setattr(booked, name, 3 if name != "secret" else "s3cret")
    with pytest.raises(RecordLockedError) as caught:
        session.flush()
    assert (caught.value.model, caught.value.key) == ("Invoice", (1,))
    assert "s3cret" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    session.rollback()
    assert booked.version == 1


def test_unlocking_and_changing_at_once_is_refused(session: Session, booked: Any) -> None:
    """Unlocking is a version of its own; locking is not, so that a last change can go with it."""
    booked.unlock()
    booked.total = 9
    with pytest.raises(RecordLockedError):
        session.flush()
    session.rollback()
    other = session.get_one(type(booked), 2)
    other.total = 8
    other.lock()
    session.commit()
    assert other.is_locked
    assert other.version == 1


def test_deletions_of_a_locked_record_are_refused(session: Session, booked: Any) -> None:
    """By a flush, and by what a flush deletes as an orphan."""
    session.delete(booked)
    with pytest.raises(RecordLockedError):
        session.flush()
    session.rollback()
    other = session.get_one(type(booked), 2)
    other.lines = [type(booked).line(id=1, is_locked=True)]
    session.commit()
    other.lines = []
    with pytest.raises(RecordLockedError) as caught:
        session.flush()
    assert caught.value.model == "Line"


@pytest.mark.parametrize("name", ["total", "secret", "seen"])
def test_statements_refuse_locked_records(session: Session, booked: Any, name: str) -> None:
    """If any of their rows is locked, nothing is written."""
    invoice = type(booked)
    value = "x" if name == "secret" else 9
    with pytest.raises(RecordLockedError) as caught:
        session.execute(sa.update(invoice).values({name: value}))
    assert caught.value.key == (1,)
    with pytest.raises(RecordLockedError):
        session.execute(sa.update(invoice), [{"id": 1, name: value}])
    with pytest.raises(RecordLockedError):
        session.execute(sa.delete(invoice))
    with pytest.raises(RecordLockedError):
        session.execute(sa.update(invoice).values(is_locked=False, total=1))
    session.execute(sa.update(invoice).where(invoice.id == 2).values({name: value}))
    session.execute(sa.update(invoice).values(is_locked=False))
    assert not booked.is_locked


def test_suppressing_history_does_not_unlock(session: Session, booked: Any) -> None:
    """A locked record stays as it is when versions are not recorded."""
    with suppress_versioning():
        booked.total = 9
        with pytest.raises(RecordLockedError):
            session.flush()


@pytest.mark.parametrize("how", ["select", "criteria"])
def test_lock_where(session: Session, booked: Any, how: str) -> None:
    """Many records are locked by one statement; those that were locked stay as they are."""
    invoice = type(booked)
    session.add(invoice(id=3))
    session.commit()
    third = session.get_one(invoice, 3)
    criteria = invoice.period == "2024"
    count = lock_where(session, sa.select(invoice).where(criteria) if how == "select" else criteria, "closed")
    assert count == 1
    assert third.is_locked
    assert third.version == 1
    assert booked.version == 1
    session.commit()
    assert third.previous_version().change_info["extra"] == {"rationale": "closed"}
    third.total = 1
    with pytest.raises(RecordLockedError):
        session.flush()
    session.rollback()
    with pytest.raises(ChrononautException, match="lock_where"):
        lock_where(session, sa.literal(1) == 1)


@pytest.mark.backends("postgresql", "mariadb")  # SQLite refuses the second writer by itself
def test_another_session_cannot_change_what_was_locked_meanwhile(
    session_factory: sessionmaker[Session], session: Session, booked: Any
) -> None:
    """A record that was loaded before somebody locked it is stale."""
    invoice = type(booked)
    other = session.get_one(invoice, 2)
    with session_factory.begin() as second:
        second.get_one(invoice, 2).lock()
    other.total = 3
    with pytest.raises(StaleVersionError) as caught:
        session.flush()
    assert caught.value.changes == {"is_locked": (False, True)}


# --- holds


def test_hold_brings_the_record_up_to_date(session: Session, booked: Any) -> None:
    """The record is read again, after what is pending was written."""
    record = session.get_one(type(booked), 2)
    record.total = 4
    with hold(session, record, timeout=5) as held:
        assert held is record
        assert record.version == 1
        record.total += 1
        session.commit()
    assert record.version == 2
    with pytest.raises(ChrononautException), hold(session, type(booked)()):
        pass
    with pytest.raises(ChrononautException), hold(session, record, nowait=True, timeout=1):
        pass


@pytest.mark.backends("sqlite-file", "postgresql", "mariadb")  # in memory all sessions of a thread share one connection
@pytest.mark.parametrize("patience", [{"nowait": True}, {"timeout": 0.1}])
def test_hold_of_a_held_record_says_so(
    session_factory: sessionmaker[Session], session: Session, booked: Any, patience: dict[str, Any]
) -> None:
    """The error names the record, and the transaction can go on."""
    invoice = type(booked)
    record = session.get_one(invoice, 2)
    with hold(session, record), session_factory() as second:
        other = second.get_one(invoice, 2)
        with pytest.raises(RecordHeldError) as caught, hold(second, other, **patience):
            pass
        assert caught.value.key == (2,)
        assert second.scalar(sa.select(sa.func.count()).select_from(invoice)) == 2
        second.rollback()
        session.commit()
        with hold(second, other, nowait=True):
            other.total = 1
            second.commit()


@pytest.mark.backends("postgresql")  # whose setting it is
def test_holding_for_a_while_leaves_the_waiting_time_as_it_was(session: Session, booked: Any) -> None:
    """A transaction that has its own limit keeps it."""
    record = session.get_one(type(booked), 2)
    session.execute(sa.text("SET LOCAL lock_timeout = '1234ms'"))
    with hold(session, record, timeout=5):
        assert session.scalar(sa.text("SELECT current_setting('lock_timeout')")) == "1234ms"


@pytest.mark.backends("mariadb")  # the others set the time for the transaction only
def test_hold_that_was_refused_leaves_the_waiting_time_as_it_was(
    session_factory: sessionmaker[Session], session: Session, booked: Any
) -> None:
    """What others have set for the connection is not lost, whether the record is held or not."""
    invoice = type(booked)
    record = session.get_one(invoice, 2)
    waiting_time = sa.text("SELECT @@innodb_lock_wait_timeout")
    with session_factory() as second:
        second.execute(sa.text("SET SESSION innodb_lock_wait_timeout = 37"))
        other = second.get_one(invoice, 2)
        with hold(session, record), pytest.raises(RecordHeldError), hold(second, other, timeout=1):
            pass
        assert second.scalar(waiting_time) == 37
        session.rollback()
        with hold(second, other, timeout=1):
            assert second.scalar(waiting_time) == 37


# --- stale writes


# SQLite lets no two transactions read and then both write; for MariaDB see test_snapshot_isolation_is_passed_on.
@pytest.mark.backends("postgresql")
def test_serialization_failures_pass_through(engine: sa.Engine, invoice: Model) -> None:
    """Above READ COMMITTED the database's own error comes, and nothing is written."""
    from chrononaut import versioned_session

    strict = engine.execution_options(isolation_level="REPEATABLE READ")
    factory = versioned_session(sessionmaker(strict))
    with factory.begin() as session:
        session.add(invoice(id=1))
    with factory() as first, factory() as second:
        mine, theirs = first.get_one(invoice, 1), second.get_one(invoice, 1)
        theirs.total = 1
        second.commit()
        mine.total = 2
        with pytest.raises(OperationalError, match="could not serialize"):
            first.flush()
        first.rollback()
        with pytest.raises(OperationalError, match="could not serialize"):
            assert first.get_one(invoice, 1).total == 1
            second.execute(sa.update(invoice).values(total=3))
            second.commit()
            first.execute(sa.update(invoice).values(total=4))


@pytest.mark.backends("postgresql", "mariadb")  # SQLite refuses the second writer by itself
def test_stale_error_says_what_the_other_changed(session_factory: sessionmaker[Session], invoice: Model) -> None:
    """As a diff without hidden values; untracked changes never conflict; the deleted is found None."""
    with session_factory.begin() as session:
        session.add(invoice(id=1))
    with session_factory() as first, session_factory() as second:
        mine, theirs = first.get_one(invoice, 1), second.get_one(invoice, 1)
        theirs.seen = 5
        second.commit()
        assert theirs.total == 0
        mine.total = 1
        first.commit()
        theirs.period, theirs.secret = "2025", "s3cret"
        with pytest.raises(StaleVersionError) as caught:
            second.flush()
        assert (caught.value.expected, caught.value.found, caught.value.changes) == (0, 1, {"total": (0, 1)})
        second.rollback()
        assert theirs.total == 1
        mine.secret = "s3cret"
        first.commit()
        assert mine.version == 2
        theirs.total = 3
        with pytest.raises(StaleVersionError) as caught:
            second.flush()
        assert caught.value.changes == {}
        assert "s3cret" not in str(caught.value)
        second.rollback()
        assert theirs.total == 1
        first.delete(mine)
        first.commit()
        theirs.total = 3
        with pytest.raises(StaleVersionError) as caught:
            second.flush()
        assert caught.value.found is None
