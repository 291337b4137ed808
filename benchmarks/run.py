"""Measure all libraries in one run, interleaved, and write ``docs/explanation/benchmarks.md`` and its charts.

Each library has its own virtual environment under ``.bench/`` and its own process and database. In each round every
library runs every scenario once, so that whatever the machine does meanwhile falls on all of them. Then the history of
this library is made to grow to a million rows, to see what that costs.

The whole run takes about ten minutes; ``--quick`` takes one, to see that it works: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, make_url, text

from .environments import DIRECTORY, LIBRARIES, ROOT, make_environment
from .report import write_report

SCENARIOS = {
    "insert": "insert 500 records",
    "change_and_commit": "change one record and commit, 100 times",
    "flush": "change 1,000 records in one flush",
    "delete": "delete 500 records",
    "bulk_update": "update 50,000 rows by one statement",
    "memory": "peak memory of changing 1,000 records",
    "versions": "read 100 versions of a record",
    "version_at": "read a record as it was",
    "as_of_get": "get a record through the past",
    "as_of_scan": "sum a column over the past",
}
STEADY = ("memory",)
"""What comes out the same each time, and is slow to measure: done once."""
STARTING = 60
"""Seconds that a process may take to be ready."""
_STARTED = time.monotonic()
Make = Callable[[str], str]


class _Process:
    """A program that answers a line by a line; killed when an answer takes too long."""

    def __init__(self, python: Path, module: str, *arguments: str, patience: float) -> None:
        self._patience = patience
        self._process = subprocess.Popen(
            [str(python), "-W", "ignore", "-m", f"benchmarks.{module}", *arguments],
            cwd=ROOT,
            # Each environment has its own library; none of the caller's may shadow it.
            env={name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._answer(max(patience, STARTING))

    def ask(self, scenario: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"scenario": scenario}) + "\n")
        self._process.stdin.flush()
        return self._answer(self._patience)

    def _answer(self, patience: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        alarm = threading.Timer(patience, self._process.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline()
        finally:
            alarm.cancel()
        if not line:
            self.close()
            if alarm.finished.is_set() and self._process.returncode == -9:
                raise TimeoutError(f"does not end within {patience:.0f} seconds")
            raise RuntimeError(f"stops with {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class _Runner:
    """A library on one backend; begins anew where a scenario ended its process."""

    def __init__(self, name: str, make: Make, options: argparse.Namespace) -> None:
        self.name = name
        self.answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._make = make
        self._options = options
        self._given_up: dict[str, str] = {}
        self._process = self._start()
        self.about = self._process.about

    def _start(self) -> _Process:
        library = LIBRARIES[self.name]
        url = make_url(self._make(self.name))
        if url.get_backend_name() == "postgresql":
            url = url.set(drivername=f"postgresql+{library.driver}")
        return _Process(
            make_environment(self.name),
            "worker",
            library.module,
            url.render_as_string(hide_password=False),
            ",".join(library.show),
            "20" if self._options.quick else "1",
            patience=self._options.patience,
        )

    def run(self, scenario: str, is_counted: bool) -> None:
        if scenario in self._given_up:
            return
        try:
            answer = self._process.ask(scenario)
        except (TimeoutError, RuntimeError) as error:
            _tell(f"{self.name}: {scenario} {error}")
            self._given_up[scenario] = str(error)
            self.answers[scenario] = [{"does_not": str(error)}]
            self._process = self._start()
            return
        if is_counted or not {"seconds", "bytes"} & answer.keys():
            self.answers[scenario].append(answer)

    def tidy(self) -> None:
        self._process.ask("tidy")

    def close(self) -> None:
        self._process.close()


@contextmanager
def _databases(backend: str, url: str | None) -> Iterator[Make]:
    """Give a function that makes an empty database and returns its URL."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        if backend == "sqlite":

            def make_file(name: str) -> str:
                path = Path(directory, f"{name}.db")
                path.unlink(missing_ok=True)
                return f"sqlite:///{path}"

            yield make_file
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


