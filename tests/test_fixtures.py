"""The fixtures themselves."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.fix_engine import BACKENDS
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements


@pytest.fixture
def things(engine: sa.Engine) -> sa.Table:
    metadata = sa.MetaData()
    table = sa.Table(
        "thing",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("parent", sa.ForeignKey("thing.id")),
    )
    metadata.create_all(engine)
    return table


def count(connection: sa.Connection, table: sa.Table) -> int:
    return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def test_backend_is_the_one_named(backend: str, engine: sa.Engine) -> None:
    """Each backend's own server answers."""
    assert engine.dialect.name == backend.partition("-")[0]
    with engine.connect() as connection:
        assert connection.scalar(sa.select(1)) == 1


@pytest.mark.parametrize("attempt", [1, 2])
def test_database_starts_empty(engine: sa.Engine, attempt: int) -> None:
    """What one test created, the next does not see."""
    assert sa.inspect(engine).get_table_names() == []
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE leftover (id INTEGER)"))


@pytest.mark.backends("postgresql")  # only a server lets a test leave a transaction behind
@pytest.mark.parametrize("attempt", [1, 2])
def test_open_transaction_does_not_block_the_next_test(
    things: sa.Table, engine: sa.Engine, attempt: int, leaked: list[sa.Connection]
) -> None:
    """A session left in a transaction is ended, and its tables are dropped."""
    connection = engine.connect()
    connection.execute(things.insert().values(id=attempt))
    leaked.append(connection)


@pytest.fixture(scope="module")
def leaked() -> Iterator[list[sa.Connection]]:
    connections: list[sa.Connection] = []
    yield connections
    for connection in connections:
        connection.invalidate()
        connection.close()


@pytest.mark.backends("sqlite-file", "postgresql")
def test_marker_limits_the_backends(backend: str) -> None:
    """The ``backends`` marker leaves out the others."""
    assert backend in {"sqlite-file", "postgresql"} <= set(BACKENDS)


def test_foreign_keys_are_enforced(engine: sa.Engine, things: sa.Table) -> None:
    """A row that refers to none is refused."""
    with engine.connect() as connection, pytest.raises(IntegrityError):
        connection.execute(things.insert().values(id=1, parent=99))


def test_savepoint_rolls_back_its_own_part(engine: sa.Engine, things: sa.Table) -> None:
    """Rolling back a savepoint keeps what came before it."""
    with engine.begin() as connection:
        connection.execute(things.insert().values(id=1))
        savepoint = connection.begin_nested()
        connection.execute(things.insert().values(id=2))
        savepoint.rollback()
    with engine.connect() as connection:
        assert connection.scalars(sa.select(things.c.id)).all() == [1]


def test_rollback_covers_a_released_savepoint(engine: sa.Engine, things: sa.Table) -> None:
    """A savepoint that comes first is inside the transaction all the same."""
    with engine.connect() as connection:
        with connection.begin_nested():
            connection.execute(things.insert().values(id=1))
        connection.rollback()
        assert count(connection, things) == 0


def test_session_reads_its_transaction(engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """Models on ``base`` work with the engine."""

    class Thing(base):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)

    base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Thing(id=1))
        session.flush()
        assert session.get(Thing, 1) is not None


def test_base_is_fresh(base: type[DeclarativeBase]) -> None:
    """No test meets another's tables."""
    assert not base.metadata.tables


def test_statements_are_counted(engine: sa.Engine, things: sa.Table, statements: RecordStatements) -> None:
    """Each round trip counts once, and an executemany says so."""
    with engine.begin() as connection:
        with statements() as log:
            connection.execute(things.insert(), [{"id": 1}, {"id": 2}])
            with connection.begin_nested():
                connection.execute(sa.select(things))
        connection.execute(sa.select(things))
    assert log.verbs == ["INSERT", "SELECT"]
    assert [s.executemany for s in log] == [True, False]
    assert log.matching("insert into thing") == [log[0]]


def test_transaction_control_is_recorded_on_demand(engine: sa.Engine, statements: RecordStatements) -> None:
    """Savepoints show when asked for."""
    with engine.begin() as connection, statements(transaction_control=True) as log:
        connection.begin_nested().commit()
    assert log.verbs == ["SAVEPOINT", "RELEASE"]


def test_clock_goes_on_when_told(clock: Clock) -> None:
    """The clock stands still but for ``advance``, and is aware of its zone."""
    start = clock()
    assert clock() == start
    assert clock.advance(1.5) == clock() > start
    assert clock().utcoffset() is not None
