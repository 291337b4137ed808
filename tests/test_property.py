"""History against an oracle: whatever is done to records, each instant reads as the tables were then.

The oracle knows nothing of history. It keeps copies of the live tables, read by plain SQL: one after each flush
and one at each commit, with the instant of the transaction. A few hundred runs are made by default; thousands with
``--hypothesis-profile=thorough``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, SessionTransaction, mapped_column, sessionmaker

from chrononaut import HistoryRecord, Versioned, history_class, versioned_session
from tests.fix_models import Clock

Values = dict[str, Any]
Key = Any
TINY = timedelta(microseconds=1)


class Base(DeclarativeBase):
    type_annotation_map = {str: sa.String(20)}


class Note(Versioned, Base):
    """A generated key."""

    __tablename__ = "note"
    __chrononaut_hidden__ = ["secret"]
    __chrononaut_untracked__ = ["hits"]

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str | None]
    secret: Mapped[str | None]
    hits: Mapped[str | None]


class Word(Versioned, Base):
    """A key that the application chooses, and may change."""

    __tablename__ = "word"
    __chrononaut_hidden__ = ["secret"]
    __chrononaut_untracked__ = ["hits"]

    id: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str | None]
    secret: Mapped[str | None]
    hits: Mapped[str | None]


class Animal(Versioned, Base):
    """The base of a hierarchy: a key may come back as another class."""

    __tablename__ = "animal"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}
    __chrononaut_hidden__ = ["secret"]
    __chrononaut_untracked__ = ["hits"]

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    text: Mapped[str | None]
    secret: Mapped[str | None]
    hits: Mapped[str | None]


class Dog(Animal):
    __tablename__ = "dog"
    __mapper_args__ = {"polymorphic_identity": "dog"}

    id: Mapped[int] = mapped_column(sa.ForeignKey("animal.id"), primary_key=True)
    trick: Mapped[str | None]


FAMILIES: tuple[type[Any], ...] = (Note, Word, Animal)
TRACKED = {Note: ("text",), Word: ("text",), Animal: ("kind", "text", "trick")}
COPIES = {
    Note: sa.text("SELECT id, version, text FROM note"),
    Word: sa.text("SELECT id, version, text FROM word"),
    Animal: sa.text("SELECT a.id, a.version, a.kind, a.text, d.trick FROM animal a LEFT JOIN dog d ON d.id = a.id"),
}


# --- what is done


@dataclass(frozen=True)
class Act:
    """Something done to the record in one of two places of a family, or to the session."""

    name: str
    family: type[Any] | None = None
    place: int = 0
    attribute: str = "text"
    value: str | None = None

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print it on one line, for Hypothesis."""
        on = "" if self.family is None else f" {self.family.__name__}[{self.place}].{self.attribute} {self.value}"
        printer.text(f"<{self.name}{on}>")


#: A record that is not there is added instead, and a savepoint that was not made is made.
ON_RECORDS = ["set"] * 5 + ["delete"] * 4 + ["set_same", "set_expression", "expire", "rename"]
ON_SESSIONS = ["flush"] * 3 + ["commit"] * 6 + ["tick"] * 4 + ["release"] * 2 + ["undo_savepoint"] * 3
ON_SESSIONS += ["rollback", "expire_all", "new_session"]

on_record = st.builds(
    Act,
    name=st.sampled_from(ON_RECORDS),
    family=st.sampled_from(FAMILIES),
    place=st.integers(0, 1),
    attribute=st.sampled_from(["text", "text", "trick", "secret", "hits"]),
    value=st.sampled_from(["a", "b", "c", None]),
)
on_session = st.builds(Act, name=st.sampled_from(ON_SESSIONS))
act = st.one_of(on_record, on_record, on_session)
# Lists of lists become long more often than lists do, and still shrink to next to nothing.
acts = st.lists(st.lists(act, max_size=15), max_size=15).map(lambda lists: [act for acts in lists for act in acts])


# --- who does it, and remembers


@dataclass
class Memory:
    """What a savepoint can give back."""

    #: The records that are there, by family and place.
    records: dict[tuple[type[Any], int], Any] = field(default_factory=dict)
    #: Each version of each record that was ever in a table after a flush.
    seen: dict[type[Any], dict[tuple[Key, int], Values]] = field(default_factory=lambda: defaultdict(dict))

    def copy(self) -> Memory:
        seen: dict[type[Any], dict[tuple[Key, int], Values]] = defaultdict(dict)
        seen.update((family, dict(versions)) for family, versions in self.seen.items())
        return Memory(dict(self.records), seen)


