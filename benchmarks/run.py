"""Measure all peers in one run, interleaved, and write ``docs/explanation/benchmarks.md`` and its chart.

Each peer has its own virtual environment under ``.bench/`` and its own process and database. In each round every
peer runs every scenario once, so that whatever the machine does meanwhile falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from .report import write_report

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".bench"
SCENARIOS = {
    "insert": "insert 500 records",
    "change_and_commit": "change one record and commit, 100 times",
    "flush": "change 1,000 records in one flush",
    "delete": "delete 500 records",
    "bulk_update": "update 50,000 rows by one statement",
    "versions": "read 100 versions of a record",
    "version_at": "read a record as it was",
    "as_of_get": "get a record through the past",
    "as_of_scan": "sum a column over the past",
}
PEERS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    # name: (title, what to install, backends)
    "unversioned": ("unversioned SQLAlchemy", [], ("sqlite", "postgresql")),
    "floor": ("floor", [], ("sqlite", "postgresql")),
    "chrononaut_now": ("chrononaut", ["-e", str(ROOT)], ("sqlite", "postgresql")),
    "continuum": ("SQLAlchemy-Continuum", ["sqlalchemy-continuum"], ("sqlite", "postgresql")),
    "history": ("sqlalchemy-history", ["sqlalchemy-history", "greenlet"], ("sqlite", "postgresql")),
    "recipe": ("the documented recipe", [], ("sqlite", "postgresql")),
    "postgresql_audit_": ("postgresql-audit (triggers)", ["postgresql-audit", "psycopg2-binary"], ("postgresql",)),
    "trigger": ("hand-written trigger", [], ("postgresql",)),
}


def _environment(name: str, packages: list[str]) -> Path:
    """Make a peer's virtual environment, once."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENTS / name)], check=True)
        command = [str(python), "-m", "pip", "install", "-q", "SQLAlchemy>=2.1,<2.2", "psycopg[binary]", *packages]
        subprocess.run(command, check=True)
    return python


class _Process:
    def __init__(self, name: str, python: Path, url: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.worker", name, url],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def run(self, scenario: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"scenario": scenario}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@contextmanager
def _databases(backend: str, url: str | None) -> Iterator[Any]:
    """Give a function that makes an empty database and returns its URL."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        if backend == "sqlite":
            yield lambda name: f"sqlite:///{directory}/{name}.db"
            return
        if url is None:
            from tests.fix_postgresql import run_server

            url = stack.enter_context(run_server()).render_as_string(hide_password=False)
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        stack.callback(engine.dispose)

        def make(name: str) -> str:
            with engine.connect() as connection:
                connection.execute(text(f"DROP DATABASE IF EXISTS bench_{name} WITH (FORCE)"))
                connection.execute(text(f"CREATE DATABASE bench_{name}"))
            return engine.url.set(database=f"bench_{name}").render_as_string(hide_password=False)

        yield make


def measure(backend: str, url: str | None, rounds: int, scenarios: list[str]) -> dict[str, dict[str, Any]]:
    """Return for each peer and scenario the median seconds, the spread, and what was written."""
    answers: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    names = [name for name, (_, _, backends) in PEERS.items() if backend in backends]
    with _databases(backend, url) as make, ExitStack() as stack:
        processes = []
        for name in names:
            process = _Process(name, _environment(name, PEERS[name][1]), make(name))
            stack.callback(process.close)
            processes.append(process)
        for number in range(rounds + 1):
            for scenario in scenarios:
                for process in processes:
                    answer = process.run(scenario)
                    if number > 0 or "seconds" not in answer:  # the first round warms up
                        answers[process.name, scenario].append(answer)
            print(f"{backend}: round {number} of {rounds}", file=sys.stderr)
    return {name: {scenario: _summary(answers[name, scenario]) for scenario in scenarios} for name in names}


def _summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sorted(answer["seconds"] for answer in answers if "seconds" in answer)
    last = answers[-1]
    if not seconds:
        return {"does_not": last["does_not"]}
    quarter = len(seconds) // 4
    return {
        **last,
        "seconds": statistics.median(seconds),
        "low": seconds[quarter],
        "high": seconds[-1 - quarter],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backend", choices=["sqlite", "postgresql"], action="append")
    parser.add_argument("--postgresql", metavar="URL", help="use this server instead of the wheel's")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "explanation")
    options = parser.parse_args()
    scenarios = options.scenario or list(SCENARIOS)
    results = {
        backend: measure(backend, options.postgresql, options.rounds, scenarios)
        for backend in options.backend or ["sqlite", "postgresql"]
    }
    about = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "rounds": options.rounds,
    }
    titles = {name: title for name, (title, _, _) in PEERS.items()}
    write_report(options.output, results, {name: SCENARIOS[name] for name in scenarios}, titles, about)


if __name__ == "__main__":
    main()
