"""The history of one record for programs that await: what ``Versioned`` does, under the same names."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar

from sqlalchemy.exc import MissingGreenlet, StatementError

from chrononaut._diff import diff_states
from chrononaut._history_record import HistoryRecord
from chrononaut._reader import (
    read_has_changed_since,
    read_previous_version,
    read_version_at,
    select_versions,
    session_of,
)
from chrononaut._restore import revert
from chrononaut._run_sync import run_sync
from chrononaut.exceptions import NotAwaitedError

Model = TypeVar("Model")
Answer = TypeVar("Answer")
Parameters = ParamSpec("Parameters")


class AwaitableHistory(Generic[Model]):
    """What :attr:`chrononaut.Versioned.awaitable_history` gives: the record's methods, to be awaited.

    Each does what the record's method of the same name does, in the ``AsyncSession`` that the record is in.
    """

    __slots__ = ("_record",)

    def __init__(self, record: Model) -> None:
        self._record = record

    async def versions(
        self, before: datetime | None = None, after: datetime | None = None
    ) -> list[HistoryRecord[Model]]:
        """Return the record's ended states, oldest first: see :meth:`chrononaut.Versioned.versions`."""
        record = self._record
        return await self._run(lambda: list(session_of(record).scalars(select_versions(record, before, after))))

    async def version_at(self, at: datetime) -> HistoryRecord[Model] | Model | None:
        """Return the state that was valid at an instant: see :meth:`chrononaut.Versioned.version_at`."""
        return await self._run(lambda: read_version_at(self._record, at))

    async def previous_version(self) -> HistoryRecord[Model] | None:
        """Return the state before the current one: see :meth:`chrononaut.Versioned.previous_version`."""
        return await self._run(lambda: read_previous_version(self._record))

    async def has_changed_since(self, since: datetime) -> bool:
        """Tell whether the state at an instant is not the current one.

        See :meth:`chrononaut.Versioned.has_changed_since`.
        """
        return await self._run(lambda: read_has_changed_since(self._record, since))

    async def diff(
        self,
        from_model: HistoryRecord[Model] | Model,
        to: HistoryRecord[Model] | Model | None = None,
        include_hidden: bool = False,
    ) -> dict[str, tuple[Any, Any]]:
        """Return what differs between two states: see :meth:`chrononaut.Versioned.diff`."""
        return await self._run(lambda: diff_states(self._record, from_model, to, include_hidden))

    async def revert_to(self, state: HistoryRecord[Model]) -> None:
        """Put the tracked values back to those of a state: see :meth:`chrononaut.Versioned.revert_to`."""
        await self._run(lambda: revert(self._record, state))

    async def _run(self, read: Callable[[], Answer]) -> Answer:
        return await run_sync(self._record, read)


def to_be_awaited(method: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """Make a method that reads say how to await it, where it must be."""

    @wraps(method)
    def call(*args: Parameters.args, **kw: Parameters.kwargs) -> Answer:
        try:
            return method(*args, **kw)
        except (MissingGreenlet, StatementError) as error:
            if isinstance(error, MissingGreenlet) or isinstance(error.orig, MissingGreenlet):
                raise NotAwaitedError(method.__name__) from error
            raise

    return call
