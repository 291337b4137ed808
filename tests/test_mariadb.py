"""What MariaDB needs: its way to be told the records, its clock, and its old snapshots."""

import enum
import itertools
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import (
    StaleVersionError,
    Versioned,
    append_change_info,
    extra_change_info,
    history_class,
    versioned_session,
)
from chrononaut.unsafe import suppress_versioning
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements

mariadb = pytest.mark.backends("mariadb")  # only there a read may be older than what is committed

AWKWARD = "é😀 \\ \" ' % %s {} \u2028 \\u0041 '); DROP"


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@pytest.fixture
def user(base: type[DeclarativeBase], engine: sa.Engine) -> type[Any]:
    """A model whose application chooses the keys."""

    class User(Versioned, base):
        __tablename__ = "appuser"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        name: Mapped[str | None] = mapped_column(sa.String(100))

    base.metadata.create_all(engine)
    return User


KEYS: dict[str, tuple[Callable[[], Any], list[Any]]] = {
    "integer": (sa.Integer, [3, 1, 2]),
    "big": (sa.BigInteger, [2**62 + 1, -(2**62), 2**62]),
    "text": (lambda: sa.String(255), ["b", AWKWARD, '"quoted"', "[1]", "1e3", "null"]),
    "collated": (lambda: sa.String(255, collation="utf8mb4_unicode_ci"), ["b", AWKWARD]),
    "uuid": (sa.Uuid, [uuid.UUID(int=3), uuid.UUID(int=1), uuid.uuid4()]),
    "uuid-text": (lambda: sa.Uuid(native_uuid=False), [uuid.UUID(int=3), uuid.UUID(int=1), uuid.uuid4()]),
    "bytes": (lambda: sa.LargeBinary(16).with_variant(sa.BINARY(16), "mariadb"), [b"b" * 16, bytes(range(240, 256))]),
    "date": (sa.Date, [date(2024, 2, 29), date(1999, 1, 1)]),
    "decimal": (lambda: sa.Numeric(20, 4), [Decimal("1.5"), Decimal("123456789012345.6789")]),
    "enum": (lambda: sa.Enum(Color, native_enum=False), [Color.BLUE, Color.RED]),
    "float": (lambda: sa.Double, [1.5, 2.25]),
}


def _sortable(key: Any) -> Any:
    return key.value if isinstance(key, Color) else key


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("is_composite", [False, True], ids=["single", "composite"])
def test_keys_of_every_type_find_their_rows(
    kind: str,
    is_composite: bool,
    base: type[DeclarativeBase],
    engine: sa.Engine,
    session_factory: sessionmaker[Session],
) -> None:
    """Records changed in one flush are found by keys of any type, alone or beside another column."""
    make_type, keys = KEYS[kind]
    if kind in {"collated", "decimal"} and engine.dialect.name != "mariadb":
        pytest.skip("the collation is MariaDB's, and SQLite has no decimals")

    class Thing(Versioned, base):
        __tablename__ = "thing"
        id: Mapped[Any] = mapped_column(make_type(), primary_key=True, autoincrement=False)
        if is_composite:
            part: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        name: Mapped[str] = mapped_column(sa.String(20))

    base.metadata.create_all(engine)
    with session_factory.begin() as session:
        more = {"part": 7} if is_composite else {}
        session.add_all(Thing(id=key, name="old", **more) for key in keys)
    with session_factory.begin() as session:
        for thing in session.scalars(sa.select(Thing)):
            thing.name = "new"
    with session_factory() as session:
        history: Any = history_class(Thing)
        rows = session.scalars(sa.select(history).where(history.operation == "update")).all()
        assert sorted(map(_sortable, (row.id for row in rows))) == sorted(map(_sortable, keys))
        assert {row.name for row in rows} == {"old"}
        assert all(row.began is not None for row in rows)


@mariadb
@pytest.mark.parametrize("kind", [name for name in KEYS if name not in {"enum", "float"}])
def test_primary_key_index_is_used(
    kind: str,
    base: type[DeclarativeBase],
    engine: sa.Engine,
    session_factory: sessionmaker[Session],
    statements: RecordStatements,
) -> None:
    """The copy looks up each wanted record by its key, whatever its type, and locks no other."""
    make_type, keys = KEYS[kind]

    class Thing(Versioned, base):
        __tablename__ = "thing"
        id: Mapped[Any] = mapped_column(make_type(), primary_key=True, autoincrement=False)
        name: Mapped[str] = mapped_column(sa.String(20))

    base.metadata.create_all(engine)
    with session_factory.begin() as session:
        session.add_all(Thing(id=key, name="old") for key in keys)
    with session_factory() as session:
        for thing in session.scalars(sa.select(Thing)):
            thing.name = "new"
        with statements() as log:
            session.flush()
        (copy,) = log.matching("json_table")
        plan = session.connection().exec_driver_sql(f"EXPLAIN {copy.sql}", copy.parameters).mappings().all()
    used = {row["table"]: (row["type"], row["key"]) for row in plan}
    assert used["thing"] == used["before"] == ("eq_ref", "PRIMARY")


