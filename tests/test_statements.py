"""Statements that a session executes: each leaves the same history as the same change in a flush."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    mapped_column,
    sessionmaker,
    with_loader_criteria,
)

from chrononaut import (
    ChrononautException,
    RecordChanges,
    UntrackedStatementError,
    Versioned,
    extra_change_info,
    history_class,
    versioned_session,
)
from chrononaut.exceptions import ReadOnlyError, StaleVersionError
from chrononaut.unsafe import suppress_versioning
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements

Model = Any


@pytest.fixture
def user(base: type[DeclarativeBase], engine: sa.Engine) -> Model:
    class User(Versioned, base):
        __tablename__ = "appuser"
        __chrononaut_hidden__ = ["password", "pin"]
        __chrononaut_untracked__ = ["hits"]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]
        score: Mapped[int] = mapped_column("points", default=0)
        extra: Mapped[Any] = mapped_column(sa.JSON, nullable=True)
        password: Mapped[str | None]
        pin: Mapped[int | None]
        hits: Mapped[int | None]

    class Bonus(base):
        __tablename__ = "bonus"
        id: Mapped[int] = mapped_column(primary_key=True)
        user_id: Mapped[int]
        points: Mapped[int]

    User.bonus = Bonus
    base.metadata.create_all(engine)
    return User


@pytest.fixture
def people(user: Model, session: Session) -> list[Model]:
    """Three users, committed and loaded."""
    session.add_all([user(name=name) for name in "abc"])
    session.commit()
    return list(session.scalars(sa.select(user).order_by(user.id)))


def rowcount(result: Any) -> int:
    """Return how many rows a statement changed, which only some results know."""
    count: int = result.rowcount
    return count


def past(session: Session, model: Model) -> list[tuple[Any, ...]]:
    """What history says, without births: key, version, name, score, operation."""
    history = history_class(model)
    rows = session.scalars(sa.select(history).order_by(history.id, history.version))
    return [(r.id, r.version, r.name, r.score, r.operation) for r in rows if r.operation != "insert"]


def births(session: Session, model: Model) -> list[tuple[int, int]]:
    history = history_class(model)
    query = sa.select(history.id, history.version).where(history.operation == "insert")
    return [(row.id, row.version) for row in session.execute(query.order_by(history.id, history.version))]


def live(session: Session, model: Model) -> list[tuple[Any, ...]]:
    table = model.__table__
    query = sa.select(table.c.id, table.c.version, table.c.name, table.c.points).order_by(table.c.id)
    return [tuple(row) for row in session.execute(query)]


# --- update


@pytest.mark.parametrize("mode", ["auto", "evaluate", "fetch"])
def test_update_leaves_history_and_raises_versions(
    session: Session, user: Model, people: list[Model], mode: str
) -> None:
    """The old states are copied, and the objects in the session have the new version in each mode."""
    statement = sa.update(user).where(user.name != "c").values(name="z", score=user.score + 1)
    result = session.execute(statement, execution_options={"synchronize_session": mode})
    assert rowcount(result) == 2
    assert [(p.name, p.score, p.version) for p in people] == [("z", 1, 1), ("z", 1, 1), ("c", 0, 0)]
    assert past(session, user) == [(1, 0, "a", 0, "update"), (2, 0, "b", 0, "update")]
    people[0].name = "later"
    session.commit()
    assert live(session, user)[0] == (1, 2, "later", 1)
    began = {(r.id, r.version): r.began for r in session.scalars(sa.select(history_class(user)))}
    changed = {(r.id, r.version): r.changed for r in session.scalars(sa.select(history_class(user)))}
    assert began[1, 1] == changed[1, 0]
    assert began[1, 0] == changed[1, -1]


def test_update_without_synchronization_leaves_stale_objects(
    session: Session, user: Model, people: list[Model]
) -> None:
    """What ``synchronize_session=False`` left behind cannot overwrite what the statement wrote."""
    session.execute(sa.update(user).values(name="z"), execution_options={"synchronize_session": False})
    people[0].score = 9
    with pytest.raises(StaleVersionError) as caught:
        session.flush()
    assert caught.value.expected == 0
    assert caught.value.found == 1
    assert caught.value.changes == {"name": ("a", "z")}


@pytest.mark.parametrize("mode", ["auto", "fetch"])
def test_statement_does_not_make_stale_objects_pass_for_fresh_ones(
    user: Model, session_factory: sessionmaker[Session], mode: str
) -> None:
    """What others changed after an object was loaded is noticed, though a statement wrote the row since."""
    with session_factory(expire_on_commit=False) as session, session_factory() as other:
        one, two = user(name="a"), user(name="b")
        session.add_all([one, two])
        session.commit()
        session.execute(sa.update(user).values(pin=1), execution_options={"synchronize_session": mode})
        session.commit()
        assert vars(one)["version"] == vars(two)["version"] == 1
        other.get_one(user, one.id).score = 5
        other.commit()
        session.execute(sa.update(user).values(pin=2), execution_options={"synchronize_session": mode})
        assert vars(two)["version"] == 2
        one.name = "z"
        with pytest.raises(StaleVersionError) as caught:
            session.flush()
        assert (caught.value.expected, caught.value.found) == (1, 3)


def test_update_of_a_table(session: Session, user: Model, people: list[Model]) -> None:
    """A statement about the table is captured as well, whichever way its columns are named."""
    table = user.__table__
    assert rowcount(session.execute(sa.update(table).where(table.c.id == 1).values(points=5))) == 1
    assert rowcount(session.execute(sa.update(table).where(table.c.id == 1).values({table.c.points: 6}))) == 1
    bound = sa.update(table).where(table.c.id == sa.bindparam("wanted")).values(points=sa.bindparam("new"))
    assert rowcount(session.execute(bound, {"wanted": 1, "new": 7})) == 1
    assert rowcount(session.execute(sa.update(table).where(table.c.id == 1), {"points": 8})) == 1
    assert past(session, user) == [(1, n, "a", score, "update") for n, score in enumerate([0, 5, 6, 7])]
    assert live(session, user)[0] == (1, 4, "a", 8)


def test_query_update_and_delete(session: Session, user: Model, people: list[Model]) -> None:
    """The legacy methods of ``Query`` are captured."""
    assert session.query(user).filter(user.id == 1).update({"name": "z"}) == 1
    assert session.query(user).filter_by(id=2).update({user.score: user.score + 3}, synchronize_session="fetch") == 1
    assert session.query(user).filter(user.id == 3).delete() == 1
    assert [p.version for p in people[:2]] == [1, 1]
    assert past(session, user) == [(1, 0, "a", 0, "update"), (2, 0, "b", 0, "update"), (3, 0, "c", 0, "delete")]


def test_rows_whose_values_stay_make_no_version(session: Session, user: Model, people: list[Model]) -> None:
    """They count as matched as ever, and only the others are copied and raised."""
    result = session.execute(sa.update(user).values(name="b"))
    assert rowcount(result) == 3
    assert [p.version for p in people] == [1, 0, 1]
    assert [row[0] for row in past(session, user)] == [1, 3]
    assert rowcount(session.execute(sa.update(user).values(name="b"))) == 3
    assert len(past(session, user)) == 2


@pytest.mark.parametrize("value", [{"a": [1, None]}, [], "text", None])
def test_json_is_compared_by_value(session: Session, user: Model, people: list[Model], value: Any) -> None:
    """Setting JSON to what it is makes no version."""
    session.execute(sa.update(user).where(user.id == 1).values(extra=value))
    before = live(session, user)
    session.execute(sa.update(user).where(user.id == 1).values(extra=value))
    assert live(session, user) == before


def test_case_only_change_is_a_change(session: Session, user: Model, people: list[Model]) -> None:
    """Text is compared to the last bit."""
    session.execute(sa.update(user).where(user.id == 1).values(name="A"))
    assert past(session, user) == [(1, 0, "a", 0, "update")]


def test_volatile_value_is_always_a_change(session: Session, user: Model, people: list[Model]) -> None:
    """What another call of a function would give nobody knows, so each row is copied."""
    assert rowcount(session.execute(sa.update(user).values(score=sa.cast(sa.func.random() * 0, sa.Integer)))) == 3
    assert len(past(session, user)) == 3


def test_untracked_columns_are_ignored(
    session: Session, user: Model, people: list[Model], statements: RecordStatements
) -> None:
    """They make no version and cost no further statement, but are written, also beside tracked ones that stay."""
    with statements() as log:
        session.execute(sa.update(user).values(hits=1))
    assert log.verbs == ["UPDATE"]
    session.execute(sa.update(user).values(hits=2, name="a"))
    assert [p.version for p in people] == [0, 1, 1]
    assert session.scalars(sa.select(user.hits)).all() == [2, 2, 2]


def test_hidden_columns_are_named_for_the_rows_they_change_in(
    session: Session, user: Model, people: list[Model]
) -> None:
    """Each row's change info names the hidden columns that changed in that row, never their values."""
    session.execute(sa.update(user).where(user.id == 1).values(password='s3cret"', pin=1))
    session.execute(sa.update(user).where(user.id == 2).values(pin=1))
    with extra_change_info(why='"hidden_cols_changed": ["password", "pin"]}'):
        session.execute(sa.update(user).values(password='s3cret"', pin=1, name="z"))
    history = history_class(user)
    rows = session.scalars(
        sa.select(history).where(history.operation == "update").order_by(history.id, history.version)
    )
    named = [row.change_info.get("hidden_cols_changed") for row in rows]
    assert named == [["password", "pin"], None, ["pin"], ["password"], ["password", "pin"]]
    with session.bind.connect() as connection:  # type: ignore[union-attr]
        session.commit()
        text = str(connection.execute(sa.select(history.__table__)).all())
    assert "s3cret" not in text


