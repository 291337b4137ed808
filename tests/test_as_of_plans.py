"""How databases go about a statement on the past."""

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import Versioned, as_of, versioned_session
from tests.fix_models import Clock

# MariaDB reports plans in another form; it looks up by key there, too.
pytestmark = pytest.mark.backends("sqlite-file", "sqlite-memory", "postgresql")

COUNT = 2000

Explain = Callable[[Callable[[Session], Any]], str]


class Models:
    def __init__(self, base: type[DeclarativeBase]) -> None:
        class User(Versioned, base):
            __tablename__ = "appuser"
            id: Mapped[int] = mapped_column(primary_key=True)
            email: Mapped[str] = mapped_column(index=True)
            team: Mapped[int] = mapped_column(index=True)

        self.User = User


@pytest.fixture
def models(base: type[DeclarativeBase], engine: sa.Engine) -> Models:
    models = Models(base)
    base.metadata.create_all(engine)
    return models


@pytest.fixture
def session(engine: sa.Engine, clock: Clock) -> Iterator[Session]:
    with versioned_session(sessionmaker(engine), clock=clock)() as session:
        yield session


@pytest.fixture
def lately(models: Models, session: Session, clock: Clock) -> datetime:
    """An instant after which little has changed in a table of some size that the database has looked at."""
    session.add_all([models.User(id=n, email=f"mail{n}", team=n % 100) for n in range(COUNT)])
    session.commit()
    for user in session.scalars(sa.select(models.User)):
        user.email += "!"
    session.commit()
    lately = clock.now
    clock.advance()
    session.get_one(models.User, 1).email = "new"
    session.commit()
    session.execute(sa.text("ANALYZE"))
    session.commit()
    return lately


@pytest.fixture
def explain(session: Session, lately: datetime) -> Explain:
    """Return the plan of the one statement that a question about the past asks."""

    def explain(question: Callable[[Session], Any]) -> str:
        plans: list[str] = []

        def record(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            prefix = "EXPLAIN QUERY PLAN " if connection.dialect.name == "sqlite" else "EXPLAIN "
            own = connection.connection.cursor()
            own.execute(prefix + statement, parameters)
            plans.append("\n".join(" ".join(map(str, row)) for row in own.fetchall()))

        with as_of(session, lately) as past:
            past.scalar(sa.select(sa.literal(1)))  # so that the past has replaced the tables before we look
            connection = session.connection()
            sa.event.listen(connection, "before_cursor_execute", record)
            question(past)
            sa.event.remove(connection, "before_cursor_execute", record)
        (plan,) = plans
        return plan

    return explain


@pytest.mark.parametrize("by", ["key", "index", "several"])
def test_a_look_up_goes_through_the_indexes(by: str, models: Models, explain: Explain) -> None:
    """By key or by an indexed column, no table is read as a whole, and nothing is materialised or shared out."""
    User = models.User
    questions: dict[str, Callable[[Session], Any]] = {
        "key": lambda past: past.get_one(User, 1),
        "index": lambda past: past.scalars(sa.select(User).where(User.email == "mail7!")).one(),
        "several": lambda past: past.scalars(sa.select(User).where(User.id.in_([3, 4, 5]))).all(),
    }
    plan = explain(questions[by])
    for reading_all in ("SCAN", "MATERIALIZE", "Seq Scan", "CTE Scan", "Workers"):
        assert reading_all not in plan
    assert plan.count("SEARCH") + plan.count("Index Cond") >= 3


@pytest.mark.backends("postgresql")
def test_a_full_scan_of_the_near_past_looks_up_nothing_row_by_row(models: Models, explain: Explain) -> None:
    """Where little has changed since, PostgreSQL gathers that once and does not look up history for each live row."""
    count = sa.select(sa.func.count()).select_from(models.User)
    plan = explain(lambda past: past.scalar(count))
    assert "hashed SubPlan" in plan
    assert "changed >" in plan
    assert "(version = (l.version - 1))" not in plan
