"""INSERT statements that update what is there already: the rows of the plain statement, and their history."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import (
    Lockable,
    RecordChanges,
    RecordLockedError,
    StaleVersionError,
    UntrackedStatementError,
    Versioned,
    as_of,
    extra_change_info,
    history_class,
    versioned_session,
)
from chrononaut.unsafe import suppress_versioning
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements
from tests.test_concurrency import run

Model = Any
Sets = Callable[[Any, Any], dict[str, Any]]
Upsert = Callable[..., Any]
Factory = sessionmaker[Session]

DATA = ("id", "email", "name", "n", "password", "hits")


class Columns:
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str | None] = mapped_column(sa.String(50), unique=True)
    name: Mapped[str | None]
    n: Mapped[int] = mapped_column("number", default=0)
    password: Mapped[str | None]
    hits: Mapped[int | None]


@pytest.fixture
def user(base: type[DeclarativeBase], engine: sa.Engine) -> Model:
    """A versioned model with a hidden and an untracked column; ``user.plain`` is its twin without versions."""

    class User(Versioned, Columns, base):
        __tablename__ = "appuser"
        __chrononaut_hidden__ = ["password"]
        __chrononaut_untracked__ = ["hits"]

    class Plain(Columns, base):
        __tablename__ = "plain"

    User.plain = Plain
    base.metadata.create_all(engine)
    return User


@pytest.fixture
def upsert(engine: sa.Engine) -> Upsert:
    """``upsert(target, sets, by=["id"])``: the statement of the backend; ``sets(new, old)`` is what it sets."""

    def make(target: Any, sets: Sets, by: list[str] | None = None, **options: Any) -> Any:
        old = getattr(target, "__table__", target).c
        if engine.dialect.name in ("mysql", "mariadb"):
            statement = mysql.insert(target)
            return statement.on_duplicate_key_update(sets(statement.inserted, old))
        dialect: Any = postgresql if engine.dialect.name == "postgresql" else sqlite
        insert = dialect.insert(target)
        return insert.on_conflict_do_update(index_elements=by or ["id"], set_=sets(insert.excluded, old), **options)

    return make


def names(new: Any, old: Any) -> dict[str, Any]:
    """What most of the tests set."""
    return {"name": new.name}


def data(session: Session, model: Model) -> list[tuple[Any, ...]]:
    """All rows, without what is ours."""
    table = model.__table__
    columns = [column for column in table.c if column.key != "version"]
    return [tuple(row) for row in session.execute(sa.select(*columns).order_by(table.c.id))]


def versions(session: Session, model: Model) -> dict[int, int]:
    return {row.id: row.version for row in session.execute(sa.select(model.id, model.version))}


def past(session: Session, model: Model) -> list[tuple[Any, ...]]:
    """What history says: key, version, name, operation."""
    history = history_class(model)
    rows = session.scalars(sa.select(history).order_by(history.id, history.version))
    return [(row.id, row.version, row.name, row.operation) for row in rows]


@pytest.fixture
def people(user: Model, session: Session) -> list[Model]:
    """Two users, committed and loaded."""
    session.add_all([user(email=f"{name}@x", name=name) for name in "ab"])
    session.commit()
    return list(session.scalars(sa.select(user).order_by(user.id)))


BORN = [(1, -1, None, "insert"), (2, -1, None, "insert")]


# --- every form


def _as_values(session: Session, statement: Any, rows: list[dict[str, Any]]) -> Any:
    return [session.execute(statement.values(**row)) for row in rows]


FORMS: dict[str, Callable[[Session, Any, list[dict[str, Any]]], Any]] = {
    "values": _as_values,
    "parameters": lambda s, st, rows: [s.execute(st, row) for row in rows],
    "list": lambda s, st, rows: [s.execute(st, rows)],
    "list of values": lambda s, st, rows: [s.execute(st.values(rows))],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", ["model", "table"])
def test_each_form_updates_and_inserts(
    session: Session, user: Model, people: list[Model], upsert: Upsert, form: str, of: str
) -> None:
    """The rows are those of the plain statement; what was updated has history, what is new its birth."""
    session.execute(
        sa.insert(user.plain), [{"id": 1, "email": "a@x", "name": "a"}, {"id": 2, "email": "b@x", "name": "b"}]
    )
    rows = [{"id": 3, "name": "new"}, {"id": 1, "name": "changed"}, {"id": 2, "name": "b"}]
    counts = []
    for model in (user.plain, user):
        target = model if of == "model" else model.__table__
        results = FORMS[form](session, upsert(target, names), rows)
        counts.append([getattr(result, "rowcount", None) for result in results])
    if session.get_bind().dialect.name != "mariadb":  # which counts 2 for a row that changes
        assert counts[0] == counts[1]
    assert data(session, user) == data(session, user.plain)
    assert versions(session, user) == {1: 1, 2: 0, 3: 0}
    assert past(session, user) == [BORN[0], (1, 0, "a", "update"), BORN[1], (3, -1, None, "insert")]
    session.commit()
    people[0].name = "later"
    session.commit()
    assert past(session, user)[2] == (1, 1, "changed", "update")


def test_upsert_states_who_and_why(session: Session, user: Model, people: list[Model], upsert: Upsert) -> None:
    """The change info is on what it ends, and on births."""
    with extra_change_info(by="upsert"):
        session.execute(upsert(user, names), [{"id": 1, "name": "x"}, {"id": 5, "name": "y"}])
    history = history_class(user)
    rows = session.scalars(sa.select(history).order_by(history.id, history.version)).all()
    by = {(row.id, row.version): row.change_info.get("extra") for row in rows}
    assert by == {(1, -1): None, (1, 0): {"by": "upsert"}, (2, -1): None, (5, -1): {"by": "upsert"}}
    began = {(row.id, row.version): (row.began, row.changed) for row in rows}
    assert began[1, 0][0] == began[1, -1][1]


def test_rows_that_keep_their_values_make_no_version(
    session: Session, user: Model, people: list[Model], upsert: Upsert
) -> None:
    """Not by the same values, nor by untracked ones."""
    session.execute(upsert(user, names), [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}])
    session.execute(upsert(user, lambda new, old: {"hits": new.hits}), [{"id": 1, "hits": 7}, {"id": 2, "hits": 8}])
    session.execute(upsert(user, lambda new, old: {"name": "a", "hits": old.hits + 1}).values(id=1))
    assert [row[-1] for row in data(session, user)] == [8, 8]
    assert versions(session, user) == {1: 0, 2: 0}
    assert past(session, user) == BORN


def test_expressions_count_as_changes(session: Session, user: Model, people: list[Model], upsert: Upsert) -> None:
    """A counter makes a version each time, and starts with what is inserted."""
    for _ in range(2):
        session.execute(upsert(user, lambda new, old: {"number": old.number + 1}).values(id=1, n=5))
        session.execute(
            upsert(user.__table__, lambda new, old: {"number": old.number + new.number}), {"id": 3, "number": 5}
        )
    assert [row[3] for row in data(session, user)] == [2, 0, 10]
    assert versions(session, user) == {1: 2, 2: 0, 3: 1}


def test_hidden_columns_are_named(session: Session, user: Model, people: list[Model], upsert: Upsert) -> None:
    """Only in the records whose hidden value changes."""
    people[0].password = "same"
    session.commit()
    statement = upsert(user, lambda new, old: {"name": new.name, "password": new.password})
    session.execute(
        statement, [{"id": 1, "name": "x", "password": "same"}, {"id": 2, "name": "y", "password": "other"}]
    )
    history = history_class(user)
    rows = session.scalars(sa.select(history).where(history.name.is_not(None)).order_by(history.changed, history.id))
    hidden = [(row.id, row.change_info.get("hidden_cols_changed")) for row in rows]
    assert hidden == [(1, ["password"]), (1, None), (2, ["password"])]


def test_defaults_take_the_place_of_what_is_not_given(
    base: type[DeclarativeBase], engine: sa.Engine, session: Session, upsert: Upsert
) -> None:
    """A row that holds NULL changes by a default, though nothing is given, or None in a model's list."""

    class Level(Versioned, base):
        __tablename__ = "level"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[int | None] = mapped_column(default=7)

    base.metadata.create_all(engine)
    session.execute(sa.insert(Level.__table__), [{"id": number, "name": None} for number in (1, 2, 3)])
    statement = upsert(Level, names)
    session.execute(statement.values(id=1))
    session.execute(statement, [{"id": 2, "name": None}])
    session.execute(statement.values(id=3, name=None))
    assert data(session, Level) == [(1, 7), (2, 7), (3, None)]
    assert versions(session, Level) == {1: 1, 2: 1, 3: 0}