@pytest.mark.backends("sqlite-file", "sqlite-memory", "postgresql")  # MariaDB's UPDATE cannot return rows
def test_update_returning(session: Session, user: Model, people: list[Model]) -> None:
    """Results are those of the statement alone."""
    result = session.execute(sa.update(user).where(user.id < 3).values(name="z").returning(user.id, user.name))
    assert sorted(tuple(row) for row in result) == [(1, "z"), (2, "z")]
    objects = session.scalars(sa.update(user).where(user.id < 3).values(name="y").returning(user)).all()
    assert {(o.id, o.name) for o in objects} == {(1, "y"), (2, "y")}
    assert len(past(session, user)) == 4


def test_delete_returning(session: Session, user: Model, people: list[Model]) -> None:
    """What is returned are the rows that went, and each of them is in history."""
    deleted = session.scalars(sa.delete(user).where(user.id == 3).returning(user.id)).all()
    assert deleted == [3]
    assert past(session, user) == [(3, 0, "c", 0, "delete")]


@pytest.mark.backends("sqlite-file", "sqlite-memory", "postgresql")  # MariaDB's UPDATE has no WITH
def test_update_with_subqueries_and_ctes(session: Session, user: Model, people: list[Model]) -> None:
    """Conditions may read other tables, and the table itself."""
    session.add_all([user.bonus(user_id=1, points=5), user.bonus(user_id=3, points=7)])
    wanted = sa.select(user.bonus.user_id).where(user.bonus.points > 5).cte("wanted")
    session.execute(sa.update(user).where(user.id.in_(sa.select(wanted.c.user_id))).values(name="cte"))
    highest = sa.select(sa.func.max(user.bonus.points)).where(user.bonus.user_id == user.id).scalar_subquery()
    session.execute(sa.update(user).where(sa.exists().where(user.bonus.user_id == user.id)).values(score=highest))
    assert past(session, user) == [(1, 0, "a", 0, "update"), (3, 0, "c", 0, "update"), (3, 1, "cte", 0, "update")]
    assert [p.version for p in people] == [1, 0, 2]
    assert live(session, user)[0][3] == 5


