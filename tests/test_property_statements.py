"""Statements and flushes of two sessions against an oracle: history says of each instant what the tables held then.

The oracle does in Python what the database is told to do: it knows which rows a statement matches, which of them
really change, their versions, and whose objects are stale. The tables must agree after each act, history in the end.
One session at a time has a transaction, so that SQLite can take part; the other keeps what it has loaded.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, SessionTransaction, mapped_column, sessionmaker
from sqlalchemy.orm.exc import ObjectDeletedError, StaleDataError

from chrononaut import HistoryRecord, StaleVersionError, Versioned, as_of, history_class, versioned_session
from tests.test_property import OracleClock, check_chain

Row = dict[str, Any]
Place = tuple[type[Any], int]
TINY = timedelta(microseconds=1)
#: Thousands were run with a higher number.
EXAMPLES = int(os.environ.get("CHRONONAUT_TEST_EXAMPLES", "100"))


class Base(DeclarativeBase):
    type_annotation_map = {str: sa.String(20)}


class Item(Versioned, Base):
    __tablename__ = "item"
    __chrononaut_hidden__ = ["secret"]
    __chrononaut_untracked__ = ["hits"]

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str | None]
    n: Mapped[int] = mapped_column(default=0)
    secret: Mapped[str | None]
    hits: Mapped[str | None]


class Animal(Versioned, Base):
    """The base of a hierarchy with a table for each class."""

    __tablename__ = "animal"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}
    __chrononaut_untracked__ = ["hits"]

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    text: Mapped[str | None]
    n: Mapped[int] = mapped_column(default=0)
    hits: Mapped[str | None]


class Dog(Animal):
    __tablename__ = "dog"
    __mapper_args__ = {"polymorphic_identity": "dog"}
    __chrononaut_hidden__ = ["chip"]

    id: Mapped[int] = mapped_column(sa.ForeignKey("animal.id", ondelete="CASCADE"), primary_key=True)
    trick: Mapped[str | None]
    chip: Mapped[str | None]


FAMILIES: tuple[type[Any], ...] = (Item, Animal)
HIDDEN = {"secret", "chip"}
NOT_COMPARED = {"hits", "version"}
COPIES = {
    Item: sa.text("SELECT id, version, text, n, secret, hits FROM item"),
    Animal: sa.text(
        "SELECT a.id, a.version, a.kind, a.text, a.n, a.hits, d.trick, d.chip "
        "FROM animal a LEFT JOIN dog d ON d.id = a.id"
    ),
}


def class_of(row: Row) -> type[Any]:
    return {None: Item, "animal": Animal, "dog": Dog}[row.get("kind")]


def attributes_of(cls: type[Any]) -> set[str]:
    return {"text", "n", "hits"} | ({"secret"} if cls is Item else {"trick", "chip"} if cls is Dog else set())


# --- what is done


@dataclass(frozen=True)
class Act:
    """What is done: to a record, by a statement to those that meet a condition, or to the session."""

    name: str
    model: type[Any]
    key: int
    attribute: str
    value: str | None
    number: int
    target: str
    sync: str | bool
    condition: str
    also: str

    @property
    def family(self) -> type[Any]:
        return Item if self.model is Item else Animal

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print it on one line, for Hypothesis."""
        how = f"{self.target} {self.sync} {self.condition} also {self.also}" if "statement" in self.name else ""
        printer.text(
            f"<{self.name} {self.model.__name__}[{self.key}] {self.attribute}={self.value}/{self.number} {how}>"
        )


RECORDS = ["set"] * 6 + ["remove", "add", "add", "refresh"]
STATEMENTS = ["update_statement"] * 6 + ["delete_statement"] * 2 + ["insert_statement"] * 3 + ["listed_statement"] * 2
STATEMENTS += ["upsert_statement"] * 2
SESSIONS = ["flush", "commit", "rollback", "tick", "tick", "savepoint", "undo_savepoint"] + ["switch"] * 4
ATTRIBUTES = ["text", "text", "n", "secret", "hits", "trick", "chip"]