def test_rows_that_keep_their_values_are_not_touched(
    base: type[DeclarativeBase], engine: sa.Engine, session: Session, upsert: Upsert
) -> None:
    """A column that an UPDATE would set keeps its value in an upsert, as SQLAlchemy has it."""

    class Note(Versioned, base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]
        touched: Mapped[int] = mapped_column(default=1, onupdate=2)

    base.metadata.create_all(engine)
    session.execute(sa.insert(Note), [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}])
    session.execute(upsert(Note, names), [{"id": 1, "name": "a"}, {"id": 2, "name": "x"}])
    assert data(session, Note) == [(1, "a", 1), (2, "x", 1)]
    assert versions(session, Note) == {1: 0, 2: 1}


@pytest.mark.backends("mariadb")  # the only one that assigns one after the other
def test_ordered_assignments(session: Session, user: Model, people: list[Model]) -> None:
    """An upsert whose assignments have an order keeps it."""
    table = user.__table__
    statement = mysql.insert(user).values(id=1, name="x")
    ordered = [("hits", table.c.number), ("number", table.c.number + 1), ("name", statement.inserted.name)]
    session.execute(statement.on_duplicate_key_update(ordered))
    assert data(session, user)[0] == (1, "a@x", "x", 1, None, 0)
    assert past(session, user)[1] == (1, 0, "a", "update")