def test_update_from_matches_a_row_twice(session: Session, user: Model, people: list[Model]) -> None:
    """UPDATE ... FROM copies each row once."""
    session.add_all([user.bonus(user_id=1, points=5), user.bonus(user_id=1, points=5)])
    statement = sa.update(user).where(user.id == user.bonus.user_id).values(score=user.bonus.points)
    assert rowcount(session.execute(statement, execution_options={"synchronize_session": False})) == 1
    assert past(session, user) == [(1, 0, "a", 0, "update")]
    assert live(session, user)[0] == (1, 1, "a", 5)


def test_update_by_primary_key(session: Session, user: Model, people: list[Model]) -> None:
    """A list of records with their new values is captured, for those that change."""
    listed = [{"id": 1, "name": "x"}, {"id": 2, "name": "b"}, {"id": 3, "name": "y", "password": "p"}]
    session.execute(sa.update(user), listed)
    assert past(session, user) == [(1, 0, "a", 0, "update"), (3, 0, "c", 0, "update")]
    assert [(p.name, p.version) for p in people] == [("x", 1), ("b", 0), ("y", 1)]
    people[0].name = "later"
    session.commit()
    with pytest.raises(UntrackedStatementError):
        session.execute(sa.update(user), [{"id": 1, "name": "x"}, {"id": 1, "name": "y"}])


