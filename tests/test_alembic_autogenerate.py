"""Alembic's own autogenerate keeps history tables in step with the models."""

import os
import subprocess
import sys
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from chrononaut import versioned_session
from tests.fix_alembic import Project

# A migration environment has a connection of its own: a database in memory would be another one.
pytestmark = pytest.mark.backends("sqlite-file", "postgresql", "mariadb")

# Defaults are written as each database tells them, for Alembic compares their texts.
PLAIN = """
import enum
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Optional
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
{imports}

class Base(DeclarativeBase):
    pass

class Colour(enum.Enum):
    red = 1
    blue = 2

class User({mixin}Base):
    __tablename__ = "appuser"
    __table_args__ = (
        sa.Index(
            "ix_user_scored",
            "name",
            postgresql_where=sa.text("score > 0"),
            postgresql_ops={{"name": "text_pattern_ops"}},
        ),
        sa.Index("ix_user_two", "name", "born", unique=True),
        sa.UniqueConstraint("code", name="uq_code"),
        sa.CheckConstraint("score >= 0", name="ck_score"),
        {{"comment": "People who use it"}},
    )
    __chrononaut_hidden__ = ["password"]
    __chrononaut_untracked__ = ["login_count"]
    id: Mapped[int] = mapped_column(primary_key=True)
    team_id: Mapped[Optional[int]] = mapped_column(sa.ForeignKey("team.id"))
    name: Mapped[str] = mapped_column(sa.String(80), index=True, comment="What we call them")
    code: Mapped[str] = mapped_column(sa.String(10), server_default="none")
    password: Mapped[str] = mapped_column(sa.Text)
    login_count: Mapped[int] = mapped_column(default=0, server_default="0")
    colour: Mapped[Optional[Colour]]
    active: Mapped[bool] = mapped_column(server_default="1")
    score: Mapped[Decimal] = mapped_column(sa.Numeric(12, 4), server_default="0.0000")
    weight: Mapped[Optional[float]]
    born: Mapped[Optional[date]]
    seen: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), server_default=sa.func.current_timestamp())
    photo: Mapped[Optional[bytes]]
    settings: Mapped[Optional[dict[str, Any]]] = mapped_column(sa.JSON)
    initials: Mapped[Optional[str]] = mapped_column(sa.String(1), sa.Computed("substr(name, 1, 1)", persisted=True))

class Membership({mixin}Base):
    __tablename__ = "membership_of_a_user_in_one_or_more_of_the_teams_there_are_now"
    user_id: Mapped[int] = mapped_column(sa.ForeignKey("appuser.id", name="fk_user"), primary_key=True)
    team_id: Mapped[int] = mapped_column(sa.ForeignKey("team.id", name="fk_team"), primary_key=True)
    since: Mapped[Optional[date]] = mapped_column(index=True)

class Team({mixin}Base):
    __tablename__ = "team"
    id: Mapped[int] = mapped_column(sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(20))
    name: Mapped[str] = mapped_column(sa.Text)
    __mapper_args__ = {{"polymorphic_on": "kind", "polymorphic_identity": "team"}}

class Club(Team):
    __tablename__ = "club"
    id: Mapped[int] = mapped_column(sa.ForeignKey("team.id"), primary_key=True)
    hall: Mapped[Optional[str]] = mapped_column(sa.String(30))
    __mapper_args__ = {{"polymorphic_identity": "club"}}

class Band(Team):
    style: Mapped[Optional[str]] = mapped_column(sa.String(30))
    __mapper_args__ = {{"polymorphic_identity": "band"}}
"""
WITHOUT = PLAIN.format(imports="", mixin="")
WITH = PLAIN.format(imports="from chrononaut import Versioned", mixin="Versioned, ")
WITH_CHANGES = PLAIN.format(
    imports="from chrononaut import RecordChanges, Versioned", mixin="RecordChanges, Versioned, "
)
WITH_LOCKS = PLAIN.format(imports="from chrononaut import Lockable, Versioned", mixin="Lockable, Versioned, ")


def _fill(models: Any, session: Session) -> None:
    session.add(models.Club(id=1, name="Chess", hall="Blue"))
    session.add(models.Band(id=2, name="The Keys", style="jazz"))
    session.flush()
    for number in range(20):
        session.add(
            models.User(
                id=number + 1,
                name=f"u{number}",
                code=str(number),
                password="secret",
                colour=models.Colour.red,
                born=date(2000, 1, 1),
                team_id=1,
                settings={"a": [number]},
                photo=b"\\x00",
                weight=1.5,
            )
        )
    session.flush()
    session.add(models.Membership(user_id=1, team_id=2))
    session.commit()


