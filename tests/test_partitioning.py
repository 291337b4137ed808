"""History that is partitioned by time, as the page on scaling out says."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from chrononaut import Versioned, as_of, changes, versioned_session
from chrononaut.check import check_schema
from chrononaut.verify import verify_history
from tests.pages import ROOT

Model = Any
PAGE = ROOT / "docs" / "explanation" / "scaling-out.md"


class Clock:
    def __init__(self) -> None:
        self.now = self.first_of_june(2026)

    def __call__(self) -> datetime:
        return self.now

    @staticmethod
    def first_of_june(year: int) -> datetime:
        return datetime(year, 6, 1, tzinfo=timezone.utc)


@pytest.fixture
def user(base: type[DeclarativeBase]) -> Model:
    class User(Versioned, base):
        __tablename__ = "appuser"

        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str]

    return User


def statements() -> list[list[str]]:
    """Return the SQL on the page: what makes the partitions, and what drops one."""
    blocks = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(r"--[^\n]*", "", block).split(";")[:-1] for block in blocks]


@pytest.mark.backends("postgresql")  # its partitions
def test_history_can_be_partitioned_by_time(user: Model, base: type[DeclarativeBase], engine: sa.Engine) -> None:
    """A history table that becomes partitioned is written to and read like before; dropping one forgets its states."""
    base.metadata.create_all(engine)
    clock = Clock()
    partition, drop = statements()
    with versioned_session(sessionmaker(engine), clock=clock)() as session:
        session.add_all([user(id=1, email="in 2026"), user(id=2, email="ever")])
        session.commit()
        with engine.begin() as connection:
            for statement in partition:
                connection.exec_driver_sql(statement)
        record = session.get_one(user, 1)
        for year in (2027, 2028, 2029):
            clock.now = clock.first_of_june(year)
            record.email = f"in {year}"
            session.commit()
        session.execute(sa.update(user).where(user.id == 1).values(email="by statement"))
        session.commit()

        assert rows(engine) == {"appuser_history_old": 2, "appuser_history_2027": 1, "appuser_history_later": 3}
        assert [row.version for row in record.versions()] == [0, 1, 2, 3]
        for year in (2026, 2027, 2028):
            at = clock.first_of_june(year)
            assert record.version_at(at).email == f"in {year}"
            with as_of(session, at) as past:
                assert past.get_one(user, 1).email == f"in {year}"
        assert len(list(changes(session, models=[user]))) == 6
        session.rollback()
        with engine.connect() as connection:
            assert list(verify_history(connection, base.metadata)) == []
            assert [found.severity for found in check_schema(connection, base.metadata)] == ["note"]

        with engine.begin() as connection:
            for statement in drop:
                connection.exec_driver_sql(statement)
        with as_of(session, clock.first_of_june(2027)) as past:
            assert past.get_one(user, 1).email == "in 2027"
        long_ago = clock.first_of_june(2020)
        assert record.version_at(long_ago) is None
        assert session.get_one(user, 2).version_at(long_ago).email == "ever"


@pytest.mark.backends("postgresql")  # its standbys allow no writes
def test_past_is_read_where_nothing_may_be_written(user: Model, base: type[DeclarativeBase], engine: sa.Engine) -> None:
    """A connection that may only read, such as a standby's, is enough for as_of and for reading history."""
    base.metadata.create_all(engine)
    with versioned_session(sessionmaker(engine))() as session:
        record = user(id=1, email="first")
        session.add(record)
        session.commit()
        record.email = "second"
        session.commit()
        at = record.versions()[0].began
    replica = sa.create_engine(engine.url, connect_args={"options": "-c default_transaction_read_only=on"})
    try:
        with replica.connect() as connection, pytest.raises(sa.exc.InternalError, match="read-only"):
            connection.exec_driver_sql("CREATE TABLE nothing (id integer)")
        with as_of(replica, at) as past:
            assert past.get_one(user, 1).email == "first"
        with versioned_session(sessionmaker(replica))() as session:
            assert session.get_one(user, 1).version_at(at).email == "first"
            assert len(list(changes(session, models=[user]))) == 2
    finally:
        replica.dispose()


def rows(engine: sa.Engine) -> dict[str, int]:
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT tableoid::regclass::text, count(*) FROM appuser_history GROUP BY 1")
        return {row[0]: row[1] for row in found}