def test_update_in_constant_statements(
    session: Session, user: Model, people: list[Model], statements: RecordStatements
) -> None:
    """Lock, copy and write: three statements, however many rows there are."""
    session.expunge_all()
    with statements() as log:
        session.execute(sa.update(user).values(name="z"))
    assert log.verbs == ["SELECT", "INSERT", "UPDATE"]
    with statements() as log:
        session.execute(sa.delete(user))
    assert log.verbs == ["SELECT", "INSERT", "DELETE"]


def test_savepoint_rollback_takes_a_listed_update_back_from_objects(
    session: Session, user: Model, people: list[Model]
) -> None:
    """After it, an object has the version and the values of its row, and can be changed."""
    first = people[0]
    assert (first.name, first.version) == ("a", 0)
    savepoint = session.begin_nested()
    session.execute(sa.update(user), [{"id": first.id, "name": "lost"}])
    assert (first.name, first.version) == ("lost", 1)
    savepoint.rollback()
    assert (first.name, first.version) == ("a", 0)
    first.name = "kept"
    session.commit()
    assert past(session, user) == [(first.id, 0, "a", 0, "update")]


@pytest.mark.parametrize("how", ["option", "earlier listener", "later listener"])
def test_loader_criteria_narrow_what_is_captured(engine: sa.Engine, user: Model, how: str) -> None:
    """A tenant filter, say: what it hides from the statement is neither locked nor copied nor counted."""
    last = 3

    def first_ones(upto: int) -> Any:
        return with_loader_criteria(user, lambda cls: cls.id <= upto)

    def hide(state: ORMExecuteState) -> None:
        if state.is_update or state.is_delete:
            state.statement = state.statement.options(first_ones(last))

    factory = sessionmaker(engine)
    if how == "earlier listener":
        sa.event.listen(factory, "do_orm_execute", hide)
    versioned_session(factory)
    if how == "later listener":
        sa.event.listen(factory, "do_orm_execute", hide)
    with factory() as session:
        session.add_all([user(name=name) for name in "abc"])
        session.commit()
        statement = sa.update(user).where(user.score < sa.bindparam("most")).values(score=user.score + 1)
        for last in (1, 2):  # the second time from SQLAlchemy's cache, with another value
            options = [first_ones(last)] if how == "option" else []
            assert rowcount(session.execute(statement.options(*options), {"most": 9})) == last
        assert past(session, user) == [(1, 0, "a", 0, "update"), (1, 1, "a", 1, "update"), (2, 0, "b", 0, "update")]
        session.execute(sa.delete(user).options(first_ones(last)))
        assert live(session, user) == [(3, 0, "c", 0)]
        assert [row[0] for row in past(session, user) if row[-1] == "delete"] == [1, 2]


def test_loader_criteria_that_narrow_a_subquery_are_refused(session: Session, user: Model, people: list[Model]) -> None:
    """They do not reach the copy, whose rows would not be those that are written: nothing of it stays."""
    session.add(user.bonus(user_id=people[0].id, points=1))
    session.commit()
    statement = sa.update(user).where(user.id.in_(sa.select(user.bonus.user_id))).values(name="z")
    with pytest.raises(UntrackedStatementError, match="rolled back"):
        session.execute(statement.options(with_loader_criteria(user.bonus, user.bonus.points > 5)))
    assert past(session, user) == []
    assert [row[2] for row in live(session, user)] == ["a", "b", "c"]


def test_pending_changes_are_flushed_first(session: Session, user: Model, people: list[Model]) -> None:
    """As SQLAlchemy does before a statement, so that history has them in order."""
    people[0].name = "first"
    session.execute(sa.update(user).where(user.name == "first").values(name="second"))
    assert [row[2] for row in past(session, user)] == ["a", "first"]
    assert people[0].version == 2


@pytest.mark.parametrize("values", [{"version": 3}, {"id": 9}])
def test_bookkeeping_and_keys_cannot_be_set(
    session: Session, user: Model, people: list[Model], values: dict[str, Any]
) -> None:
    """A statement cannot count versions, and cannot move records to another key."""
    with pytest.raises(UntrackedStatementError):
        session.execute(sa.update(user).where(user.id == 1).values(values))
    assert past(session, user) == []