def test_change_info_text_is_kept_as_it_is(user: type[Any], session_factory: sessionmaker[Session]) -> None:
    """Change info comes back as the same dict, encoded once, however it was sent."""
    with session_factory.begin() as session:
        session.add_all(user(id=number, name="old") for number in range(4))
    with session_factory.begin() as session:
        records = session.scalars(sa.select(user).order_by(user.id)).all()
        for number, record in enumerate(records[:3]):
            record.name = AWKWARD
            if number:
                append_change_info(record, note=AWKWARD, number=number, deep={"list": [None, True, 1.5, AWKWARD]})
    with extra_change_info(note=AWKWARD), session_factory.begin() as session:
        record = session.get_one(user, 3)
        record.name = AWKWARD
    with session_factory() as session:
        infos = [session.get_one(user, number).versions()[0].change_info for number in range(4)]
        assert infos[0] == {"user_id": None, "remote_addr": None}
        assert infos[1]["extra"] == {"note": AWKWARD, "number": 1, "deep": {"list": [None, True, 1.5, AWKWARD]}}
        assert infos[2]["extra"]["number"] == 2
        assert infos[3]["extra"] == {"note": AWKWARD}
        assert session.get_one(user, 0).name == AWKWARD


@mariadb
def test_change_info_is_a_json_object(user: type[Any], session_factory: sessionmaker[Session]) -> None:
    """The database's own JSON functions can read it, so it is not a JSON string that holds JSON."""
    with session_factory.begin() as session:
        session.add(user(id=1, name="old"))
    with session_factory() as session:
        text = session.scalar(sa.text("SELECT change_info FROM appuser_history"))
        assert json.loads(text) == {"user_id": None, "remote_addr": None}
        assert session.scalar(sa.text("SELECT json_type(change_info) FROM appuser_history")) == "OBJECT"


@mariadb
def test_instant_is_the_databases_and_costs_one_round_trip(
    user: type[Any], session_factory: sessionmaker[Session], statements: RecordStatements, engine: sa.Engine
) -> None:
    """Each transaction asks the clock once; the session's time zone does not matter."""
    with engine.connect() as connection:
        connection.exec_driver_sql("SET time_zone = '-11:00'")
        with Session(connection) as inner:
            versioned_session(inner)
            with statements(connection, transaction_control=True) as log:
                for number in range(3):
                    inner.add(user(id=number))
                    inner.flush()
            at = inner.scalar(sa.text("SELECT utc_timestamp(6)")).replace(tzinfo=timezone.utc)
            births = inner.scalars(sa.select(history_class(user).changed)).all()
    assert len(log.matching("utc_timestamp")) == 1
    assert len(set(births)) == 1
    assert births[0].tzinfo is not None
    assert timedelta(0) <= at - births[0] < timedelta(minutes=10)  # not hours: another zone


def test_instants_keep_their_microseconds(user: type[Any], engine: sa.Engine, clock: Clock) -> None:
    """Points in time are stored and compared to the microsecond."""
    factory = versioned_session(sessionmaker(engine), clock=clock)
    clock.now = datetime(2024, 3, 31, 1, 59, 59, 999_999, tzinfo=timezone.utc)
    with factory.begin() as session:
        session.add(user(id=1, name="one"))
    began = clock.now
    changed = clock.advance(0.000_001)
    with factory.begin() as session:
        session.get_one(user, 1).name = "two"
    with factory() as session:
        record = session.get_one(user, 1)
        (row,) = record.versions()
        assert (row.began, row.changed) == (began, changed)
        assert record.version_at(began) is row
        assert record.version_at(changed) is record
        assert record.version_at(began - timedelta(microseconds=1)) is None