class OracleClock(Clock):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[datetime] = []

    def __call__(self) -> datetime:
        self.answers.append(self.now)
        return self.now


class Player:
    """Acts, and keeps copies of the tables."""

    def __init__(self, engine: sa.Engine, expire_on_commit: bool) -> None:
        self.clock = OracleClock()
        self.factory = versioned_session(
            sessionmaker(engine, autoflush=False, expire_on_commit=expire_on_commit), clock=self.clock
        )
        self.session: Session = self.factory()
        self.memory = Memory()
        self.committed = Memory()
        self.savepoints: list[tuple[SessionTransaction, Memory]] = []
        #: The instant of each transaction, and what the tables held when it was committed.
        self.commits: list[tuple[datetime, dict[type[Any], dict[Key, Values]]]] = []

    def play(self, acts_: list[Act]) -> None:
        for act in acts_:
            if act.family is None:
                getattr(self, f"_{act.name}")()
            elif self._record(act) is None:
                self._add(act)
            else:
                getattr(self, f"_{act.name}")(act)
        self._commit()

    # records

    def _add(self, act: Act) -> None:
        family = act.family
        assert family is not None
        if family is Animal and act.attribute == "trick":
            self._flush()  # SQLAlchemy cannot replace a record by one of another class in one flush
            record: Any = Dog(id=act.place, text=act.value, trick=act.value)
        elif family is Animal:
            self._flush()
            record = Animal(id=act.place, text=act.value)
        else:
            record = family(text=act.value, secret="s", **({"id": f"w{act.place}"} if family is Word else {}))
        self.session.add(record)
        self.memory.records[family, act.place] = record

    def _record(self, act: Act) -> Any:
        assert act.family is not None
        return self.memory.records.get((act.family, act.place))

    def _set(self, act: Act, value: Any = None) -> None:
        record = self._record(act)
        if act.attribute != "trick" or isinstance(record, Dog):
            setattr(record, act.attribute, act.value if value is None else value)

    def _set_expression(self, act: Act) -> None:
        self._set(act, sa.func.coalesce(sa.cast(act.value, sa.String(20)), "none"))

    def _set_same(self, act: Act) -> None:
        record = self._record(act)
        self._flush()
        record.text = record.text

    def _delete(self, act: Act) -> None:
        record = self._record(act)
        assert act.family is not None
        if record in self.session.new:
            self.session.expunge(record)
        else:
            self.session.delete(record)
        del self.memory.records[act.family, act.place]

    def _expire(self, act: Act) -> None:
        self._flush()
        self.session.expire(self._record(act))

    def _rename(self, act: Act) -> None:
        """Give a word the other's key, if that is free."""
        records = self.memory.records
        if act.family is Word and (Word, 1 - act.place) not in records:
            self._flush()
            record = records[Word, 1 - act.place] = records.pop((Word, act.place))
            record.id = f"w{1 - act.place}"
            if act.attribute == "text":
                record.text = act.value
            self._flush()

    # sessions

    def _copies(self, note_versions: bool) -> dict[type[Any], dict[Key, Values]]:
        copies: dict[type[Any], dict[Key, Values]] = {}
        for family, query in COPIES.items():
            copies[family] = {}
            for key, version, *values in self.session.connection().execute(query):
                copies[family][key] = dict(zip(TRACKED[family], values, strict=True))
                if note_versions:
                    self.memory.seen[family][key, version] = copies[family][key]
        return copies

    def _flush(self) -> None:
        self.session.flush()
        self._copies(note_versions=True)

    def _tick(self) -> None:
        self.clock.advance()

    def _commit(self) -> None:
        self._flush()
        copies = self._copies(note_versions=False)
        self.session.commit()
        if self.clock.answers:
            assert len(self.clock.answers) == 1, "a transaction has one instant"
            self.commits.append((self.clock.answers[0], copies))
        self.committed = self.memory
        self._after_end()

    def _rollback(self) -> None:
        self.session.rollback()
        self._after_end()

    def _after_end(self) -> None:
        self.memory = self.committed.copy()
        self.savepoints.clear()
        self.clock.answers.clear()

    def _savepoint(self) -> None:
        self._flush()
        self.savepoints.append((self.session.begin_nested(), self.memory.copy()))

    def _release(self) -> None:
        if not self.savepoints:
            self._savepoint()
            return
        self._flush()
        self.savepoints.pop()[0].commit()

    def _undo_savepoint(self) -> None:
        if not self.savepoints:
            self._savepoint()
            return
        savepoint, self.memory = self.savepoints.pop()
        savepoint.rollback()

    def _expire_all(self) -> None:
        self._flush()
        self.session.expire_all()

    def _new_session(self) -> None:
        self._commit()
        self.session.close()
        self.session = self.factory()
        for (family, place), record in list(self.memory.records.items()):
            key = sa.inspect(record).identity
            self.memory.records[family, place] = self.session.get_one(family, key)
        self.committed = self.memory.copy()


