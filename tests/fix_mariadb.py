"""MariaDB for the tests: ``CHRONONAUT_TEST_MARIADB``, else root's server on 127.0.0.1:3306."""

import os
import secrets
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

VARIABLE = "CHRONONAUT_TEST_MARIADB"
LOCAL = "mariadb+pymysql://root@127.0.0.1:3306/"

ENABLED = False
"""Whether the engine fixture runs on MariaDB: not before the library supports it."""


def _server() -> sa.URL:
    return sa.make_url(os.environ.get(VARIABLE, LOCAL))


def pytest_report_header() -> str | None:
    if not ENABLED:
        return None
    engine = sa.create_engine(_server())
    try:
        with engine.connect() as connection:
            return f"mariadb: {connection.scalar(sa.text('SELECT version()'))}"
    finally:
        engine.dispose()


@pytest.fixture(scope="session")
def mariadb_database() -> Iterator[tuple[sa.URL, Callable[[], None]]]:
    """The URL of a database for this run, and a function that empties it."""
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
                connection.exec_driver_sql(f"KILL {session}")
            connection.exec_driver_sql(f"DROP DATABASE {name}")
            connection.exec_driver_sql(create)

    yield _server().set(database=name), reset

    with keeper.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")
    keeper.dispose()