def test_ordered_values_are_refused(session: Session, user: Model, people: list[Model]) -> None:
    """What a statement with ordered values sets cannot be found out."""
    with pytest.raises(UntrackedStatementError, match="ordered_values"):
        session.execute(sa.update(user).ordered_values((user.name, "x")))


# --- delete and insert


def test_delete_leaves_history_and_a_new_life_continues(session: Session, user: Model, people: list[Model]) -> None:
    """The last state is written, and the same key, inserted by a statement, is numbered after it."""
    assert rowcount(session.execute(sa.delete(user).where(user.id < 3))) == 2
    assert past(session, user) == [(1, 0, "a", 0, "delete"), (2, 0, "b", 0, "delete")]
    session.execute(sa.insert(user).values(id=1, name="again"))
    assert live(session, user)[0] == (1, 2, "again", 0)
    assert births(session, user) == [(1, -1), (1, 1), (2, -1), (3, -1)]


Insert = Callable[[Session, Model], Any]
INSERTS: dict[str, Insert] = {
    "values": lambda s, u: s.execute(sa.insert(u).values(name="n")),
    "parameters": lambda s, u: s.execute(sa.insert(u), {"name": "n"}),
    "list": lambda s, u: s.execute(sa.insert(u), [{"name": "n"}, {"name": "m"}]),
    "list with keys": lambda s, u: s.execute(sa.insert(u), [{"id": 7, "name": "n"}, {"id": 9, "name": "m"}]),
    "multiple values": lambda s, u: s.execute(sa.insert(u).values([{"name": "n"}, {"name": "m"}])),
    "select": lambda s, u: s.execute(sa.insert(u).from_select(["name", "points"], sa.select(u.name, u.score))),
    "table": lambda s, u: s.execute(sa.insert(u.__table__).values(name="n", points=1)),
    "table, list": lambda s, u: s.execute(sa.insert(u.__table__), [{"name": "n"}, {"name": "m"}]),
    "returning": lambda s, u: s.execute(sa.insert(u).returning(u.name), [{"name": "n"}, {"name": "m"}]).all(),
    "returning objects": lambda s, u: s.scalars(sa.insert(u).returning(u), [{"name": "n"}, {"name": "m"}]).all(),
    "table, returning": lambda s, u: s.execute(
        sa.insert(u.__table__).returning(u.__table__.c.name), [{"name": "n"}]
    ).all(),
    "default": lambda s, u: s.execute(sa.insert(u)),
    "legacy": lambda s, u: s.execute(u.__table__.insert().values(name="n")),
}


@pytest.mark.parametrize("how", INSERTS)
def test_each_way_to_insert_records_births(session: Session, user: Model, people: list[Model], how: str) -> None:
    """Each new row has the row that ends its absence."""
    with extra_change_info(by="statement"):
        INSERTS[how](session, user)
    keys = [row[0] for row in live(session, user)]
    assert len(keys) > 3
    assert births(session, user) == [(key, -1) for key in keys]
    history = history_class(user)
    new = session.scalars(sa.select(history).where(history.id > 3)).all()
    assert all(row.change_info["extra"] == {"by": "statement"} for row in new)


def test_results_of_inserts(session: Session, user: Model, people: list[Model]) -> None:
    """Row counts, keys and returned rows are those of the statement alone."""
    result: Any = session.execute(sa.insert(user).values(name="n"))
    assert result.inserted_primary_key == (4,)
    assert rowcount(session.execute(sa.insert(user).values([{"name": "n"}, {"name": "m"}]))) == 2
    copied = sa.insert(user).from_select(["name", "points"], sa.select(user.name, user.score))
    assert rowcount(session.execute(copied)) == 6
    returned = session.execute(sa.insert(user).returning(user.name, user.score), [{"name": "n"}, {"name": "m"}])
    assert [tuple(row) for row in returned] == [("n", 0), ("m", 0)]
    (one,) = session.scalars(sa.insert(user).values(name="one").returning(user)).all()
    assert one.name == "one"
    assert one.version == 0
    one.name = "two"
    session.commit()


