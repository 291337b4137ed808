"""``engine``: one fixture through which each behaviour runs on every backend."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

BACKENDS = ("sqlite-file", "sqlite-memory", "postgresql", "mariadb")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=BACKENDS,
        help="run on this backend only (may be given several times); default: on all",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise what uses ``engine`` by the backends its ``backends`` marker leaves."""
    if "backend" not in metafunc.fixturenames:
        return
    names = set(BACKENDS)
    for marker in metafunc.definition.iter_markers("backends"):
        names &= set(marker.args)
    names &= set(metafunc.config.getoption("backend") or BACKENDS)
    metafunc.parametrize("backend", [n for n in BACKENDS if n in names], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The name of the backend that ``engine`` is on, one of ``BACKENDS``."""
    name: str = request.param
    return name


@pytest.fixture
def engine(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[sa.Engine]:
    """An engine of the test's own on an empty database."""
    with contextlib.ExitStack() as stack:
        if backend == "sqlite-file":
            made = _sqlite_engine(f"sqlite:///{tmp_path / 'test.db'}")
        elif backend == "sqlite-memory":
            made = _sqlite_engine("sqlite://")
        else:
            url, reset = request.getfixturevalue(f"{backend}_database")
            stack.callback(reset)
            made = sa.create_engine(url)
        stack.callback(made.dispose)
        yield made


def _sqlite_engine(url: str) -> sa.Engine:
    """Make SQLite keep foreign keys, and begin transactions where SQLAlchemy does.

    Python's driver begins a transaction at the first write only, so that SAVEPOINT and reads would
    stand outside it. ``execution_options(sqlite_begin="BEGIN IMMEDIATE")`` on the engine or a
    connection takes the write lock at once, which contending threads need.
    """
    engine = sa.create_engine(url)

    @event.listens_for(engine, "connect")
    def _configure(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.isolation_level = None
        dbapi_connection.execute("PRAGMA foreign_keys = ON")
        dbapi_connection.execute("PRAGMA synchronous = OFF")

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # An in-memory database has one connection for each thread: a second session joins in.
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:
            how = connection.get_execution_options().get("sqlite_begin", "BEGIN")
            driver.execute(how)

    return engine
