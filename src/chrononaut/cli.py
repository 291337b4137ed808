"""The command line: ``chrononaut check``, ``verify``, ``adopt`` and ``import``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, cast

from sqlalchemy import Engine, MetaData, create_engine
from sqlalchemy.exc import DBAPIError

from chrononaut._mapping import versioned_mappings
from chrononaut.adopt import adopt_records
from chrononaut.check import check_schema
from chrononaut.exceptions import ChrononautException
from chrononaut.importers import ImportResult, import_activity, import_continuum, upgrade_history_tables
from chrononaut.typing import Progress
from chrononaut.verify import verify_history

URL_VARIABLE = "CHRONONAUT_URL"
IMPORTERS: dict[str, Callable[..., ImportResult]] = {"0.4": import_activity, "continuum": import_continuum}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    :param arguments: without the program's name; those of the process if None.
    :return: the exit status: 0 if all is well, 1 if something was found, 2 if the command could not be run.
    """
    options = _parser().parse_args(arguments)
    try:
        metadata = load_metadata(options.models)
        engine = create_engine(options.url or _url())
    except (ChrononautException, ImportError) as error:
        return _fail(error)
    try:
        status: int = options.run(engine, metadata, options)
    except ChrononautException as error:
        return _fail(error)
    except DBAPIError as error:
        # Not the statement, whose parameters are nobody's business here.
        return _fail(ChrononautException(f"{error.orig}. Is the schema what `chrononaut check` expects?"))
    finally:
        engine.dispose()
    return status


def load_metadata(target: str) -> MetaData:
    """Import a module and return the tables that its models are declared on.

    :param target: ``package.module:attribute``; the attribute is a ``MetaData`` or has one as its ``metadata``, as a
        declarative base, a registry and Flask-SQLAlchemy's ``db`` do. The working directory is looked in first.
    :raises ChrononautException: if there is no such thing, or no versioned model on it.
    :raises ImportError: if the module cannot be imported.
    """
    module, _, path = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = importlib.import_module(module)
    for name in (path or "Base").split("."):
        if not hasattr(found, name):
            raise ChrononautException(f"{target}: {module} has no attribute {path or 'Base'!r}.")
        found = getattr(found, name)
    metadata = found if isinstance(found, MetaData) else getattr(found, "metadata", None)
    if not isinstance(metadata, MetaData):
        raise ChrononautException(f"{target} is neither a MetaData nor has one as its attribute `metadata`.")
    if not versioned_mappings(metadata):
        raise ChrononautException(f"No versioned model is declared on {target}. Name a module that imports them all.")
    return metadata


def _url() -> str:
    if URL_VARIABLE not in os.environ:
        raise ChrononautException(f"Which database? Pass --url, or set {URL_VARIABLE}, which hides a password better.")
    return os.environ[URL_VARIABLE]


def _fail(error: Exception) -> int:
    _say(f"chrononaut: {error}", sys.stderr)
    return 2


def _say(line: str, stream: Any = None) -> None:
    (stream or sys.stdout).write(line + "\n")


# --- commands


def _check(engine: Engine, metadata: MetaData, options: argparse.Namespace) -> int:
    with engine.connect() as connection:
        differences = list(check_schema(connection, metadata))
    for difference in differences:
        _say(str(difference))
    errors = sum(difference.severity == "error" for difference in differences)
    tables = len({mapping.tables[-1] for mapping in versioned_mappings(metadata)})
    _say(f"{tables} versioned tables: {errors} errors, {len(differences) - errors} notes")
    return 1 if errors else 0


