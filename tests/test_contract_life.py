"""The lives of a record: birth, end, keys that come back, keys that change; and the time of it all."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import ChrononautException, Versioned, history_class, rationale, versioned_session
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements
from tests.models import Animal, Base, Dog, Setting, Team, User

TINY = timedelta(microseconds=1)


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


@pytest.fixture
def session_factory(engine: sa.Engine, clock: Clock) -> sessionmaker[Session]:
    """With a clock."""
    return versioned_session(sessionmaker(engine), clock=clock)


def chain(session: Session, model: type[Any] = Setting) -> list[tuple[Any, ...]]:
    """Version, operation, and what was there, of all history rows of a model."""
    history = history_class(model)
    what = {Setting: "value", User: "email"}[model]
    rows = session.scalars(sa.select(history).order_by(history.version))
    return [(row.version, row.operation, getattr(row, what)) for row in rows]


# --- birth and end


def test_birth_is_a_narrow_row(session: Session, clock: Clock) -> None:
    """Who created the record and when; of the data, the key alone."""
    with rationale("created"):
        session.add(User(id=1, email="a", name="n", settings={"a": 1}, login_count=3))
        session.commit()
    [row] = session.scalars(sa.select(history_class(User)))
    assert (row.id, row.version, row.operation, row.began, row.changed) == (1, -1, "insert", None, clock.now)
    assert (row.email, row.name, row.settings, row.biography, row.team_id) == (None, None, None, None, None)
    assert row.change_info["extra"] == {"rationale": "created"}
    assert session.get_one(User, 1).version == 0


def test_end_is_the_last_state(session: Session, clock: Clock) -> None:
    """With everything that was there."""
    born = clock.now
    session.add(Setting(name="x", value="1"))
    session.commit()
    clock.advance()
    session.delete(session.get_one(Setting, "x"))
    session.commit()
    history = history_class(Setting)
    [row] = session.scalars(sa.select(history).where(history.version == 0))
    assert (row.value, row.operation, row.began, row.changed) == ("1", "delete", born, clock.now)


def test_discriminator_is_in_the_birth_row(session: Session) -> None:
    """Polymorphic loading could not see it else."""
    session.add_all([Dog(id=1, name="rex"), Animal(id=2, name="it")])
    session.commit()
    rows = session.scalars(sa.select(history_class(Animal)).order_by(history_class(Animal).id)).all()
    assert [type(row) for row in rows] == [history_class(Dog), history_class(Animal)]
    assert [row.kind for row in rows] == ["dog", "animal"]


def test_model_that_does_not_track_inserts(
    session: Session, engine: sa.Engine, base: type[DeclarativeBase], statements: RecordStatements
) -> None:
    """No birth rows, and a new life goes on where the old one ended."""

    class Quiet(Versioned, base):
        __tablename__ = "quiet"
        __chrononaut_track_inserts__ = False
        id: Mapped[str] = mapped_column(sa.String(50), primary_key=True)
        value: Mapped[str] = mapped_column(sa.String(50))

    base.metadata.create_all(engine)
    history = history_class(Quiet)
    quiet = Quiet(id="x", value="1")
    session.add(quiet)
    session.commit()
    assert session.scalars(sa.select(history)).all() == []
    quiet.value = "2"
    session.commit()
    session.delete(quiet)
    session.commit()
    again = Quiet(id="x", value="3")
    session.add(again)
    session.commit()
    assert again.version == 2
    again.value = "4"
    session.commit()
    rows = session.scalars(sa.select(history).order_by(history.version)).all()
    assert [(row.version, row.value, row.operation) for row in rows] == [
        (0, "1", "update"),
        (1, "2", "delete"),
        (2, "3", "update"),
    ]


# --- keys that come back


def test_chosen_key_comes_back(session: Session, clock: Clock) -> None:
    """The absence between the lives is a state of its own, and numbers are contiguous."""
    for life in ("1", "2", "3"):
        setting = Setting(name="x", value=life)
        session.add(setting)
        session.commit()
        clock.advance()
        session.delete(setting)
        session.commit()
        clock.advance()
    assert chain(session) == [
        (-1, "insert", None),
        (0, "delete", "1"),
        (1, "insert", None),
        (2, "delete", "2"),
        (3, "insert", None),
        (4, "delete", "3"),
    ]
    history = history_class(Setting)
    rows = session.scalars(sa.select(history).order_by(history.version)).all()
    assert [row.began for row in rows[1:]] == [row.changed for row in rows[:-1]]
    assert rows[0].began is None


def test_many_keys_come_back_by_one_query(session: Session, statements: RecordStatements) -> None:
    """Numbering is not done one by one, and new keys among them are not mistaken."""
    for value in "12":
        session.add_all([Setting(name=f"s{n}", value=value) for n in range(30)])
        session.commit()
        for setting in session.scalars(sa.select(Setting)):
            session.delete(setting)
        session.commit()
    session.add_all([Setting(name=f"s{n}", value="3") for n in range(40)])
    with statements() as log:
        session.flush()
    assert len(log.matching("^SELECT")) == 1
    assert len(log) <= 4
    session.commit()
    for setting in session.scalars(sa.select(Setting)):
        assert setting.version == (4 if int(setting.name[1:]) < 30 else 0)


@pytest.mark.backends("sqlite-file", "sqlite-memory")  # the only database that gives a key twice
def test_sqlite_gives_a_key_again(session: Session) -> None:
    """The two records of one rowid do not collide."""
    first = User(email="a")
    session.add(first)
    session.commit()
    session.delete(first)
    session.commit()
    second = User(email="b")
    session.add(second)
    session.commit()
    assert (second.id, second.version) == (1, 2)
    second.email = "c"
    session.commit()
    assert chain(session, User) == [
        (-1, "insert", None),
        (0, "delete", "a"),
        (1, "insert", None),
        (2, "update", "b"),
    ]


def test_key_comes_back_in_the_transaction_of_its_end(session: Session, clock: Clock) -> None:
    """By another flush: the end, no time, and the birth."""
    setting = Setting(name="x", value="1")
    session.add(setting)
    session.commit()
    at = clock.advance()
    session.delete(setting)
    session.flush()
    again = Setting(name="x", value="2")
    session.add(again)
    session.commit()
    assert chain(session) == [(-1, "insert", None), (0, "delete", "1"), (1, "insert", None)]
    assert again.version == 2
    assert again.version_at(at) is again
    assert again.version_at(at - TINY) is again.versions()[0]


def test_replaced_in_one_flush_is_an_update(session: Session) -> None:
    """A delete and an add of one key, to SQLAlchemy and to history."""
    setting = Setting(name="x", value="1")
    session.add(setting)
    session.commit()
    session.delete(setting)
    session.add(again := Setting(name="x", value="2"))
    session.commit()
    assert chain(session) == [(-1, "insert", None), (0, "update", "1")]
    assert again.version == 1


def test_replaced_by_one_read_elsewhere_is_stale(session_factory: sessionmaker[Session], session: Session) -> None:
    """Replacing what somebody else has changed is refused like any other change."""
    session.add(Setting(name="x", value="1"))
    session.commit()
    with session_factory() as other:
        found = other.get_one(Setting, "x")
        other.commit()
        setting = session.get_one(Setting, "x")
        assert (found.value, setting.value) == ("1", "1")
        setting.value = "2"
        other.rollback()
        session.commit()
        other.delete(other.get_one(Setting, "x"))
        other.add(Setting(name="x", value="3"))
        other.commit()
    assert chain(session) == [(-1, "insert", None), (0, "update", "1"), (1, "update", "2")]


# --- keys that change


def test_changed_key_ends_one_history_and_starts_another(session: Session, clock: Clock) -> None:
    """The birth row says which key it came from."""
    setting = Setting(name="x", value="1")
    session.add(setting)
    session.commit()
    at = clock.advance()
    setting.name = "y"
    setting.value = "2"
    session.commit()
    history = history_class(Setting)
    rows = session.scalars(sa.select(history).order_by(history.name, history.version)).all()
    assert [(row.name, row.version, row.operation, row.value) for row in rows] == [
        ("x", -1, "insert", None),
        ("x", 0, "delete", "1"),
        ("y", -1, "insert", None),
    ]
    assert rows[2].change_info["previous_key"] == {"name": "x"}
    assert (setting.version, setting.versions()) == (0, [])
    assert setting.version_at(at) is setting
    assert setting.version_at(at - TINY) is None


def test_key_is_changed_to_one_that_was_used_before(session: Session) -> None:
    """And back again: each key has its own numbers."""
    setting = Setting(name="x", value="1")
    session.add(setting)
    session.commit()
    for name in ("y", "x", "y"):
        setting.name = name
        session.commit()
    assert setting.version == 2
    history = history_class(Setting)
    for name, expected in (("x", [-1, 0, 1, 2]), ("y", [-1, 0, 1])):
        query = sa.select(history.version).where(history.name == name).order_by(history.version)
        assert session.scalars(query).all() == expected


# --- time


def test_one_transaction_has_one_instant(session: Session, clock: Clock) -> None:
    """Whatever it does, over all its flushes and savepoints."""
    setting = Setting(name="x", value="0")
    session.add(setting)
    session.commit()
    at = clock.advance()
    setting.value = "1"
    session.flush()
    clock.advance()
    with session.begin_nested():
        session.add(User(id=1, email="a"))
    clock.advance()
    setting.value = "2"
    session.commit()
    assert {row.changed for row in setting.versions()} == {at}
    [birth] = session.scalars(sa.select(history_class(User)))
    assert birth.changed == at


def test_each_transaction_has_its_own_instant(engine: sa.Engine) -> None:
    """By the database's clock, in UTC; what came later is later."""
    with versioned_session(sessionmaker(engine))() as session:
        before = datetime.now(timezone.utc)
        setting = Setting(name="x", value="0")
        session.add(setting)
        session.commit()
        for value in "123":
            setting.value = value
            session.commit()
        after = datetime.now(timezone.utc)
        rows = setting.versions()
        instants = [rows[0].began, *(row.changed for row in rows)]
        assert None not in instants
        assert sorted(set(instants)) == instants  # type: ignore[type-var]
        assert before - timedelta(seconds=1) < instants[0] <= instants[-1] < after + timedelta(seconds=1)  # type: ignore[operator]