def test_key_that_was_used_before_is_numbered_on(
    session: Session, user: Model, people: list[Model], upsert: Upsert
) -> None:
    """A deleted record that is upserted begins a new life, and the next upsert changes that."""
    session.execute(sa.delete(user).where(user.id == 1))
    session.expunge_all()
    statement = upsert(user, names)
    if session.get_bind().dialect.insert_returning:
        returned = session.scalars(statement.returning(user), [{"id": 1, "name": "again"}]).all()
        assert [one.version for one in returned] == [2]
        returned[0].name = "flushed"
        session.flush()
    else:
        session.execute(statement, [{"id": 1, "name": "flushed"}])
    session.execute(statement, [{"id": 1, "name": "more"}])
    assert [row[1:] for row in past(session, user)][:4] == [
        (-1, None, "insert"),
        (0, "a", "delete"),
        (1, None, "insert"),
        (2, "again", "update"),
    ]
    assert versions(session, user) == {1: 4, 2: 0}


@pytest.mark.parametrize("form", ["values", "list"])
def test_conflict_by_a_unique_column(
    session: Session, user: Model, people: list[Model], upsert: Upsert, form: str
) -> None:
    """The key of the row that is there, and that of a new one, are the database's."""
    statement = upsert(user, lambda new, old: {"name": new.name, "email": new.email}, by=["email"])
    rows = [{"email": "b@x", "name": "x"}, {"email": "new@x", "name": "y"}]
    FORMS[form](session, statement, rows)
    assert [row[1:3] for row in data(session, user)] == [("a@x", "a"), ("b@x", "x"), ("new@x", "y")]
    new = data(session, user)[2][0]
    assert past(session, user) == [*BORN, (2, 0, "b", "update"), (new, -1, None, "insert")]


@pytest.mark.backends("postgresql")  # the only one that knows names
def test_conflict_by_a_named_constraint(base: type[DeclarativeBase], engine: sa.Engine, session: Session) -> None:
    """A unique constraint or index by its name, the primary key's by PostgreSQL's own, or the thing itself."""

    class Place(Versioned, base):
        __tablename__ = "place"
        __table_args__ = (sa.UniqueConstraint("town", "street", name="address"),)
        id: Mapped[int] = mapped_column(primary_key=True)
        town: Mapped[str]
        street: Mapped[str]
        name: Mapped[str]

    base.metadata.create_all(engine)
    session.add(Place(id=1, town="t", street="s", name="a"))
    session.commit()
    table: Any = Place.__table__
    for number, constraint in enumerate(["address", "place_pkey", table.primary_key]):
        statement = postgresql.insert(Place).values(id=1, town="t", street="s", name=str(number))
        session.execute(statement.on_conflict_do_update(constraint=constraint, set_={"name": statement.excluded.name}))
    assert past(session, Place)[1:] == [(1, 0, "a", "update"), (1, 1, "0", "update"), (1, 2, "1", "update")]
    with pytest.raises(UntrackedStatementError, match="index_elements"):
        session.execute(postgresql.insert(Place).on_conflict_do_update(constraint="other", set_={"name": "x"}))


@pytest.mark.parametrize("of", ["model", "table"])
def test_returning(session: Session, user: Model, people: list[Model], upsert: Upsert, of: str) -> None:
    """The rows are those of the plain statement, with the versions that they now have."""
    session.execute(
        sa.insert(user.plain), [{"id": 1, "email": "a@x", "name": "a"}, {"id": 2, "email": "b@x", "name": "b"}]
    )
    if not session.get_bind().dialect.insert_returning:
        pytest.skip("it cannot")
    rows = [{"id": 3, "name": "new"}, {"id": 1, "name": "changed"}, {"id": 2, "name": "b"}]
    found = []
    for model in (user.plain, user):
        target = model if of == "model" else model.__table__
        source = model if of == "model" else model.__table__.c
        extra = [source.version] if model is user else []
        result = session.execute(upsert(target, names).returning(source.id, source.email, *extra), rows)
        found.append([row._asdict() for row in result])
    versions = [row.pop("version") for row in found[1]]
    assert found[0] == found[1]
    assert versions == [0, 1, 0]
    assert past(session, user) == [BORN[0], (1, 0, "a", "update"), BORN[1], (3, -1, None, "insert")]


