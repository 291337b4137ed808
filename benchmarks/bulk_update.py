"""What a set-based UPDATE costs with history: `python benchmarks/bulk_update.py URL [rows]`.

Prints the ratio of versioned to unversioned time, the median of several runs taken in turn.
"""

from __future__ import annotations

import statistics
import sys
import time
import tracemalloc
from datetime import datetime, timezone
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import Versioned, versioned_session


class Base(DeclarativeBase):
    pass


class Columns:
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]
    score: Mapped[int]
    active: Mapped[bool]
    joined: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))


class Plain(Columns, Base):
    __tablename__ = "bench_plain"


class Tracked(Versioned, Columns, Base):
    __tablename__ = "bench_tracked"


def fill(session: Session, model: Any, rows: int) -> None:
    now = datetime.now(timezone.utc)
    values = [
        {"id": n, "name": f"name {n}", "email": f"user{n}@example.org", "score": n, "active": True, "joined": now}
        for n in range(1, rows + 1)
    ]
    session.execute(sa.insert(model), values)
    session.commit()


def measure(factory: Any, model: Any, step: int) -> float:
    with factory() as session:
        session.connection()
        start = time.perf_counter()
        session.execute(sa.update(model).where(model.active).values(score=model.score + step))
        session.commit()
        return time.perf_counter() - start


def main(url: str, rows: int) -> None:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: object) -> None:
            connection.execute("PRAGMA synchronous = OFF")

    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    factories = {Plain: sessionmaker(engine), Tracked: versioned_session(sessionmaker(engine))}
    for model, factory in factories.items():
        with factory() as session:
            fill(session, model, rows)
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("VACUUM ANALYZE"))
    times: dict[Any, list[float]] = {Plain: [], Tracked: []}
    for step in range(1, 8):
        for model, factory in factories.items():
            times[model].append(measure(factory, model, step))
    ratio = statistics.median(times[Tracked]) / statistics.median(times[Plain])
    tracemalloc.start()
    measure(factories[Tracked], Tracked, 9)
    peak = tracemalloc.get_traced_memory()[1]
    print(f"{engine.dialect.name}: {rows} rows, {ratio:.2f} times the unversioned UPDATE, peak {peak // 1024} KiB")
    Base.metadata.drop_all(engine)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100_000)
