"""``async_engine`` and ``async_session_factory``: the same databases through every asynchronous driver."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from chrononaut import versioned_session

DRIVERS = {
    "aiosqlite": "sqlite-file",
    "psycopg": "postgresql",
    "asyncpg": "postgresql",
    "asyncmy": "mariadb",
    "aiomysql": "mariadb",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise what uses ``async_engine`` by the drivers of the backends that are to be run."""
    if "driver" not in metafunc.fixturenames:
        return
    backends = metafunc.config.getoption("backend") or DRIVERS.values()
    metafunc.parametrize("driver", [name for name, backend in DRIVERS.items() if backend in backends], indirect=True)


@pytest.fixture
def anyio_backend() -> str:
    """What runs the asynchronous tests: SQLAlchemy knows asyncio only."""
    return "asyncio"


@pytest.fixture
def driver(request: pytest.FixtureRequest) -> str:
    """The name of the driver that ``async_engine`` uses, one of ``DRIVERS``."""
    name: str = request.param
    return name


@pytest.fixture
async def async_engine(
    driver: str, tmp_path: Path, request: pytest.FixtureRequest, anyio_backend: str
) -> AsyncIterator[AsyncEngine]:
    """An asynchronous engine of the test's own on an empty database."""
    if driver == "aiosqlite":
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}", connect_args={"timeout": 60})
        event.listen(engine.sync_engine, "connect", _configure_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        yield engine
        await engine.dispose()
    else:
        url, reset = request.getfixturevalue(f"{DRIVERS[driver]}_database")
        engine = create_async_engine(url.set(drivername=f"{url.get_backend_name()}+{driver}"), pool_timeout=60)
        yield engine
        await engine.dispose()
        reset()


def _configure_sqlite(dbapi_connection: Any, _record: object) -> None:
    dbapi_connection.isolation_level = None
    for setting in ("foreign_keys = ON", "synchronous = OFF"):
        cursor = dbapi_connection.cursor()
        cursor.execute(f"PRAGMA {setting}")
        cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # At once for writing: one who began by reading is refused if another writes meanwhile.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@pytest.fixture
async def async_session_factory(async_engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """A versioned ``async_sessionmaker`` with nothing else configured."""
    return versioned_session(async_sessionmaker(async_engine))


async def create_tables(engine: AsyncEngine, metadata: sa.MetaData) -> None:
    """Create the tables of a test's models."""
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
