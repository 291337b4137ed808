"""History tables: indexes, names, schemas, binds, and keys of every type."""

import datetime as dt
import uuid
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import Versioned, history_class, versioned_session
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements


class Code(sa.types.TypeDecorator[int]):
    """An integer that is stored as text."""

    impl = sa.String(20)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else f"N-{value}"

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> int | None:
        return None if value is None else int(value[2:])


KEYS: dict[str, tuple[sa.types.TypeEngine[Any], list[Any]]] = {
    "text": (sa.String(20), ["", "007", "1", 'quo"ted', "naïve ключ", "a\\b", "new\nline", "1e5"]),
    "unbounded-text": (sa.Text().with_variant(sa.String(20), "mysql", "mariadb"), ["7", "07", "x"]),
    "big-integer": (sa.BigInteger(), [0, -1, 2**62, -(2**62), 2**53 + 1]),
    "date": (sa.Date(), [dt.date(2024, 1, 1), dt.date(1, 1, 1), dt.date(9999, 12, 31)]),
    "datetime": (
        sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb"),
        [dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 1, 0, 0, 0, 1)],
    ),
    "time": (
        sa.Time().with_variant(mysql.TIME(fsp=6), "mysql", "mariadb"),
        [dt.time(0, 0), dt.time(23, 59, 59, 999999)],
    ),
    "uuid": (sa.Uuid(), [uuid.UUID(f"{n}2345678-1234-4234-8234-1234567890ab") for n in (0, 1, 9)]),
    "text-uuid": (
        sa.Uuid(native_uuid=False),
        [uuid.UUID(f"{n}2345678-1234-4234-8234-123456789012") for n in (0, 1, 9)],
    ),
    "numeric": (sa.Numeric(20, 5), [Decimal("1.5"), Decimal("-0.00001"), Decimal("123456789.12345")]),
    "float": (sa.Double(), [1.5, -0.25, 1e300, 0.1]),
    "bytes": (sa.LargeBinary().with_variant(sa.VARBINARY(20), "mysql", "mariadb"), [b"", b"\x00\xff", b"abc"]),
    "boolean": (sa.Boolean(), [True, False]),
    "enum": (sa.Enum("a", "b b", "c'", name="letters"), ["a", "b b", "c'"]),
    "decorated": (Code(), [1, 2, 30]),
    "interval": (sa.Interval(), [dt.timedelta(seconds=1), dt.timedelta(days=400, seconds=1)]),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_every_type(kind: str, engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """Records are found again by a key of any type: many in a flush, one alone, deleted, and born again."""
    type_, keys = KEYS[kind]

    class Record(Versioned, base):
        __tablename__ = "record"
        key = mapped_column(type_, primary_key=True, autoincrement=False)
        value: Mapped[int] = mapped_column(default=0)

    base.metadata.create_all(engine)
    session.add_all(Record(key=key) for key in keys)
    session.commit()
    records = session.scalars(sa.select(Record)).all()
    assert len(records) == len(keys)
    for record in records:
        record.value = 1
    session.commit()
    records[0].value = 2
    session.commit()
    assert [[row.value for row in record.versions()] for record in records] == [[0, 1]] + [[0]] * (len(keys) - 1)
    assert all(record.versions()[0].key == record.key for record in records)
    for record in records:
        session.delete(record)
    session.commit()
    session.add_all(Record(key=key) for key in keys)
    session.commit()
    assert sorted(session.scalars(sa.select(Record.version))) == [3] * (len(keys) - 1) + [4]


def test_composite_keys_of_text_date_and_uuid(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase], statements: RecordStatements
) -> None:
    """Records with a key of several parts of several types are copied by one statement."""

    class Booking(Versioned, base):
        __tablename__ = "booking"
        room: Mapped[str] = mapped_column(sa.String(10), primary_key=True)
        day: Mapped[dt.date] = mapped_column(primary_key=True)
        guest: Mapped[uuid.UUID] = mapped_column(primary_key=True)
        note: Mapped[str] = mapped_column(default="")

    base.metadata.create_all(engine)
    bookings = [
        Booking(room=f"0{room}", day=dt.date(2024, 1, 1 + day), guest=uuid.UUID(int=room * day))
        for room in range(5)
        for day in range(5)
    ]
    session.add_all(bookings)
    session.commit()
    for booking in bookings:
        booking.note = booking.room
    with statements() as log:
        session.flush()
    assert log.verbs == ["INSERT", "UPDATE"]
    session.commit()
    assert all([row.note for row in booking.versions()] == [""] for booking in bookings)
    key = bookings[0].room, bookings[0].day, bookings[0].guest
    session.delete(bookings[0])
    session.commit()
    session.add(Booking(room=key[0], day=key[1], guest=key[2]))
    session.commit()
    assert session.get_one(Booking, key).version == 3