def test_time_never_goes_back_along_a_record(user: type[Any], engine: sa.Engine, clock: Clock) -> None:
    """A state whose end the clock puts before its beginning has no length."""
    factory = versioned_session(sessionmaker(engine), clock=clock)
    with factory.begin() as session:
        session.add_all([user(id=1), user(id=2)])
    began = clock()
    clock.advance(-60)
    with factory.begin() as session:
        for record in session.scalars(sa.select(user)):
            record.name = "new"
    with factory.begin() as session:
        session.delete(session.get_one(user, 1))
    with factory.begin() as session:
        session.add(user(id=1))
    with factory() as session:
        rows = session.scalars(sa.select(history_class(user))).all()
        assert {row.changed for row in rows} == {began}


def test_births_are_sent_at_once(
    user: type[Any], session_factory: sessionmaker[Session], statements: RecordStatements
) -> None:
    """Many births cost one executemany, which the driver can send as one statement."""
    with session_factory() as session:
        session.add_all(user(id=number) for number in range(50))
        with statements() as log:
            session.flush()
    (births,) = log.matching("into appuser_history")
    assert births.executemany
    assert len(births.parameters) == 50


@mariadb
def test_driver_sends_births_as_one_statement(user: type[Any], session_factory: sessionmaker[Session]) -> None:
    """The statement has the plain form that PyMySQL joins into one with many rows."""
    with session_factory() as session:
        session.add(user(id=-1))
        session.flush()
        questions = sa.text("SHOW SESSION STATUS LIKE 'Com_insert'")
        before = int(session.execute(questions).one()[1])
        session.add_all(user(id=number) for number in range(50))
        session.flush()
        assert int(session.execute(questions).one()[1]) - before == 2


# --- two connections, step by step


@pytest.fixture(params=["REPEATABLE READ", "READ COMMITTED"])
def two(request: pytest.FixtureRequest, engine: sa.Engine) -> Iterator[tuple[Session, Session]]:
    """Two sessions at the same isolation."""
    factory = versioned_session(sessionmaker(engine.execution_options(isolation_level=request.param)))
    with ExitStack() as stack:
        yield stack.enter_context(factory()), stack.enter_context(factory())


@pytest.fixture
def stored(user: type[Any], session_factory: sessionmaker[Session]) -> type[Any]:
    """The model, with two records in the database."""
    with session_factory.begin() as session:
        session.add_all([user(id=1, name="one"), user(id=2, name="two")])
    return user


def history_of(factory: sessionmaker[Session], model: type[Any], key: Any) -> list[tuple[int, str, str | None]]:
    """Return version, operation and name of all history rows of a key, and check that the times join up."""
    history: Any = history_class(model)
    with factory() as session:
        rows = session.scalars(sa.select(history).where(history.id == key).order_by(history.version)).all()
        for row, following in itertools.pairwise(rows):
            assert following.began == row.changed
        return [(row.version, row.operation, row.name) for row in rows]


@mariadb
def test_began_is_the_end_that_another_wrote_after_our_first_read(
    stored: type[Any], two: tuple[Session, Session], session_factory: sessionmaker[Session]
) -> None:
    """A record that is first touched after another changed it continues that history, old snapshot or not."""
    one, other = two
    one.scalars(sa.select(stored.name).where(stored.id == 2)).all()  # the snapshot is of now
    other.get_one(stored, 1).name = "other"
    other.commit()
    expired = one.get(stored, 1)
    assert expired is not None
    one.expire(expired)
    expired.name = "mine"  # unseen: there is nothing to be stale against
    one.commit()
    assert history_of(session_factory, stored, 1) == [
        (-1, "insert", None),
        (0, "update", "one"),
        (1, "update", "other"),
    ]


@mariadb
def test_stale_record_is_refused_with_the_version_that_is_committed(
    stored: type[Any], two: tuple[Session, Session], session_factory: sessionmaker[Session]
) -> None:
    """The error names what the database holds now, not what our snapshot shows; nothing is written."""
    one, other = two
    mine = one.scalars(sa.select(stored).order_by(stored.id)).all()
    other.get_one(stored, 2).name = "other"
    other.commit()
    for record in mine:
        record.name = "mine"
    with pytest.raises(StaleVersionError) as caught:
        one.flush()
    assert (caught.value.key, caught.value.expected, caught.value.found) == ((2,), 0, 1)
    one.rollback()
    mine[1].name = "again"
    one.commit()
    assert history_of(session_factory, stored, 1) == [(-1, "insert", None)]
    assert [row[0] for row in history_of(session_factory, stored, 2)] == [-1, 0, 1]


@mariadb
def test_record_that_another_deleted_is_stale(stored: type[Any], two: tuple[Session, Session]) -> None:
    """A record that is gone is found to be gone, although our snapshot still shows it."""
    one, other = two
    mine = one.get_one(stored, 1)
    other.delete(other.get_one(stored, 1))
    other.commit()
    mine.name = "mine"
    with pytest.raises(StaleVersionError) as caught:
        one.flush()
    assert caught.value.found is None


