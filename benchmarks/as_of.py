"""What the past costs: 100,000 records with 1,000,000 history rows on PostgreSQL, live and through ``as_of``.

Run it with a server's URL in ``CHRONONAUT_TEST_POSTGRESQL``, or with the embedded server that the tests use::

    python -m benchmarks.as_of [--records 100000] [--versions 10] [--plans]

Prints for each question the live time, and the past's as a multiple of it (medians of alternating runs), for an
instant long ago, one in the middle, and one just now.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from chrononaut import Versioned, as_of, changes, history_class

START = datetime(2020, 1, 1, tzinfo=timezone.utc)
DAYS_EACH = 100
INSTANTS = {"long ago": 0.15, "in the middle": 0.5, "lately": 0.99}


class Base(DeclarativeBase):
    pass


class User(Versioned, Base):
    __tablename__ = "appuser"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str] = mapped_column(index=True)
    team_id: Mapped[int] = mapped_column(index=True)


@contextmanager
def server() -> Iterator[sa.URL]:
    url = os.environ.get("CHRONONAUT_TEST_POSTGRESQL")
    if url is not None:
        yield sa.make_url(url)
        return
    from tests.fix_postgresql import run_server

    with run_server() as own:
        yield own


def fill(engine: sa.Engine, records: int, versions: int) -> None:
    """Write what that many records with that many changes each would have left behind, in the order of time."""
    history = history_class(User).__table__
    Base.metadata.create_all(engine)
    columns = "id, name, email, team_id, version, began, changed, change_info, operation"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO appuser (id, name, email, team_id, version) "
            f"SELECT i, 'name ' || i, 'mail' || i, (i * 7919) %% 1000, {versions - 1} "
            f"FROM generate_series(1, {records}) i"
        )
        connection.exec_driver_sql(
            f"INSERT INTO {history.name} ({columns}) "
            "SELECT i, 'name ' || i || '-' || v, 'mail' || i, (i * 7919 + v) %% 1000, v, "
            f"CASE WHEN v >= 0 THEN t + v * interval '{DAYS_EACH} days' END, "
            f"t + (v + 1) * interval '{DAYS_EACH} days', "
            """'{"user_id": "x", "remote_addr": null}', CASE WHEN v < 0 THEN 'insert' ELSE 'update' END """
            f"FROM (SELECT i, v, timestamptz '{START.isoformat()}' + (i * 37 %% {DAYS_EACH}) * interval '1 day' AS t "
            f"FROM generate_series(1, {records}) i, generate_series(-1, {versions - 2}) v "
            f"ORDER BY v, i * 37 %% {DAYS_EACH}) AS s"
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")


Question = Callable[[Session, int], Any]

QUESTIONS: dict[str, tuple[Question, int]] = {
    "get": (lambda session, n: session.get(User, n * 13 + 5), 300),
    "indexed filter, 1 row": (
        lambda session, n: session.scalars(sa.select(User).where(User.email == f"mail{n * 7 + 3}")).all(),
        300,
    ),
    "indexed filter, 100 rows": (
        lambda session, n: session.scalars(sa.select(User).where(User.team_id == n % 1000)).all(),
        60,
    ),
    "full scan": (lambda session, n: session.scalars(sa.select(User)).all(), 3),
    "full scan, columns": (lambda session, n: session.execute(sa.select(User.id, User.name, User.team_id)).all(), 3),
    "count": (lambda session, n: session.scalar(sa.select(sa.func.count()).select_from(User)), 5),
}


def timed(session: Session, question: Question, n: int) -> float:
    session.expunge_all()
    start = time.perf_counter()
    question(session, n)
    return time.perf_counter() - start


def compare(engine: sa.Engine, at: datetime) -> None:
    with Session(engine) as live, as_of(live, at) as past:
        for name, (question, runs) in QUESTIONS.items():
            question(live, 0), question(past, 0)
            pairs = [(timed(live, question, n), timed(past, question, n)) for n in range(1, runs + 1)]
            now, then = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"  {name:26} live {now * 1000:9.2f} ms   past {then / now:6.2f} x", flush=True)


def show_plans(engine: sa.Engine, at: datetime) -> None:
    def explain(_connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, COSTS OFF, SUMMARY ON) {statement}", parameters)
        print("\n".join(row[0] for row in cursor.fetchall()), flush=True)

    with Session(engine) as live, as_of(live, at) as past:
        past.scalar(sa.select(sa.literal(1)))
        sa.event.listen(live.connection(), "before_cursor_execute", explain)
        for name, (question, _) in QUESTIONS.items():
            print(f"--- {name}")
            question(past, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--versions", type=int, default=10)
    parser.add_argument("--plans", action="store_true")
    options = parser.parse_args()
    with server() as url:
        engine = sa.create_engine(url)
        fill(engine, options.records, options.versions)
        whole = timedelta(days=DAYS_EACH * options.versions)
        for name, part in INSTANTS.items():
            print(name)
            compare(engine, START + whole * part)
        with Session(engine) as session:
            start = time.perf_counter()
            feed = changes(session, since=START + whole / 2, models=[User])
            for _ in range(1000):
                next(feed)
            print(f"1,000 changes from the middle of the feed: {(time.perf_counter() - start) * 1000:.0f} ms")
        if options.plans:
            show_plans(engine, START + whole / 2)
        engine.dispose()


if __name__ == "__main__":
    main()
