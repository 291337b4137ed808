"""The how-to page on Flask: what it says about adopting the library works on an application that has data."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.pages import ROOT

PAGE = ROOT / "docs" / "how-to" / "flask.md"
STEP = re.compile(r"^```python\n(?P<file># shop\.py\n.*?)^```|^\$ flask (?P<command>.*?)$", re.MULTILINE | re.DOTALL)


# The application's own data, before and after it has adopted the library.
BEFORE = """
from shop import *
with app.app_context():
    db.session.add(User(email="old@example.org", password_hash="1"))
    db.session.commit()
"""
AFTER = """
from shop import *
with app.app_context():
    user = User.query.one()
    assert (user.version, user.versions()) == (0, [])
    user.email, user.password_hash = "new@example.org", "2"
    db.session.commit()
    (row,) = user.versions()
    print(row.email, row.began, row.change_info)
"""


# A database in memory is not shared by processes.
# Each command is a program of its own: a database in memory would be another one.
@pytest.mark.backends("sqlite-file", "postgresql", "mariadb")
def test_steps_of_the_page_bring_history_to_an_application_with_data(engine: sa.Engine, tmp_path: Path) -> None:
    """The page's commands migrate a database with rows, once and for all, and the rows have history from then on."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "DATABASE_URL": engine.url.render_as_string(hide_password=False)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = []
    files = 0
    for step in STEP.finditer(PAGE.read_text(encoding="utf-8")):
        if step["file"]:
            if files == 1:
                run("-W", "error", "-c", BEFORE)
            (tmp_path / "shop.py").write_text(step["file"])
            files += 1
        else:
            # Flask-Migrate's own env.py asks Flask-SQLAlchemy for what will be gone.
            said.append(run("-m", "flask", *shlex.split(step["command"])))
    assert (files, len(said)) == (2, 6)
    assert "No new upgrade operations detected" in said[-1]
    assert run("-W", "error", "-c", AFTER).strip() == (
        "old@example.org None {'user_id': None, 'remote_addr': None, 'hidden_cols_changed': ['password_hash']}"
    )
    migration = next(path for path in (tmp_path / "migrations" / "versions").glob("*.py") if "history" in path.name)
    assert "chrononaut" not in migration.read_text()
