"""The mixin that makes a model versioned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, overload

from sqlalchemy import Connection, event
from sqlalchemy.orm import InstanceState, Mapped, Mapper, Query, declared_attr
from sqlalchemy.orm.interfaces import EXT_CONTINUE
from typing_extensions import Self

from chrononaut._awaitable import AwaitableHistory
from chrononaut._change_info import ChangeInfoHooks
from chrononaut._diff import diff_states
from chrononaut._flush import Flush, flush_of
from chrononaut._history_mapper import build_history_mapper
from chrononaut._history_record import HistoryRecord
from chrononaut._history_table import declared_column, version_column
from chrononaut._mapping import VersionedMapping, mapping_of
from chrononaut._options import after_mapping
from chrononaut._reader import (
    query_versions,
    read_has_changed_since,
    read_previous_version,
    read_version_at,
    select_versions,
    session_of,
)
from chrononaut._restore import restore, revert
from chrononaut._run_sync import to_be_awaited
from chrononaut._timeline import Change, read_timeline


class Versioned(ChangeInfoHooks):
    """Give a model a history: each state that a record ever had, when it lived, who ended it and why.

    The model gets one column, ``version``, and a table ``<table>_history``. E.g.::

        class User(Versioned, Base):
            __tablename__ = "appuser"
            __chrononaut_hidden__ = ["password"]

            id: Mapped[int] = mapped_column(primary_key=True)
            email: Mapped[str]
            password: Mapped[str]

        Session = versioned_session(sessionmaker(engine))
    """

    __chrononaut_untracked__: ClassVar[Sequence[str]] = ()
    """Columns that history ignores: it does not hold them, and changing only them makes no version."""
    __chrononaut_hidden__: ClassVar[Sequence[str]] = ()
    """Columns whose values never leave the live row; that they changed is recorded."""
    __chrononaut_disable_indices__: ClassVar[Sequence[str]] = ()
    """Names of columns or indexes whose index the history table does not get."""
    __chrononaut_copy_validators__: ClassVar[bool] = False
    """Whether the history class gets the model's ``@validates`` methods."""
    __chrononaut_track_inserts__: ClassVar[bool] = True
    """Whether it is recorded who created a record, and when."""

    if TYPE_CHECKING:
        __chrononaut_tablename__: ClassVar[str]
        version: Mapped[int]
        """The number of the current state: 0 at first, one more with each change. Do not set it."""
    else:

        @declared_attr
        def version(cls):  # documented above
            return declared_column(cls, version_column())

    def __init_subclass__(cls, **kw: Any) -> None:
        super().__init_subclass__(**kw)
        after_mapping(cls, _after_mapper_constructed)

    @property
    def awaitable_history(self) -> AwaitableHistory[Self]:
        """The record's history for programs that await: the methods below, under the same names.

        E.g. under an ``AsyncSession``::

            rows = await user.awaitable_history.versions()
            differences = await user.awaitable_history.diff(rows[0])
        """
        return AwaitableHistory(self)

    @overload
    def versions(
        self, before: datetime | None = None, after: datetime | None = None, return_query: Literal[False] = False
    ) -> list[HistoryRecord[Self]]: ...

    @overload
    def versions(
        self, before: datetime | None = None, after: datetime | None = None, *, return_query: Literal[True]
    ) -> Query[HistoryRecord[Self]]: ...

    @to_be_awaited()
    def versions(
        self, before: datetime | None = None, after: datetime | None = None, return_query: bool = False
    ) -> list[HistoryRecord[Self]] | Query[HistoryRecord[Self]]:
        """Return the record's ended states, oldest first. The current state, the record itself, is not among them.

        :param before: only states that ended at or before this instant (inclusive; aware).
        :param after: only states that ended at or after this instant (inclusive; aware).
        :param return_query: return a ``Query`` instead of a list, to filter and page it.
        :raises NaiveDatetimeError: if an instant has no zone.
        :raises ChrononautException: if the record is in no session, or was never flushed.
        """
        if return_query:
            return query_versions(self, before, after)
        return list(session_of(self).scalars(select_versions(self, before, after)))

    @to_be_awaited()
    def version_at(self, at: datetime) -> HistoryRecord[Self] | Self | None:
        """Return the state that was valid at an instant.

        :param at: the instant (aware). A state is valid from when it began (inclusive) to when it ended (exclusive).
        :return: the history row; the record itself if its current state was valid; None if it did not exist then.
        :raises NaiveDatetimeError: if the instant has no zone.
        :raises ChrononautException: if the record is in no session, or was never flushed.
        """
        return read_version_at(self, at)

    @to_be_awaited()
    def previous_version(self) -> HistoryRecord[Self] | None:
        """Return the state before the current one, or None if there is none.

        :raises ChrononautException: if the record is in no session, or was never flushed.
        """
        return read_previous_version(self)

    @to_be_awaited()
    def has_changed_since(self, since: datetime) -> bool:
        """Tell whether the record's state at an instant is not its current one.

        :param since: the instant (aware). A change at just this instant has happened already, so it does not count.
        :raises NaiveDatetimeError: if the instant has no zone.
        :raises ChrononautException: if the record is in no session, or was never flushed.
        """
        return read_has_changed_since(self, since)

    @to_be_awaited()
    def diff(
        self,
        from_model: HistoryRecord[Self] | Self,
        to: HistoryRecord[Self] | Self | None = None,
        include_hidden: bool = False,
    ) -> dict[str, tuple[Any, Any]]:
        """Return what differs between two states of the record, as ``{attribute: (from, to)}``.

        :param from_model: a history row of this record.
        :param to: a later history row; the record itself, with what is not flushed yet, if None.
        :param include_hidden: add every hidden column that changed in between, as ``(None, current value)``, or as
            ``(None, None)`` where ``to`` is a history row.
        :raises ChrononautException: if ``from_model`` is no history row, one of another record, or later than ``to``.
        """
        return diff_states(self, from_model, to, include_hidden)

    @to_be_awaited()
    def revert_to(self, state: HistoryRecord[Self]) -> None:
        """Put the tracked attributes back to what they were in one of the record's own states.

        This is a change like any other: nothing is written before the next flush, which makes a version of it. The key
        stays, and so does what history does not hold: hidden and untracked attributes, and relationships other than
        through this record's own foreign keys. E.g.::

            with rationale("undo the import"):
                user.revert_to(user.version_at(yesterday))
                session.commit()

        :param state: a history row of this record.
        :raises ChrononautException: if it is something else, or the record was deleted (see ``HistoryRecord.restore``).
        """
        revert(self, state)

    @to_be_awaited()
    def timeline(self) -> Iterator[Change[Self]]:
        """Read the record's changes, oldest first: how it came to be, and what each change did to it.

        E.g.::

            for change in user.timeline():
                print(change.changed, change.user_id, change.operation, change.diff)

        What is not flushed is not in it. A record without a birth row (older than its versioning, or not tracking
        inserts) begins with its first update.

        :raises ChrononautException: if the record is in no session, or was never flushed.
        """
        return read_timeline(self)

    @classmethod
    def __chrononaut_restore__(cls, row: HistoryRecord[Self], values: dict[str, Any]) -> Self:
        return cast("Self", restore(row, values))