@pytest.mark.backends("sqlite-file", "postgresql")  # MariaDB has its own, below
def test_inserts_that_skip(session: Session, user: Model, people: list[Model], backend: str) -> None:
    """Rows that an INSERT skips have no birth."""
    insert = postgresql.insert if backend == "postgresql" else sqlite.insert
    statement = insert(user).values([{"id": 1, "name": "x"}, {"id": 8, "name": "y"}])
    session.execute(statement.on_conflict_do_nothing())
    assert births(session, user) == [(1, -1), (2, -1), (3, -1), (8, -1)]


@pytest.mark.backends("mariadb")
def test_insert_ignore_is_refused(session: Session, user: Model, people: list[Model]) -> None:
    """MariaDB's INSERT IGNORE does not say which rows are new."""
    with pytest.raises(UntrackedStatementError, match="IGNORE"):
        session.execute(sa.insert(user).prefix_with("IGNORE").values(id=1, name="x"))
    assert births(session, user) == [(1, -1), (2, -1), (3, -1)]


@pytest.mark.backends("sqlite-file")
def test_insert_or_replace_is_refused(session: Session, user: Model, people: list[Model]) -> None:
    """SQLite's INSERT OR REPLACE deletes rows without a word."""
    with pytest.raises(UntrackedStatementError, match="OR REPLACE"):
        session.execute(sa.insert(user).prefix_with("OR REPLACE").values(id=1, name="x"))


def test_objects_returned_for_a_used_key_are_not_stale(session: Session, user: Model, people: list[Model]) -> None:
    """They have the version of their new life, however the keys become known."""
    session.execute(sa.delete(user).where(user.id < 3))
    rows = [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}]
    found = list(session.scalars(sa.insert(user).returning(user), rows[:1]))
    found += session.scalars(sa.insert(user).values(rows[1:]).returning(user))
    assert [one.version for one in found] == [2, 2]
    for one in found:
        one.name = "flushed"
    session.commit()
    assert [row[1:3] for row in live(session, user)][:2] == [(3, "flushed"), (3, "flushed")]


def test_numbering_touches_nothing_else(base: type[DeclarativeBase], engine: sa.Engine, session: Session) -> None:
    """A column that any update sets keeps what the new life of a used key was given."""

    class Note(Versioned, base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        touched: Mapped[int | None] = mapped_column(onupdate=9)

    base.metadata.create_all(engine)
    session.execute(sa.insert(Note), [{"id": 1}])
    session.execute(sa.delete(Note))
    session.execute(sa.insert(Note), [{"id": 1, "touched": 5}])
    assert session.execute(sa.select(Note.version, Note.touched)).one() == (2, 5)


def test_suppressed_statements_leave_no_trace(session: Session, user: Model, people: list[Model]) -> None:
    """But a key that was used before is numbered on, or its next change would collide."""
    session.execute(sa.delete(user).where(user.id == 1))
    with suppress_versioning():
        session.execute(sa.update(user).values(name="z"))
        session.execute(sa.insert(user).values(id=1, name="again"))
        session.execute(sa.text("UPDATE appuser SET points = 5"))
    assert [row[:3] for row in past(session, user)] == [(1, 0, "a")]
    session.execute(sa.update(user).values(name="q"))
    assert [row[:3] for row in past(session, user)] == [(1, 0, "a"), (1, 1, "again"), (2, 0, "z"), (3, 0, "z")]


# --- what does not pass the session


def _connection(session: Session, statement: Any, *args: Any) -> None:
    session.connection().execute(statement, *args)


BYPASSES: dict[str, Insert] = {
    "bulk_save_objects": lambda s, u: s.bulk_save_objects([u(name="x")]),
    "bulk_insert_mappings": lambda s, u: s.bulk_insert_mappings(u, [{"name": "x"}]),
    "bulk_update_mappings": lambda s, u: s.bulk_update_mappings(u, [{"id": 1, "name": "x"}]),
    "connection update": lambda s, u: _connection(s, sa.update(u).values(name="x")),
    "connection delete": lambda s, u: _connection(s, sa.delete(u.__table__)),
    "connection insert": lambda s, u: _connection(s, sa.insert(u.__table__), [{"name": "x"}]),
    "text": lambda s, u: s.execute(sa.text("UPDATE appuser SET name = 'x'")),
    "quoted text": lambda s, u: s.execute(sa.text('delete from "appuser" where id = :id'), {"id": 1}),
    "text insert": lambda s, u: s.execute(sa.text("INSERT INTO appuser (name, points) VALUES ('x', 1)")),
    "driver text": lambda s, u: s.connection().exec_driver_sql("DELETE FROM main.appuser"),
    "typed text": lambda s, u: s.execute(
        sa.text("UPDATE appuser SET name = 'x' RETURNING id").columns(sa.column("id", sa.Integer))
    ),
    "list of conditions": lambda s, u: s.execute(
        sa.update(u.__table__).where(u.__table__.c.id == sa.bindparam("k")).values(name="x"), [{"k": 1}, {"k": 2}]
    ),
}


@pytest.mark.parametrize("how", BYPASSES)
def test_what_cannot_be_captured_is_refused(session: Session, user: Model, people: list[Model], how: str) -> None:
    """It raises before anything happens."""
    before = live(session, user)
    with pytest.raises(UntrackedStatementError):
        BYPASSES[how](session, user)
    session.rollback()
    assert live(session, user) == before
    if how in ("bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings", "connection update"):
        with suppress_versioning():
            BYPASSES[how](session, user)


@pytest.mark.backends("postgresql")
def test_dml_in_a_cte_is_refused(session: Session, user: Model, people: list[Model]) -> None:
    """A SELECT can hold a change."""
    changed = sa.update(user).values(name="x").returning(user.id).cte("changed")
    for statement in (sa.select(changed.c.id), sa.insert(user.bonus).from_select(["user_id"], sa.select(changed.c.id))):
        with pytest.raises(UntrackedStatementError):
            session.execute(statement)
    assert live(session, user)[0][2] == "a"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM appuser",
        "INSERT INTO bonus (user_id, points) SELECT id, 1 FROM appuser",
        "UPDATE bonus SET points = 2",
        "DELETE FROM bonus",
        "SELECT count(*) FROM appuser WHERE name = 'insert into'",
    ],
)
def test_harmless_text_passes(session: Session, user: Model, people: list[Model], sql: str) -> None:
    """Text that only reads a versioned table, or changes another, is executed."""
    session.execute(sa.text(sql))


