"""The libraries that are measured, and the environment of each, made once under ``.bench/``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT / ".bench"
INSTALLING = 300
"""Seconds that one installation may take."""

_BOTH = ("sqlite", "postgresql")
_NOW = ("SQLAlchemy>=2.1,<2.2", "psycopg[binary]")
_FLASK_2 = ("SQLAlchemy<2", "Flask<2.3", "Flask-SQLAlchemy<2.6", "Werkzeug<2.3", "python-dateutil", "six")


@dataclass(frozen=True)
class Library:
    """What is measured, and how.

    :param title: what readers call it.
    :param module: its module in ``benchmarks.peers``.
    :param backends: where it works.
    :param requires: what its environment has beside the driver.
    :param alone: what is installed without that which it requires.
    :param show: distributions whose versions the report names.
    :param driver: PostgreSQL's driver.
    :param reference: the plain SQLAlchemy, of the same version and with the same driver, that it is compared with.
    """

    title: str
    module: str
    backends: tuple[str, ...] = _BOTH
    requires: tuple[str, ...] = _NOW
    alone: tuple[str, ...] = ()
    show: tuple[str, ...] = ()
    driver: str = "psycopg"
    reference: str = "unversioned"


LIBRARIES = {
    "unversioned": Library("unversioned SQLAlchemy", "unversioned"),
    "floor": Library("floor", "floor"),
    "chrononaut": Library("chrononaut", "chrononaut_now", requires=(*_NOW, "-e", str(ROOT)), show=("chrononaut",)),
    "continuum": Library(
        "SQLAlchemy-Continuum",
        "continuum",
        requires=(*_NOW, "SQLAlchemy-Continuum"),
        show=("SQLAlchemy-Continuum",),
    ),
    "history": Library(
        "sqlalchemy-history",
        "history",
        requires=(*_NOW, "sqlalchemy-history", "greenlet"),
        show=("sqlalchemy-history",),
    ),
    "recipe": Library("SQLAlchemy's recipe", "recipe"),
    # Its columns are JSONB, so it has never worked on SQLite.
    "chrononaut_04": Library(
        "chrononaut 0.4",
        "chrononaut_04",
        ("postgresql",),
        requires=(*_FLASK_2, "psycopg2-binary"),
        alone=("chrononaut==0.4.1",),
        show=("chrononaut",),
        driver="psycopg2",
        reference="unversioned_14",
    ),
    # Its functions are called with untyped parameters, which psycopg 3 refuses.
    "postgresql_audit": Library(
        "postgresql-audit (triggers)",
        "postgresql_audit_",
        ("postgresql",),
        requires=(*_NOW, "postgresql-audit", "psycopg2-binary"),
        show=("postgresql-audit",),
        driver="psycopg2",
        reference="unversioned_psycopg2",
    ),
    "trigger": Library("hand-written trigger", "trigger", ("postgresql",)),
    "unversioned_psycopg2": Library(
        "unversioned SQLAlchemy, psycopg2",
        "unversioned",
        ("postgresql",),
        requires=(*_NOW, "psycopg2-binary"),
        driver="psycopg2",
        reference="unversioned_psycopg2",
    ),
    "unversioned_14": Library(
        "unversioned SQLAlchemy 1.4, psycopg2",
        "unversioned",
        ("postgresql",),
        requires=("SQLAlchemy<2", "psycopg2-binary"),
        driver="psycopg2",
        reference="unversioned_14",
    ),
}


def make_environment(name: str) -> Path:
    """Return the interpreter of a library's environment; makes it anew where what it requires has changed."""
    library = LIBRARIES[name]
    directory = DIRECTORY / name
    python, done = directory / "bin" / "python", directory / "installed"
    wanted = "\n".join((sys.version, *library.requires, "alone:", *library.alone))
    if done.exists() and done.read_text() == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    uv = shutil.which("uv")
    if uv is not None:
        _run(uv, "venv", "--quiet", "--python", sys.executable, str(directory))
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    else:
        _run(sys.executable, "-m", "venv", str(directory))
        install = [str(python), "-m", "pip", "install", "--quiet"]
    _run(*install, *library.requires)
    if library.alone:
        _run(*install, "--no-deps", *library.alone)
    done.write_text(wanted)
    return python


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=INSTALLING)
