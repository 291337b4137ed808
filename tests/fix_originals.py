"""``original``: run a program in an environment of its own, in which another library keeps history."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

PROGRAMS = Path(__file__).parent / "originals"

#: What each environment has: packages that are installed without what they require, and others.
ENVIRONMENTS = {
    "chrononaut 0.2": (
        ["chrononaut==0.2.4", "SQLAlchemy==1.3.24"],
        ["Flask<2.3", "Flask-SQLAlchemy<2.6", "Werkzeug<2.3", "pytz", "psycopg2-binary"],
    ),
    "chrononaut 0.4": (
        ["chrononaut==0.4.1"],
        [
            "SQLAlchemy<2",
            "Flask<2.3",
            "Flask-SQLAlchemy<2.6",
            "Werkzeug<2.3",
            "python-dateutil",
            "six",
            "psycopg2-binary",
        ],
    ),
    "SQLAlchemy-Continuum": ([], ["SQLAlchemy-Continuum", "SQLAlchemy<2.1", "psycopg2-binary"]),
}


def _install(directory: Path, name: str) -> Path:
    python = directory / "bin" / "python"
    uv = shutil.which("uv")
    if uv is not None:
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, directory], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    else:
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
    alone, others = ENVIRONMENTS[name]
    subprocess.run([*install, *others], check=True)
    if alone:
        subprocess.run([*install, "--no-deps", *alone], check=True)
    return python


@pytest.fixture(scope="session")
def original_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the interpreter of an environment, installed when it is first asked for."""
    installed: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in installed:
            installed[name] = _install(tmp_path_factory.mktemp("original") / "environment", name)
        return installed[name]

    return get


@pytest.fixture
def original(original_python: Callable[[str], Path], engine: sa.Engine) -> Callable[[str, str], Any]:
    """Let another library write to the test's database; returns what the program prints, read as JSON."""

    def run(name: str, program: str) -> Any:
        url = engine.url
        if url.get_backend_name() == "postgresql":
            url = url.set(drivername="postgresql")
        done = subprocess.run(
            [original_python(name), "-W", "ignore", PROGRAMS / program, url.render_as_string(hide_password=False)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