def index_names(engine: sa.Engine, table: str) -> dict[str, list[Any]]:
    return {str(index["name"]): index["column_names"] for index in sa.inspect(engine).get_indexes(table)}


def test_indexes_are_copied_as_plain_ones(engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """History gets the live table's indexes as plain ones, but not those that are disabled or need hidden columns."""

    class User(Versioned, base):
        __tablename__ = "appuser"
        __chrononaut_disable_indices__ = ["phone", "ix_two"]
        __chrononaut_hidden__ = ["password"]
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str] = mapped_column(sa.String(50), index=True, unique=True)
        phone: Mapped[str] = mapped_column(sa.String(50), index=True)
        first: Mapped[str] = mapped_column(sa.String(50))
        last: Mapped[str] = mapped_column(sa.String(50))
        password: Mapped[str] = mapped_column(sa.String(50), index=True)
        __table_args__ = (
            sa.Index("ix_names", "last", "first", unique=True),
            sa.Index("ix_two", "first", "last"),
            sa.Index("ix_desc", last.desc()),
        )

    base.metadata.create_all(engine)
    assert index_names(engine, "appuser_history") == {
        "ix_appuser_history_changed": ["changed"],
        "ix_appuser_history_email": ["email"],
        "ix_desc_history": ["last"],
        "ix_names_history": ["last", "first"],
    }
    assert not any(index["unique"] for index in sa.inspect(engine).get_indexes("appuser_history"))


@pytest.mark.backends("sqlite-file", "sqlite-memory", "postgresql")  # MariaDB has no functional indexes
def test_functional_and_partial_indexes_are_copied(engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """Indexes over expressions, and partial ones, are moved to the history table's columns."""

    class User(Versioned, base):
        __tablename__ = "appuser"
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str] = mapped_column("e mail", sa.String(50))
        active: Mapped[bool]
        __table_args__ = (
            sa.Index("ix_lower", sa.func.lower(email), unique=True),
            sa.Index(
                "ix_partial",
                email,
                postgresql_where=email != "",
                sqlite_where=email != "",
                postgresql_include=["active"],
            ),
        )

    base.metadata.create_all(engine)
    (lower,) = [i for i in base.metadata.tables["appuser_history"].indexes if i.name == "ix_lower_history"]
    sql = str(sa.schema.CreateIndex(lower).compile(dialect=engine.dialect))
    assert "appuser_history" in sql
    assert "lower" in sql
    (partial,) = [i for i in base.metadata.tables["appuser_history"].indexes if i.name == "ix_partial_history"]
    assert "WHERE" in str(sa.schema.CreateIndex(partial).compile(dialect=engine.dialect))


def test_naming_conventions_hold_for_history(engine: sa.Engine, session: Session) -> None:
    """History tables under a naming convention get conventional names, all different from the live table's."""

    class Base(DeclarativeBase):
        metadata = sa.MetaData(
            naming_convention={
                "ix": "ix_%(table_name)s_%(column_0_N_name)s",
                "uq": "uq_%(table_name)s_%(column_0_name)s",
                "ck": "ck_%(table_name)s_%(constraint_name)s",
                "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
                "pk": "pk_%(table_name)s",
            }
        )

    class User(Versioned, Base):
        __tablename__ = "appuser"
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str] = mapped_column(sa.String(50), index=True, unique=True)
        active: Mapped[bool] = mapped_column(sa.Boolean(create_constraint=True, name="active"))
        kind: Mapped[str] = mapped_column(sa.Enum("a", "b", native_enum=False, create_constraint=True, name="kind"))
        boss_id: Mapped[int | None] = mapped_column(sa.ForeignKey("appuser.id"), index=True)

    Base.metadata.create_all(engine)
    assert "ix_appuser_history_email" in index_names(engine, "appuser_history")
    inspector = sa.inspect(engine)
    assert not inspector.get_check_constraints("appuser_history")
    assert not inspector.get_foreign_keys("appuser_history")
    user = User(email="a", active=True, kind="a")
    session.add(user)
    session.commit()
    user.active, user.kind = False, "b"
    session.commit()
    assert [(row.active, row.kind) for row in user.versions()] == [(True, "a")]
    Base.registry.dispose()


