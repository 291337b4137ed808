"""Contention: many writers of one record, with real threads on real servers."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from chrononaut import StaleVersionError, history_class, versioned_session
from tests.models import Base, Setting, User

pytestmark = pytest.mark.backends("sqlite-file", "postgresql", "mariadb")  # memory has one connection for each thread

WRITERS, CHANGES = 6, 8


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


@pytest.fixture(params=["optimistic", "locking"])
def connecting(request: pytest.FixtureRequest, engine: sa.Engine) -> sa.Engine:
    """On SQLite, a transaction takes the write lock when it first writes, or when it begins."""
    if request.param == "locking":
        if engine.dialect.name != "sqlite":
            pytest.skip("a way of SQLite's only")
        return engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
    return engine


def run_together(work: Callable[[int], None], count: int = WRITERS) -> None:
    """Run the same work in threads that start at one time, and pass on what fails."""
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait(30)
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if failures:
        raise failures[0]


def retry(factory: sessionmaker[Session], work: Callable[[Session], None]) -> int:
    """Do something in a transaction of its own until nobody interferes; return how often somebody did."""
    for attempt in range(1000):
        with factory() as session:
            try:
                work(session)
                session.commit()
                return attempt
            except StaleVersionError:
                pass
            except OperationalError as error:
                # SQLite cannot let two transactions that have read go on to write, nor MariaDB two that insert a key.
                if not re.search("database is locked|Deadlock found", str(error)):
                    raise
        time.sleep(random.random() * 0.01)
    raise AssertionError("gave up")


def check(session: Session, name: str, count: int) -> None:
    """No version is lost and none is twice; each is one more than the one before, and the last is live."""
    setting = session.get_one(Setting, name)
    rows = setting.versions()
    assert [row.version for row in rows] == list(range(count))
    assert [row.value for row in rows] == [str(n) for n in range(count)]
    assert (setting.version, setting.value) == (count, str(count))
    history = history_class(Setting)
    everything = session.scalars(sa.select(history).where(history.name == name).order_by(history.version)).all()
    for before, after in pairwise(everything):
        assert after.began == before.changed
        assert before.changed <= after.changed


def test_no_change_of_one_record_is_lost(connecting: sa.Engine) -> None:
    """Each writer reads a number and writes the next; those who come too late notice."""
    factory = versioned_session(sessionmaker(connecting))
    with factory() as session:
        session.add(Setting(name="x", value="0"))
        session.commit()

    def increment(session: Session) -> None:
        setting = session.get_one(Setting, "x")
        setting.value = str(int(setting.value or 0) + 1)

    def work(number: int) -> None:
        for _ in range(CHANGES):
            retry(factory, increment)

    run_together(work)
    with factory() as session:
        check(session, "x", WRITERS * CHANGES)


def test_writers_of_several_records_in_any_order(connecting: sa.Engine) -> None:
    """Each changes all of them in one flush, told of them in an order of its own; nobody deadlocks."""
    factory = versioned_session(sessionmaker(connecting))
    names = ["a", "b", "c", "d"]
    with factory() as session:
        session.add_all([Setting(name=name, value="0") for name in names])
        session.commit()

    def work(number: int) -> None:
        order = random.Random(number).sample(names, len(names))

        def increment(session: Session) -> None:
            for setting in [session.get_one(Setting, name) for name in order]:
                setting.value = str(int(setting.value or 0) + 1)

        for _ in range(CHANGES // 2):
            retry(factory, increment)

    run_together(work)
    with factory() as session:
        for name in names:
            check(session, name, WRITERS * CHANGES // 2)


def test_lives_of_one_key_do_not_collide(connecting: sa.Engine) -> None:
    """Writers add and delete the same key; whoever wins, the numbers are contiguous."""
    factory = versioned_session(sessionmaker(connecting))

    def turn(session: Session) -> None:
        found = session.get(Setting, "x")
        if found is None:
            session.add(Setting(name="x", value="1"))
        else:
            session.delete(found)

    def work(number: int) -> None:
        for _ in range(CHANGES // 2):
            try:
                retry(factory, turn)
            except IntegrityError:  # somebody else has added it: nothing of ours
                continue

    run_together(work)
    with factory() as session:
        history = history_class(Setting)
        rows = session.scalars(sa.select(history).order_by(history.version)).all()
        assert rows
        assert [row.version for row in rows] == list(range(-1, len(rows) - 1))
        assert [row.operation for row in rows] == (["insert", "delete"] * len(rows))[: len(rows)]
        assert [row.began for row in rows[1:]] == [row.changed for row in rows[:-1]]
        assert (session.get(Setting, "x") is None) == (rows[-1].operation == "delete")


@pytest.mark.backends("postgresql")  # SQLite locks the whole database
def test_change_does_not_block_who_refers_to_the_record(engine: sa.Engine) -> None:
    """A captured update locks the row as weakly as the UPDATE itself does: its key may be referred to."""
    factory = versioned_session(sessionmaker(engine))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE post (author INTEGER REFERENCES appuser (id))"))
    with factory() as session, engine.connect() as other:
        session.add(User(id=1, email="a"))
        session.commit()
        session.get_one(User, 1).email = "b"
        session.flush()
        other.execute(sa.text("SET lock_timeout = '2s'"))
        other.execute(sa.text("INSERT INTO post VALUES (1)"))
        other.rollback()


@pytest.mark.backends("postgresql")  # SQLite has no row locks to wait for
@pytest.mark.parametrize("how", ["update", "delete"])
def test_writer_who_had_to_wait_notices_what_happened(engine: sa.Engine, how: str) -> None:
    """The second writer waits for the first one's lock, and then sees that it is too late."""
    factory = versioned_session(sessionmaker(engine))
    with factory() as session:
        session.add(Setting(name="x", value="0"))
        session.commit()
    outcome: list[object] = []
    with factory() as first, factory() as second:
        one, two = first.get_one(Setting, "x"), second.get_one(Setting, "x")
        one.value = "first"
        first.flush()

        def write() -> None:
            try:
                if how == "update":
                    two.value = "second"
                else:
                    second.delete(two)
                second.flush()
                outcome.append("written")
            except StaleVersionError as error:
                outcome.append((error.expected, error.found))

        thread = threading.Thread(target=write)
        thread.start()
        with engine.connect() as watcher:
            waiting = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
            while thread.is_alive() and not watcher.scalar(waiting):
                watcher.rollback()
        assert outcome == []
        first.commit()
        thread.join(30)
    assert outcome == [(0, 1)]


@pytest.mark.backends("postgresql")  # the database's clock, seen by two sessions at once
def test_record_changed_after_our_instant_is_clamped_to_that_change(engine: sa.Engine) -> None:
    """A transaction that began to write earlier, and then changes what a later one has changed."""
    factory = versioned_session(sessionmaker(engine))
    with factory() as session:
        session.add_all([Setting(name="x", value="0"), Setting(name="y", value="0")])
        session.commit()
    with factory() as early, factory() as late:
        early.get_one(Setting, "y").value = "early"
        early.flush()
        late.get_one(Setting, "x").value = "late"
        late.commit()
        x = early.get_one(Setting, "x")
        x.value = "early"
        early.commit()
        by_late, by_early = x.versions()
        [row] = early.get_one(Setting, "y").versions()
        assert row.changed < by_late.changed
        assert by_early.began == by_late.changed == by_early.changed
