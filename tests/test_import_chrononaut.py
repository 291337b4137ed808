"""History that chrononaut 0.2 and 0.4 wrote themselves is ours after the import."""

from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy.orm import Session

from chrononaut import versioned_session
from chrononaut.check import check_schema
from chrononaut.cli import main
from chrononaut.importers import import_activity, upgrade_history_tables
from chrononaut.verify import verify_history
from tests.fix_alembic import Project

pytestmark = pytest.mark.backends("postgresql")  # both knew no other

MODELS = """
from datetime import date, datetime
from decimal import Decimal
from typing import Optional
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from chrononaut import Versioned

class Base(DeclarativeBase):
    pass

class User(Versioned, Base):
    __tablename__ = "appuser"
    __chrononaut_hidden__ = ["password"]
    __chrononaut_untracked__ = ["login_count"]
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(sa.String(255), index=True)
    score: Mapped[Decimal] = mapped_column(sa.Numeric(10, 2))
    active: Mapped[bool]
    born: Mapped[Optional[date]]
    seen: Mapped[Optional[datetime]] = mapped_column(sa.DateTime(timezone=True))
    colour: Mapped[Optional[str]] = mapped_column(sa.Enum("red", "blue", name="colour"))
    password: Mapped[Optional[str]] = mapped_column(sa.Text)
    login_count: Mapped[Optional[int]]

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


def _values(table: str, record: Any) -> dict[str, Any]:
    if table == "task":
        return {"title": record.title, "note": getattr(record, "note", None)}
    if table == "membership":
        return {"role": record.role}
    return {
        "email": record.email,
        "score": str(record.score),
        "active": record.active,
        "born": record.born and str(record.born),
        "seen": record.seen and record.seen.timestamp(),
        "colour": record.colour,
    }


def _as_told(told: dict[str, Any]) -> dict[str, Any]:
    if told.get("seen"):
        told["seen"] = datetime.fromisoformat(told["seen"]).timestamp()
    return told


def _compare(session: Session, models: Any, expected: Any, *, knows_all: bool) -> int:
    """Compare what the original's program saw at each instant with what history says now."""
    compared = 0
    live = {"appuser": models.User, "task": models.Task, "membership": models.Membership}
    for at, states in expected:
        instant = datetime.fromisoformat(at)
        for table, key, told in states:
            record = session.get(live[table], tuple(key))
            if (table, key) == ("membership", [7, "old"]) and told["role"] == "older" and record and not knows_all:
                assert record.version_at(instant).role is None  # 0.4 never recorded what it was before the change
            elif record is not None:
                assert _values(table, record.version_at(instant)) == _as_told(told), (table, key, at)
                compared += 1
    return compared


def _assert_whole(project: Project, models: Any) -> None:
    with project.engine.connect() as connection:
        assert [str(each) for each in verify_history(connection, models.Base.metadata)] == []
        assert [str(each) for each in check_schema(connection, models.Base.metadata)] == []
    assert project.differences() == []


def test_history_tables_of_0_2_are_ours_after_the_upgrade(
    project: Project,
    original: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What 0.2 wrote is whole, says what the records were at each instant, and goes on from there."""
    expected = original("chrononaut 0.2", "chrononaut_app.py")
    models = project.models(MODELS)
    with project.engine.connect() as connection:
        assert any("import 0.2" in each.remedy for each in check_schema(connection, models.Base.metadata))
    told: list[Any] = []
    result = upgrade_history_tables(project.engine, models.Base.metadata, progress=lambda *each: told.append(each))
    assert (result.records, result.rows, told[-1]) == (6, 10, ("history tables", 4, 4))
    monkeypatch.setenv("CHRONONAUT_URL", project.engine.url.render_as_string(hide_password=False))
    assert main(["import", "0.2", "models:Base"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 records, 0 history rows"
    project.migrate()
    models = project.reload()
    _assert_whole(project, models)

    with versioned_session(Session(project.engine)) as session:
        assert _compare(session, models, expected, knows_all=True) > 10
        user = session.get_one(models.User, 1)
        assert [row.change_info.get("extra") for row in user.versions()] == [{"ticket": "SUP-1"}, None, None]
        [row] = session.get_one(models.User, 2).versions()
        assert row.change_info["hidden_cols_changed"] == ["password"]
        user.email = "after@example.org"
        session.get_one(models.Task, 1).note = "after"
        session.get_one(models.Membership, (8, "old")).role = "first"
        session.add(models.User(id=3, email="back", score=Decimal(1), active=True))
        session.commit()
        assert user.version == 4
    _assert_whole(project, models)


def test_activity_of_0_4_is_ours_after_the_import(project: Project, original: Callable[..., Any]) -> None:
    """What 0.4 wrote is whole, says what the records were at each instant and who made them, and goes on from there."""
    expected = original("chrononaut 0.4", "chrononaut_app.py")
    with project.engine.begin() as connection:
        for table in ("appuser", "task", "membership"):
            connection.exec_driver_sql(f"UPDATE {table} SET version = 0 WHERE version IS NULL")
    project.env(settings="include_name=lambda name, kind, parent: name != 'chrononaut_activity',")
    models = project.models(MODELS)
    project.migrate()
    models = project.reload()
    result = import_activity(project.engine, models.Base.metadata, chunk_size=2)
    assert (result.records, result.rows) == (6, 15)
    assert any("membership: some records are older" in note for note in result.notes)
    assert import_activity(project.engine, models.Base.metadata).records == 0
    _assert_whole(project, models)

    with versioned_session(Session(project.engine)) as session:
        assert _compare(session, models, expected, knows_all=False) > 10
        user = session.get_one(models.User, 1)
        assert user.version_at(datetime.fromisoformat("2001-01-01T00:00:00+00:00")) is None
        assert [row.change_info.get("extra") for row in user.versions()] == [{"ticket": "SUP-1"}, None, None]
        [row] = session.get_one(models.User, 2).versions()
        assert row.change_info["hidden_cols_changed"] == ["password"]
        user.email = "after@example.org"
        session.get_one(models.Task, 1).note = "after"
        session.get_one(models.Membership, (8, "old")).role = "first"
        session.add(models.User(id=3, email="back", score=Decimal(1), active=True))
        session.commit()
    _assert_whole(project, models)
