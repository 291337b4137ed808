"""A record's life as the changes that made it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from sqlalchemy import and_, inspect, or_, select
from sqlalchemy.orm import Mapper, Session, selectin_polymorphic, undefer

from chrononaut._history_record import HistoryRecord
from chrononaut._mapping import VersionedMapping, mapping_of
from chrononaut._past_statements import is_past
from chrononaut._reader import is_record, key_of, session_of
from chrononaut.typing import ChangeInfo, Operation

Model = TypeVar("Model", covariant=True)
Values = Mapping[str, Any]
_Key = tuple[Any, ...]
_NOTHING: Values = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Change(Generic[Model]):
    """One change of one record: the end of a state, and the beginning of the next.

    :param model: the record's class.
    :param key: its primary key.
    :param version: the version that the change ended, which is the version of its history row. For the first insert
        of a record that is -1.
    :param operation: ``insert``, ``update`` or ``delete``.
    :param changed: when, UTC.
    :param change_info: who and why.
    :param before: the tracked values before, by attribute; None for an insert.
    :param after: the tracked values after; None for a delete.
    """

    model: type[Model]
    key: tuple[Any, ...]
    version: int
    operation: Operation
    changed: datetime
    change_info: ChangeInfo
    before: Values | None = field(repr=False)
    after: Values | None = field(repr=False)

    @property
    def user_id(self) -> str | None:
        """Who made the change."""
        return self.change_info.get("user_id")

    @property
    def rationale(self) -> str | None:
        """Why it was made, where that was said."""
        extra: dict[str, Any] = self.change_info.get("extra", {})
        return extra.get("rationale")

    @cached_property
    def diff(self) -> dict[str, tuple[Any, Any]]:
        """What the change did, as ``{attribute: (before, after)}``. Hidden attributes are in ``change_info`` only."""
        before, after = self.before or _NOTHING, self.after or _NOTHING
        compare = mapping_of(self.model).comparisons
        differences: dict[str, tuple[Any, Any]] = {}
        for name in sorted({*before, *after}):
            values = before.get(name), after.get(name)
            if compare[name](*values) is not True:
                differences[name] = values
        return differences

    @property
    def cursor(self) -> tuple[datetime, str, tuple[Any, ...], int]:
        """Where the change stands in the feed: pass it to ``changes(after=...)`` to go on behind it."""
        return self.changed, self.model.__name__, self.key, self.version


def read_timeline(record: Any) -> Iterator[Change[Any]]:
    """Read the changes of one record, all at once: see ``Versioned.timeline``."""
    cls: type[Any] = record.__class__
    mapping = mapping_of(cls)
    session = session_of(record)
    with open_reader(session, mapping) as reader:
        # The live row first: what changes in between is in the history that is read after it.
        live = _read_live(reader, mapping, [key_of(mapping, record)])
        history = mapping.history_class
        rows = reader.scalars(select(history).where(is_record(record)).order_by(history.version)).all()
        return iter(list(build_changes(mapping, rows, rows, live)))


@contextmanager
def open_reader(session: Session, mapping: VersionedMapping) -> Generator[Session]:
    """Open a session on another's connection, which neither sees nor disturbs what that has loaded."""
    if is_past(session):
        yield session
        return
    connection = session.connection(bind_arguments={"mapper": mapping.mapper})
    with Session(connection, autoflush=False, join_transaction_mode="rollback_only") as reader:
        yield reader


def read_changes(reader: Session, mapping: VersionedMapping, wanted: Iterable[tuple[_Key, int]]) -> list[Change[Any]]:
    """Return the changes that ended some states, each with the state that followed."""
    states = list(wanted)
    live = _read_live(reader, mapping, {key for key, _ in states})
    around = {(*key, version + step) for key, version in states for step in (0, 1)}
    rows = list(_read_rows(reader, mapping, around))
    ended = [row for row in rows if (_key_of_row(mapping, row), row.version) in set(states)]
    return list(build_changes(mapping, ended, rows, live))


def build_changes(
    mapping: VersionedMapping,
    ended: Iterable[HistoryRecord[Any]],
    known: Iterable[HistoryRecord[Any]],
    live: Mapping[_Key, tuple[int, Values]],
) -> Iterator[Change[Any]]:
    """Yield the changes that ended some states.

    :param known: history rows, among them those of the states that followed.
    :param live: version and values of the live rows, by key.
    """
    rows = {(_key_of_row(mapping, row), row.version): row for row in known}
    for row in ended:
        key = _key_of_row(mapping, row)
        after: Values | None = None
        if row.operation != "delete":
            following = rows.get((key, row.version + 1))
            version, values = live.get(key, (None, None))
            if following is not None:
                after = _values(following)
            elif version == row.version + 1:
                after = values
        yield Change(
            model=row.__chrononaut_model__,
            key=key,
            version=row.version,
            operation=row.operation,
            changed=row.changed,
            change_info=row.change_info,
            before=None if row.operation == "insert" else _values(row),
            after=after,
        )


def _values(state: Any) -> Values:
    """Return the tracked values of a history row or a live record."""
    cls: type[Any] = state.__class__
    model: type[Any] = getattr(cls, "__chrononaut_model__", cls)
    return MappingProxyType({name: getattr(state, name) for name in sorted(mapping_of(model).tracked)})


def _key_of_row(mapping: VersionedMapping, row: HistoryRecord[Any]) -> _Key:
    return tuple(getattr(row, name) for name in mapping.key_attributes)


def _read_live(reader: Session, mapping: VersionedMapping, keys: Iterable[_Key]) -> dict[_Key, tuple[int, Values]]:
    model: Any = mapping.mapper.class_
    attributes = [getattr(model, name) for name in mapping.key_attributes]
    live: dict[_Key, tuple[int, Values]] = {}
    query = select(model).options(*_with_subclasses(model))
    for condition in _in_chunks(attributes, list(keys)):
        for record in reader.scalars(query.where(condition)):
            key = tuple(getattr(record, name) for name in mapping.key_attributes)
            live[key] = (record.version, _values(record))
    return live


def _read_rows(reader: Session, mapping: VersionedMapping, states: Iterable[_Key]) -> Iterator[HistoryRecord[Any]]:
    history = mapping.history_class
    attributes = [getattr(history, name) for name in (*mapping.key_attributes, "version")]
    query = select(history).options(*_with_subclasses(history))
    for condition in _in_chunks(attributes, list(states)):
        yield from reader.scalars(query.where(condition))


def _with_subclasses(cls: type[Any]) -> list[Any]:
    mapper: Mapper[Any] = inspect(cls)
    subclasses = [each.class_ for each in mapper.self_and_descendants if each is not mapper]
    return [undefer("*"), *([selectin_polymorphic(cls, subclasses)] if subclasses else [])]


def _in_chunks(columns: list[Any], keys: list[_Key]) -> Iterator[Any]:
    # ORed equalities: row values scan the table on SQLite, and not every database has them.
    for start in range(0, len(keys), 100):
        chunk = keys[start : start + 100]
        yield or_(*(and_(*(column == part for column, part in zip(columns, key, strict=True))) for key in chunk))
