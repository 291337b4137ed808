"""What is executed on the connections of attached sessions is heard, once, and only while their transactions last."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from chrononaut import UntrackedStatementError, Versioned, history_class, versioned_session, versioned_table

Model = Any


@pytest.fixture
def note(base: type[DeclarativeBase], engine: sa.Engine) -> Model:
    class Note(Versioned, base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    keys = (sa.Column(name, sa.Integer, primary_key=True, autoincrement=False) for name in ("one", "other"))
    Note.pairs = versioned_table(sa.Table("pair", base.metadata, *keys))
    base.metadata.create_all(engine)
    return Note


def lives(session: Session, note: Model) -> list[tuple[Any, ...]]:
    history = history_class(note)
    query = sa.select(history.id, history.version, history.operation).order_by(history.id, history.version)
    return [tuple(row) for row in session.execute(query)]


def change(bind: Any, note: Model, key: int) -> None:
    """Make a record, change it by flush and by statement, and pair it for a while."""
    with versioned_session(Session(bind)) as session:
        record = note(id=key, text="a")
        session.add(record)
        session.commit()
        record.text = "b"
        session.execute(note.pairs.insert(), [{"one": key, "other": key}])
        session.commit()
        session.execute(note.pairs.delete().where(note.pairs.c.one == key))
        session.commit()
        session.execute(sa.update(note).where(note.id == key).values(text="c"))
        session.commit()
        with pytest.raises(UntrackedStatementError):
            session.execute(sa.text("UPDATE note SET text = 'd'"))
        session.rollback()


WHOLE = [(-1, "insert"), (0, "update"), (1, "update")]


@pytest.mark.parametrize("order", ["engine first", "made from it first", "in turn"])
def test_engines_made_from_others_hear_once(engine: sa.Engine, note: Model, order: str) -> None:
    """``Engine.execution_options`` gives an engine that has the listeners of the one that it is made from."""
    other = engine.execution_options(tenant="a")
    binds = {"engine first": [engine, other], "made from it first": [other, engine], "in turn": [other, engine, other]}
    for key, bind in enumerate(binds[order], 1):
        change(bind, note, key)
    change(engine.execution_options(tenant="b"), note, 9)
    with Session(engine) as session:
        expected = [*range(1, len(binds[order]) + 1), 9]
        assert lives(session, note) == [(key, *state) for key in expected for state in WHOLE]


def test_connection_that_is_older_than_the_first_session(engine: sa.Engine, note: Model) -> None:
    """It is heard while the session's transaction lasts, and not afterwards."""
    with engine.connect() as connection:
        change(connection, note, 1)
        connection.execute(sa.text("UPDATE note SET text = 'mine alone'"))
        connection.rollback()
        with Session(connection) as unattached:
            assert lives(unattached, note) == [(1, *state) for state in WHOLE]


def test_listeners_do_not_add_up(engine: sa.Engine, note: Model) -> None:
    """An engine has one set, however many sessions and transactions there were."""
    before: Any = engine
    counts = []
    for key in (1, 2, 3):
        change(engine, note, key)
        counts.append(len(list(before.dispatch.before_execute)))
    assert counts == [counts[0]] * 3


@pytest.mark.backends("postgresql", "mariadb")  # SQLite has one writer at a time
def test_first_transactions_at_once(engine: sa.Engine, note: Model) -> None:
    """Whoever comes first, everybody is heard."""
    barrier = threading.Barrier(8)

    def write(key: int) -> None:
        with versioned_session(Session(engine)) as session:
            barrier.wait()
            session.add(note(id=key, text="a"))
            session.commit()

    threads = [threading.Thread(target=write, args=(key,)) for key in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Session(engine) as session:
        assert lives(session, note) == [(key, -1, "insert") for key in range(1, 9)]
