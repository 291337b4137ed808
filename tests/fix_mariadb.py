"""MariaDB for the tests: ``CHRONONAUT_TEST_MARIADB``, else root's server on 127.0.0.1:3306.

A server that is named must answer. Where none is named and none answers, the tests that need it are reported as not
run, by name and count.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.compiler import compiles

VARIABLE = "CHRONONAUT_TEST_MARIADB"
LOCAL = "mariadb+pymysql://root@127.0.0.1:3306/"
NO_SERVER = f"no MariaDB server: {VARIABLE} is not set, and none answers on 127.0.0.1:3306"

# Not UTC and not a whole hour, so that a forgotten conversion shows; and a key of 0 is a key, not a wish for one.
SETTINGS = {"init_command": "SET time_zone = '+05:45', sql_mode = CONCAT(@@sql_mode, ',NO_AUTO_VALUE_ON_ZERO')"}


@compiles(sa.String, "mariadb")
def _string_with_a_length(type_: Any, compiler: Any, **kw: Any) -> str:
    """Give the tests' texts the length that MariaDB alone asks for."""
    return str(compiler.visit_VARCHAR(type_ if type_.length else sa.String(255, type_.collation), **kw))


def _server() -> sa.URL:
    return sa.make_url(os.environ.get(VARIABLE, LOCAL))


def _version() -> str | None:
    """Return the server's version; None if there is none and none is named."""
    engine = sa.create_engine(_server())
    try:
        with engine.connect() as connection:
            return str(connection.scalar(sa.text("SELECT version()")))
    except OperationalError:
        if VARIABLE in os.environ:
            raise
        return None
    finally:
        engine.dispose()


def pytest_report_header() -> str:
    return f"mariadb: {_version() or 'not there'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that were not run for want of a server."""
    skipped: list[pytest.TestReport] = terminalreporter.stats.get("skipped", [])
    names = sorted(report.nodeid for report in skipped if NO_SERVER in str(report.longrepr))
    if names:
        terminalreporter.section(f"{len(names)} tests were not run: no MariaDB")
        terminalreporter.line(NO_SERVER)
        for name in names:
            terminalreporter.line(f"NOT RUN {name}")


@pytest.fixture(scope="session")
def mariadb_database() -> Iterator[tuple[sa.URL, Callable[[], None]]]:
    """The URL of a database for this run, and a function that empties it."""
    if _version() is None:
        pytest.skip(NO_SERVER)
    name = f"chrononaut_test_{secrets.token_hex(4)}"
    keeper = sa.create_engine(_server(), isolation_level="AUTOCOMMIT")
    create = f"CREATE DATABASE {name} CHARACTER SET utf8mb4"
    with keeper.connect() as connection:
        connection.exec_driver_sql(create)

    def reset() -> None:
        with keeper.connect() as connection:
            # A test that failed may have left a transaction open, whose locks would block us.
            others = connection.exec_driver_sql("SELECT id FROM information_schema.processlist WHERE db = %s", (name,))
            for (session,) in others.all():
                with contextlib.suppress(OperationalError):  # it may end by itself meanwhile
                    connection.exec_driver_sql(f"KILL {session}")
            connection.exec_driver_sql(f"DROP DATABASE {name}")
            connection.exec_driver_sql(create)

    yield _server().set(database=name).update_query_dict(SETTINGS), reset

    with keeper.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")
    keeper.dispose()