def test_instant_is_that_of_the_first_versioned_write(session: Session, clock: Clock) -> None:
    """Not when the transaction began, or read, or wrote something else."""
    session.add(Team(name="red"))
    session.flush()
    at = clock.advance()
    setting = Setting(name="x", value="0")
    session.add(setting)
    session.flush()
    clock.advance()
    session.commit()
    assert setting.version_at(at - TINY) is None
    assert setting.version_at(at) is setting


def test_time_never_goes_back_along_a_record(session: Session, clock: Clock) -> None:
    """A clock that does is overruled, for the record that it would turn round only."""
    born = clock.now
    setting = Setting(name="x", value="0")
    session.add(setting)
    session.commit()
    clock.advance(-60)
    setting.value = "1"
    session.add(Setting(name="y", value="0"))
    session.commit()
    [row] = setting.versions()
    assert (row.began, row.changed) == (born, born)
    assert setting.version_at(born) is setting
    assert setting.version_at(born - TINY) is None
    assert session.get_one(Setting, "y").version_at(born - timedelta(seconds=60)) is session.get_one(Setting, "y")
    session.delete(setting)
    session.commit()
    session.add(Setting(name="x", value="2"))
    session.commit()
    history = history_class(Setting)
    query = sa.select(history.changed).where(history.name == "x").order_by(history.version)
    assert session.scalars(query).all() == [born] * 4


