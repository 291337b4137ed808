"""Run scenarios for one peer, one at a time, as told on standard input; runs inside the peer's own environment.

Called with the peer's module, a URL, the distributions whose versions to tell, and what to divide the sizes by. Reads
one JSON object a line, ``{"scenario": name}``, and answers with one, ``{"seconds": ..., "statements": ..., "rows":
...}``. Has to run on SQLAlchemy 1.4 as well.
"""

from __future__ import annotations

import gc
import importlib
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event, func, select, table, text, update
from sqlalchemy.engine import Engine

from .peers import Peer

SIZES = {"insert": 500, "change_and_commit": 100, "flush": 1_000, "delete": 500, "bulk_update": 50_000, "memory": 1_000}
# Reads are short: a round does that many, and tells the mean.
READS = {"versions": 5, "version_at": 20, "as_of_get": 20, "as_of_scan": 3}
AGED, VERSIONS = 5, 100
_FILL = {
    "sqlite": "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {size}) "
    "INSERT INTO record ({columns}) SELECT {values} FROM numbers",
    "postgresql": "INSERT INTO record ({columns}) SELECT {values} FROM generate_series(1, {size}) AS numbers(n)",
}


class Worker:
    """A peer on an empty database."""

    def __init__(self, peer: Peer, engine: Engine, divisor: int) -> None:
        self.peer = peer
        self.engine = engine
        self.statements = 0
        self._sizes = {name: max(size // divisor, 1) for name, size in SIZES.items()}
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _do_not_wait_for_the_disk)
        peer.create(engine)
        self._session = peer.session(engine)
        self._aged: list[tuple[int, list[tuple[datetime, int]]]] = []
        event.listen(engine, "before_cursor_execute", self._count)

    def _count(self, *_: Any) -> None:
        self.statements += 1

    def _records(self, number: int) -> list[Any]:
        return [
            self.peer.model(name=f"name {n}", email=f"{n}@example.org", amount=n, note="a note " * 8)
            for n in range(number)
        ]

    def _added(self, number: int) -> list[Any]:
        records = self._records(number)
        self._session.add_all(records)
        self._session.commit()
        return records

    def _rows(self) -> int:
        with self.engine.connect() as connection:
            return sum(
                connection.scalar(select(func.count()).select_from(table(name))) or 0
                for name in self.peer.history_tables
            )

    def run(self, scenario: str) -> dict[str, Any]:
        """Run a scenario once."""
        if scenario in self.peer.does_not and scenario not in SIZES:
            return {"does_not": self.peer.does_not[scenario]}
        prepare: Callable[[], Iterator[None]] = getattr(self, scenario)
        steps = prepare()
        next(steps)
        rows, self.statements = self._rows(), 0
        gc.collect()  # what was left behind by the work before is not part of this
        started = time.perf_counter()
        next(steps, None)
        seconds = time.perf_counter() - started
        times = READS.get(scenario, 1)
        answer: dict[str, Any] = {
            "seconds": seconds / times,
            "statements": round(self.statements / times),
            "rows": self._rows() - rows,
        }
        for _ in steps:
            pass
        if scenario == "memory":
            answer = {"bytes": self._peak}
        if self.peer.does_not.get(scenario):
            answer["does_not"] = self.peer.does_not[scenario]
        answer["resident"] = _peak_resident()
        return answer

    def tidy(self) -> None:
        """Let the database do between rounds what it would do by itself some time."""
        self._session.rollback()
        self._session.expunge_all()
        if self.engine.dialect.name == "postgresql":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("VACUUM ANALYZE"))

    # Each scenario prepares up to its first yield, is measured up to the second, and cleans up after it.

    def insert(self) -> Iterator[None]:
        records = self._records(self._sizes["insert"])
        yield
        self._session.add_all(records)
        self._session.commit()
        yield

    def change_and_commit(self) -> Iterator[None]:
        records = self._added(self._sizes["change_and_commit"])
        yield
        for record in records:
            record.amount += 1
            self._session.commit()
        yield

    def flush(self) -> Iterator[None]:
        records = self._added(self._sizes["flush"])
        yield
        for record in records:
            record.amount += 1
        self._session.commit()
        yield

    def delete(self) -> Iterator[None]:
        records = self._added(self._sizes["delete"])
        # SQLite gives the greatest key again once its row is gone, for which not every peer is prepared.
        self._fill("last", 1)
        yield
        for record in records:
            self._session.delete(record)
        self._session.commit()
        yield

    def bulk_update(self) -> Iterator[None]:
        model, marker = self.peer.model, "bulk"
        self._fill(marker, self._sizes["bulk_update"])
        yield
        statement = update(model).where(model.name == marker).values(amount=model.amount + 1)
        self._session.execute(statement, execution_options={"synchronize_session": False})
        self._session.commit()
        yield
        for name in {"record", "record_history"} & {"record", *self.peer.history_tables}:
            self._past_the_library(f"DELETE FROM {name} WHERE name = '{marker}'")

    def memory(self) -> Iterator[None]:
        records = self._added(self._sizes["memory"])
        tracemalloc.start()
        yield
        for record in records:
            record.amount += 1
        self._session.commit()
        yield
        self._peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    def _fill(self, marker: str, size: int) -> None:
        """Add rows past the library: they are older than their versioning."""
        values = {
            "name": f"'{marker}'",
            "email": "''",
            "amount": "n",
            "note": "'a note a note a note a note a note a note a note a note '",
        }
        if "version" in self.peer.model.__table__.columns:
            values["version"] = "0"
        columns = ", ".join(values)
        statement = _FILL[self.engine.dialect.name]
        self._past_the_library(statement.format(columns=columns, values=", ".join(values.values()), size=size))

    def _past_the_library(self, statement: str) -> None:
        with self.engine.begin() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.execute(text("SET LOCAL session_replication_role = replica"))  # no triggers
            connection.execute(text(statement))
        if self.engine.dialect.name == "postgresql":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("VACUUM ANALYZE record"))

    def _old_records(self) -> list[tuple[Any, datetime, int]]:
        """Return records that have many versions, read anew, each with an instant and what it held then."""
        if not self._aged:
            for record in self._added(AGED):
                instants = []
                for n in range(1, VERSIONS + 1):
                    record.amount = 1_000 + n
                    self._session.commit()
                    instants.append((datetime.now(timezone.utc), record.amount))
                self._aged.append((record.id, instants))
        self._session.expunge_all()
        return [
            (self._session.get(self.peer.model, key), *random.choice(instants[:-1])) for key, instants in self._aged
        ]

    def versions(self) -> Iterator[None]:
        records = self._old_records()
        yield
        found = [self.peer.versions(self._session, record) for record, _, _ in records]  # type: ignore[misc]
        yield
        assert all(len(rows) >= VERSIONS for rows in found)

    def version_at(self) -> Iterator[None]:
        questions = self._old_records() * (READS["version_at"] // AGED)
        yield
        rows = [self.peer.version_at(self._session, record, at) for record, at, _ in questions]  # type: ignore[misc]
        yield
        assert [row.amount for row in rows] == [amount for _, _, amount in questions]

    def as_of_get(self) -> Iterator[None]:
        questions = self._old_records() * (READS["as_of_get"] // AGED)
        then = []
        yield
        for record, at, _ in questions:
            with self.peer.as_of(self._session, at) as past:  # type: ignore[misc]
                then.append(past.get(self.peer.model, record.id).amount)
        yield
        assert then == [amount for _, _, amount in questions]

    def as_of_scan(self) -> Iterator[None]:
        questions = self._old_records()[: READS["as_of_scan"]]
        yield
        for _, at, _ in questions:
            with self.peer.as_of(self._session, at) as past:  # type: ignore[misc]
                past.execute(select(func.sum(self.peer.model.amount))).all()
        yield


def _peak_resident() -> int:
    """Return the most memory that this process has had, in KiB, on Linux; getrusage counts its parent's too."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _do_not_wait_for_the_disk(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA synchronous = OFF")


def main() -> None:
    module, url, shown, divisor = sys.argv[1:]
    peer: Peer = importlib.import_module(f"benchmarks.peers.{module}").peer
    engine = create_engine(url)
    worker = Worker(peer, engine, int(divisor))
    with engine.connect() as connection:
        server = ".".join(map(str, connection.dialect.server_version_info))
    driver = {"psycopg": "psycopg", "psycopg2": "psycopg2-binary"}.get(engine.dialect.driver)
    names = [name for name in (*shown.split(","), "SQLAlchemy", driver) if name]
    print(json.dumps({"server": server, "versions": {name: version(name) for name in names}}), flush=True)
    for line in sys.stdin:
        scenario = json.loads(line)["scenario"]
        if scenario == "tidy":
            worker.tidy()
            answer: dict[str, Any] = {}
        else:
            answer = worker.run(scenario)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
