"""Errors of chrononaut.

.. code-block:: text

    ChrononautException
    ├── MappingError                    a model cannot be versioned as it is declared
    ├── UnattachedSessionError          a session writes versioned records but was never attached
    ├── StaleVersionError               somebody else changed the record (also a StaleDataError)
    ├── RecordLockedError               the record is locked
    ├── RecordHeldError                 another transaction holds the record
    ├── UntrackedStatementError         a statement whose changes cannot be captured
    ├── ReadOnlyError                   history, and the past, cannot be changed
    ├── ChangeInfoError                 change info is missing, or JSON cannot hold it (also a ValueError)
    ├── MissingExtraError               an optional dependency is not installed (also an ImportError)
    ├── NaiveDatetimeError              a point in time without a zone (also a ValueError)
    ├── NotAwaitedError                 a read that must be awaited was not (also a MissingGreenlet)
    ├── HiddenAttributeError            history does not hold this attribute (also an AttributeError)
    └── UntrackedAttributeError         history does not hold this attribute (also an AttributeError)

Every error keeps the values it was raised with as attributes and can be pickled.
None of them ever holds the value of a hidden column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.orm.exc import StaleDataError

__all__ = [
    "ChangeInfoError",
    "ChrononautException",
    "HiddenAttributeError",
    "MappingError",
    "MissingExtraError",
    "NaiveDatetimeError",
    "NotAwaitedError",
    "ReadOnlyError",
    "RecordHeldError",
    "RecordLockedError",
    "StaleVersionError",
    "UnattachedSessionError",
    "UntrackedAttributeError",
    "UntrackedStatementError",
]


class ChrononautException(Exception):
    """Root of all errors that chrononaut raises by itself."""


class MappingError(ChrononautException):
    """A model cannot be versioned the way it is declared; the message says what to change."""


class UnattachedSessionError(ChrononautException):
    """A session writes versioned records although it was never attached.

    :param model: name of the model that was about to be written.
    """

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model

    def __str__(self) -> str:
        return (
            f"{self.model} is versioned, but the session that writes it is not attached, so its history "
            "would be lost. Attach the session or its factory once, e.g. "
            "`versioned_session(sessionmaker(engine))`, or write inside `suppress_versioning()`."
        )


class _RecordError(ChrononautException):
    """An error about one record."""

    def __init__(self, model: str, key: tuple[Any, ...], *more: Any) -> None:
        super().__init__(model, key, *more)
        self.model = model
        self.key = key

    @property
    def _record(self) -> str:
        return f"{self.model}({', '.join(map(repr, self.key))})"


class StaleVersionError(_RecordError, StaleDataError):
    """Somebody else changed or deleted the record after it was read here.

    Nothing of the flush or statement stays in the transaction. Roll back (or end the
    savepoint), refresh the record and decide again.

    :param model: name of the model.
    :param key: primary key of the record.
    :param expected: the version that was read here; ``None`` where it was not loaded.
    :param found: the version that the database holds; ``None`` where the record is gone.
    :param changes: what the other writer changed, as ``{attribute: (before, after)}``, where
        that is known. Hidden columns are not in it.
    """

    def __init__(
        self,
        model: str,
        key: tuple[Any, ...],
        expected: int | None,
        found: int | None,
        changes: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> None:
        super().__init__(model, key, expected, found, changes)
        self.expected = expected
        self.found = found
        self.changes: Mapping[str, tuple[Any, Any]] = changes or {}

    def __str__(self) -> str:
        if self.found is None:
            what = "somebody else deleted it (or changed its key) after it was read here"
        elif self.expected is None:
            what = f"the database holds version {self.found}"
        else:
            what = (
                f"version {self.expected} was expected but the database holds version {self.found}: "
                "somebody else changed it after it was read here"
            )
        if self.changes:
            what += f" ({', '.join(sorted(self.changes))})"
        return f"{self._record} is stale: {what}. Roll back, refresh it and try again."


class RecordLockedError(_RecordError):
    """A locked record was about to be changed or deleted.

    :param model: name of the model.
    :param key: primary key of the record.
    """

    def __str__(self) -> str:
        return (
            f"{self._record} is locked and cannot be changed or deleted. "
            "Call `record.unlock(reason=...)` and flush that first."
        )


class RecordHeldError(_RecordError):
    """Another transaction holds the record, and did not end in time.

    :param model: name of the model.
    :param key: primary key of the record.
    """

    def __str__(self) -> str:
        return f"{self._record} is held by another transaction. Try again when that has ended."


class UntrackedStatementError(ChrononautException):
    """A statement changes versioned records in a way that cannot be captured.

    It was not executed. Write it through the session's unit of work or as
    ``session.execute(update(Model)...)``, or take the loss of history upon you by
    ``with suppress_versioning():``.
    """


class ReadOnlyError(ChrononautException):
    """History, or the past seen through ``as_of``, was about to be changed."""


class ChangeInfoError(ChrononautException, ValueError):
    """Change info is required but missing, or holds what JSON cannot hold."""


class MissingExtraError(ChrononautException, ImportError):
    """Something was imported whose optional dependencies are not installed.

    :param feature: what was imported.
    :param extra: the name of the extra that brings what it needs.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(feature, extra)
        self.feature = feature
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.feature} needs packages that are not installed: install `chrononaut[{self.extra}]`."


class NaiveDatetimeError(ChrononautException, ValueError):
    """A point in time was given without a time zone.

    :param name: name of the argument.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"{self.name} is a naive datetime, and a point in time needs a zone: "
            "pass e.g. `datetime.now(timezone.utc)` or `value.replace(tzinfo=timezone.utc)`."
        )


class NotAwaitedError(ChrononautException, MissingGreenlet):
    """The database was asked without ``await`` under an ``AsyncSession``.

    :param method: name of the method or function.
    :param form: what to write instead.
    """

    def __init__(self, method: str, form: str) -> None:
        super().__init__(method, form)
        self.method = method
        self.form = form

    def __str__(self) -> str:
        return f"{self.method}() asks the database, which must be awaited under an AsyncSession: use `{self.form}`."


class _AttributeNotInHistory(ChrononautException, AttributeError):
    _why: str
    name: str | None

    def __init__(self, model: str, attribute: str) -> None:
        super().__init__(model, attribute)
        self.model = model
        self.attribute = self.name = attribute

    def __str__(self) -> str:
        return f"{self.model}.{self.attribute} is {self._why}, so history does not hold its value."


class HiddenAttributeError(_AttributeNotInHistory):
    """The value of a hidden attribute was asked of history.

    :param model: name of the model.
    :param attribute: name of the attribute.
    """

    _why = "hidden (`__chrononaut_hidden__`)"


class UntrackedAttributeError(_AttributeNotInHistory):
    """The value of an untracked attribute was asked of history.

    :param model: name of the model.
    :param attribute: name of the attribute.
    """

    _why = "untracked (`__chrononaut_untracked__`)"