def test_objects_in_the_session_stay_stale_unless_populated(
    session: Session, user: Model, people: list[Model], upsert: Upsert
) -> None:
    """An object that has not seen what an upsert wrote cannot overwrite it; one that was returned anew can."""
    session.execute(upsert(user, names), [{"id": 1, "name": "x"}, {"id": 2, "name": "b"}])
    assert [(one.name, one.version) for one in people] == [("a", 0), ("b", 0)]
    people[1].name = "fine"
    session.flush()
    people[0].n = 1
    with pytest.raises(StaleVersionError):
        session.flush()
    session.rollback()
    if session.get_bind().dialect.insert_returning:
        [one, two] = session.scalars(sa.select(user).order_by(user.id))
        statement = upsert(user, names).returning(user)
        session.scalars(statement, [{"id": 1, "name": "x"}]).all()
        assert (one.name, one.version) == ("a", 0)
        options = {"populate_existing": True}
        rows = [{"id": 1, "name": "y"}, {"id": 2, "name": "z"}]
        assert set(session.scalars(statement, rows, execution_options=options)) == {one, two}
        assert [(each.name, each.version) for each in (one, two)] == [("y", 2), ("z", 1)]
        one.name = "flushed"
        session.commit()
        assert past(session, user)[1:4] == [(1, 0, "a", "update"), (1, 1, "x", "update"), (1, 2, "y", "update")]


def test_pending_changes_are_flushed_first(session: Session, user: Model, people: list[Model], upsert: Upsert) -> None:
    """What the session has not written yet is part of what the upsert ends."""
    people[0].name = "flushed"
    session.add(user(id=9, name="pending"))
    session.execute(upsert(user, names), [{"id": 1, "name": "x"}, {"id": 9, "name": "y"}])
    assert past(session, user) == [
        BORN[0],
        (1, 0, "a", "update"),
        (1, 1, "flushed", "update"),
        BORN[1],
        (9, -1, None, "insert"),
        (9, 0, "pending", "update"),
    ]


def test_savepoint_takes_an_upsert_back(session: Session, user: Model, people: list[Model], upsert: Upsert) -> None:
    """With its history; and the statement can be executed again."""
    statement = upsert(user, names)
    savepoint = session.begin_nested()
    session.execute(statement, [{"id": 1, "name": "x"}, {"id": 3, "name": "y"}])
    savepoint.rollback()
    assert past(session, user) == BORN
    assert [one.version for one in people] == [0, 0]
    session.execute(statement, [{"id": 1, "name": "z"}, {"id": 3, "name": "y"}])
    session.commit()
    assert past(session, user) == [BORN[0], (1, 0, "a", "update"), BORN[1], (3, -1, None, "insert")]


def test_statement_is_compiled_once_for_all_values(
    session: Session, user: Model, people: list[Model], upsert: Upsert
) -> None:
    """The same statement with other values, or built again with others, sets those."""
    statement = upsert(user, names)
    for number in range(3):
        session.execute(statement, [{"id": 1, "name": f"list {number}"}])
        constant = f"set {number}"
        session.execute(upsert(user, lambda new, old, name=constant: {"name": name}).values(id=1, name="unused"))
        assert data(session, user)[0][2] == constant
    assert [row[2] for row in past(session, user)][1:7] == ["a", "list 0", "set 0", "list 1", "set 1", "list 2"]
    plain = str(statement.compile(dialect=session.get_bind().dialect))
    assert "version +" not in plain  # the caller's own statement is as it was


def test_number_of_statements_does_not_depend_on_rows(
    engine: sa.Engine, session: Session, user: Model, upsert: Upsert, statements: RecordStatements
) -> None:
    """An upsert of 200 rows costs as many statements as one of 4."""
    counts = []
    for count in (4, 200):
        first = 1000 * count
        session.execute(sa.insert(user), [{"id": first + number, "name": "x"} for number in range(count)])
        session.commit()
        rows = [{"id": first + number, "name": "xy"[number % 2]} for number in range(count * 2)]
        with statements() as log:
            session.execute(upsert(user, names), rows)
        counts.append(log.verbs)
        assert sum(versions(session, user).values()) == count / 2 + (0 if count == 4 else 2)
    assert counts[0] == counts[1]
    assert len(counts[0]) <= 8


