"""Flask-Migrate keeps history tables in step with the models, without anything of ours in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

# Each command is a program of its own: a database in memory would be another one.
pytestmark = pytest.mark.backends("sqlite-file", "postgresql", "mariadb")

APPLICATION = """
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
{imports}

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = {url!r}
db = SQLAlchemy(app)
migrate = Migrate(app, db, compare_server_default=True, render_as_batch={batch})

class User({mixin}db.Model):
    __tablename__ = "appuser"
    id = db.Column(db.Integer, primary_key=True)
    email = db.Column(db.String(255), unique=True, index=True)
    team_id = db.Column(db.ForeignKey("team.id"))

class Team({mixin}db.Model):
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.Text, nullable=False)
"""


def test_flask_migrate_adds_versioning_to_tables_with_rows(engine: sa.Engine, tmp_path: Path) -> None:
    """``flask db migrate`` generates the history tables, and ``flask db check`` then finds nothing."""
    values = {
        "url": engine.url.render_as_string(hide_password=False),
        "batch": engine.dialect.name == "sqlite",
    }
    application = tmp_path / "app.py"
    application.write_text(APPLICATION.format(imports="", mixin="", **values))
    for command in (["init"], ["migrate"], ["upgrade"]):
        _flask_db(tmp_path, *command)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO appuser (id, email) VALUES (1, 'a@example.org')")

    versioned = APPLICATION.format(imports="from chrononaut import Versioned", mixin="Versioned, ", **values)
    application.write_text(versioned)
    for command in (["migrate"], ["upgrade"]):
        _flask_db(tmp_path, *command)

    assert "No new upgrade operations detected" in _flask_db(tmp_path, "check")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT version FROM appuser").scalars().all() == [0]
        assert connection.exec_driver_sql("SELECT * FROM appuser_history").all() == []
        assert connection.exec_driver_sql("SELECT * FROM team_history").all() == []
    scripts = [path.read_text() for path in (tmp_path / "migrations" / "versions").glob("*.py")]
    assert len(scripts) == 2
    assert not any("chrononaut" in script for script in scripts)


def _flask_db(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "app", "db", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
