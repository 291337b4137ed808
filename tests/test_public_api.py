"""The public names, their errors and documentation, and what importing does not do."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import chrononaut
import chrononaut.exceptions
import chrononaut.typing
import chrononaut.unsafe
from chrononaut import ChrononautException

MODULES = [chrononaut, chrononaut.exceptions, chrononaut.typing, chrononaut.unsafe]
#: Needs the ``flask`` extra, and has tests of its own.
LAZY = {"VersionedSQLAlchemy"}


def public_names(module: ModuleType) -> list[str]:
    return [name for name in module.__all__ if name not in LAZY]


def test_all_is_what_the_module_has() -> None:
    """Sorted, complete, and nothing that is private."""
    names = public_names(chrononaut)
    assert list(chrononaut.__all__) == sorted(chrononaut.__all__)
    in_module = {
        name
        for name, value in vars(chrononaut).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("chrononaut")
    }
    assert in_module - LAZY == set(names)


CONTRACT = {
    *("Versioned", "RecordChanges", "versioned_session", "ChangeInfoProvider"),
    *("extra_change_info", "append_change_info", "rationale"),
    *("HistoryRecord", "history_class", "select_versions"),
    *("ChrononautException", "HiddenAttributeError", "UntrackedAttributeError", "StaleVersionError"),
    *("RecordLockedError", "UntrackedStatementError"),
}


def test_all_has_the_names_of_the_contract() -> None:
    """Other people's code relies on them."""
    assert set(chrononaut.__all__) >= CONTRACT


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_documented(module: ModuleType) -> None:
    """Classes with their public methods, functions, and the modules themselves."""
    assert module.__doc__
    missing = []
    for name in public_names(module):
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue  # a type alias has its documentation beside it
        if not (value.__doc__ or "").strip():
            missing.append(name)
        if inspect.isclass(value) and not issubclass(value, Exception):
            for method, member in vars(value).items():
                if not method.startswith("_") and inspect.isfunction(member) and not member.__doc__:
                    missing.append(f"{name}.{method}")
    assert missing == []


EVERYTHING = """
import sys
from sqlalchemy import event
import sqlalchemy.orm, sqlalchemy.ext.hybrid, sqlalchemy.dialects.mysql, sqlalchemy.dialects.postgresql
registered = []
listen, listens_for = event.listen, event.listens_for
event.listen = lambda *args, **kw: registered.append(args)
event.listens_for = lambda *args, **kw: registered.append(args) or (lambda f: f)
import chrononaut, chrononaut.unsafe, chrononaut.typing, chrononaut.exceptions
adapters = {"flask", "flask_sqlalchemy", "flask_login", "werkzeug", "alembic", "sqlalchemy.ext.asyncio"}
assert not adapters & set(sys.modules), adapters & set(sys.modules)
# SQLAlchemy's own types listen to the columns that will have them, whoever makes one.
registered = [args for args in registered if not isinstance(args[0], sqlalchemy.types.TypeEngine)]
assert not registered, registered
"""


def test_importing_does_nothing_else() -> None:
    """It imports no adapter and no asyncio, and registers no event."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EVERYTHING], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


ERRORS: list[tuple[str, tuple[Any, ...]]] = [
    ("ChrononautException", ("m",)),
    ("MappingError", ("m",)),
    ("UnattachedSessionError", ("User",)),
    ("StaleVersionError", ("User", (1, "x"), 1, 2, {"email": ("a", "b")})),
    ("StaleVersionError", ("User", (1,), None, None)),
    ("RecordHeldError", ("User", (1,))),
    ("RecordLockedError", ("User", (1,))),
    ("UntrackedStatementError", ("m",)),
    ("ReadOnlyError", ("m",)),
    ("ChangeInfoError", ("m",)),
    ("MissingExtraError", ("The Flask adapter", "flask")),
    ("NaiveDatetimeError", ("at",)),
    ("NotAwaitedError", ("versions", "await record.awaitable_history.versions(...)")),
    ("HiddenAttributeError", ("User", "password")),
    ("UntrackedAttributeError", ("User", "hits")),
]


@pytest.mark.parametrize(("name", "arguments"), ERRORS)
def test_errors_pickle(name: str, arguments: tuple[Any, ...]) -> None:
    """With their text and all that they know."""
    error = getattr(chrononaut.exceptions, name)(*arguments)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert isinstance(copy, ChrononautException)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_all_errors_are_pickled_above() -> None:
    """None is forgotten."""
    assert {name for name, _ in ERRORS} >= set(chrononaut.exceptions.__all__)
