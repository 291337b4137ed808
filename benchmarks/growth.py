"""How cost grows: the same work beside histories of several sizes, in turn; runs in this library's environment.

Called with a JSON object of sizes and URLs of empty databases, and the number of rounds. Waits for a line, and answers
with the median seconds of each piece of work for each size.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

from sqlalchemy import Engine, create_engine, event, func, select, text
from sqlalchemy.orm import Session, sessionmaker

from chrononaut import history_class, versioned_session

from .peers.chrononaut_now import Base, Record

RECORDS = 10_000
START = datetime(2020, 1, 1, tzinfo=timezone.utc)
COMMITS, CHANGES, READS = 50, 1_000, 200

_COLUMNS = "id, version, name, email, amount, note, began, changed, change_info, operation"
# Written in the order of time, as a history that has grown is: every record's first change, then every second one, …
_HISTORY = {
    "sqlite": (
        "WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n < {size} - 1) "
        "INSERT INTO record_history ({columns}) SELECT 1 + n % {records}, n / {records}, 'name', "
        "'mail@example.org', n, 'a note a note a note a note a note a note a note a note ', "
        "CASE WHEN n >= {records} THEN {time_before} END, {time}, "
        """'{{"user_id": null, "remote_addr": null}}', 'update' FROM numbers"""
    ),
    "postgresql": (
        "INSERT INTO record_history ({columns}) SELECT 1 + n % {records}, n / {records}, 'name', "
        "'mail@example.org', n, 'a note a note a note a note a note a note a note a note ', "
        "CASE WHEN n >= {records} THEN {time_before} END, {time}, "
        """'{{"user_id": null, "remote_addr": null}}', 'update' FROM generate_series(0, {size} - 1) AS numbers(n)"""
    ),
}
_TIME = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%S', '2020-01-01', ({n}) || ' minutes') || '.000000'",
    "postgresql": "timestamptz '2020-01-01T00:00Z' + ({n}) * interval '1 minute'",
}
_LIVE = {
    "sqlite": "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {records}) "
    "INSERT INTO record (id, name, email, amount, note, version) "
    "SELECT n, 'name', 'mail@example.org', n, 'a note', {version} FROM numbers",
    "postgresql": "INSERT INTO record (id, name, email, amount, note, version) "
    "SELECT n, 'name', 'mail@example.org', n, 'a note', {version} FROM generate_series(1, {records}) AS numbers(n)",
}


def _fill(engine: Engine, size: int) -> None:
    """Write what RECORDS records leave behind that have been changed until history has so many rows."""
    backend = engine.dialect.name
    records = min(RECORDS, size) or RECORDS
    Base.metadata.create_all(engine)
    time_of = _TIME[backend]
    values = {
        "columns": _COLUMNS,
        "size": size,
        "records": records,
        "version": size // records,
        "time": time_of.format(n="n"),
        "time_before": time_of.format(n=f"n - {records}"),
    }
    with engine.begin() as connection:
        connection.execute(text(_LIVE[backend].format(**values)))
        if size:
            connection.execute(text(_HISTORY[backend].format(**values)))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        found = connection.scalar(select(func.count()).select_from(history_class(Record).__table__))
        assert found == size, (found, size)
        connection.execute(text("ANALYZE" if backend == "sqlite" else "VACUUM ANALYZE"))
        if backend == "postgresql":
            connection.execute(text("CHECKPOINT"))


class _Grown:
    """A database with so much history."""

    def __init__(self, url: str, size: int) -> None:
        self.size = size
        self._engine = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _do_not_wait_for_the_disk)
        _fill(self._engine, size)
        self._factory = versioned_session(sessionmaker(self._engine, expire_on_commit=False))
        self._keys = range(1, (min(RECORDS, size) or RECORDS) + 1)

    def _some(self, session: Session, number: int) -> list[Record]:
        keys = random.sample(self._keys, min(number, len(self._keys)))
        return list(session.scalars(select(Record).where(Record.id.in_(keys))))

    def change_and_commit(self) -> float:
        with self._factory() as session:
            records = self._some(session, COMMITS)
            session.commit()
            started = time.perf_counter()
            for record in records:
                record.amount += 1
                session.commit()
            return (time.perf_counter() - started) / len(records)

    def flush(self) -> float:
        with self._factory() as session:
            records = self._some(session, CHANGES)
            session.commit()
            started = time.perf_counter()
            for record in records:
                record.amount += 1
            session.commit()
            return time.perf_counter() - started

    def version_at(self) -> float:
        with self._factory() as session:
            records = self._some(session, READS)
            started = time.perf_counter()
            for record in records:
                record.version_at(START + timedelta(minutes=random.uniform(0, max(self.size, 1))))
            return (time.perf_counter() - started) / len(records)


def _do_not_wait_for_the_disk(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA synchronous = OFF")


WORK: dict[str, Callable[[_Grown], float]] = {
    "change_and_commit": _Grown.change_and_commit,
    "flush": _Grown.flush,
    "version_at": _Grown.version_at,
}


def main() -> None:
    urls, rounds = json.loads(sys.argv[1]), int(sys.argv[2])
    print(json.dumps({}), flush=True)
    sys.stdin.readline()
    grown = [_Grown(url, int(size)) for size, url in urls.items()]
    seconds: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in WORK}
    for number in range(rounds + 1):
        for name, work in WORK.items():
            for each in grown[number % len(grown) :] + grown[: number % len(grown)]:
                gc.collect()
                taken = work(each)
                if number > 0:  # the first round warms up
                    seconds[name][each.size].append(taken)
    answer = {
        name: {str(size): statistics.median(found) for size, found in sorted(sizes.items())}
        for name, sizes in seconds.items()
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