@mariadb
def test_snapshot_isolation_is_passed_on(
    stored: type[Any], session: Session, session_factory: sessionmaker[Session]
) -> None:
    """Where MariaDB itself refuses to change what others changed, its own error comes, and nothing is written."""
    session.execute(sa.text("SET SESSION innodb_snapshot_isolation = ON"))
    session.commit()
    mine = session.scalars(sa.select(stored).order_by(stored.id)).all()
    with session_factory.begin() as other:
        other.get_one(stored, 2).name = "other"
    for record in mine:
        record.name = "mine"
    with pytest.raises(OperationalError, match="Record has changed since last read"):
        session.flush()
    session.rollback()
    assert history_of(session_factory, stored, 1) == [(-1, "insert", None)]


@mariadb
@pytest.mark.parametrize("with_neighbour", [False, True], ids=["alone", "among others"])
@pytest.mark.parametrize("has_birth", [True, False], ids=["birth", "suppressed"])
def test_key_that_another_used_meanwhile_goes_on_counting(
    stored: type[Any],
    two: tuple[Session, Session],
    session_factory: sessionmaker[Session],
    with_neighbour: bool,
    has_birth: bool,
) -> None:
    """A key that was used and given up after our snapshot continues after the history that it has."""
    one, other = two
    one.scalars(sa.select(history_class(stored))).all()  # the snapshot is of now
    other.get_one(stored, 1).name = "other"
    other.flush()
    other.delete(other.get_one(stored, 1))
    other.commit()
    with ExitStack() as stack:
        if not has_birth:
            stack.enter_context(suppress_versioning())
        mine = stored(id=1, name="mine")
        one.add(mine)
        if with_neighbour:
            one.add_all([stored(id=0, name="neighbour"), stored(id=3, name="neighbour")])
        one.flush()
    assert mine.version == (3 if has_birth else 2)
    mine.name = "changed"
    one.commit()
    rows = history_of(session_factory, stored, 1)
    assert [row[0] for row in rows] == list(range(-1, len(rows) - 1))
    assert rows[-1] == (len(rows) - 2, "update", "mine")
    if with_neighbour:
        assert [row[0] for row in history_of(session_factory, stored, 3)] == ([-1] if has_birth else [])


@mariadb
def test_inserting_chosen_keys_side_by_side_does_not_deadlock(
    stored: type[Any], two: tuple[Session, Session], session_factory: sessionmaker[Session]
) -> None:
    """Two transactions that insert neighbouring keys do not wait for each other."""
    one, other = two
    for session in two:
        session.connection().exec_driver_sql("SET SESSION innodb_lock_wait_timeout = 2")
    for number in range(0, 10, 2):
        one.add(stored(id=100 + number))
        one.flush()
        other.add(stored(id=101 + number))
        other.flush()
    one.add_all(stored(id=200 + number) for number in range(0, 10, 2))
    one.flush()
    other.add_all(stored(id=201 + number) for number in range(0, 10, 2))
    other.flush()
    one.commit()
    other.commit()
    with session_factory() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(history_class(stored))) == 22


@mariadb
def test_changing_side_by_side_does_not_wait(stored: type[Any], two: tuple[Session, Session]) -> None:
    """Two transactions that change different records of one table do not wait for each other."""
    for session in two:
        session.connection().exec_driver_sql("SET SESSION innodb_lock_wait_timeout = 2")
    one, other = two
    with versioned_session(Session(one.get_bind())) as session:
        session.add_all(stored(id=number, name="old") for number in range(10, 20))
        session.commit()
    for text in ("a", "b", "c"):
        for session, keys in ((one, range(10, 15)), (other, range(15, 20))):
            for number in keys:
                session.get_one(stored, number).name = text
            session.flush()
    one.commit()
    other.commit()


