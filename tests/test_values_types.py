"""Values of every type: history gives back what the record held."""

import datetime as dt
import enum
import ipaddress
import math
import uuid
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.mutable import MutableDict, MutableList
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.orm.attributes import flag_modified

from chrononaut import Versioned, history_class, versioned_session

UTC = dt.timezone.utc


class Mood(enum.Enum):
    GOOD = "fine"
    BAD = "awful"


VALUES: dict[str, tuple[sa.types.TypeEngine[Any], list[Any]]] = {
    "numeric": (sa.Numeric(20, 6), [Decimal("1.5"), Decimal("-0.000001"), Decimal("12345678901234.123456"), None]),
    "date": (sa.Date(), [dt.date(1, 1, 1), dt.date(9999, 12, 31), None]),
    "naive-datetime": (
        sa.DateTime().with_variant(sa.dialects.mysql.DATETIME(fsp=6), "mysql", "mariadb"),
        [dt.datetime(2024, 1, 1, 12, 30, 1, 123456), dt.datetime(1900, 1, 1), None],
    ),
    "time": (
        sa.Time().with_variant(sa.dialects.mysql.TIME(fsp=6), "mysql", "mariadb"),
        [dt.time(0), dt.time(23, 59, 59, 999999), None],
    ),
    "timedelta": (sa.Interval(second_precision=6), [dt.timedelta(0), dt.timedelta(5, 3, 7), None]),
    "uuid": (sa.Uuid(), [uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), None]),
    "text-uuid": (sa.Uuid(native_uuid=False, as_uuid=False), [str(uuid.UUID(int=5)), None, str(uuid.UUID(int=6))]),
    "native-enum": (sa.Enum(Mood, name="mood"), [Mood.GOOD, Mood.BAD, None]),
    "text-enum": (sa.Enum(Mood, name="mood", native_enum=False), [Mood.GOOD, Mood.BAD, None]),
    "checked-enum": (
        sa.Enum(Mood, name="mood", native_enum=False, create_constraint=True),
        [Mood.GOOD, Mood.BAD, None],
    ),
    "enum-by-value": (
        sa.Enum(Mood, name="mood", values_callable=lambda cls: [member.value for member in cls]),
        [Mood.GOOD, Mood.BAD, None],
    ),
    "string-enum": (sa.Enum("a", "b", name="letters"), ["a", "b", None]),
    "bytes": (sa.LargeBinary(), [b"", b"\x00\xff" * 1000, None, b"abc"]),
    "boolean": (sa.Boolean(), [True, False, None]),
    "checked-boolean": (sa.Boolean(create_constraint=True, name="is_checked"), [True, False, None]),
    "float": (sa.Double(), [0.1, -0.0, 1e-300, 1e300, None]),
    "big-integer": (sa.BigInteger(), [2**62, -(2**63), 0, None]),
    "small-integer": (sa.SmallInteger(), [1, -1, None]),
    "text": (sa.Text(), ["", " ", "naïve ключ 🐘", "quo'te\"s", "a" * 10000, None, "null"]),
    "fixed-text": (sa.CHAR(3), ["abc", "xyz", None]),
    "pickle": (sa.PickleType(), [{"a": (1, 2)}, [1], None]),
    "json": (sa.JSON(none_as_null=True), [{"a": [1, {"b": None}]}, [], {}, "", 0, "text", False, None]),
    "unicode": (sa.Unicode(20), ["", "é", None]),
}