# --- what must be so then


def chains(session: Session, family: type[Any]) -> dict[Key, list[HistoryRecord[Any]]]:
    history = history_class(family)
    found: dict[Key, list[HistoryRecord[Any]]] = defaultdict(list)
    for row in session.scalars(sa.select(history).order_by(history.version)):
        found[row.id].append(row)
    return found


def values_of(family: type[Any], state: object) -> Values:
    return {name: getattr(state, name, None) for name in TRACKED[family]}


def check_chain(chain: list[HistoryRecord[Any]], live_version: int | None) -> None:
    """Versions are contiguous, time never goes back, and the last state is the live row, if there is one."""
    assert [row.version for row in chain] == list(range(-1, len(chain) - 1))
    last = "delete"
    ended = None
    for row in chain:
        assert row.began == ended
        assert row.began is None or row.began <= row.changed
        assert (row.operation == "insert") == (last == "delete"), "one is born who was not there, and only then"
        last, ended = row.operation, row.changed
    assert (last == "delete") == (live_version is None)
    assert live_version in (None, len(chain) - 1)


def past_of(chain: list[HistoryRecord[Any]], live: Any, at: datetime) -> Any:
    """The state at an instant, by the rule that the documentation gives for SQL."""
    found = [
        row
        for row in chain
        if row.changed > at and (row.began is None or row.began <= at) and row.operation != "insert"
    ]
    if live is not None and not any(row.version == live.version - 1 and row.changed > at for row in chain):
        found.append(live)
    assert len(found) <= 1
    return found[0] if found else None


def check(player: Player) -> None:
    session = player.session
    session.expire_all()
    instants = {instant for instant, _ in player.commits}
    instants |= {instant - TINY for instant in instants} | {instant + TINY for instant in instants}
    for family in FAMILIES:
        found = chains(session, family)
        live = {record.id: record for record in session.scalars(sa.select(family))}
        for key in found.keys() | live.keys():
            check_chain(found[key], live[key].version if key in live else None)
        states = {(row.id, row.version): row for chain in found.values() for row in chain if row.operation != "insert"}
        states |= {(key, record.version): record for key, record in live.items()}
        assert {at: values_of(family, state) for at, state in states.items()} == player.memory.seen[family]
        for at in sorted(instants):
            then = [copies[family] for instant, copies in player.commits if instant <= at]
            expected = then[-1] if then else {}
            past = {key: past_of(found[key], live.get(key), at) for key in found.keys() | live.keys()}
            assert {key: values_of(family, state) for key, state in past.items() if state} == expected
            for key, record in live.items():
                # A dog is told of its life as a dog, though its key may have been another animal's.
                own = past[key] if isinstance(past[key], type(record) | history_class(type(record))) else None
                assert record.version_at(at) is own


@pytest.fixture
def tables(engine: sa.Engine) -> Callable[[], None]:
    Base.metadata.create_all(engine)

    def clear() -> None:
        with engine.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(table.delete())

    return clear


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(expire_on_commit=st.booleans(), acts=acts)
def test_every_instant_reads_as_the_tables_were(
    engine: sa.Engine, tables: Callable[[], None], expire_on_commit: bool, acts: list[Act]
) -> None:
    """Each flush is in history as the tables held it, and each instant reads as they were committed."""
    tables()
    player = Player(engine, expire_on_commit)
    try:
        player.play(acts)
        check(player)
        event(f"{len(player.commits)} commits")
    finally:
        player.session.close()