def test_sessions_under_one_outer_transaction_see_time_pass(engine: sa.Engine) -> None:
    """As in a suite of tests that rolls back everything: each session has its own instant."""
    factory = versioned_session(sessionmaker(join_transaction_mode="create_savepoint"))
    with engine.connect() as connection:
        outer = connection.begin()
        instants = []
        with factory(bind=connection) as session:
            session.add(Setting(name="x", value="0"))
            session.commit()
            for value in "123":
                session.get_one(Setting, "x").value = value
                session.commit()
            instants += [row.changed for row in session.get_one(Setting, "x").versions()]
        with factory(bind=connection) as session:
            session.get_one(Setting, "x").value = "4"
            session.commit()
            rows = session.get_one(Setting, "x").versions()
            instants.append(rows[-1].changed)
        assert sorted(set(instants)) == instants
        assert len(instants) == 4
        outer.rollback()
    with factory(bind=engine) as session:
        assert session.get(Setting, "x") is None
        assert chain(session) == []


def test_sessions_under_one_outer_transaction_with_a_clock(engine: sa.Engine, clock: Clock) -> None:
    """The clock is asked by each transaction of each session."""
    factory = versioned_session(sessionmaker(join_transaction_mode="create_savepoint"), clock=clock)
    with engine.connect() as connection, connection.begin(), factory(bind=connection) as session:
        setting = Setting(name="x", value="0")
        session.add(setting)
        session.commit()
        expected = []
        for value in "123":
            expected.append(clock.advance())
            setting.value = value
            session.commit()
        assert [row.changed for row in setting.versions()] == expected


