"""What versioning costs, in statements."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker, with_polymorphic

from chrononaut import Versioned
from tests.fix_statements import RecordStatements, StatementLog
from tests.models import Animal, Base, Dog, Setting


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


class Models:
    """The same model with and without history."""

    def __init__(self, base: type[DeclarativeBase]) -> None:
        class Plain(base):
            __tablename__ = "plain"
            __table_args__ = {"sqlite_autoincrement": True}
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(sa.String(50))
            number: Mapped[int] = mapped_column(default=0)

        class Thing(Versioned, base):
            __tablename__ = "thing"
            __table_args__ = {"sqlite_autoincrement": True}
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(sa.String(50))
            number: Mapped[int] = mapped_column(default=0)

        self.plain: Any = Plain
        self.versioned: Any = Thing


@pytest.fixture
def models(engine: sa.Engine, base: type[DeclarativeBase]) -> Models:
    models = Models(base)
    base.metadata.create_all(engine)
    return models


def change(records: list[Any]) -> None:
    for number, record in enumerate(records):
        record.name = f"changed {number}"


def count_flush(session: Session, statements: RecordStatements) -> StatementLog:
    with statements() as log:
        session.flush()
    return log


def add_and_load(session: Session, model: Any, count: int) -> list[Any]:
    session.add_all([model(name=f"name {number}") for number in range(count)])
    session.commit()
    return list(session.scalars(sa.select(model).order_by(model.id)))


def test_200_changed_records_are_one_history_statement(
    session: Session, models: Models, statements: RecordStatements
) -> None:
    """And the whole flush is at most two statements more than without versioning."""
    change(add_and_load(session, models.plain, 200))
    plain = count_flush(session, statements)
    things = add_and_load(session, models.versioned, 200)
    change(things)
    log = count_flush(session, statements)
    [copy] = log.matching("thing_history")
    assert copy.verb == "INSERT"
    assert not copy.executemany
    assert len(log) <= len(plain) + 2
    session.commit()
    assert [(thing.version, thing.versions()[0].name) for thing in things[:3]] == [
        (1, f"name {number}") for number in range(3)
    ]


def test_200_records_changed_each_in_its_own_way(
    session: Session, models: Models, statements: RecordStatements
) -> None:
    """As long as the UPDATE of unversioned records is a batch, that of versioned ones is."""
    logs: list[StatementLog] = []
    for model in (models.plain, models.versioned):
        for number, record in enumerate(add_and_load(session, model, 200)):
            if number < 100:
                record.name = "x"
            else:
                record.number = number
        logs.append(count_flush(session, statements))
    plain, log = logs
    assert len(log.matching("thing_history")) == 1
    assert len(log) <= len(plain) + 2


@pytest.mark.parametrize("expired", [False, True])
def test_200_deleted_records_are_one_history_statement(
    session: Session, models: Models, statements: RecordStatements, expired: bool
) -> None:
    """Whether they are loaded or not."""
    things = add_and_load(session, models.versioned, 200)
    if expired:
        session.commit()
    for thing in things:
        session.delete(thing)
    log = count_flush(session, statements)
    assert len(log.matching("INSERT INTO thing_history")) == 1
    assert len(log) <= 3
    session.commit()
    assert session.scalar(sa.text("SELECT count(*) FROM thing_history WHERE operation = 'delete'")) == 200


def test_200_new_records_are_one_executemany_of_births(
    session: Session, models: Models, statements: RecordStatements
) -> None:
    """And no more."""
    session.add_all([models.plain(name="n") for _ in range(200)])
    plain = count_flush(session, statements)
    session.add_all([models.versioned(name="n") for _ in range(200)])
    log = count_flush(session, statements)
    [births] = log.matching("thing_history")
    assert births.verb == "INSERT"
    assert len(log) == len(plain) + 1


@pytest.mark.parametrize("count", [5000])
def test_5000_records_in_one_flush(session: Session, models: Models, statements: RecordStatements, count: int) -> None:
    """Added, changed, changed without being loaded, and deleted: bind limits do not matter."""
    things = add_and_load(session, models.versioned, count)
    change(things)
    log = count_flush(session, statements)
    assert len(log.matching("INSERT INTO thing_history")) == 1
    session.commit()
    for thing in things:
        thing.name = "again"
    log = count_flush(session, statements)
    assert len(log.matching("INSERT INTO thing_history")) == 1
    assert len(log.matching("^SELECT")) <= 10
    for thing in things:
        session.delete(thing)
    log = count_flush(session, statements)
    assert len(log.matching("INSERT INTO thing_history")) == 1
    session.commit()
    rows = session.execute(sa.text("SELECT version, count(*) FROM thing_history GROUP BY version ORDER BY version"))
    assert [tuple(row) for row in rows] == [(version, count) for version in (-1, 0, 1, 2)]


def test_5000_records_with_text_keys(session: Session, statements: RecordStatements) -> None:
    """Also where the key is chosen by the application, with any characters."""
    settings = [Setting(name=f"{number} 'ü\"{{,\\", value="0") for number in range(5000)]
    session.add_all(settings)
    session.commit()
    for setting in session.scalars(sa.select(Setting)):
        setting.value = "1"
    log = count_flush(session, statements)
    assert len(log.matching("INSERT INTO setting_history")) == 1
    session.commit()
    assert session.scalar(sa.text("SELECT count(*) FROM setting_history WHERE version = 0")) == 5000


@pytest.mark.backends("sqlite-file")  # shows its plan at once
@pytest.mark.parametrize("count", [1, 2, 200])
def test_the_copy_uses_the_keys(session: Session, models: Models, statements: RecordStatements, count: int) -> None:
    """Neither the live table nor history is scanned, however many records change."""
    change(add_and_load(session, models.versioned, count))
    log = count_flush(session, statements)
    [copy] = log.matching("INSERT INTO thing_history")
    plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {copy.sql}", copy.parameters).all()
    details = [row[-1] for row in plan]
    assert any("SEARCH thing USING INTEGER PRIMARY KEY" in detail for detail in details), details
    assert any("SEARCH before USING" in detail and "id=? AND version=?" in detail for detail in details), details
    assert not any(detail.startswith(("SCAN thing", "SCAN before")) for detail in details), details


def test_generated_key_is_not_looked_up(session: Session, models: Models, statements: RecordStatements) -> None:
    """Where the database never gives a key twice."""
    session.add(models.versioned(name="n"))
    log = count_flush(session, statements)
    assert log.verbs == ["INSERT", "INSERT"]


def test_chosen_keys_are_looked_up_once(session: Session, statements: RecordStatements) -> None:
    """For all of them."""
    session.add_all([Setting(name=str(number)) for number in range(100)])
    log = count_flush(session, statements)
    assert log.verbs == ["INSERT", "SELECT", "INSERT"]


def test_versions_do_not_break_the_batches_of_a_hierarchy(session: Session, statements: RecordStatements) -> None:
    """One history statement for each table."""
    session.add_all([Dog(id=number, name="a", trick="sit") for number in range(100)])
    session.add_all([Animal(id=number, name="a") for number in range(100, 150)])
    session.commit()
    for animal in session.scalars(sa.select(with_polymorphic(Animal, [Dog]))):
        animal.name = "b"
    log = count_flush(session, statements)
    assert len(log.matching("INSERT INTO animal_history")) == 1
    assert len(log.matching("INSERT INTO dog_history")) == 1


def test_nothing_to_capture_costs_nothing(session: Session, models: Models, statements: RecordStatements) -> None:
    """Reading, and flushing what is not versioned."""
    [plain] = add_and_load(session, models.plain, 1)
    with statements() as log:
        session.scalars(sa.select(models.versioned)).all()
        plain.name = "x"
        session.flush()
    assert log.verbs == ["SELECT", "UPDATE"]


def test_a_change_costs_no_round_trip_for_the_instant(
    engine: sa.Engine, session_factory: sessionmaker[Session], models: Models, statements: RecordStatements
) -> None:
    """The first versioned write of a transaction takes it along."""
    with session_factory() as session:
        [thing] = add_and_load(session, models.versioned, 1)
        thing.name = "x"
        log = count_flush(session, statements)
        assert log.verbs == ["INSERT", "UPDATE"]


def test_listeners_do_not_pile_up(engine: sa.Engine, session_factory: sessionmaker[Session], models: Models) -> None:
    """A connection that served many transactions is left as it was."""
    calls = []
    with engine.connect() as connection:
        with session_factory(bind=connection) as session:
            [thing] = add_and_load(session, models.versioned, 1)
            for number in range(5):
                thing.name = str(number)
                session.commit()
        event.listen(connection, "before_execute", lambda *_: calls.append(1))
        connection.execute(sa.text("SELECT 1"))
        assert len(calls) == 1
        with session_factory(bind=connection) as session:
            assert session.get_one(models.versioned, 1).version == 5