def measure(backend: str, options: argparse.Namespace, scenarios: list[str], versions: dict[str, str]) -> Any:
    """Return for each library and scenario the median, the spread, and what was written."""
    names = [name for name, library in LIBRARIES.items() if backend in library.backends]
    with _databases(backend, options.postgresql) as make, ExitStack() as stack:
        runners = []
        for name in names:
            try:
                runner = _Runner(name, make, options)
            except (TimeoutError, RuntimeError) as error:
                _tell(f"{backend}: {name} is left out, because it {error}")
                continue
            stack.callback(runner.close)
            runners.append(runner)
            found = runner.about["versions"]
            versions[LIBRARIES[name].title] = ", ".join(f"{package} {number}" for package, number in found.items())
        versions[backend] = runners[0].about["server"]
        for number in range(options.rounds + 1):
            first = number % len(runners)
            for scenario in (name for name in scenarios if number == 1 or name not in STEADY):
                for runner in runners[first:] + runners[:first]:
                    runner.run(scenario, is_counted=number > 0)  # the first round warms up
            for runner in runners:
                runner.tidy()
            _tell(f"{backend}: round {number} of {options.rounds}")
        return {
            runner.name: {scenario: _summary(runner.answers[scenario]) for scenario in scenarios} for runner in runners
        }


def _summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    last = answers[-1]
    kind = "bytes" if "bytes" in last else "seconds"
    values = sorted(answer[kind] for answer in answers if kind in answer)
    if not values:
        return {"does_not": last["does_not"]}
    quarter = len(values) // 4
    return {**last, kind: statistics.median(values), "low": values[quarter], "high": values[-1 - quarter]}


def measure_growth(backend: str, options: argparse.Namespace) -> Any:
    """Return what writes and reads cost with histories of several sizes."""
    sizes = [0, 1_000, 2_000] if options.quick else [0, 10_000, 100_000, 1_000_000]
    with _databases(backend, options.postgresql) as make:
        urls = {str(size): make(f"growth_{size}") for size in sizes}
        process = _Process(
            make_environment("chrononaut"), "growth", json.dumps(urls), str(options.rounds), patience=600
        )
        try:
            answer = process.ask("growth")
        except (TimeoutError, RuntimeError) as error:
            _tell(f"{backend}: growth is left out, because it {error}")
            return None
        finally:
            process.close()
    _tell(f"{backend}: history grown to {sizes[-1]:,} rows")
    return answer


def _tell(what: str) -> None:
    print(f"{time.monotonic() - _STARTED:5.0f} s  {what}", file=sys.stderr, flush=True)


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = names[0] if names and "unknown" not in names[0].lower() else platform.machine()
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GB of memory, {platform.system()}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--rounds", type=int, help="how often everything is measured (default: 7)")
    parser.add_argument("--backend", choices=["sqlite", "postgresql"], action="append")
    parser.add_argument("--postgresql", metavar="URL", help="a superuser's, of a server to use instead of the wheel's")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append")
    parser.add_argument("--no-growth", action="store_true", help="leave out how cost grows with history")
    parser.add_argument("--patience", type=float, default=60, metavar="SECONDS", help="for one scenario (default: 60)")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds, written to .bench/quick")
    parser.add_argument("--output", type=Path, help="a directory (default: docs/explanation)")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw benchmarks.json in OUTPUT again")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.output = options.output or (DIRECTORY / "quick" if options.quick else ROOT / "docs" / "explanation")
    return options


def main() -> None:
    options = _options()
    titles = {name: library.title for name, library in LIBRARIES.items()}
    references = {name: library.reference for name, library in LIBRARIES.items()}
    figures = options.output / "benchmarks.json"
    if options.draw:
        measured = json.loads(figures.read_text(encoding="utf-8"))
    else:
        for name in LIBRARIES:
            make_environment(name)
        scenarios = options.scenario or list(SCENARIOS)
        backends = options.backend or ["sqlite", "postgresql"]
        versions: dict[str, str] = {}
        results = {backend: measure(backend, options, scenarios, versions) for backend in backends}
        grown = {} if options.no_growth else {backend: measure_growth(backend, options) for backend in backends}
        about = {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "machine": _machine(),
            "versions": versions,
            "rounds": options.rounds,
            "quick": options.quick,
        }
        measured = {
            "about": about,
            "scenarios": {name: SCENARIOS[name] for name in scenarios},
            "results": results,
            "growth": {backend: found for backend, found in grown.items() if found is not None},
        }
        options.output.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    write_report(options.output, measured, titles, references)


if __name__ == "__main__":
    main()