def test_threads_lose_no_history(user: type[Any], engine: sa.Engine, session_factory: sessionmaker[Session]) -> None:
    """Threads that change the same records end each with a version or a refusal; history has no gap."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer")
    with session_factory.begin() as session:
        session.add_all(user(id=number, name="old") for number in range(5))
    written = [0] * 4

    def work(worker: int) -> None:
        for attempt in range(15):
            with session_factory() as session:
                try:
                    for record in session.scalars(sa.select(user)).all():
                        record.name = f"{worker}:{attempt}"
                    session.commit()
                    written[worker] += 1
                except (StaleVersionError, OperationalError):
                    session.rollback()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(written) > 0
    for key in range(5):
        rows = history_of(session_factory, user, key)
        assert [row[0] for row in rows] == list(range(-1, sum(written)))


# --- tables


def test_wide_tables_fit(
    base: type[DeclarativeBase], engine: sa.Engine, session_factory: sessionmaker[Session]
) -> None:
    """Keys and indexes of long texts, and long names, are within the limits; columns of many types are copied."""
    long_name = "a_name_so_long_that_its_history_needs_a_shorter"

    class Parent(Versioned, base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Wide(Versioned, base):
        __tablename__ = long_name
        one: Mapped[str] = mapped_column(sa.String(255), primary_key=True)
        two: Mapped[str] = mapped_column(sa.String(255), primary_key=True)
        three: Mapped[str] = mapped_column(sa.String(255), primary_key=True)
        color: Mapped[Color] = mapped_column(index=True)
        email: Mapped[str] = mapped_column(sa.String(255), unique=True)
        parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("parent.id", ondelete="SET NULL"), index=True)
        flag: Mapped[bool] = mapped_column(default=True)
        data: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
        body: Mapped[bytes]
        long_text: Mapped[str] = mapped_column(sa.Text)
        price: Mapped[Decimal] = mapped_column(sa.String(20))
        at: Mapped[datetime] = mapped_column(sa.TIMESTAMP)
        __table_args__ = (sa.Index("ix_of_" + long_name, "one", "email", "color"),)

    base.metadata.create_all(engine)
    values: dict[str, Any] = {
        "color": Color.RED,
        "flag": False,
        "data": {"text": AWKWARD, "list": [1, None, {}], "empty": ""},
        "body": bytes(range(256)),
        "long_text": AWKWARD * 500,
        "price": "1.50",
        "at": datetime(2024, 3, 31, 2, 30),
    }
    with session_factory.begin() as session:
        session.add(Parent(id=1))
        session.flush()
        for name in ("a", "b"):
            session.add(Wide(one=name, two=AWKWARD, three="", email=name, parent_id=1, **values))
    with session_factory.begin() as session:
        for wide in session.scalars(sa.select(Wide)):
            wide.flag, wide.data, wide.color, wide.parent_id = True, {}, Color.BLUE, None
    with session_factory.begin() as session:
        session.delete(session.get_one(Parent, 1))
    with session_factory() as session:
        for wide in session.scalars(sa.select(Wide)):
            (row,) = wide.versions()
            assert {name: getattr(row, name) for name in values} == values
            assert (row.two, row.three, row.parent_id) == (AWKWARD, "", 1)


def test_joined_inheritance_is_copied_in_one_flush(
    base: type[DeclarativeBase], engine: sa.Engine, session_factory: sessionmaker[Session]
) -> None:
    """Both halves of several records are copied, with chosen text keys."""

    class Animal(Versioned, base):
        __tablename__ = "animal"
        name: Mapped[str] = mapped_column(sa.String(50), primary_key=True)
        kind: Mapped[str] = mapped_column(sa.String(10))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

    class Dog(Animal):
        __tablename__ = "dog"
        name: Mapped[str] = mapped_column(sa.ForeignKey("animal.name"), primary_key=True)
        trick: Mapped[str] = mapped_column(sa.String(50))
        __mapper_args__ = {"polymorphic_identity": "dog"}

    base.metadata.create_all(engine)
    with session_factory.begin() as session:
        session.add_all(Dog(name=name, trick="sit") for name in ("Rex", "Fido", AWKWARD))
    with session_factory.begin() as session:
        for dog in session.scalars(sa.select(Dog)):
            dog.trick = "roll"
    with session_factory.begin() as session:
        for dog in session.scalars(sa.select(Dog)):
            assert [row.trick for row in dog.versions()] == ["sit"]
            session.delete(dog)
    with session_factory.begin() as session:
        session.add_all(Dog(name=name, trick="again") for name in ("Rex", "Fido"))
    with session_factory() as session:
        assert {dog.version for dog in session.scalars(sa.select(Dog))} == {3}


def test_generated_keys_are_not_looked_up(
    base: type[DeclarativeBase], engine: sa.Engine, session_factory: sessionmaker[Session], statements: RecordStatements
) -> None:
    """A key that the server generates was never used, so its history is not asked for."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite uses keys again")

    class Thing(Versioned, base):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)

    base.metadata.create_all(engine)
    with session_factory() as session:
        session.add(Thing())
        session.flush()
        session.add_all([Thing(), Thing()])
        with statements() as log:
            session.flush()
    assert not log.matching("from thing_history")