def make_schemas(engine: sa.Engine, *names: str) -> None:
    """Make schemas: on SQLite, attached databases."""
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def _attach(connection: Any, _record: object) -> None:
            for name in names:
                connection.execute(f"ATTACH ':memory:' AS {name}")

        engine.dispose()
        return
    with engine.begin() as connection:
        for name in names:
            connection.execute(sa.schema.CreateSchema(name))


@pytest.mark.backends("sqlite-memory", "postgresql")  # a database attached in memory is gone with its connection
def test_the_same_table_name_in_two_schemas(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """Tables of one name in several schemas have separate histories beside them."""
    make_schemas(engine, "one", "two")

    class Plain(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column(sa.String(10), index=True)

    class One(Versioned, base):
        __tablename__ = "record"
        __table_args__ = {"schema": "one"}
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column(sa.String(10), index=True)

    class Two(Versioned, base):
        __tablename__ = "record"
        __table_args__ = {"schema": "two"}
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column(sa.String(10), index=True)

    base.metadata.create_all(engine)
    records: list[Any] = [Plain(id=1, value="p"), One(id=1, value="1"), Two(id=1, value="2")]
    session.add_all(records)
    session.commit()
    for record in records:
        record.value += "!"
    session.commit()
    assert [[row.value for row in record.versions()] for record in records] == [["p"], ["1"], ["2"]]
    assert sa.inspect(history_class(One)).local_table.schema == "one"
    for record in records:
        session.delete(record)
    session.commit()


@pytest.mark.backends("sqlite-memory", "postgresql")
def test_a_schema_of_the_whole_metadata(engine: sa.Engine, session: Session) -> None:
    """History tables stand in the schema that the MetaData gives all tables."""
    make_schemas(engine, "app")

    class Base(DeclarativeBase):
        metadata = sa.MetaData(schema="app")

    class Record(Versioned, Base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column(sa.String(10))

    class Child(Record):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(sa.ForeignKey("app.record.id"), primary_key=True)
        more: Mapped[str] = mapped_column(sa.String(10))

    class Inside(Versioned, Base):
        __tablename__ = "inside"
        __table_args__ = {"schema": sa.schema.BLANK_SCHEMA}
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column(sa.String(10))

    assert {table.fullname for table in Base.metadata.sorted_tables if table.name.endswith("_history")} == {
        "app.record_history",
        "app.child_history",
        "inside_history",
    }
    Base.metadata.create_all(engine)
    child, inside = Child(value="a", more="b"), Inside(value="c")
    session.add_all([child, inside])
    session.commit()
    child.value = inside.value = "d"
    session.commit()
    assert [(row.value, row.more) for row in child.versions()] == [("a", "b")]
    assert [row.value for row in inside.versions()] == ["c"]
    Base.registry.dispose()


@pytest.mark.backends("sqlite-memory", "postgresql")
def test_schema_translate_map_moves_history_too(engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """A session under a schema_translate_map reads and writes history in the translated schemas."""
    make_schemas(engine, "tenant_a", "tenant_b")

    class Record(Versioned, base):
        __tablename__ = "record"
        __table_args__ = {"schema": "tenant"}
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column(sa.String(10))

    for tenant in ("tenant_a", "tenant_b"):
        with engine.connect() as connection:
            tenants = connection.execution_options(schema_translate_map={"tenant": tenant})
            base.metadata.create_all(tenants)
            connection.commit()
    for tenant in ("tenant_a", "tenant_b"):
        bind = engine.execution_options(schema_translate_map={"tenant": tenant})
        with versioned_session(sessionmaker(bind))() as session:
            records = [Record(id=n, value=tenant) for n in range(3)]
            session.add_all(records)
            session.commit()
            for record in records:
                record.value = "x"
            session.commit()
            assert [[row.value for row in record.versions()] for record in records] == [[tenant]] * 3
            assert session.scalar(sa.select(sa.func.count()).select_from(history_class(Record))) == 6


def test_several_binds_in_one_session(
    engine: sa.Engine, base: type[DeclarativeBase], clock: Clock, tmp_path: Any
) -> None:
    """Each model's history is written where its table is, and all share the transaction's instant."""
    other = sa.create_engine(f"sqlite:///{tmp_path / 'other.db'}")

    class Here(Versioned, base):
        __tablename__ = "here"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column(sa.String(10))

    class There(Versioned, base):
        __tablename__ = "there"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column(sa.String(10))

    tables = base.metadata.tables
    base.metadata.create_all(engine, [tables["here"], tables["here_history"]])
    base.metadata.create_all(other, [tables["there"], tables["there_history"]])
    binds: dict[Any, Any] = {Here: engine, There: other, history_class(Here): engine, history_class(There): other}
    with versioned_session(sessionmaker(binds=binds))() as session:
        here, there = Here(value="h"), There(value="t")
        session.add_all([here, there])
        session.commit()
        here.value = there.value = "x"
        session.commit()
        (one,), (two,) = here.versions(), there.versions()
        assert (one.value, two.value) == ("h", "t")
        assert one.changed == two.changed
    other.dispose()


def test_the_history_of_a_bound_class_is_found_where_its_table_is(
    engine: sa.Engine, base: type[DeclarativeBase]
) -> None:
    """A session that binds only the model reads its history from the same database."""

    class Here(Versioned, base):
        __tablename__ = "here"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column(sa.String(10))

    base.metadata.create_all(engine)
    for binds in ({Here: engine}, {base: engine}, {Here.__table__: engine}):
        with versioned_session(sessionmaker(binds=binds))() as session:
            here = Here(value="h")
            session.add(here)
            session.commit()
            here.value = "x"
            session.commit()
            assert [row.value for row in here.versions()] == ["h"]
            assert here.versions()[-1] is here.previous_version()


@pytest.mark.backends("postgresql")  # its own types
@pytest.mark.filterwarnings("ignore:.*does not refer to an OperatorClass")  # SQLAlchemy 2.1's own DOMAIN
def test_postgresql_keys_with_collation_domain_and_range(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """Keys with a collation, of a domain, of a range and of an address are found again."""

    class Record(Versioned, base):
        __tablename__ = "record"
        code: Mapped[str] = mapped_column(sa.String(10, collation="C"), primary_key=True)
        positive: Mapped[int] = mapped_column(
            postgresql.DOMAIN("positive", sa.Integer, check="VALUE > 0"), primary_key=True
        )
        during: Mapped[Any] = mapped_column(postgresql.INT4RANGE, primary_key=True)
        address: Mapped[Any] = mapped_column(postgresql.INET, primary_key=True)
        fixed: Mapped[str] = mapped_column(sa.CHAR(5), primary_key=True)
        value: Mapped[int]

    base.metadata.create_all(engine)
    records = [
        Record(
            code=f"c{n}",
            positive=n,
            during=postgresql.Range(n, n + 5),
            address=f"10.0.0.{n}",
            fixed=f"f{n}",
            value=0,
        )
        for n in range(1, 4)
    ]
    session.add_all(records)
    session.commit()
    session.expunge_all()
    records = list(session.scalars(sa.select(Record)))
    for record in records:
        record.value = 1
    session.commit()
    assert [[row.value for row in record.versions()] for record in records] == [[0]] * 3


@pytest.mark.backends("postgresql")  # its own types
def test_postgresql_array_keys(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """A key that is an array is taken whole."""

    class Node(Versioned, base):
        __tablename__ = "node"
        path: Mapped[tuple[int, ...]] = mapped_column(postgresql.ARRAY(sa.Integer, as_tuple=True), primary_key=True)
        value: Mapped[int]

    base.metadata.create_all(engine)
    nodes = [Node(path=(n, n), value=0) for n in range(3)]
    session.add_all(nodes)
    session.commit()
    for node in nodes:
        node.value = 1
    session.commit()
    assert [[row.value for row in node.versions()] for node in nodes] == [[0]] * 3
