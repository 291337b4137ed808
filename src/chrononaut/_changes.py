"""What changed, over all versioned models, in the order of time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, overload

from sqlalchemy import ColumnElement, Integer, Select, and_, literal, null, or_, select, union_all
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.types import TypeEngine

from chrononaut._mapping import VersionedMapping, mapping_of, versioned_models
from chrononaut._run_sync import async_session_in, session_in
from chrononaut._timeline import Change, open_reader, read_changes
from chrononaut._types import as_utc
from chrononaut.exceptions import ChrononautException

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

Cursor = tuple[datetime, str, tuple[Any, ...], int]
_Slot = tuple[str, int]


@overload
def changes(
    session: Session | scoped_session[Any],
    since: datetime | None = ...,
    until: datetime | None = ...,
    models: Iterable[type[Any]] | None = ...,
    user_id: str | None = ...,
    *,
    after: Change[Any] | Cursor | None = ...,
    newest_first: bool = ...,
    page_size: int = ...,
) -> Iterator[Change[Any]]: ...


@overload
def changes(
    session: AsyncSession | async_scoped_session[Any],
    since: datetime | None = ...,
    until: datetime | None = ...,
    models: Iterable[type[Any]] | None = ...,
    user_id: str | None = ...,
    *,
    after: Change[Any] | Cursor | None = ...,
    newest_first: bool = ...,
    page_size: int = ...,
) -> AsyncIterator[Change[Any]]: ...


def changes(
    session: Any,
    since: datetime | None = None,
    until: datetime | None = None,
    models: Iterable[type[Any]] | None = None,
    user_id: str | None = None,
    *,
    after: Change[Any] | Cursor | None = None,
    newest_first: bool = False,
    page_size: int = 500,
) -> Any:
    """Yield what changed, over all versioned models, ordered by time, model, key and version.

    Changes are read page by page, while they are iterated over, each page by one statement over all history tables
    and two for each model that is on it. E.g.::

        for change in changes(session, since=midnight, user_id="ann@example.org"):
            print(change.changed, change.model.__name__, change.key, change.operation, change.diff)

    Tables without a class, which ``versioned_table`` gave a history, are not in it: query their history tables, or give
    them a class that is ``Versioned``. What the session has flushed is seen, what is pending is not.

    :param session: a session, or one of the past. With an ``AsyncSession``, use ``async for``.
    :param since: only changes at or after this instant (inclusive; aware).
    :param until: only changes before this instant (exclusive; aware).
    :param models: only changes of these classes and their subclasses; a declarative base stands for all its models. All
        versioned models of the program if None, so name them where the program has several databases.
    :param user_id: only changes by this user.
    :param after: go on behind this change (or its ``cursor``), e.g. with what came since, or with the next page of a
        web view.
    :param newest_first: turn the order around.
    :param page_size: how many changes to read at once; at least 1.
    :raises NaiveDatetimeError: if an instant has no zone.
    :raises ChrononautException: if a class is not versioned, or ``after`` is of none of the models.
    """
    if page_size < 1:
        raise ChrononautException(f"changes(page_size=...) is at least 1, not {page_size}.")
    mappings = _mappings(models)
    bounds = None if since is None else as_utc(since, "since"), None if until is None else as_utc(until, "until")
    feed = _Feed(mappings, bounds, user_id, newest_first, page_size)
    cursor = after.cursor if isinstance(after, Change) else after
    start = None if cursor is None else feed.place_of(cursor)
    asynchronous = async_session_in(session)
    if asynchronous is not None:
        return feed.read_async(asynchronous, start)
    return feed.read(session_in(session), start)


def _mappings(models: Iterable[type[Any]] | None) -> list[VersionedMapping]:
    """Return the most general of the models, in a stable order."""
    everything = list(versioned_models())
    chosen: list[VersionedMapping] = [] if models is not None else everything
    for model in models or ():
        own = [mapping for mapping in everything if issubclass(mapping.mapper.class_, model)]
        chosen.extend(own or [mapping_of(model)])
    unique = list(dict.fromkeys(chosen))
    tops = [one for one in unique if not any(one is not other and one.mapper.isa(other.mapper) for other in unique)]
    return sorted(tops, key=lambda mapping: (mapping.name, mapping.mapper.class_.__module__))


@dataclass(frozen=True)
class _Place:
    """Where a change stands in the order."""

    changed: datetime
    branch: int
    key: tuple[Any, ...]
    version: int


@dataclass(frozen=True)
class _Feed:
    mappings: Sequence[VersionedMapping]
    bounds: tuple[datetime | None, datetime | None]
    user_id: str | None
    newest_first: bool
    page_size: int

    def place_of(self, cursor: Cursor) -> _Place:
        changed, name, key, version = cursor
        for number, mapping in enumerate(self.mappings):
            if any(mapper.class_.__name__ == name for mapper in mapping.mapper.self_and_descendants):
                return _Place(as_utc(changed, "after"), number, tuple(key), version)
        names = ", ".join(mapping.name for mapping in self.mappings)
        raise ChrononautException(f"changes(after=...) is of {name}, which is none of the models ({names}).")

    def read(self, session: Session, start: _Place | None) -> Iterator[Change[Any]]:
        more = bool(self.mappings)
        while more:
            page, start, more = self._read_page(session, start)
            yield from page

    async def read_async(self, session: AsyncSession, start: _Place | None) -> AsyncIterator[Change[Any]]:
        more = bool(self.mappings)
        while more:
            page, start, more = await session.run_sync(self._read_page, start)
            for change in page:
                yield change

    def _read_page(self, session: Session, start: _Place | None) -> tuple[list[Change[Any]], _Place | None, bool]:
        """Return a page, where it ended, and whether there may be another."""
        with open_reader(session, self.mappings[0]) as reader:
            places = [self._place(row) for row in reader.execute(self._page(start))]
            found = dict(self._load(reader, places))
        # One that is gone meanwhile was erased.
        page = [found[place] for place in places if place in found]
        return page, places[-1] if places else start, len(places) == self.page_size

    def _load(self, reader: Session, places: Iterable[_Place]) -> Iterator[tuple[_Place, Change[Any]]]:
        wanted: dict[int, list[_Place]] = defaultdict(list)
        for place in places:
            wanted[place.branch].append(place)
        for number, own in wanted.items():
            by_state = {(place.key, place.version): place for place in own}
            for change in read_changes(reader, self.mappings[number], by_state):
                yield by_state[change.key, change.version], change

    # --- one page

    def _slots(self) -> dict[_Slot, TypeEngine[Any]]:
        """Return the columns that hold the keys: those of one type share theirs, for a union has one type in each."""
        return {
            slot: column.type
            for mapping in self.mappings
            for slot, column in zip(_slots_of(mapping), mapping.base.history_key, strict=True)
        }

    def _page(self, start: _Place | None) -> Select[Any]:
        branches = [self._branch(number, start).subquery() for number in range(len(self.mappings))]
        columns = [select(*branch.c) for branch in branches]
        # Each branch is limited by itself, so that an index on its time is all that is read of it.
        page = (union_all(*columns) if len(columns) > 1 else columns[0]).subquery("page")
        return select(*page.c).order_by(*map(self._ordered, page.c)).limit(self.page_size)

    def _branch(self, number: int, start: _Place | None) -> Select[Any]:
        mapping = self.mappings[number]
        history: Any = mapping.history_class
        key = [getattr(history, name) for name in mapping.key_attributes]
        own = dict(zip(_slots_of(mapping), key, strict=True))
        slots = [
            (own[slot] if slot in own else sql_cast(null(), type_)).label(f"key_{position}")
            for position, (slot, type_) in enumerate(self._slots().items())
        ]
        columns: list[Any] = [history.changed.label("changed"), literal(number, Integer()).label("branch"), *slots]
        columns.append(history.version.label("version"))
        query: Any = select(*columns)
        since, until = self.bounds
        if since is not None:
            query = query.where(history.changed >= since)
        if until is not None:
            query = query.where(history.changed < until)
        if self.user_id is not None:
            query = query.where(history.change_info["user_id"].as_string() == self.user_id)
        if start is not None:
            query = query.where(self._is_behind(history, number, key, start))
        order = [history.changed, *key, history.version]
        ordered: Select[Any] = query.order_by(*map(self._ordered, order)).limit(self.page_size)
        return ordered

    def _is_behind(self, history: Any, number: int, key: Sequence[Any], start: _Place) -> ColumnElement[bool]:
        columns: list[Any] = [history.changed]
        values: list[Any] = [start.changed]
        if number == start.branch:
            columns += [*key, history.version]
            values += [*start.key, start.version]
        elif (number > start.branch) is not self.newest_first:
            # One that comes later among those of the same time.
            (time,) = columns
            later: ColumnElement[bool] = time <= start.changed if self.newest_first else time >= start.changed
            return later
        steps: list[ColumnElement[bool]] = []
        for index, (column, value) in enumerate(zip(columns, values, strict=True)):
            before = zip(columns[:index], values[:index], strict=True)
            further: ColumnElement[bool] = column < value if self.newest_first else column > value
            steps.append(and_(*(same == known for same, known in before), further))
        return or_(*steps)

    def _ordered(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return column.desc() if self.newest_first else column.asc()

    def _place(self, row: Any) -> _Place:
        changed, branch, *key, version = row
        number: int = branch
        mapping = self.mappings[number]
        slots: dict[_Slot, Any] = dict(zip(self._slots(), key, strict=True))
        return _Place(changed, branch, tuple(slots[slot] for slot in _slots_of(mapping)), version)


def _slots_of(mapping: VersionedMapping) -> list[_Slot]:
    """Return which shared columns a model's key is in."""
    slots: list[_Slot] = []
    for column in mapping.base.history_key:
        name = repr(column.type)
        slots.append((name, sum(other == name for other, _ in slots)))
    return slots
