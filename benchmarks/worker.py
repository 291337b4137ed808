"""Run scenarios for one peer, one at a time, as told on standard input; runs inside the peer's own environment.

Reads one JSON object a line, ``{"scenario": name}``, and answers with one, ``{"seconds": ..., "statements": ...,
"rows": ...}``.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Engine, create_engine, event, func, insert, make_url, select, table, update

from .peers import Peer

SIZES = {"insert": 500, "change_and_commit": 100, "flush": 1_000, "delete": 500, "bulk_update": 50_000}


class Worker:
    """A peer on an empty database."""

    def __init__(self, peer: Peer, engine: Engine) -> None:
        self.peer = peer
        self.engine = engine
        self.statements = 0
        peer.create(engine)
        self._session = peer.session(engine)
        self._many: list[Any] = []
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
        if scenario in self.peer.too_slow:
            return {"does_not": "does not end within ten minutes"}
        if scenario in self.peer.does_not and scenario not in SIZES:
            return {"does_not": self.peer.does_not[scenario]}
        prepare: Callable[[], Iterator[None]] = getattr(self, scenario)
        steps = prepare()
        next(steps)
        rows, self.statements = self._rows(), 0
        started = time.perf_counter()
        next(steps, None)
        seconds = time.perf_counter() - started
        answer = {"seconds": seconds, "statements": self.statements, "rows": self._rows() - rows}
        for _ in steps:
            pass
        if self.peer.does_not.get(scenario):
            answer["does_not"] = self.peer.does_not[scenario]
        answer["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return answer

    # Each scenario prepares up to its first yield, is measured up to the second, and cleans up after it.

    def insert(self) -> Iterator[None]:
        records = self._records(SIZES["insert"])
        yield
        self._session.add_all(records)
        self._session.commit()
        yield

    def change_and_commit(self) -> Iterator[None]:
        records = self._added(SIZES["change_and_commit"])
        yield
        for record in records:
            record.amount += 1
            self._session.commit()
        yield

    def flush(self) -> Iterator[None]:
        records = self._added(SIZES["flush"])
        yield
        for record in records:
            record.amount += 1
        self._session.commit()
        yield

    def delete(self) -> Iterator[None]:
        records = self._added(SIZES["delete"])
        yield
        for record in records:
            self._session.delete(record)
        self._session.commit()
        yield

    def bulk_update(self) -> Iterator[None]:
        model, marker = self.peer.model, f"bulk {time.monotonic_ns()}"
        rows = [{"name": marker, "email": "", "amount": n, "note": "a note " * 8} for n in range(SIZES["bulk_update"])]
        # Not through the library: these rows are older than their versioning.
        with self.engine.begin() as connection:
            connection.execute(insert(model.__table__), rows)
        yield
        statement = update(model).where(model.name == marker).values(amount=model.amount + 1)
        self._session.execute(statement, execution_options={"synchronize_session": False})
        self._session.commit()
        yield

    def _aged(self) -> Any:
        """Return a record with a hundred versions, and remember an instant in the middle."""
        if not self._many:
            (record,) = self._added(1)
            middle = None
            for n in range(1, 101):
                record.amount = n
                self._session.commit()
                if n == 50:
                    middle = datetime.now(timezone.utc)
            self._many = [record, middle]
        return self._many

    def versions(self) -> Iterator[None]:
        record, _ = self._aged()
        self._session.expunge_all()
        record = self._session.get(self.peer.model, record.id)
        yield
        rows = self.peer.versions(self._session, record)  # type: ignore[misc]
        yield
        assert len(rows) >= 100
        self._session.rollback()

    def version_at(self) -> Iterator[None]:
        record, middle = self._aged()
        self._session.expunge_all()
        record = self._session.get(self.peer.model, record.id)
        yield
        row = self.peer.version_at(self._session, record, middle)  # type: ignore[misc]
        yield
        assert row.amount == 50
        self._session.rollback()

    def as_of_get(self) -> Iterator[None]:
        record, middle = self._aged()
        yield
        with self.peer.as_of(self._session, middle) as past:  # type: ignore[misc]
            then = past.get(self.peer.model, record.id)
        yield
        assert then.amount == 50
        self._session.rollback()

    def as_of_scan(self) -> Iterator[None]:
        _, middle = self._aged()
        yield
        with self.peer.as_of(self._session, middle) as past:  # type: ignore[misc]
            past.execute(select(func.sum(self.peer.model.amount))).all()
        yield
        self._session.rollback()


def main() -> None:
    name, url = sys.argv[1:]
    peer: Peer = importlib.import_module(f"benchmarks.peers.{name}").peer
    worker = Worker(peer, create_engine(make_url(url).set(drivername=peer.driver) if peer.driver else url))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(json.loads(line)["scenario"])), flush=True)


if __name__ == "__main__":
    main()
