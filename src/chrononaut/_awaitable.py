"""The history of one record for programs that await: what ``Versioned`` does, under the same names."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Generic, TypeVar, cast

from chrononaut._diff import diff_states
from chrononaut._history_record import HistoryRecord
from chrononaut._locking import Lockable
from chrononaut._reader import (
    read_has_changed_since,
    read_previous_version,
    read_version_at,
    select_versions,
    session_of,
)
from chrononaut._restore import revert
from chrononaut._run_sync import run_sync
from chrononaut._timeline import Change, read_timeline
from chrononaut.exceptions import ChrononautException

Model = TypeVar("Model")
Answer = TypeVar("Answer")


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

    async def timeline(self) -> list[Change[Model]]:
        """Return the record's changes, oldest first: see :meth:`chrononaut.Versioned.timeline`."""
        return await self._run(lambda: list(read_timeline(self._record)))

    async def lock(self, reason: str | None = None) -> None:
        """Lock the record with the next flush: see :meth:`chrononaut.Lockable.lock`.

        :raises ChrononautException: if the model is not ``Lockable``.
        """
        record = self._lockable()
        await self._run(lambda: record.lock(reason))

    async def unlock(self, reason: str | None = None) -> None:
        """Unlock the record with the next flush: see :meth:`chrononaut.Lockable.unlock`.

        :raises ChrononautException: if the model is not ``Lockable``.
        """
        record = self._lockable()
        await self._run(lambda: record.unlock(reason))

    def _lockable(self) -> Lockable:
        if not isinstance(self._record, Lockable):
            raise ChrononautException(f"{type(self._record).__name__} is not Lockable: give it the mixin.")
        return cast("Lockable", self._record)

    async def _run(self, read: Callable[[], Answer]) -> Answer:
        return await run_sync(self._record, read)