# --- other kinds of models


def test_locked_records_are_refused(
    base: type[DeclarativeBase], engine: sa.Engine, session: Session, upsert: Upsert
) -> None:
    """An upsert changes no locked record, but may unlock it."""

    class Note(Lockable, Versioned, base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]

    base.metadata.create_all(engine)
    one, two = Note(id=1, name="a"), Note(id=2, name="b")
    session.add_all([one, two])
    session.flush()
    one.lock()
    session.commit()
    lock = next(iter({column.key for column in Note.__table__.c} - {"id", "name", "version"}))
    with pytest.raises(RecordLockedError) as caught:
        session.execute(upsert(Note, names), [{"id": 2, "name": "x"}, {"id": 1, "name": "y"}])
    assert caught.value.key == (1,)
    assert [row[1] for row in past(session, Note) if row[0] == 2] == [-1]
    session.execute(upsert(Note, lambda new, old: {lock: False}).values(id=1, name="a"))
    session.execute(upsert(Note, names), [{"id": 1, "name": "y"}])
    assert [row[1] for row in past(session, Note) if row[0] == 1] == [-1, 0, 1, 2]


def test_marks_of_versioned_rows(base: type[DeclarativeBase], engine: sa.Engine, upsert: Upsert, clock: Clock) -> None:
    """A record that keeps them on its row, too, has those of its last version."""

    class Page(RecordChanges, Versioned, base):
        __tablename__ = "page"
        __chrononaut_hidden__ = ["draft"]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]
        draft: Mapped[str | None]

    base.metadata.create_all(engine)
    with versioned_session(sessionmaker(engine), clock=clock)() as session:
        session.add_all([Page(id=number, name="a") for number in (1, 2, 3)])
        session.commit()
        began = clock.now
        clock.advance()
        with extra_change_info(by="upsert"):
            rows: list[dict[str, Any]] = [
                {"id": 1, "name": "b"},
                {"id": 2, "name": "a"},
                {"id": 3, "name": "a", "draft": "x"},
                {"id": 4},
            ]
            rows = [{"name": None, "draft": None, **row} for row in rows]
            statement = upsert(Page, lambda new, old: {"name": new.name, "draft": new.draft})
            session.execute(statement.values(rows))
        pages = {page.id: page for page in session.scalars(sa.select(Page))}
        assert {key: page.changed for key, page in pages.items()} == {
            1: clock.now,
            2: began,
            3: clock.now,
            4: clock.now,
        }
        info = {key: page.change_info or {} for key, page in pages.items()}
        assert [info[key].get("extra") for key in (1, 2, 3, 4)] == [{"by": "upsert"}, None, *[{"by": "upsert"}] * 2]
        assert [key for key in info if "hidden_cols_changed" in info[key]] == [3]
        assert {key: page.version for key, page in pages.items()} == {1: 1, 2: 0, 3: 1, 4: 0}


@pytest.mark.parametrize("form", ["values", "parameters", "list"])
@pytest.mark.parametrize("of", ["model", "table"])
def test_marks_of_rows_without_versions(
    base: type[DeclarativeBase], engine: sa.Engine, upsert: Upsert, clock: Clock, form: str, of: str
) -> None:
    """A model that only records who changed it last is told of upserts, those with a condition too."""

    class Visit(RecordChanges, base):
        __tablename__ = "visit"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]

    base.metadata.create_all(engine)
    with versioned_session(sessionmaker(engine), clock=clock)() as session:
        session.add_all([Visit(id=1, name="a"), Visit(id=2, name="b")])
        session.commit()
        began = clock.now
        clock.advance()
        options = {} if engine.dialect.name in ("mysql", "mariadb") else {"where": Visit.name != "b"}
        statement = upsert(Visit if of == "model" else Visit.__table__, names, **options)
        keys = [1, 2, 3] if options else [1, 3]
        with extra_change_info(by="upsert"):
            FORMS[form](session, statement, [{"id": key, "name": "x"} for key in keys])
        rows = {visit.id: visit for visit in session.scalars(sa.select(Visit))}
        assert {key: visit.name for key, visit in rows.items()} == {1: "x", 2: "b", 3: "x"}
        assert {key: visit.changed for key, visit in rows.items()} == {1: clock.now, 2: began, 3: clock.now}
        assert [(rows[key].change_info or {})["extra"] for key in (1, 3)] == [{"by": "upsert"}] * 2