def cycle(
    session: Session, engine: sa.Engine, base: Any, type_: Any, values: list[Any]
) -> tuple[Any, list[Any], list[Any]]:
    """Give a record one value after the other; return its class, what it read as each time, and what history says."""

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        value = mapped_column("the value", type_, nullable=True)

    base.metadata.create_all(engine)
    record = Record(value=values[0])
    session.add(record)
    session.commit()
    held = [record.value]
    for value in values[1:]:
        record.value = value
        session.commit()
        held.append(record.value)
    session.delete(record)
    session.commit()
    history = history_class(Record)
    query = sa.select(history).where(history.operation != "insert").order_by(history.version)
    return Record, held, [row.value for row in session.scalars(query)]


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_every_type(kind: str, engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """Each value that a record had is in its history, equal and of the same Python type."""
    type_, values = VALUES[kind]
    record, held, found = cycle(session, engine, base, type_, values)
    assert found == held
    assert len(found) == len(values)
    assert [type(value) for value in found] == [type(value) for value in held]
    history = history_class(record)
    if kind not in ("pickle", "json"):  # which databases do not compare
        assert session.scalars(sa.select(history).where(history.value == values[0])).first() is not None


def test_aware_datetimes_with_microseconds(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """Aware datetimes come back from history as from the record: as instants where the database knows zones."""
    values = [
        dt.datetime(2024, 6, 1, 12, 0, 0, 123456, tzinfo=dt.timezone(dt.timedelta(hours=5.75))),
        dt.datetime(2024, 6, 1, 12, 0, 0, 123456, tzinfo=UTC),
    ]

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        at: Mapped[dt.datetime] = mapped_column(
            sa.DateTime(timezone=True).with_variant(sa.dialects.mysql.DATETIME(fsp=6), "mysql", "mariadb")
        )

    base.metadata.create_all(engine)
    record = Record(at=values[0])
    session.add(record)
    session.commit()
    held = [record.at]
    record.at = values[1]
    session.commit()
    held.append(record.at)
    session.delete(record)
    session.commit()
    history = history_class(Record)
    query = sa.select(history.at).where(history.operation != "insert").order_by(history.version)
    assert session.scalars(query).all() == held


@pytest.mark.backends("sqlite-file", "sqlite-memory", "postgresql")  # MariaDB has neither
def test_not_a_number_and_infinity(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """Infinity is kept, NaN too where the database can hold it, and an untouched NaN is no change."""
    nan = math.nan if engine.dialect.name == "postgresql" else 0.5

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[float] = mapped_column(sa.Double())
        other: Mapped[int] = mapped_column(default=0)

    base.metadata.create_all(engine)
    record = Record(value=math.inf)
    session.add(record)
    session.commit()
    record.value = nan
    session.commit()
    record.other = 1
    session.commit()
    record.value = -math.inf
    session.commit()
    rows = record.versions()
    assert rows[0].value == math.inf
    assert all(math.isnan(row.value) if math.isnan(nan) else row.value == nan for row in rows[1:])
    assert len(rows) == 3
    differences = record.diff(rows[1], rows[2])
    assert differences["other"] == (0, 1)


def test_json_null_and_sql_null(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """A JSON null and an SQL NULL stay what they were in history."""

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[Any] = mapped_column(sa.JSON, nullable=True)

    base.metadata.create_all(engine)
    record = Record(value=sa.JSON.NULL)
    session.add(record)
    session.commit()
    record.value = sa.null()
    session.commit()
    record.value = {"a": 1}
    session.commit()
    table = base.metadata.tables["record_history"]
    is_null = sa.select(table.c.value.is_(None)).where(table.c.operation != "insert").order_by(table.c.version)
    assert [bool(value) for value in session.scalars(is_null)] == [False, True]
    assert [row.value for row in record.versions()] == [None, None]


@pytest.mark.parametrize("how", ["mutable", "flag", "replace"])
def test_nested_json_changed_in_place(
    how: str, engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A JSON value that is changed in place has its old value in history, not the new one."""
    type_: Any = MutableDict.as_mutable(sa.JSON()) if how == "mutable" else sa.JSON()

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[Any] = mapped_column(type_)
        items: Mapped[Any] = mapped_column(MutableList.as_mutable(sa.JSON()))

    base.metadata.create_all(engine)
    record = Record(value={"a": {"b": [1]}, "c": 1}, items=[1])
    session.add(record)
    session.commit()
    if how == "mutable":
        record.value["c"] = 2
    elif how == "flag":
        record.value["a"]["b"].append(2)
        flag_modified(record, "value")
    else:
        record.value = {**record.value, "c": 2}
    session.commit()
    record.items.append(2)
    session.commit()
    assert [(row.value, row.items) for row in record.versions()] == [
        ({"a": {"b": [1]}, "c": 1}, [1]),
        ({"a": {"b": [1, 2]}, "c": 1} if how == "flag" else {"a": {"b": [1]}, "c": 2}, [1]),
    ]
    row = record.versions()[0]
    row.value["c"] = 9
    session.expire(row)
    assert row.value["c"] == 1


def test_members_may_be_added_and_removed_later(engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """History of an enum outlives its members: old ones come back as text, new ones go in."""

    def models(*names: str) -> Any:
        class Base(DeclarativeBase):
            pass

        members = enum.Enum("Size", {name: name.lower() for name in names})

        class Shirt(Versioned, Base):
            __tablename__ = "shirt"
            id: Mapped[int] = mapped_column(primary_key=True)
            size: Mapped[Any] = mapped_column(sa.Enum(members, name="size"))
            kind: Mapped[Any] = mapped_column(sa.Enum(members, name="kind", native_enum=False), primary_key=True)

        return Base, Shirt, members

    before, Shirt, sizes = models("S", "M")
    before.metadata.create_all(engine)
    factory = versioned_session(sessionmaker(engine))
    with factory() as session:
        shirt = Shirt(id=1, size=sizes.S, kind=sizes.M)
        session.add(shirt)
        session.commit()
        shirt.size = sizes.M
        session.commit()
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # What a migration does that removes a member; history must not stand in its way.
            connection.exec_driver_sql("ALTER TYPE size RENAME TO old_size")
            connection.exec_driver_sql("CREATE TYPE size AS ENUM ('M', 'EXTRA_LARGE_AND_MORE')")
            connection.exec_driver_sql("ALTER TABLE shirt ALTER size TYPE size USING size::text::size")
            connection.exec_driver_sql("DROP TYPE old_size")
        elif connection.dialect.name != "sqlite":
            connection.exec_driver_sql("ALTER TABLE shirt MODIFY size ENUM('M', 'EXTRA_LARGE_AND_MORE')")
    after, Shirt, sizes = models("M", "EXTRA_LARGE_AND_MORE")
    with factory() as session:
        shirt = session.get_one(Shirt, (1, sizes.M))
        assert [row.size for row in shirt.versions()] == ["S"]
        shirt.size = sizes.EXTRA_LARGE_AND_MORE
        session.commit()
        assert [row.size for row in shirt.versions()] == ["S", sizes.M]
        shirt.size = sizes.M
        session.commit()
        assert shirt.previous_version().size is sizes.EXTRA_LARGE_AND_MORE
        history = history_class(Shirt)
        assert session.scalars(sa.select(history).where(history.size == sizes.M)).one().version == 1
    before.registry.dispose()
    after.registry.dispose()


def test_an_enum_may_tell_the_class(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """A native enum as the discriminator loads history polymorphically."""

    class Person(Versioned, base):
        __tablename__ = "person"
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": Mood.GOOD}
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[Mood]
        name: Mapped[str]

    class Bad(Person):
        __mapper_args__ = {"polymorphic_identity": Mood.BAD}

    base.metadata.create_all(engine)
    bad = Bad(name="a")
    session.add(bad)
    session.commit()
    bad.name = "b"
    session.commit()
    rows = session.scalars(sa.select(history_class(Person)).order_by(history_class(Person).version)).all()
    assert [(type(row), row.kind, row.name) for row in rows] == [
        (history_class(Bad), Mood.BAD, None),
        (history_class(Bad), Mood.BAD, "a"),
    ]


class Reversed(sa.types.TypeDecorator[str]):
    """Stands in for encryption: counts how often it is called."""

    impl = sa.String(50)
    cache_ok = True
    bound: list[str] = []
    read: list[str] = []

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        if value is None:
            return None
        self.bound.append(value)
        return str(value[::-1])

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> str | None:
        if value is None:
            return None
        self.read.append(value)
        return str(value[::-1])


def test_a_decorated_type_is_bound_once_and_read_once(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """History copies what the database holds: an encrypting type is not called for it, and reads it once."""

    class Secret(Versioned, base):
        __tablename__ = "secret"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str] = mapped_column(Reversed)

    base.metadata.create_all(engine)
    Reversed.bound.clear()
    secret = Secret(text="abc")
    session.add(secret)
    session.commit()
    secret.text = "def"
    session.commit()
    assert Reversed.bound == ["abc", "def"]
    table = base.metadata.tables["secret_history"]
    raw = session.scalars(sa.select(sa.type_coerce(table.c.text, sa.String)).where(table.c.version == 0)).one()
    assert raw == "cba"
    Reversed.read.clear()
    (row,) = secret.versions()
    assert row.text == "abc"
    assert Reversed.read.count("cba") == 1


class Doubled(sa.types.TypeDecorator[str]):
    """Has SQL of its own around each value, as types that encrypt in the database have."""

    impl = sa.String(50)
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> Any:
        return sa.literal_column("'<'") + bindparam

    def column_expression(self, column: Any) -> Any:
        return sa.func.substr(sa.type_coerce(column, sa.String), 2)


def test_a_type_with_sql_around_its_values_is_copied_raw(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """History holds what the live column holds, not what an SQL expression of its type makes of it."""
    if engine.dialect.name not in ("sqlite", "postgresql"):
        pytest.skip("|| is another operator there")

    class Secret(Versioned, base):
        __tablename__ = "secret"
        key: Mapped[str] = mapped_column(Doubled, primary_key=True)
        text: Mapped[str] = mapped_column(Doubled)

    base.metadata.create_all(engine)
    secrets = [Secret(key=f"k{n}", text="abc") for n in range(3)]
    session.add_all(secrets)
    session.commit()
    for secret in secrets:
        secret.text = "def"
    session.commit()
    table = base.metadata.tables["secret_history"]
    raw = sa.select(sa.type_coerce(table.c.text, sa.String), sa.type_coerce(table.c.key, sa.String))
    assert [tuple(row) for row in session.execute(raw.where(table.c.version == 0).order_by(table.c.key))] == [
        ("<abc", "<k0"),
        ("<abc", "<k1"),
        ("<abc", "<k2"),
    ]
    assert [row.text for row in secrets[0].versions()] == ["abc"]


class MoodText(sa.types.TypeDecorator[str]):
    """An enum in the database that is text in Python."""

    impl = sa.Enum(Mood, name="mood")
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return None if value is None else Mood(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return value.value if isinstance(value, Mood) else value


def test_a_decorated_native_enum_does_not_tie_history(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A type decorator over a native enum is plain text in history, with the same Python values."""
    Record, held, found = cycle(session, engine, base, MoodText(), ["fine", "awful", None])
    assert found == held == ["fine", "awful", None]
    assert isinstance(base.metadata.tables["record_history"].c["the value"].type, sa.String)
    assert not isinstance(base.metadata.tables["record_history"].c["the value"].type, sa.Enum)
    history = history_class(Record)
    assert session.scalars(sa.select(history).where(history.value == "fine")).one().version == 0


POSTGRESQL_VALUES: dict[str, tuple[Any, list[Any]]] = {
    "array": (postgresql.ARRAY(sa.Integer), [[1, 2], [], [None], None]),
    "nested-array": (postgresql.ARRAY(sa.Text, dimensions=2), [[["a", "b"], ["c", "d"]], None]),
    "generic-array": (sa.ARRAY(sa.Text), [["a"], ["b", "c"]]),
    "enum-array": (postgresql.ARRAY(sa.Enum(Mood, name="mood")), [[Mood.GOOD, Mood.BAD], [], None]),
    "enum-variant": (sa.String(20).with_variant(postgresql.ENUM("a", "b", name="ab"), "postgresql"), ["a", "b"]),
    "pg-enum": (postgresql.ENUM(Mood, name="mood"), [Mood.GOOD, Mood.BAD, None]),
    "jsonb": (postgresql.JSONB(none_as_null=True), [{"a": [1]}, {}, None]),
    "hstore": (postgresql.HSTORE, [{"a": "1", "b": None}, {}]),
    "int-range": (postgresql.INT4RANGE, [postgresql.Range(1, 5), postgresql.Range(empty=True), None]),
    "date-range": (
        postgresql.DATERANGE,
        [postgresql.Range(dt.date(2024, 1, 1), None), postgresql.Range(None, dt.date(2024, 1, 1))],
    ),
    "multirange": (postgresql.INT4MULTIRANGE, [[postgresql.Range(1, 3), postgresql.Range(5, 7)], []]),
    "bit": (postgresql.BIT(3), ["101", "000"]),
    "interval": (postgresql.INTERVAL(), [dt.timedelta(400, 5, 7)]),
    "inet": (postgresql.INET, [ipaddress.ip_address("10.0.0.1"), None]),
    "cidr": (postgresql.CIDR, [ipaddress.ip_network("10.0.0.0/8")]),
    "tsvector": (postgresql.TSVECTOR, ["'a':1 'b':2"]),
    "money": (postgresql.MONEY, ["$1.50"]),
    "domain": (postgresql.DOMAIN("positive", sa.Integer, check="VALUE > 0"), [1, 2]),
}


@pytest.mark.backends("postgresql")  # its own types
@pytest.mark.filterwarnings("ignore:.*does not refer to an OperatorClass")  # SQLAlchemy 2.1's own DOMAIN
@pytest.mark.parametrize("kind", POSTGRESQL_VALUES)
def test_values_of_postgresql_types(
    kind: str, engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """Each value of a PostgreSQL type is in history, equal and of the same Python type."""
    type_, values = POSTGRESQL_VALUES[kind]
    if kind == "hstore":
        with engine.connect() as connection:
            available = connection.scalar(sa.text("SELECT count(*) FROM pg_available_extensions WHERE name='hstore'"))
        if not available:
            pytest.skip("this server has no hstore")
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS hstore")
    _, held, found = cycle(session, engine, base, type_, values)
    assert found == held
    assert len(found) == len(values)
    assert [type(value) for value in found] == [type(value) for value in held]


@pytest.mark.backends("postgresql")  # its own types
@pytest.mark.filterwarnings("ignore:.*does not refer to an OperatorClass")  # SQLAlchemy 2.1's own DOMAIN
def test_history_depends_on_no_type_of_the_schema(engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """No history column is of an enum or domain of the database, however it is wrapped."""

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        one = mapped_column(sa.Enum(Mood, name="one"))
        two = mapped_column(postgresql.ENUM("a", name="two"))
        three = mapped_column(postgresql.ARRAY(sa.Enum(Mood, name="three")))
        four = mapped_column(sa.String(5).with_variant(postgresql.ENUM("a", name="four"), "postgresql"))
        five = mapped_column(MoodText)
        six = mapped_column(postgresql.DOMAIN("six", sa.Text))
        seven = mapped_column(sa.Enum(Mood, name="seven"), primary_key=True)

    base.metadata.create_all(engine)
    with engine.connect() as connection:
        kinds = connection.execute(
            sa.text(
                "SELECT a.attname, t.typtype FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
                "LEFT JOIN pg_type e ON e.oid = t.typelem "
                "WHERE a.attrelid = 'record_history'::regclass AND a.attnum > 0 "
                "AND (t.typtype IN ('e', 'd') OR e.typtype IN ('e', 'd'))"
            )
        ).all()
    assert kinds == []