def _after_mapper_constructed(mapper: Mapper[Any], cls: type) -> None:
    """Fire when the mapper of a versioned class was made, before its relationships are resolved."""
    build_history_mapper(mapper)
    event.listen(mapper, "mapper_configured", _mapper_configured)


def _mapper_configured(mapper: Mapper[Any], cls: type) -> None:
    """Fire once, before the first use of the class: listen as late as that, so as to hear after all others."""
    for name, collect in _COLLECT.items():
        # As raw states, and with a return value: SQLAlchemy calls such listeners without a wrapper.
        event.listen(mapper, name, partial(_before_write, collect, mapping_of(cls)), raw=True, retval=True)


def _before_write(
    collect: Callable[[Flush, Connection, VersionedMapping, InstanceState[Any]], None],
    mapping: VersionedMapping,
    mapper: Mapper[Any],
    connection: Connection,
    state: InstanceState[Any],
) -> Any:
    """Fire before a record is inserted, deleted, updated, or only looked at because something about it was touched."""
    flush = flush_of(state)
    if flush is not None:
        collect(flush, connection, mapping, state)
    return EXT_CONTINUE


_COLLECT = {
    "before_insert": Flush.collect_insert,
    "before_update": Flush.collect_update,
    "before_delete": Flush.collect_delete,
}
