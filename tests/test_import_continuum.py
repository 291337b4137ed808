"""History that SQLAlchemy-Continuum wrote itself is ours after the import."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from chrononaut import versioned_session
from chrononaut.check import check_schema
from chrononaut.cli import main
from chrononaut.exceptions import ChrononautException
from chrononaut.importers import import_continuum
from chrononaut.verify import verify_history
from tests.fix_alembic import Project

pytestmark = pytest.mark.backends("sqlite-file", "postgresql")

MODELS = """
import enum
from datetime import date
from decimal import Decimal
from typing import Any, Optional
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from chrononaut import Versioned

class Base(DeclarativeBase):
    pass

class Colour(enum.Enum):
    red = 1
    blue = 2

class User(Versioned, Base):
    __tablename__ = "appuser"
    __chrononaut_hidden__ = ["password"]
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column("mail", sa.String(255), index=True)
    score: Mapped[Decimal] = mapped_column(sa.Numeric(10, 2))
    colour: Mapped[Optional[Colour]]
    settings: Mapped[Optional[Any]] = mapped_column(sa.JSON)
    born: Mapped[Optional[date]]
    password: Mapped[Optional[str]] = mapped_column(sa.Text)

class Task(Versioned, Base):
    __tablename__ = "task"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(20))
    title: Mapped[str] = mapped_column(sa.String(50))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "task"}

class SpecialTask(Task):
    __tablename__ = "special_task"
    id: Mapped[int] = mapped_column(sa.ForeignKey("task.id"), primary_key=True)
    note: Mapped[Optional[str]] = mapped_column(sa.Text)
    __mapper_args__ = {"polymorphic_identity": "special"}

class Membership(Versioned, Base):
    __tablename__ = "membership"
    user_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    team: Mapped[str] = mapped_column(sa.String(10), primary_key=True)
    role: Mapped[Optional[str]] = mapped_column(sa.String(10))
"""
KEEP_THEIRS = (
    "include_name=lambda name, kind, parent: not (kind == 'table' and name.endswith(('_version', 'transaction'))),"
)


def _values(table: str, record: Any) -> dict[str, Any]:
    if table == "task":
        return {"title": record.title, "note": getattr(record, "note", None)}
    if table == "membership":
        return {"role": record.role}
    return {
        "email": record.email,
        "score": str(record.score),
        "colour": record.colour and record.colour.name,
        "settings": record.settings,
        "born": record.born and str(record.born),
    }


def _assert_whole(project: Project, models: Any) -> None:
    with project.engine.connect() as connection:
        assert [str(each) for each in verify_history(connection, models.Base.metadata)] == []
        assert [str(each) for each in check_schema(connection, models.Base.metadata)] == []


@pytest.mark.parametrize("chunk_size", [1, 1000])
def test_version_tables_are_our_history_after_the_import(
    project: Project,
    original: Callable[..., Any],
    chunk_size: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What Continuum wrote is whole, says what the records were at each instant, and goes on from there."""
    expected = original("SQLAlchemy-Continuum", "continuum_app.py")
    project.env(settings=KEEP_THEIRS)
    models = project.models(MODELS)
    project.migrate()
    models = project.reload()
    told: list[Any] = []
    result = import_continuum(
        project.engine, models.Base.metadata, chunk_size=chunk_size, progress=lambda *each: told.append(each)
    )
    assert (result.records, result.rows) == (6, 15)
    assert told[-1] == ("membership", 1, 1)
    assert "SECRET" not in str(result).upper()
    monkeypatch.setenv("CHRONONAUT_URL", project.engine.url.render_as_string(hide_password=False))
    assert main(["import", "continuum", "models:Base"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 records, 0 history rows"
    _assert_whole(project, models)
    assert project.differences() == []

    live = {"appuser": models.User, "task": models.Task, "membership": models.Membership}
    compared = 0
    with versioned_session(Session(project.engine)) as session:
        for at, states in expected:
            there = {(table, tuple(key)): values for table, key, values in states}
            for table, cls in live.items():
                for record in session.scalars(sa.select(cls)):
                    key = tuple(sa.inspect(record).identity)
                    found = record.version_at(datetime.fromisoformat(at))
                    if (table, key) == ("membership", (7, "old")) and at < expected[2][0]:
                        continue  # older than what Continuum recorded of it
                    seen = there.get((table, key))
                    assert (found and _values(table, found)) == seen, (table, key, at)
                    compared += 1
        assert compared > 25
        user = session.get_one(models.User, 1)
        assert [row.change_info for row in user.versions()] == [{"user_id": None, "remote_addr": "192.0.2.1"}] * 2
        user.email = "after@example.org"
        session.get_one(models.Task, 1).note = "after"
        session.get_one(models.User, 3).email = "after that"
        session.get_one(models.Membership, (8, "old")).role = "first"
        session.commit()
    _assert_whole(project, models)


def test_a_version_of_an_unknown_transaction_is_refused(project: Project, original: Callable[..., Any]) -> None:
    """Nothing says when it was made, so it is not guessed."""
    original("SQLAlchemy-Continuum", "continuum_app.py")
    project.env(settings=KEEP_THEIRS)
    models = project.models(MODELS)
    project.migrate()
    models = project.reload()
    with project.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM transaction WHERE id = 1".replace("transaction", '"transaction"'))
    with pytest.raises(ChrononautException, match="transaction 1, which is not in transaction"):
        import_continuum(project.engine, models.Base.metadata)