def test_bases_of_hierarchies(base: type[DeclarativeBase], engine: sa.Engine, session: Session, upsert: Upsert) -> None:
    """An upsert of the base copies what a record has in a subclass's table; one of such a subclass is refused."""

    class Animal(Versioned, base):
        __tablename__ = "animal"
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        name: Mapped[str | None]

    class Dog(Animal):
        __tablename__ = "dog"
        __mapper_args__ = {"polymorphic_identity": "dog"}
        id: Mapped[int] = mapped_column(sa.ForeignKey("animal.id"), primary_key=True)
        trick: Mapped[str | None]

    base.metadata.create_all(engine)
    session.add(Dog(id=1, name="Rex", trick="sit"))
    session.commit()
    session.execute(upsert(Animal, names), [{"id": 1, "kind": "animal", "name": "Max"}])
    session.execute(upsert(Animal.__table__, names), [{"id": 2, "kind": "animal", "name": "Leo"}])
    [state] = session.get_one(Dog, 1).versions()
    assert (state.name, state.trick, state.version) == ("Rex", "sit", 0)
    [birth] = session.scalars(sa.select(history_class(Animal)).filter_by(id=2))
    assert (birth.kind, birth.operation) == ("animal", "insert")
    with pytest.raises(UntrackedStatementError, match="several tables"):
        session.execute(upsert(Dog, lambda new, old: {"trick": new.trick}), [{"id": 1, "name": "x", "trick": "y"}])


@pytest.mark.backends("mariadb", "sqlite-file")
def test_keys_that_are_the_same_to_the_database(
    base: type[DeclarativeBase], engine: sa.Engine, session: Session, upsert: Upsert
) -> None:
    """Where the collation takes 'A' for 'a', an upsert of one is about the other."""
    collation = "NOCASE" if engine.dialect.name == "sqlite" else "utf8mb4_general_ci"

    class Word(Versioned, base):
        __tablename__ = "word"
        id: Mapped[int] = mapped_column(primary_key=True)
        word: Mapped[str] = mapped_column(sa.String(20, collation=collation), unique=True)
        name: Mapped[str | None]

    base.metadata.create_all(engine)
    session.add_all([Word(id=1, word="one", name="a"), Word(id=2, word="two", name="b")])
    session.commit()
    rows = [{"word": "ONE", "name": "a"}, {"word": "Two", "name": "x"}, {"word": "three", "name": "y"}]
    session.execute(upsert(Word, names, by=["word"]), rows)
    assert past(session, Word)[:3] == [BORN[0], BORN[1], (2, 0, "b", "update")]
    twice = [{"word": "NEW", "name": "a"}, {"word": "new", "name": "b"}]
    with pytest.raises(UntrackedStatementError, match="same to the database"):
        session.execute(upsert(Word, names, by=["word"]), twice)
    session.rollback()
    for word in ("One", "oNE"):
        rows = [{"word": "one", "name": "q"}, {"word": word, "name": "r"}]
        with pytest.raises(UntrackedStatementError):
            session.execute(upsert(Word, names, by=["word"]), rows)


# --- what is refused


def _from_select(s: Session, u: Model, upsert: Upsert) -> None:
    s.execute(upsert(u, names).from_select(["id", "name"], sa.select(u.id, u.name)))