@pytest.mark.parametrize("target", [WITH, WITH_CHANGES, WITH_LOCKS], ids=["Versioned", "RecordChanges", "Lockable"])
def test_the_mixin_on_tables_full_of_rows_needs_one_generated_migration(project: Project, target: str) -> None:
    """Autogenerate adds what is missing, rows stay, history works, and a second autogenerate finds nothing."""
    models = project.models(WITHOUT)
    project.migrate()
    assert project.differences() == []
    with Session(project.engine) as session:
        _fill(models, session)

    models = project.models(target)
    source = project.migrate()
    assert project.differences() == []
    assert "chrononaut" not in source

    models = project.reload()
    with versioned_session(Session(project.engine)) as session:
        users = session.scalars(sa.select(models.User)).all()
        assert len(users) == 20
        assert {user.version for user in users} == {0}
        users[0].name = "new"
        session.get_one(models.Club, 1).hall = "Green"
        session.get_one(models.Band, 2).style = "rock"
        session.get_one(models.Membership, (1, 2)).since = date(2024, 1, 1)
        session.add(models.User(id=100, name="x", password="p", code="x"))
        session.commit()
        [row] = users[0].versions()
        assert (row.name, row.settings, row.began, row.colour) == ("u0", {"a": [0]}, None, models.Colour.red)
        [row] = session.get_one(models.Club, 1).versions()
        assert row.hall == "Blue"
        assert users[0].version_at(datetime(2001, 1, 1, tzinfo=timezone.utc)).name == "u0"
    assert project.differences() == []

    if project.engine.dialect.name == "sqlite":
        return  # Alembic cannot drop a column there from a table that has a computed one
    project.downgrade()
    project.models(WITHOUT)
    assert project.differences() == []
    with project.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM appuser")) == 21


CONVENTION = """
from typing import Optional
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from chrononaut import Versioned

class Base(DeclarativeBase):
    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )

class Place(Versioned, Base):
    __tablename__ = "place_with_a_name_so_long_that_its_history_is_shortened_by_us"
    __table_args__ = (sa.Index(None, "name", "note"), sa.CheckConstraint("length(name) > 1", name="long_name"))
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(30), index=True)
    code: Mapped[str] = mapped_column(sa.String(30), unique=True, index=True)
    note: Mapped[Optional[str]]
    parent_id: Mapped[Optional[int]] = mapped_column(
        sa.ForeignKey("place_with_a_name_so_long_that_its_history_is_shortened_by_us.id"), index=True
    )
"""


def test_a_naming_convention_and_long_names_leave_nothing_to_a_second_autogenerate(project: Project) -> None:
    """The names that history gets are the ones that the database has."""
    project.models(CONVENTION)
    project.migrate()
    assert project.differences() == []


SCHEMAS = """
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from chrononaut import Versioned

class Base(DeclarativeBase):
    pass

class Here(Versioned, Base):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)

class There(Versioned, Base):
    __tablename__ = "thing"
    __table_args__ = {"schema": "other"}
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
"""


@pytest.mark.backends("postgresql")  # SQLite has no schemas of its own, and MariaDB's are databases
def test_tables_of_one_name_in_two_schemas_leave_nothing_to_a_second_autogenerate(project: Project) -> None:
    """Each history table stands in its live table's schema."""
    with project.engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA other")
    project.env(settings="include_schemas=True,")
    project.models(SCHEMAS)
    project.migrate()
    assert project.differences() == []
    assert sa.inspect(project.engine).has_table("thing_history", schema="other")


def test_options_that_come_later_are_generated_too(project: Project) -> None:
    """Hiding, not tracking, and leaving out an index each drop from history what the option says."""
    models = project.models(CONVENTION)
    project.migrate()
    with versioned_session(Session(project.engine)) as session:
        place = models.Place(name="old", code="c", note="n")
        session.add(place)
        session.commit()
        place.name = "new"
        session.commit()
    options = '__chrononaut_hidden__ = ["note"]\n    __chrononaut_disable_indices__ = ["name"]\n    id: Mapped'
    project.models(CONVENTION.replace("id: Mapped", options, 1))
    source = project.migrate()
    assert "drop_column('note')" in source or "'note')" in source
    assert project.differences() == []

    models = project.models(CONVENTION)
    project.migrate()
    assert project.differences() == []
    with versioned_session(Session(project.engine)) as session:
        place = session.scalars(sa.select(models.Place)).one()
        [row] = place.versions()
        assert (row.name, row.note, place.note) == ("old", None, "n")


def test_a_fresh_interpreter_generates_without_configured_mappers(project: Project) -> None:
    """The ``alembic`` command itself, which imports the models and nothing more, finds every history table."""
    project.write_models(WITH.replace("class Base(DeclarativeBase):", UNCONFIGURED))
    project.env(imports="import sqlalchemy as sa")
    env = project.directory / "env.py"
    url = project.engine.url.render_as_string(hide_password=False)
    env.write_text(env.read_text().replace('context.config.attributes["engine"]', f"sa.create_engine({url!r})"))
    (project.directory / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s\npath_separator = os\n")
    _run(project.directory, "revision", "--autogenerate", "-m", "first")
    _run(project.directory, "upgrade", "head")
    assert "No new upgrade operations detected" in _run(project.directory, "check")
    assert sa.inspect(project.engine).has_table("club_history")


UNCONFIGURED = """@sa.event.listens_for(sa.orm.Mapper, "before_configured")
def _refuse():
    raise AssertionError("the mappers were configured")

class Base(DeclarativeBase):"""


def _run(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "alembic", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