def test_statements_of_flush_listeners_do_not_slip_through(session: Session, user: Model, people: list[Model]) -> None:
    """A mapper event that writes another record past the session is refused."""

    def write(mapper: object, connection: sa.Connection, target: Model) -> None:
        connection.execute(sa.update(user.__table__).where(user.__table__.c.id == 2).values(name="x"))

    sa.event.listen(user, "before_update", write)
    people[0].name = "z"
    with pytest.raises(UntrackedStatementError):
        session.flush()


def test_history_is_read_only_for_statements(session: Session, user: Model, people: list[Model]) -> None:
    """It may be deleted where that was allowed, and never changed."""
    history = history_class(user)
    refused: list[Any] = [
        sa.delete(history),
        sa.update(history).values(name="x"),
        sa.insert(history.__table__).values(id=1, version=9),
        sa.text("DELETE FROM appuser_history"),
    ]
    for statement in refused:
        with pytest.raises(ReadOnlyError):
            session.execute(statement)
    with suppress_versioning(allow_deleting_history=True):
        assert rowcount(session.execute(sa.delete(history).where(history.id == 1))) == 1
        with pytest.raises(ReadOnlyError):
            session.execute(refused[1])


# --- change marks


def test_change_marks_are_set_by_statements(base: type[DeclarativeBase], engine: sa.Engine, clock: Clock) -> None:
    """``RecordChanges`` is kept by statements, with versions and without."""

    class Page(RecordChanges, base):
        __tablename__ = "page"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    class Note(RecordChanges, Versioned, base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    base.metadata.create_all(engine)
    factory = versioned_session(sessionmaker(engine), clock=clock, change_info=lambda: {"user_id": "u"})
    for model in (Page, Note):
        with factory.begin() as session:
            session.execute(sa.insert(model), [{"text": "a"}, {"text": "b"}])
            session.execute(sa.insert(model).values(text="c"))
        with factory.begin() as session:
            objects = session.scalars(sa.select(model).order_by(model.id)).all()
            assert {o.changed for o in objects} == {clock.now}
            clock.advance()
            session.execute(sa.update(model).where(model.text != "b").values(text="b"))
            if model is Note:
                assert [o.changed == clock.now for o in objects] == [True, False, True]
            assert objects[0].change_info == {"user_id": "u", "remote_addr": None}
        with factory() as session, pytest.raises(ChrononautException):
            session.bulk_insert_mappings(sa.inspect(model), [{"text": "x"}])