act = st.builds(
    Act,
    name=st.sampled_from(RECORDS + STATEMENTS + SESSIONS),
    model=st.sampled_from([Item, Item, Animal, Dog]),
    key=st.integers(0, 2),
    attribute=st.sampled_from(ATTRIBUTES),
    value=st.sampled_from(["a", "b", None]),
    number=st.integers(0, 2),
    target=st.sampled_from(["model", "query", "table"]),
    sync=st.sampled_from(["auto", "evaluate", "fetch", False]),
    condition=st.sampled_from(["all", "key", "key", "text", "other", "number", "subquery"]),
    also=st.sampled_from(["nothing", "nothing", "raise", "fill", "hits"]),
)
# Lists of lists become long more often than lists do, and still shrink to next to nothing.
acts = st.lists(st.lists(act, max_size=12), max_size=8).map(lambda lists: [act for acts in lists for act in acts])


# --- the oracle


@dataclass
class World:
    """What the tables hold, and every state that they held."""

    live: dict[type[Any], dict[int, Row]] = field(default_factory=lambda: {family: {} for family in FAMILIES})
    #: The last version of those that were deleted.
    ended: dict[Place, int] = field(default_factory=dict)
    seen: dict[tuple[type[Any], int, int], Row] = field(default_factory=dict)
    #: The hidden columns that changed when a version ended.
    hidden: dict[tuple[type[Any], int, int], set[str]] = field(default_factory=dict)

    def write(self, place: Place, values: Row) -> None:
        family, key = place
        row = self.live[family][key]
        changed = {name for name in values.keys() - NOT_COMPARED if row[name] != values[name]}
        row |= values
        if changed:
            if changed & HIDDEN:
                self.hidden[family, key, row["version"]] = changed & HIDDEN
            row["version"] += 1
            self._see(place)

    def begin(self, place: Place, values: Row) -> None:
        version = self.ended[place] + 2 if place in self.ended else 0
        self.live[place[0]][place[1]] = values | {"version": version}
        self._see(place)

    def end(self, place: Place) -> None:
        self.ended[place] = self.live[place[0]].pop(place[1])["version"]

    def _see(self, place: Place) -> None:
        row = self.live[place[0]][place[1]]
        state = (*place, row["version"])
        self.seen[state] = visible(row)

    def row(self, place: Place) -> Row | None:
        return self.live[place[0]].get(place[1])


def visible(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in NOT_COMPARED | HIDDEN}


@dataclass
class Known:
    """What a session has loaded of a record."""

    version: int
    values: Row


DELETED: Row = {}


