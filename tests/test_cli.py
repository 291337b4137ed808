"""The command line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from chrononaut import ChrononautException, versioned_session
from chrononaut.cli import load_metadata, main
from chrononaut.unsafe import suppress_versioning
from tests.fix_alembic import Project
from tests.test_alembic_changes import MODELS

# Most commands open the database by its URL, which one in memory has not.
pytestmark = pytest.mark.backends("sqlite-file", "postgresql", "mariadb")


@pytest.fixture
def shop(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A migrated project with two items, one of them older than its versioning; the URL is in the environment."""
    models = project.models(MODELS)
    project.migrate()
    with versioned_session(Session(project.engine)) as session:
        with suppress_versioning():
            session.add(models.Item(id=1, name="old", price=1))
            session.commit()
        item = models.Item(id=2, name="new", price=2)
        session.add(item)
        session.commit()
        item.name = "newer"
        session.commit()
    monkeypatch.setenv("CHRONONAUT_URL", project.engine.url.render_as_string(hide_password=False))
    monkeypatch.chdir(project.directory)
    return project


def test_check_and_verify_are_content_with_what_is_whole(shop: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Both exit with 0 and say how much they looked at."""
    assert main(["check", "models:Base"]) == 0
    assert main(["verify", "models:Base.metadata"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 versioned tables: 0 errors, 0 notes",
        "2 history rows of 1 tables: all is whole",
    ]


def test_check_says_what_differs_and_how_to_mend_it(shop: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """It exits with 1."""
    with shop.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE item_history DROP COLUMN note")
        connection.exec_driver_sql("ALTER TABLE item_history ADD COLUMN extra INTEGER")
    assert main(["check", "models:Base"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "error: item_history: it has no column `note`, so no change could be recorded.",
        "    Run `alembic revision --autogenerate` and `alembic upgrade head`.",
        "note: item_history: `extra` is in no model; it keeps what it held.",
        "    Drop the column when nobody needs it any more.",
        "1 versioned tables: 1 errors, 1 notes",
    ]


def test_verify_lists_problems_up_to_a_limit(shop: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """It exits with 1, unless all that it found is to be passed over."""
    with shop.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE item SET version = 5")
    assert main(["verify", "models:Base", "--limit", "1"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "item(2) version 5: version: the record's version is not the one after the last in history",
        "... and 1 more",
        "2 history rows of 1 tables: 1 no-history, 1 version",
    ]
    assert main(["verify", "models:Base", "--ignore", "version", "--ignore", "no-history"]) == 0


def test_adopt_writes_births(shop: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """It says how many."""
    arguments = ["adopt", "models:Base", "--change-info", '{"user_id": "legacy"}', "--born", "2020-01-01T00:00Z"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == ["1 births written", "0 births written"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "models:Nothing"], "models has no attribute 'Nothing'"),
        (["check", "models:Size"], "models:Size is neither a MetaData nor has one"),
        (["check", "no_such_module:Base"], "No module named 'no_such_module'"),
        (["import", "0.4", "models:Base"], "There is no table chrononaut_activity"),
        (["adopt", "models:Base", "--change-info", "{", "--born-column", "x"], "--change-info is no JSON"),
        (["adopt", "models:Base", "--change-info", "[]", "--born-column", "x"], "must be a JSON object"),
    ],
)
def test_a_mistake_in_the_command_is_explained(
    shop: Project, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """It exits with 2, without a traceback."""
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_database_must_be_named(shop: Project, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """None is guessed."""
    monkeypatch.delenv("CHRONONAUT_URL")
    assert main(["check", "models:Base"]) == 2
    assert "Pass --url, or set CHRONONAUT_URL" in capsys.readouterr().err


def test_an_instant_without_a_zone_is_refused(shop: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """As everywhere."""
    with pytest.raises(SystemExit):
        main(["adopt", "models:Base", "--change-info", "{}", "--born", "2020-01-01T00:00"])
    assert "has no zone" in capsys.readouterr().err


def test_models_without_versioning_are_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most likely the module does not import the models."""
    (tmp_path / "bare.py").write_text("import sqlalchemy\nmetadata = sqlalchemy.MetaData()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ChrononautException, match="No versioned model is declared on bare:metadata"):
        load_metadata("bare:metadata")


def test_the_module_is_a_program(shop: Project) -> None:
    """``python -m chrononaut`` is the same as ``chrononaut``."""
    done = subprocess.run(
        [sys.executable, "-m", "chrononaut", "check", "models:Base"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1 versioned tables: 0 errors, 0 notes\n"), done.stderr


def test_importing_the_library_imports_no_tool() -> None:
    """Neither the command line nor Alembic costs those who do not use them."""
    code = "import sys, chrononaut; print([n for n in sys.modules if 'alembic' in n or n.startswith('chrononaut.cli')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