def test_rolled_back_savepoint_does_not_keep_its_instant_from_others(session: Session, clock: Clock) -> None:
    """The transaction's instant holds, or is taken anew; it is never after the work."""
    with pytest.raises(ZeroDivisionError), session.begin_nested():
        session.add(Setting(name="x"))
        session.flush()
        raise ZeroDivisionError
    clock.advance()
    setting = Setting(name="y", value="0")
    session.add(setting)
    session.commit()
    assert setting.version_at(clock.now) is setting


# --- the columns of history


def test_history_has_the_documented_columns() -> None:
    """The key and the tracked columns, nullable and plain, and five of ours."""
    table = Base.metadata.tables["appuser_history"]
    assert list(table.c.keys()) == [
        *("id", "email", "name", "settings", "biography", "team_id"),
        *("version", "began", "changed", "change_info", "operation"),
    ]
    assert [column.name for column in table.primary_key] == ["id", "version"]
    assert not table.foreign_keys
    assert not any(column.default or column.server_default or column.unique for column in table.c)
    assert {column.name for column in table.c if not column.nullable} == {
        *("id", "version", "changed", "change_info", "operation")
    }


def test_live_table_has_one_more_column(engine: sa.Engine) -> None:
    """``version``, zero by default in the database too."""
    version = Base.metadata.tables["appuser"].c.version
    assert not version.nullable
    assert version.server_default is not None
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO setting (name) VALUES ('x')"))
        assert connection.scalar(sa.text("SELECT version FROM setting")) == 0


@pytest.mark.parametrize("spelling", ["chrononaut", "version"])
@pytest.mark.parametrize("mixin_first", [True, False])
def test_options_in_both_spellings_and_orders(
    session: Session, engine: sa.Engine, base: type[DeclarativeBase], spelling: str, mixin_first: bool
) -> None:
    """The older names of the options mean the same."""
    options = {
        f"__{spelling}_untracked__": ["hits"],
        f"__{spelling}_hidden__": ["secret"],
        f"__{spelling}_tablename__": "thing_past",
    }
    members: dict[str, Any] = {
        "__tablename__": "thing",
        "__annotations__": {"name": Mapped[str], "hits": Mapped[int], "secret": Mapped[str]},
        "id": mapped_column(sa.Integer, primary_key=True),
        "name": mapped_column(sa.String(50), index=True),
        "hits": mapped_column(),
        "secret": mapped_column(sa.String(50)),
        "__chrononaut_disable_indices__": ["name"],
        **options,
    }
    Thing: Any = type("Thing", (Versioned, base) if mixin_first else (base, Versioned), members)
    table = base.metadata.tables["thing_past"]
    assert {"hits", "secret"}.isdisjoint(table.c.keys())
    assert {index.columns.keys()[0] for index in table.indexes} == {"changed"}
    base.metadata.create_all(engine)
    thing = Thing(id=1, name="a", hits=0, secret="s")
    session.add(thing)
    session.commit()
    thing.hits = 1
    session.commit()
    thing.secret = "t"
    session.commit()
    [row] = thing.versions()
    assert row.change_info["hidden_cols_changed"] == ["secret"]


@pytest.mark.parametrize("option", ["hidden", "untracked"])
@pytest.mark.parametrize("name", ["nothing", "id", "version"])
def test_option_that_names_what_it_cannot_is_refused(base: type[DeclarativeBase], option: str, name: str) -> None:
    """When the class is mapped, with what to do."""
    members: dict[str, Any] = {
        "__tablename__": "thing",
        "id": mapped_column(sa.Integer, primary_key=True),
        f"__chrononaut_{option}__": [name],
    }
    with pytest.raises(ChrononautException, match=name):
        type("Thing", (Versioned, base), members)
