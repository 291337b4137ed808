"""Verify that the history in a database is whole: what ``chrononaut verify`` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from sqlalchemy import ColumnElement, Connection, MetaData, Select, and_, cast, func, select, type_coerce

from chrononaut._capture import live_version
from chrononaut._history_table import BEGAN, CHANGED, OPERATION, VERSION
from chrononaut._mapping import VersionedMapping, VersionedTable, versioned_mappings
from chrononaut._pages import read_pages
from chrononaut._types import UTCDateTime
from chrononaut.typing import Progress

__all__ = ["Problem", "ProblemKind", "verify_history"]

ProblemKind: TypeAlias = Literal[
    "gap", "interval", "backwards", "birth", "vanished", "version", "no-history", "child-missing", "child-orphan"
]
"""What can be wrong with a history: see the texts in ``Problem``."""

_PAGE_OF_PROBLEMS = 1_000

_TEXTS: dict[ProblemKind, str] = {
    "gap": "a version is missing before this one",
    "interval": "this state does not begin when the one before it ended",
    "backwards": "this state ended before it began",
    "birth": "this row says that the record was inserted, but it existed already",
    "vanished": "history ends with this row, which is no deletion, and yet the record is gone",
    "version": "the record's version is not the one after the last in history",
    "no-history": "the record has changed, as its version says, but has no history",
    "child-missing": "the part of this state that belongs to a subclass is missing",
    "child-orphan": "the part of a state that belongs to a subclass is there, but not the state",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a record's history. It names the record, and never holds a value of it.

    :param table: name of the live table.
    :param key: primary key of the record.
    :param version: the version of the state in question; the live version where the live row is in question.
    :param kind: what is wrong.
    """

    table: str
    key: tuple[Any, ...]
    version: int | None
    kind: ProblemKind

    def __str__(self) -> str:
        key = ", ".join(map(str, self.key))
        return f"{self.table}({key}) version {self.version}: {self.kind}: {_TEXTS[self.kind]}"


class _State(NamedTuple):
    """A history row, without its data, and the version that the live row has."""

    key: tuple[Any, ...]
    version: int
    began: datetime | None
    changed: datetime
    operation: str
    live_version: int | None


def verify_history(
    connection: Connection, metadata: MetaData, *, chunk_size: int = 10_000, progress: Progress | None = None
) -> Iterator[Problem]:
    """Walk the history of all versioned tables, and yield what is wrong with it.

    Only reads. Each chunk is read by a statement of its own, so that it can run for long beside writers. What
    ``suppress_versioning`` left out, or erased, is found as well: it is not told from a loss.

    :param connection: a connection to the database; on a server preferably one in autocommit mode.
    :param metadata: what the models are declared on, e.g. ``Base.metadata``.
    :param chunk_size: how many history rows are read at a time.
    :param progress: told after every chunk how many history rows of a table are done.
    """
    children: dict[VersionedTable, list[VersionedMapping]] = {}
    bases: set[VersionedTable] = set()
    for mapping in versioned_mappings(metadata):
        if mapping.base not in bases:
            bases.add(mapping.base)
            yield from _verify_chains(connection, mapping.base, chunk_size, progress)
            yield from _find_without_history(connection, mapping.base)
        for table in mapping.tables[1:]:
            children.setdefault(table, []).append(mapping)
    for table, mappings in children.items():
        yield from _verify_child(connection, table, mappings)


def _verify_chains(
    connection: Connection, table: VersionedTable, chunk_size: int, progress: Progress | None
) -> Iterator[Problem]:
    name = str(table.live)
    total = connection.scalar(select(func.count()).select_from(table.history)) or 0
    done = 0
    previous: _State | None = None
    query, order = _states(table)
    width = len(table.key)
    for page in read_pages(connection, query, order, chunk_size):
        for row in page:
            state = _State(tuple(row[:width]), *row[width:])
            if previous is not None and previous.key != state.key:
                yield from (Problem(name, *found) for found in _wrong_with_last(previous))
                previous = None
            yield from (Problem(name, *found) for found in _wrong_with(previous, state))
            previous = state
        done += len(page)
        if progress is not None:
            progress(name, done, max(total, done))
    if previous is not None:
        yield from (Problem(name, *found) for found in _wrong_with_last(previous))


def _states(table: VersionedTable) -> tuple[Select[Any], list[ColumnElement[Any]]]:
    history = table.history
    order: list[ColumnElement[Any]] = [*table.history_key, history.c[VERSION]]
    query: Select[Any] = select(
        *order,
        type_coerce(history.c[BEGAN], UTCDateTime()),
        type_coerce(history.c[CHANGED], UTCDateTime()),
        history.c[OPERATION],
        live_version(table),
    ).select_from(history.outerjoin(table.live, _is_same_record(table)))
    return query, order


def _is_same_record(table: VersionedTable) -> ColumnElement[bool]:
    keys = zip(table.key, table.history_key, strict=True)
    return and_(*((live if live.type is copy.type else cast(live, copy.type)) == copy for live, copy in keys))


_Found = tuple[tuple[Any, ...], int | None, ProblemKind]


def _wrong_with(previous: _State | None, state: _State) -> Iterator[_Found]:
    if state.began is not None and state.changed < state.began:
        yield state.key, state.version, "backwards"
    if previous is None:
        return
    if state.version != previous.version + 1:
        yield state.key, state.version, "gap"
    elif state.began != previous.changed:
        yield state.key, state.version, "interval"
    if state.operation == "insert" and previous.operation != "delete":
        yield state.key, state.version, "birth"


def _wrong_with_last(last: _State) -> Iterator[_Found]:
    if last.live_version is None:
        if last.operation != "delete":
            yield last.key, last.version, "vanished"
    elif last.live_version != last.version + 1:
        yield last.key, last.live_version, "version"


def _find_without_history(connection: Connection, table: VersionedTable) -> Iterator[Problem]:
    has_history = select(1).select_from(table.history).where(_is_same_record(table)).correlate(table.live).exists()
    version = live_version(table)
    query = select(*table.key, version).where(version > 0, ~has_history)
    yield from _problems(connection, query, str(table.live), "no-history")


def _verify_child(
    connection: Connection, table: VersionedTable, mappings: Sequence[VersionedMapping]
) -> Iterator[Problem]:
    """Find child history rows without their base row, and base rows without the child row they should have."""
    base = mappings[0].base
    keys = zip(table.history_key, base.history_key, strict=True)
    same = and_(table.history.c[VERSION] == base.history.c[VERSION], *(mine == theirs for mine, theirs in keys))
    name = str(table.live)
    orphans = select(*table.history_key, table.history.c[VERSION]).where(
        ~select(1).select_from(base.history).where(same).correlate(table.history).exists()
    )
    yield from _problems(connection, orphans, name, "child-orphan")
    discriminator = mappings[0].discriminator
    if discriminator is None:
        return
    identities = [mapping.mapper.polymorphic_identity for mapping in mappings]
    missing = select(*base.history_key, base.history.c[VERSION]).where(
        base.history.c[discriminator.key].in_([each for each in identities if each is not None]),
        ~select(1).select_from(table.history).where(same).correlate(base.history).exists(),
    )
    yield from _problems(connection, missing, name, "child-missing")


def _problems(connection: Connection, query: Select[Any], table: str, kind: ProblemKind) -> Iterator[Problem]:
    key = list(query.selected_columns)
    for page in read_pages(connection, query, key, _PAGE_OF_PROBLEMS):
        for row in page:
            yield Problem(table, tuple(row[:-1]), row[-1], kind)