def _verify(engine: Engine, metadata: MetaData, options: argparse.Namespace) -> int:
    counts: Counter[str] = Counter()
    rows: dict[str, int] = {}
    tables = len({mapping.base for mapping in versioned_mappings(metadata)})
    with engine.connect() as connection, _progress() as progress:

        def count(what: str, done: int, total: int) -> None:
            rows[what] = done
            progress(what, done, total)

        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        for problem in verify_history(connection, metadata, chunk_size=options.chunk_size, progress=count):
            counts[problem.kind] += problem.kind not in options.ignore
            if problem.kind not in options.ignore and counts.total() <= options.limit:
                _say(str(problem))
    if counts.total() > options.limit:
        _say(f"... and {counts.total() - options.limit} more")
    found = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()) if number) or "all is whole"
    _say(f"{sum(rows.values())} history rows of {tables} tables: {found}")
    return 1 if counts.total() else 0


def _adopt(engine: Engine, metadata: MetaData, options: argparse.Namespace) -> int:
    try:
        info: Any = json.loads(options.change_info)
    except ValueError as error:
        raise ChrononautException(f"--change-info is no JSON: {error}") from None
    if not isinstance(info, dict):
        raise ChrononautException("--change-info must be a JSON object.")
    born = options.born_column if options.born is None else options.born
    with _progress() as progress:
        number = adopt_records(
            engine,
            metadata,
            cast("dict[str, Any]", info),
            born,
            tables=options.table,
            chunk_size=options.chunk_size,
            progress=progress,
        )
    _say(f"{number} births written")
    return 0


def _import(engine: Engine, metadata: MetaData, options: argparse.Namespace) -> int:
    with _progress() as progress:
        if options.source == "0.2":
            result = upgrade_history_tables(engine, metadata, progress=progress)
        else:
            result = IMPORTERS[options.source](engine, metadata, chunk_size=options.chunk_size, progress=progress)
    for note in result.notes:
        _say(f"note: {note}")
    _say(f"{result.records} records, {result.rows} history rows")
    return 0


# --- its surroundings


@contextmanager
def _progress() -> Generator[Progress, None, None]:
    """Show progress on a terminal: as bars if tqdm is installed, else as lines."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield lambda what, done, total: _say(f"{what}: {done} of {total}", sys.stderr)
        return
    bars: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        bar = bars.setdefault(what, None) or tqdm(desc=what, total=total, unit=" rows")
        bars[what] = bar
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text.replace("Z", "+00:00"))
    if instant.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text} has no zone; write e.g. 2020-01-31T12:00+00:00")
    return instant


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chrononaut", description="Look after the history of versioned models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    def common(made: argparse.ArgumentParser, chunk_size: int) -> None:
        made.add_argument(
            "models", metavar="MODULE:ATTRIBUTE", help="what the models are declared on, e.g. app.db:Base"
        )
        made.add_argument("--url", help=f"the database, as SQLAlchemy names it; default: ${URL_VARIABLE}")
        if chunk_size:
            made.add_argument("--chunk-size", type=int, default=chunk_size, help="rows at a time (%(default)s)")

    check = command("check", _check, "Compare the versioned models with a database. Exits with 1 if they differ.")
    common(check, 0)

    verify = command("verify", _verify, "Verify that the history in a database is whole. Exits with 1 if it is not.")
    common(verify, 10_000)
    verify.add_argument("--limit", type=int, default=100, help="list at most so many problems (%(default)s)")
    verify.add_argument("--ignore", action="append", default=[], metavar="KIND", help="a kind of problem to pass over")

    adopt = command("adopt", _adopt, "Write births for records that are older than their versioning.")
    common(adopt, 5_000)
    adopt.add_argument("--change-info", required=True, metavar="JSON", help="who inserted them and why")
    born = adopt.add_mutually_exclusive_group(required=True)
    born.add_argument("--born", type=_instant, metavar="INSTANT", help="when they were inserted, with a zone")
    born.add_argument("--born-column", metavar="COLUMN", help="the column that tells when each was inserted")
    adopt.add_argument("--table", action="append", help="only this table (may be given several times)")

    importer = command("import", _import, "Bring history here from where it was kept before.")
    importer.add_argument("source", choices=["0.2", *IMPORTERS], help="what wrote it")
    common(importer, 1_000)
    return parser