REFUSED: dict[str, tuple[Callable[[Session, Model, Upsert], Any], str]] = {
    "select": (_from_select, "list of parameters"),
    "no key": (lambda s, u, up: s.execute(up(u, names).values(name="x")), "plain values for id"),
    "expression as key": (lambda s, u, up: s.execute(up(u, names).values(id=sa.func.abs(1), name="x")), "plain values"),
    "key": (lambda s, u, up: s.execute(up(u, lambda new, old: {"id": 9}).values(id=1)), "sets id"),
    "version": (lambda s, u, up: s.execute(up(u, lambda new, old: {"version": 3}).values(id=1)), "chrononaut's own"),
    "given version": (lambda s, u, up: s.execute(up(u, names).values(id=1, version=3)), "chrononaut's own"),
    "listed version": (lambda s, u, up: s.execute(up(u, names).values([{"id": 1, "version": 3}])), "chrononaut's own"),
    "of version": (lambda s, u, up: s.execute(up(u, lambda new, old: {"number": old.version}).values(id=1)), "by the"),
    "twice": (lambda s, u, up: s.execute(up(u, names), [{"id": 1, "name": "x"}, {"id": 1, "name": "y"}]), "twice"),
    "new twice": (lambda s, u, up: s.execute(up(u, names), [{"id": 9, "name": "x"}, {"id": 9, "name": "y"}]), "twice"),
    "parameter": (
        lambda s, u, up: s.execute(
            up(u.__table__, lambda new, old: {"name": sa.bindparam("k")}), [{"id": 1, "k": "x"}]
        ),
        "'k' that is no column",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_captured_is_refused(
    session: Session, user: Model, people: list[Model], upsert: Upsert, how: str
) -> None:
    """It raises before anything happens, and says what to do."""
    execute, message = REFUSED[how]
    with pytest.raises(UntrackedStatementError, match=message):
        execute(session, user, upsert)
    assert data(session, user) == [(1, "a@x", "a", 0, None, None), (2, "b@x", "b", 0, None, None)]
    assert past(session, user) == BORN


@pytest.mark.backends("sqlite-file", "postgresql")
def test_conditions_are_refused(session: Session, user: Model, people: list[Model], upsert: Upsert) -> None:
    """Those of the update, and those of a partial index."""
    for option in ("where", "index_where"):
        with pytest.raises(UntrackedStatementError, match=f"`{option}=`"):
            session.execute(upsert(user, names, **{option: user.name == "a"}), [{"id": 1, "name": "x"}])


@pytest.mark.backends("mariadb")
def test_rows_that_conflict_with_two_are_refused(
    session: Session, user: Model, people: list[Model], upsert: Upsert
) -> None:
    """MariaDB would update the one that it finds first."""
    with pytest.raises(UntrackedStatementError, match="those of two"):
        session.execute(upsert(user, names), [{"id": 1, "email": "b@x", "name": "x"}])
    both = [{"id": 1, "email": "new@x", "name": "x"}, {"id": 7, "email": "a@x", "name": "y"}]
    with pytest.raises(UntrackedStatementError, match="twice"):
        session.execute(upsert(user, names), both)
    assert past(session, user) == BORN


def test_suppressed_upserts_leave_no_trace(session: Session, user: Model, people: list[Model], upsert: Upsert) -> None:
    """Those that would be refused can be executed, too; a key that was used before is numbered on."""
    session.execute(upsert(user, names), [{"id": 1, "name": "x"}])
    session.execute(sa.delete(user).where(user.id == 2))
    before = past(session, user)
    with suppress_versioning():
        session.execute(
            upsert(user, names), [{"id": 1, "name": "y"}, {"id": 2, "name": "again"}, {"id": 3, "name": "z"}]
        )
    assert past(session, user) == before
    assert versions(session, user) == {1: 1, 2: 1, 3: 0}
    session.execute(sa.update(user).values(name="end"))
    assert [row[1:3] for row in past(session, user) if row[3] == "update"] == [
        (0, "a"),
        (1, "y"),
        (1, "again"),
        (0, "z"),
    ]


# --- time


@pytest.mark.parametrize("seed", range(6))
def test_the_past_is_what_was(engine: sa.Engine, user: Model, upsert: Upsert, clock: Clock, seed: int) -> None:
    """After any upserts and deletions, rows are those of the plain statements, and each moment is seen as it was."""
    chance = random.Random(seed)
    moments: dict[datetime, list[tuple[Any, ...]]] = {}
    sets: list[Sets] = [
        names,
        names,
        lambda new, old: {"name": new.name, "number": old.number + sa.literal_column("1")},
        lambda new, old: {"number": new.number, "hits": new.hits, "password": new.password},
        lambda new, old: {"name": "constant"},
    ]
    with versioned_session(sessionmaker(engine), clock=clock)() as session:
        for _ in range(12):
            clock.advance()
            if chance.random() < 0.3:
                gone = chance.sample(range(1, 8), 2)
                for model in (user, user.plain):
                    session.execute(sa.delete(model).where(model.id.in_(gone)))
            form, chosen, of = chance.choice(list(FORMS)), chance.choice(sets), chance.choice(["model", "table"])
            if chosen is sets[-1] and form in ("parameters", "list"):
                form = "values"  # PyMySQL cannot send many rows with such a statement
            number = "n" if of == "model" else "number"
            rows = [
                {
                    "id": key,
                    "email": f"{key}@x",
                    "name": chance.choice("ab"),
                    number: key % 2,
                    "password": "p",
                    "hits": 1,
                }
                for key in chance.sample(range(1, 8), chance.randint(1, 4))
            ]
            for model in (user, user.plain):
                FORMS[form](session, upsert(model if of == "model" else model.__table__, chosen), rows)
            session.commit()
            assert data(session, user) == data(session, user.plain)
            moments[clock.now] = [row[:4] for row in data(session, user)]
            session.commit()
        for moment, seen in moments.items():
            with as_of(session, moment) as past:
                query = sa.select(user.id, user.email, user.name, user.n).order_by(user.id)
                assert [tuple(row) for row in past.execute(query)] == seen
        _check_numbers(session, user)


def _check_numbers(session: Session, model: Model) -> None:
    """Each record's versions are contiguous, and so are its times."""
    history = history_class(model)
    ended: dict[int, Any] = {}
    for row in session.scalars(sa.select(history).order_by(history.id, history.version)):
        before = ended.get(row.id)
        assert row.version == (-1 if before is None else before.version + 1)
        assert row.began == (None if before is None else before.changed)
        ended[row.id] = row
    for key, version in versions(session, model).items():
        assert version == ended[key].version + 1


# --- others at work


def wait_for_lock(engine: sa.Engine) -> None:
    """Return as soon as another transaction waits for one that is under way."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    pause = "SELECT pg_sleep(0.01)"
    if engine.dialect.name != "postgresql":
        waiting = "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
        pause = "SELECT SLEEP(0.12)"  # it looks anew after a tenth of a second only
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watcher:
        for _ in range(500):
            if watcher.exec_driver_sql(waiting).scalar():
                return
            watcher.exec_driver_sql(pause)
    raise AssertionError("nobody waits")


@pytest.mark.backends("postgresql", "mariadb")  # SQLite has one writer at a time
@pytest.mark.parametrize("by", ["id", "email"])
def test_row_that_comes_in_between(
    session_factory: Factory, user: Model, people: list[Model], session: Session, upsert: Upsert, by: str
) -> None:
    """A row committed after the others were read is updated, and its state before is history."""
    session.rollback()
    done: list[str] = []

    def interfere(conn: object, cursor: object, sql: str, params: object, context: object, many: bool) -> None:
        if not done and sql.startswith("INSERT INTO appuser "):
            done.append(sql)
            with session_factory.begin() as other:
                other.add(user(id=8, email="8@x", name="theirs"))

    with session_factory() as mine:
        mine.execute(sa.select(user)).all()  # MariaDB's snapshot does not show the other's row
        event.listen(mine.connection(), "before_cursor_execute", interfere)
        rows = [{"id": key, "email": f"{key}@x", "name": "mine"} for key in (7, 8)]
        mine.execute(upsert(user, names, by=[by]), [*rows, {"id": 1, "email": "a@x", "name": "mine"}])
        assert done
        mine.commit()
    assert versions(session, user) == {1: 1, 2: 0, 7: 0, 8: 1}
    assert past(session, user)[2:] == [
        BORN[1],
        (7, -1, None, "insert"),
        (8, -1, None, "insert"),
        (8, 0, "theirs", "update"),
    ]
    _check_numbers(session, user)


@pytest.mark.backends("postgresql", "mariadb")
@pytest.mark.parametrize("key", [1, 8], ids=["there", "new"])
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
def test_upsert_that_waits_for_another(
    session_factory: Factory,
    user: Model,
    people: list[Model],
    session: Session,
    upsert: Upsert,
    engine: sa.Engine,
    key: int,
    level: str,
) -> None:
    """Two upserts of one record, there or new: the second ends the state that the first began."""
    if engine.dialect.name == "postgresql" and level == "REPEATABLE READ":
        pytest.skip("PostgreSQL refuses the second then, as it does the plain statement")
    session.rollback()
    own = versioned_session(sessionmaker(engine.execution_options(isolation_level=level)))

    def write() -> None:
        with own.begin() as second:
            second.execute(sa.select(user)).all()
            second.execute(upsert(user, names), [{"id": key, "name": "second"}])

    with own() as first:
        first.execute(upsert(user, names), [{"id": key, "name": "first"}])
        waiting = threading.Thread(target=write)
        waiting.start()
        wait_for_lock(engine)
        first.commit()
        waiting.join()
    assert data(session, user)[-1 if key == 8 else 0][2] == "second"
    states = [row[1:] for row in past(session, user) if row[0] == key]
    before = [(0, "a", "update")] if key == 1 else []
    assert states == [(-1, None, "insert"), *before, (len(before), "first", "update")]
    _check_numbers(session, user)


@pytest.mark.backends("postgresql", "mariadb")
def test_upserts_of_overlapping_lists(session_factory: Factory, user: Model, session: Session, upsert: Upsert) -> None:
    """Many writers add to the same few records, new or there: no count is lost, nobody waits in a circle."""
    one: Any = sa.literal_column("1")

    def work(number: int) -> None:
        chance = random.Random(number)
        keys = [[key] for key in range(1, 9)] + [sorted(chance.sample(range(1, 9), 4)) for _ in range(6)]
        for chosen in keys:
            with session_factory.begin() as own:
                statement = upsert(user, lambda new, old: {"number": old.number + one})
                own.execute(statement, [{"id": key, "n": 1} for key in chosen])

    run(4, work)
    assert sum(row[3] for row in data(session, user)) == 4 * (8 + 6 * 4)
    _check_numbers(session, user)