class Writer:
    """One of the sessions, and what it knows."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.known: dict[Place, Known] = {}
        #: What was done to objects since the last flush; ``DELETED`` itself if one is deleted.
        self.pending: dict[Place, Row] = {}
        self.added: dict[Place, Row] = {}
        self.savepoint: tuple[SessionTransaction, World, dict[Place, Known]] | None = None
        self.references: list[Any] = []

    def objects(self) -> dict[Place, Any]:
        each: Any
        found: dict[Place, Any] = {}
        for each in self.session.identity_map.values():
            state: Any = sa.inspect(each)
            found[Item if isinstance(each, Item) else Animal, state.identity[0]] = each
        return found

    def forget(self) -> None:
        self.pending.clear()
        self.added.clear()
        self.savepoint = None


class Player:
    """Acts through the sessions, and does the same to the oracle."""

    def __init__(self, engine: sa.Engine, expire_on_commit: bool) -> None:
        self.clock = OracleClock()
        self.factory = versioned_session(sessionmaker(engine, expire_on_commit=expire_on_commit), clock=self.clock)
        self.expires = expire_on_commit
        self.writers = [Writer(self.factory()), Writer(self.factory())]
        self.writer = self.writers[0]
        self.world = World()
        self.committed = World()
        self.commits: list[tuple[datetime, dict[type[Any], dict[int, Row]]]] = []
        self.stale = 0

    @property
    def session(self) -> Session:
        return self.writer.session

    def play(self, acts_: list[Act]) -> None:
        for each in acts_:
            getattr(self, f"_{each.name}")(each)
        self._commit()

    # what is pending

    def _changes(self, place: Place) -> tuple[Row, bool]:
        """Return what a flush writes of an object, and whether it changes what is versioned."""
        values, known, row = self.writer.pending[place], self.writer.known.get(place), self.world.row(place)
        loaded = {} if known is None else known.values
        written = {name: value for name, value in values.items() if name not in loaded or loaded[name] != value}
        compared = (row or {}) | loaded
        noticed = {name for name in written.keys() - NOT_COMPARED if row is None or compared[name] != written[name]}
        return written, bool(noticed)

    def _refusal(self) -> tuple[type[Exception], ...]:
        """Return the error that a flush must raise, because others have changed what it is about to write."""
        found: tuple[type[Exception], ...] = ()
        for place, values in self.writer.pending.items():
            known, row = self.writer.known.get(place), self.world.row(place)
            is_stale = row is None or (known is not None and known.version != row["version"])
            written, is_noticed = ({}, True) if values is DELETED else self._changes(place)
            if is_stale and is_noticed and known is not None:
                return (StaleVersionError,)
            if row is None and (written or is_noticed):
                found = (StaleDataError, ObjectDeletedError)  # SQLAlchemy's own, where nothing was loaded
        return found

    def _flushing(self, run: Callable[[], Any]) -> Any:
        """Do something that flushes; None if that is refused, as it must be."""
        errors = self._refusal()
        if errors:
            self.stale += 1
            with pytest.raises(errors):
                run()
            self._rollback()
            return None
        result = run()
        for place, values in self.writer.pending.items():
            if values is DELETED:
                self.world.end(place)
                continue
            written, _ = self._changes(place)
            known, row = self.writer.known.get(place), self.world.row(place)
            if row is None:
                continue
            was_current = known is not None and known.version == row["version"]
            self.world.write(place, written)
            if known is None or was_current:
                self.writer.known[place] = Known(row["version"], {} if known is None else known.values)
        for place, values in self.writer.added.items():
            self.world.begin(place, values)
            self.writer.known[place] = Known(self.world.live[place[0]][place[1]]["version"], {})
        self.writer.pending.clear()
        self.writer.added.clear()
        return () if result is None else result

    def _compare(self) -> None:
        """The tables hold what the oracle does, and objects that are not stale do so, too."""
        for family, query in COPIES.items():
            rows = {row.id: dict(row._mapping) for row in self.session.connection().execute(query)}
            for row in rows.values():
                del row["id"]
                if family is Animal and row["kind"] == "animal":
                    assert row.pop("trick") is row.pop("chip") is None
            assert rows == self.world.live[family]
        writer, objects = self.writer, self.writer.objects()
        for place in writer.known.keys() - objects.keys():
            del writer.known[place]
        for place, each in objects.items():
            held = vars(each)
            if "version" not in held:
                writer.known.pop(place, None)
                continue
            present: Any = self.world.row(place)
            known = writer.known.get(place)
            if known is None:
                known = writer.known[place] = Known(present["version"], {})
            assert held["version"] == known.version
            known.values = {name: held[name] for name in attributes_of(type(each)) if name in held}
            if present is not None and present["version"] == known.version:
                tracked = {name: value for name, value in known.values.items() if name != "hits"}
                assert tracked.items() <= present.items()

    # records

    def _object(self, place: Place) -> Any:
        writer = self.writer
        found, row = writer.objects().get(place), self.world.row(place)
        if found is not None:
            if row is None or "version" in vars(found) or type(found) is class_of(row):
                return found
            self.session.expunge(found)  # SQLAlchemy does not turn an object into one of another class
        with self.session.no_autoflush:
            found = self.session.get(place[0], place[1])
        assert (found is None) == (row is None)
        if found is not None and row is not None:
            writer.references.append(found)
            names = attributes_of(type(found)) & vars(found).keys()
            writer.known[place] = Known(row["version"], {name: vars(found)[name] for name in names})
        return found

    def _set(self, act: Act) -> None:
        place = act.family, act.key
        if place in self.writer.added:
            self._flush()
        if self.writer.pending.get(place) is DELETED:
            return
        found = self._object(place)
        if found is None:
            self._add(act)
            return
        name = act.attribute if act.attribute in attributes_of(type(found)) else "text"
        value = act.number if name == "n" else act.value
        setattr(found, name, value)
        self.writer.pending.setdefault(place, {})[name] = value

    def _remove(self, act: Act) -> None:
        place = act.family, act.key
        if place in self.writer.added:
            self._flush()
        found = None if self.writer.pending.get(place) is DELETED else self._object(place)
        if found is not None:
            self._flush()
            found = self._object(place)
        if found is not None:
            with self.session.no_autoflush:
                known = "version" in vars(found)
                if not known and self.world.row(place) is None:
                    return
                self.session.delete(found)
                if not known and "version" in vars(found):
                    row = self.world.row(place)
                    assert row is not None
                    self.writer.known[place] = Known(row["version"], {})
            self.writer.pending[place] = DELETED

    def _new_row(self, act: Act, key: int) -> Row:
        row: Row = {"text": act.value, "n": act.number, "hits": None}
        if act.model is Item:
            return row | {"secret": act.value}
        if act.model is Animal:
            return row | {"kind": "animal"}
        return row | {"kind": "dog", "trick": act.value, "chip": f"c{key}"}

    def _add(self, act: Act) -> None:
        place = act.family, act.key
        self._flush()
        if self.world.row(place) is not None:
            return
        held = self.writer.objects().get(place)
        if held is not None:
            self.session.expunge(held)
            self.writer.known.pop(place, None)
        row = self._new_row(act, act.key)
        record = act.model(id=act.key, **{name: value for name, value in row.items() if name != "kind"})
        self.session.add(record)
        self.writer.references.append(record)
        self.writer.added[place] = row

    def _refresh(self, act: Act) -> None:
        if self.writer.savepoint is None:
            self._flush()
            self.session.expire_all()
            self.writer.known.clear()

    # statements

    def _update_statement(self, act: Act) -> None:
        if act.sync is not False and self._is_partly_expired(act):
            # SQLAlchemy takes such an object for one that matches, and gives it the new values, even if it does not.
            act = replace(act, sync="fetch")
        values, new = _assignments(act)
        target = act.model.__table__ if act.target == "table" else act.model
        statement = sa.update(target).values(values).where(_where(act))
        is_synchronized = act.target != "table" and act.sync is not False
        if act.target == "query":

            def run() -> Any:
                query: Any = self.session.query(act.model).filter(_where(act))
                return query.update(values, synchronize_session=_sync(act))
        else:

            def run() -> Any:
                options = {} if act.target == "table" else {"synchronize_session": _sync(act)}
                result: Any = self.session.execute(statement, execution_options=options)
                return result.rowcount

        count = self._flushing(run)
        if count is None or count == ():
            return
        matching = self._matching(act)
        assert count == len(matching)
        for place in matching:
            self._write(place, new, is_synchronized)
        self._compare()

    def _is_partly_expired(self, act: Act) -> bool:
        """Tell whether the condition cannot be evaluated for some object."""
        found = (each for (family, _), each in self.writer.objects().items() if family is act.family)
        return any(not attributes_of(type(each)) - HIDDEN - {"hits"} <= vars(each).keys() for each in found)

    def _matching(self, act: Act) -> list[Place]:
        """Return whom a statement is about, by the oracle."""
        rows = self.world.live[act.family]
        wanted = (dict if act.model is not Dog else _only_dogs)(rows)
        return [(act.family, key) for key, row in wanted.items() if _matches(act, key, row)]

    def _write(self, place: Place, new: Callable[[Row], Row], is_synchronized: bool) -> None:
        row, known = self.world.row(place), self.writer.known.get(place)
        assert row is not None
        was_current = known is not None and known.version == row["version"]
        self.world.write(place, new(row))
        if known is not None and was_current and is_synchronized:
            known.version = row["version"]

    def _delete_statement(self, act: Act) -> None:
        act = replace(act, model=act.family)
        if act.target == "query":

            def run() -> Any:
                return self.session.query(act.model).filter(_where(act)).delete(synchronize_session=_sync(act))
        else:
            target = act.model.__table__ if act.target == "table" else act.model
            options = {} if act.target == "table" else {"synchronize_session": _sync(act)}

            def run() -> Any:
                result: Any = self.session.execute(sa.delete(target).where(_where(act)), execution_options=options)
                return result.rowcount

        count = self._flushing(run)
        if count is None or count == ():
            return
        matching = self._matching(act)
        assert count == len(matching)
        for place in matching:
            self.world.end(place)
        self._compare()

    def _insert_statement(self, act: Act) -> None:
        self._flush()
        keys = [key for key in range(3) if key not in self.world.live[act.family]]
        keys = keys if act.condition == "all" else keys[:1]
        rows = [{"id": key} | self._new_row(act, key) for key in keys]
        if not rows:
            return
        for row in rows:
            held = self.writer.objects().get((act.family, row["id"]))
            if held is not None and act.sync is False:
                self.session.expunge(held)
        if act.model is Dog or act.target == "model":
            given = [{name: value for name, value in row.items() if name != "kind"} for row in rows]
            self.session.execute(sa.insert(act.model), given)
        elif act.target == "query":
            statement = sa.insert(act.model.__table__).values(rows if len(rows) > 1 else rows[0])
            self.session.execute(statement)
        else:
            self.session.execute(sa.insert(act.model.__table__), rows)
        for row in rows:
            self.world.begin((act.family, row.pop("id")), row)
        self._compare()

    def _upsert_statement(self, act: Act) -> None:
        """Insert records, or update those that are there; the objects in the session stay as they are."""
        self._flush()
        act = replace(act, model=act.family)
        rows = {key: self._new_row(act, key) for key in ([0, 1, 2] if act.condition == "all" else [act.key])}
        for key in rows.keys() - self.world.live[act.family].keys():
            held = self.writer.objects().get((act.family, key))
            if held is not None and act.sync is False:
                self.session.expunge(held)
        target: Any = act.model if act.target == "model" else act.model.__table__
        statement, new = _upsert(self.session.get_bind().dialect.name, target, act)
        given = [{"id": key} | row for key, row in rows.items()]
        if act.target == "table":
            self.session.execute(statement, given)
        else:
            self.session.execute(statement.values(given))
        for key, row in rows.items():
            place, present = (act.family, key), self.world.row((act.family, key))
            if present is None:
                self.world.begin(place, row)
            else:
                self.world.write(place, new(present))
        self._compare()

    def _listed_statement(self, act: Act) -> None:
        self._flush()
        rows = self.world.live[act.family]
        keys = [key for key, row in rows.items() if act.model is not Dog or row["kind"] == "dog"]
        name = act.attribute if act.attribute in attributes_of(act.model) else "text"
        value = act.number if name == "n" else act.value
        if keys:
            self.session.execute(sa.update(act.model), [{"id": key, name: value} for key in sorted(keys)])
        for key in keys:
            self._write((act.family, key), lambda row: {name: value}, is_synchronized=True)
        self._compare()

    # sessions

    def _flush(self, act: Act | None = None) -> None:
        if self._flushing(self.session.flush) is not None:
            self._compare()

    def _commit(self, act: Act | None = None) -> None:
        self._flush()
        self.session.commit()
        if self.clock.answers:
            assert len(self.clock.answers) == 1, "a transaction has one instant"
            live = {
                family: {key: visible(row) for key, row in rows.items()} for family, rows in self.world.live.items()
            }
            self.commits.append((self.clock.answers[0], live))
        self.committed = copy.deepcopy(self.world)
        self.clock.answers.clear()
        self.writer.forget()
        if self.expires:
            self.writer.known.clear()

    def _rollback(self, act: Act | None = None) -> None:
        began = self.session.in_transaction()
        self.session.rollback()
        self.world = copy.deepcopy(self.committed)
        self.clock.answers.clear()
        self.writer.forget()
        if began:
            assert not any("version" in vars(each) for each in self.writer.objects().values())
            self.writer.known.clear()

    def _tick(self, act: Act) -> None:
        self.clock.advance()

    def _savepoint(self, act: Act) -> None:
        self._flush()
        writer = self.writer
        if writer.savepoint is None:
            began = self.session.begin_nested()
            writer.savepoint = began, copy.deepcopy(self.world), copy.deepcopy(writer.known)
        else:
            writer.savepoint[0].commit()
            writer.savepoint = None

    def _undo_savepoint(self, act: Act) -> None:
        writer = self.writer
        if writer.savepoint is None:
            return
        savepoint, self.world, known = writer.savepoint
        savepoint.rollback()
        writer.forget()
        writer.known = known
        for place, each in writer.objects().items():
            if "version" in vars(each) and place not in known:
                self.session.expire(each)  # loaded inside: SQLAlchemy leaves it as it was there
        self._compare()

    def _switch(self, act: Act) -> None:
        """The other session goes on; what it has loaded may be stale by now."""
        self._commit()
        self.writer = self.writers[1 - self.writers.index(self.writer)]


def _only_dogs(rows: dict[int, Row]) -> dict[int, Row]:
    return {key: row for key, row in rows.items() if row["kind"] == "dog"}


def _text(act: Act) -> str:
    return "trick" if act.model is Dog else "text"


def _sync(act: Act) -> Any:
    return "auto" if act.sync == "evaluate" and act.condition == "subquery" else act.sync


def _where(act: Act) -> Any:
    columns = act.model.__table__.c
    source: Any = columns if act.target == "table" else act.model
    text = getattr(source, _text(act))
    if act.condition == "all":
        return sa.true()
    if act.condition == "key" or (act.model is Dog and act.condition == "number"):
        return source.id == act.key
    if act.condition == "text":
        return text == act.value
    if act.condition == "other":
        return text != act.value
    if act.condition == "number":
        return source.n >= act.number
    other = act.model.__table__.alias()
    return source.id.in_(sa.select(other.c.id).where(other.c[_text(act)] == "a"))


def _matches(act: Act, key: int, row: Row) -> bool:
    text = row[_text(act)]
    if act.condition == "all":
        return True
    if act.condition == "key" or (act.model is Dog and act.condition == "number"):
        return key == act.key
    if act.condition == "text":
        return bool(text == act.value)
    if act.condition == "other":
        return text is not None and text != act.value
    if act.condition == "number":
        return bool(row["n"] >= act.number)
    return bool(text == "a")


def _assignments(act: Act) -> tuple[dict[str, Any], Callable[[Row], Row]]:
    """Return what an UPDATE sets, and the same in Python."""
    own = {"trick", "chip"} if act.model is Dog else attributes_of(act.model)
    text, columns = _text(act), act.model.__table__.c
    name = act.attribute if act.attribute in own else text
    value = act.number if name == "n" else act.value
    values: dict[str, Any] = {name: value}
    if act.also == "raise" and name != "n" and "n" in own:
        values["n"] = columns.n + 1
    elif act.also == "fill" and name != text:
        values[text] = sa.func.coalesce(columns[text], "none")
    elif act.also == "hits" and "hits" in own:
        values["hits"] = "h"

    def new(row: Row) -> Row:
        result: Row = {key: each for key, each in values.items() if not isinstance(each, sa.ClauseElement)}
        if "n" in values and "n" not in result:
            result["n"] = row["n"] + 1
        if text in values and text not in result:
            result[text] = "none" if row[text] is None else row[text]
        return result

    return values, new


def _upsert(dialect: str, target: Any, act: Act) -> tuple[Any, Callable[[Row], Row]]:
    """Return an upsert of a family, and what it makes of a row that is there."""
    name = act.attribute if act.attribute in attributes_of(act.family) else "text"
    values: Row = {name: act.number if name == "n" else None if name == "hits" else act.value}
    statement: Any = {"sqlite": sqlite, "postgresql": postgresql}.get(dialect, mysql).insert(target)
    inserted = statement.excluded if dialect in ("sqlite", "postgresql") else statement.inserted
    sets: dict[str, Any] = {name: inserted[name]}
    if act.also == "raise" and name != "n":
        sets["n"] = act.family.__table__.c.n + sa.literal_column("1")
    if dialect in ("sqlite", "postgresql"):
        statement = statement.on_conflict_do_update(index_elements=["id"], set_=sets)
    else:
        statement = statement.on_duplicate_key_update(sets)
    return statement, lambda row: values | ({"n": row["n"] + 1} if "n" in sets and name != "n" else {})


# --- what must be so in the end


def check(player: Player) -> None:
    for writer in player.writers:
        writer.session.close()
    with player.factory() as session:
        for family in FAMILIES:
            check_history(player, session, family)
        instants = {instant for instant, _ in player.commits}
        for at in sorted(instants | {instant - TINY for instant in instants}):
            then = [copies for instant, copies in player.commits if instant <= at]
            expected = then[-1] if then else {family: {} for family in FAMILIES}
            check_instant(session, at, expected)


def check_history(player: Player, session: Session, family: type[Any]) -> None:
    history = history_class(family)
    chains: dict[int, list[HistoryRecord[Any]]] = defaultdict(list)
    for row in session.scalars(sa.select(history).order_by(history.version)):
        chains[row.id].append(row)
    live = {record.id: record for record in session.scalars(sa.select(family))}
    found: dict[tuple[type[Any], int, int], Row] = {}
    for key in chains.keys() | live.keys():
        check_chain(chains[key], live[key].version if key in live else None)
        states = [*(row for row in chains[key] if row.operation != "insert"), *([live[key]] if key in live else ())]
        found |= {(family, key, state.version): seen_of(family, state) for state in states}
        for row in chains[key]:
            hidden = player.world.hidden.get((family, key, row.version), set())
            if row.operation == "update":
                assert set(row.change_info.get("hidden_cols_changed", ())) == hidden
    assert found == {place: row for place, row in player.world.seen.items() if place[0] is family}


def check_instant(session: Session, at: datetime, expected: dict[type[Any], dict[int, Row]]) -> None:
    """The past reads as the tables were, by either way."""
    with as_of(session, at) as past:
        for family in FAMILIES:
            found = {record.id: seen_of(family, record) for record in past.scalars(sa.select(family))}
            assert found == expected[family]
    for family in FAMILIES:
        for record in session.scalars(sa.select(family)):
            then = expected[family].get(record.id)
            state = record.version_at(at)
            if then is not None and class_of(then) is type(record):
                assert state is not None
                assert seen_of(family, state) == then
            elif then is None:
                assert state is None


def seen_of(family: type[Any], state: Any) -> Row:
    names = ["text", "n"]
    if family is Animal:
        names += ["kind", "trick"] if state.kind == "dog" else ["kind"]
    return {name: getattr(state, name) for name in names}


@pytest.fixture
def tables(engine: sa.Engine) -> Callable[[], None]:
    Base.metadata.create_all(engine)

    def clear() -> None:
        with engine.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(table.delete())

    return clear


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
    max_examples=EXAMPLES,
)
@given(expire_on_commit=st.sampled_from([False, False, True]), acts=acts)
def test_two_sessions_leave_the_history_of_what_they_did(
    engine: sa.Engine, tables: Callable[[], None], expire_on_commit: bool, acts: list[Act]
) -> None:
    """Each state is in history once, each instant reads as it was, and just what is stale is refused."""
    tables()
    player = Player(engine, expire_on_commit)
    try:
        player.play(acts)
        check(player)
        event("stale" if player.stale else "not stale")
        event(f"{len(player.commits)} commits")
    finally:
        for writer in player.writers:
            writer.session.close()
