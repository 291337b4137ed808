"""Several writers at once: nothing is lost, nobody waits in a circle, and history fits the rows."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import StaleVersionError, Versioned, history_class, versioned_session

Model = Any
Factory = sessionmaker[Session]


@pytest.fixture
def account(base: type[DeclarativeBase], engine: sa.Engine) -> Model:
    class Account(Versioned, base):
        __tablename__ = "account"
        id: Mapped[int] = mapped_column(primary_key=True)
        balance: Mapped[int] = mapped_column(default=0)
        owner: Mapped[str | None]

    base.metadata.create_all(engine)
    return Account


@pytest.fixture
def factory(engine: sa.Engine, account: Model) -> Factory:
    """Sessions that take SQLite's write lock when they begin, as contending writers must."""
    factory = versioned_session(sessionmaker(engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")))
    with factory.begin() as session:
        session.add_all([account(id=number) for number in range(1, 21)])
    return factory


def run(count: int, work: Callable[[int], None]) -> None:
    """Run so many threads, and raise what any of them raised."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def check_histories(session: Session, model: Model) -> dict[int, list[int]]:
    """Versions are contiguous and time never goes backwards; return the balances of each record in order."""
    history = history_class(model)
    states: dict[int, list[Any]] = {}
    for row in session.scalars(sa.select(history).order_by(history.id, history.version)):
        states.setdefault(row.id, []).append(row)
    for record in session.scalars(sa.select(model)):
        rows = states[record.id]
        assert [row.version for row in rows] == list(range(-1, record.version))
        for before, after in itertools.pairwise(rows):
            assert before.changed == after.began <= after.changed
    return {key: [row.balance for row in rows if row.operation != "insert"] for key, rows in states.items()}


@pytest.mark.backends("sqlite-file", "postgresql", "mariadb")  # in memory each thread has a database of its own
def test_increments_with_retry_are_all_there(factory: Factory, account: Model) -> None:
    """8 writers add 50 times to one record, and try again when they were late."""

    def work(number: int) -> None:
        for _ in range(50):
            while True:
                with factory() as session:
                    try:
                        session.get_one(account, 1).balance += 1
                        session.commit()
                        break
                    except StaleVersionError:
                        continue

    run(8, work)
    with factory() as session:
        record = session.get_one(account, 1)
        assert (record.balance, record.version) == (400, 400)
        assert check_histories(session, account)[1] == list(range(400))


@pytest.mark.backends("postgresql", "mariadb")  # SQLite has one writer at a time
def test_overlapping_sets_do_not_deadlock(factory: Factory, account: Model) -> None:
    """8 writers flush and execute statements over overlapping records, in any order."""

    def work(number: int) -> None:
        chance = random.Random(number)
        for turn in range(12):
            chosen = chance.sample(range(1, 21), 8)
            with factory() as session:
                try:
                    if turn % 3 == 2:
                        session.execute(
                            sa.update(account).where(account.id.in_(chosen)).values(balance=account.balance + 1)
                        )
                    else:
                        records = [session.get_one(account, key) for key in chosen]
                        for record in records:
                            record.balance += 1
                    session.commit()
                except StaleVersionError:
                    session.rollback()

    run(8, work)
    with factory() as session:
        balances = check_histories(session, account)
        for record in session.scalars(sa.select(account)):
            assert [*balances[record.id], record.balance] == list(range(record.balance + 1))
            assert record.version == record.balance


@pytest.mark.backends("postgresql", "mariadb")
def test_flushes_that_change_and_delete_do_not_deadlock(factory: Factory, account: Model) -> None:
    """One changes what the other deletes, and the other way round."""

    def work(number: int) -> None:
        for turn in range(1, 11):
            mine, theirs = (2 * turn - 1, 2 * turn) if number % 2 else (2 * turn, 2 * turn - 1)
            with factory() as session:
                kept, gone = session.get(account, mine), session.get(account, theirs)
                if kept is None or gone is None:
                    continue
                barrier.wait(timeout=5) if turn == 1 else None
                kept.balance += 1
                session.delete(gone)
                try:
                    session.commit()
                except StaleVersionError:
                    session.rollback()

    barrier = threading.Barrier(2)
    run(2, work)
    with factory() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(account)) == 10


@pytest.mark.backends("postgresql")
def test_statement_that_waits_keeps_when_its_states_began(factory: Factory, account: Model, engine: sa.Engine) -> None:
    """It copies what it finds after the wait, with the end of the state before."""
    with factory() as first:
        first.get_one(account, 1).balance = 5
        first.flush()
        waiting = threading.Thread(target=lambda: _add_seven(factory, account))
        waiting.start()
        _wait_for_lock(engine)
        first.commit()
        waiting.join()
    with factory() as session:
        assert session.get_one(account, 1).balance == 12
        assert check_histories(session, account)[1] == [0, 5]


def _add_seven(factory: Factory, account: Model) -> None:
    with factory.begin() as session:
        session.execute(sa.update(account).where(account.id == 1).values(balance=account.balance + 7))


def _wait_for_lock(engine: sa.Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watcher:
        for _ in range(1000):
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            if watcher.exec_driver_sql(waiting).scalar():
                return
            watcher.exec_driver_sql("SELECT pg_sleep(0.01)")
    raise AssertionError("nobody waits")


@pytest.mark.backends("postgresql")
@pytest.mark.parametrize("moment", ["INSERT", "UPDATE"])
@pytest.mark.parametrize("how", ["insert", "update"])
def test_row_that_comes_to_match_in_between(
    factory: Factory, account: Model, engine: sa.Engine, moment: str, how: str
) -> None:
    """A row committed after the lock, or between copy and write, is neither written without history nor lost."""
    done: list[str] = []

    def interfere(conn: object, cursor: object, sql: str, params: object, context: object, many: bool) -> None:
        if not done and sql.startswith(moment):
            done.append(sql)
            with factory.begin() as other:
                if how == "insert":
                    other.add(account(id=99, owner="x"))
                else:
                    other.get_one(account, 2).owner = "x"

    with factory.begin() as session:
        session.get_one(account, 1).owner = "x"
    with factory() as session:
        event.listen(session.connection(), "before_cursor_execute", interfere)
        result: Any = session.execute(sa.update(account).where(account.owner == "x").values(balance=3))
        assert result.rowcount == 2
        assert done
        session.commit()
    with factory() as session:
        balances = check_histories(session, account)
        for record in session.scalars(sa.select(account).where(account.owner == "x")):
            assert record.balance == 3
            assert balances[record.id][-1] == 0


def test_flush_of_thirty_thousand_records(factory: Factory, account: Model) -> None:
    """There is no limit that a large flush runs into."""
    with factory() as session:
        session.execute(sa.insert(account), [{"id": number} for number in range(100, 30_100)])
        session.commit()
        for record in session.scalars(sa.select(account)):
            record.balance = 1
        session.commit()
        history = history_class(account)
        query = sa.select(sa.func.count()).select_from(history).where(history.operation == "update")
        assert session.scalar(query) == 30_020
