"""Values that the database makes: defaults, triggers, computed columns, identities, expressions."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from chrononaut import Versioned, history_class
from tests.fix_statements import RecordStatements


def ended(session: Session, model: type[Any]) -> list[Any]:
    history = history_class(model)
    return list(session.scalars(sa.select(history).where(history.operation != "insert").order_by(history.version)))


def test_server_defaults_and_explicit_null(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """History holds what a server default gave, and NULL where that was set explicitly."""

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        given: Mapped[int | None] = mapped_column(server_default="7")
        null: Mapped[int | None] = mapped_column(server_default="7")
        python: Mapped[int] = mapped_column(default=lambda: 8)

    base.metadata.create_all(engine)
    record = Record(name="a", null=sa.null())
    session.add(record)
    session.commit()
    record.name = "b"
    session.commit()
    record.given = None
    session.commit()
    record.name = "c"
    session.commit()
    assert [(row.name, row.given, row.null, row.python) for row in record.versions()] == [
        ("a", 7, None, 8),
        ("b", 7, None, 8),
        ("b", None, None, 8),
    ]
    history = base.metadata.tables["record_history"]
    assert all(column.server_default is None and column.default is None for column in history.c)


def test_onupdate_values_are_in_history(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """Each version holds what a column's onupdate had made of it."""
    ticks = iter(range(100))

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        ticked: Mapped[int] = mapped_column(default=lambda: next(ticks), onupdate=lambda: next(ticks))
        length: Mapped[int] = mapped_column(default=0, onupdate=sa.text("length + 10"))

    base.metadata.create_all(engine)
    record = Record(name="a")
    session.add(record)
    session.commit()
    for name in "bcd":
        record.name = name
        session.commit()
    assert [(row.name, row.ticked, row.length) for row in record.versions()] == [
        ("a", 0, 0),
        ("b", 1, 10),
        ("c", 2, 20),
    ]


def test_attributes_set_to_sql_expressions(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """An attribute set to an SQL expression makes a version, and what it became is in the next one."""

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        count: Mapped[int]
        name: Mapped[str | None]

    base.metadata.create_all(engine)
    record = Record(count=sa.select(sa.literal(5)).scalar_subquery())
    session.add(record)
    session.commit()
    for _ in range(3):
        record.count = Record.count + 1
        session.commit()
    record.name = sa.func.lower("ABC")
    session.flush()
    record.count = Record.count * 2
    session.commit()
    assert [(row.count, row.name) for row in record.versions()] == [
        (5, None),
        (6, None),
        (7, None),
        (8, None),
        (8, "abc"),
    ]
    assert (record.count, record.version) == (16, 5)


@pytest.mark.parametrize("persisted", [True, None])
def test_computed_columns(
    persisted: bool | None, engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """Stored and virtual computed columns are plain in history, with the values they had."""
    if engine.dialect.name == "postgresql" and persisted is None:
        persisted = False  # virtual ones say so since PostgreSQL 18

    class Box(Versioned, base):
        __tablename__ = "box"
        id: Mapped[int] = mapped_column(primary_key=True)
        side: Mapped[int]
        area: Mapped[int] = mapped_column(sa.Computed("side * side", persisted=persisted))

    if engine.dialect.name == "postgresql" and sa.__version__.startswith("2.0.") and persisted is False:
        pytest.skip("SQLAlchemy 2.0 writes no virtual columns for PostgreSQL")
    base.metadata.create_all(engine)
    box = Box(side=2)
    session.add(box)
    session.commit()
    box.side = 3
    session.commit()
    box.side = 4
    session.commit()
    assert [(row.side, row.area) for row in box.versions()] == [(2, 4), (3, 9)]
    assert box.area == 16
    assert base.metadata.tables["box_history"].c.area.computed is None
    session.delete(box)
    session.commit()
    assert ended(session, Box)[-1].area == 16


@pytest.mark.parametrize("always", [True, False])
def test_identity_keys(always: bool, engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """An identity is a plain number in history, GENERATED ALWAYS included."""

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(sa.Identity(always=always, start=5), primary_key=True)
        name: Mapped[str]

    base.metadata.create_all(engine)
    records = [Record(name="a"), Record(name="b")]
    session.add_all(records)
    session.commit()
    for record in records:
        record.name += "!"
    session.commit()
    assert [[row.name for row in record.versions()] for record in records] == [["a"], ["b"]]
    assert base.metadata.tables["record_history"].c.id.identity is None
    session.delete(records[0])
    session.commit()


@pytest.mark.backends("postgresql")  # the others have identities for keys only, or no sequences
def test_identities_and_sequences_beside_the_key(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase], statements: RecordStatements
) -> None:
    """Columns that are numbered by an identity or a sequence keep their numbers in history."""

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(sa.Sequence("record_ids", start=100), primary_key=True)
        number: Mapped[int] = mapped_column(sa.Identity(always=True, start=7))
        ticket: Mapped[int] = mapped_column(sa.Sequence("tickets", start=50))
        name: Mapped[str]

    base.metadata.create_all(engine)
    record = Record(name="a")
    with statements() as log:
        session.add(record)
        session.commit()
    # The sequence never gives a number twice, so the key needs no look-up in history.
    assert not log.matching(r"SELECT .*record_history")
    record.name = "b"
    session.commit()
    session.delete(record)
    session.commit()
    assert [(row.id, row.number, row.ticket, row.name) for row in ended(session, Record)] == [
        (100, 7, 50, "a"),
        (100, 7, 50, "b"),
    ]
    history = base.metadata.tables["record_history"]
    assert all(column.default is None and column.identity is None for column in history.c)


TRIGGERS = {
    "sqlite": [
        "CREATE TRIGGER shout AFTER INSERT ON record BEGIN UPDATE record SET name = upper(name) WHERE id = NEW.id; END",
        "CREATE TRIGGER shout_again AFTER UPDATE OF name ON record BEGIN "
        "UPDATE record SET name = upper(name), touched = touched + 1 WHERE id = NEW.id; END",
    ],
    "postgresql": [
        "CREATE FUNCTION shout() RETURNS trigger AS $$ BEGIN NEW.name := upper(NEW.name); "
        "IF TG_OP = 'UPDATE' THEN NEW.touched := OLD.touched + 1; END IF; RETURN NEW; END $$ LANGUAGE plpgsql",
        "CREATE TRIGGER shout BEFORE INSERT OR UPDATE ON record FOR EACH ROW EXECUTE FUNCTION shout()",
    ],
    "mysql": [
        "CREATE TRIGGER shout BEFORE INSERT ON record FOR EACH ROW SET NEW.name = upper(NEW.name)",
        "CREATE TRIGGER shout_again BEFORE UPDATE ON record FOR EACH ROW "
        "SET NEW.name = upper(NEW.name), NEW.touched = OLD.touched + 1",
    ],
}
TRIGGERS["mariadb"] = TRIGGERS["mysql"]


def test_triggers_that_change_the_row(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """History holds what the database held after its triggers, though the session never read it."""

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(sa.String(20))
        touched: Mapped[int] = mapped_column(default=0)

    base.metadata.create_all(engine)
    with engine.begin() as connection:
        for trigger in TRIGGERS[engine.dialect.name]:
            connection.exec_driver_sql(trigger)
    session.expire_on_commit = False
    record = Record(name="a")
    session.add(record)
    held = []
    for name in "bcd":
        session.commit()
        held.append(session.execute(sa.select(Record.name, Record.touched)).one())
        record.name = name
    session.commit()
    assert [(row.name, row.touched) for row in record.versions()] == held
    assert [name for name, _ in held] == ["A", "B", "C"]


def test_a_rule_of_the_database_that_refuses_leaves_no_history(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A change that the database refuses leaves neither a version nor a row of history."""

    class Record(Versioned, base):
        __tablename__ = "record"
        id: Mapped[int] = mapped_column(primary_key=True)
        age: Mapped[int] = mapped_column(sa.CheckConstraint("age >= 0"))

    base.metadata.create_all(engine)
    record = Record(age=1)
    session.add(record)
    session.commit()
    record.age = -1
    with pytest.raises(sa.exc.SQLAlchemyError):
        session.commit()
    session.rollback()
    assert record.versions() == []
    record.age = 2
    session.commit()
    assert [row.age for row in record.versions()] == [1]


def test_an_unmapped_column_of_the_table_is_copied_all_the_same(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A column that the model does not map is in the history table, as the database held it."""

    class Record(Versioned, base):
        __table__ = sa.Table(
            "record",
            base.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("name", sa.String(10)),
            sa.Column("legacy", sa.String(10), server_default="old"),
        )
        __mapper_args__ = {"exclude_properties": ["legacy"]}

    base.metadata.create_all(engine)
    record: Any = Record(name="a")
    session.add(record)
    session.commit()
    record.name = "b"
    session.commit()
    table = base.metadata.tables["record_history"]
    assert session.scalars(sa.select(table.c.legacy).where(table.c.version == 0)).all() == ["old"]
    assert not hasattr(record.versions()[0], "legacy")


def test_database_defaults_of_hidden_columns_stay_hidden(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A hidden column that a computed one is made of is not in history; the computed one is what its author made."""

    class Record(Versioned, base):
        __tablename__ = "record"
        __chrononaut_hidden__ = ["secret", "derived"]
        id: Mapped[int] = mapped_column(primary_key=True)
        secret: Mapped[str] = mapped_column(sa.String(10), server_default="sss")
        derived: Mapped[str] = mapped_column(sa.String(20), sa.Computed("secret || '!'", persisted=True))
        name: Mapped[str]

    if engine.dialect.name not in ("sqlite", "postgresql"):
        pytest.skip("|| is another operator there")
    base.metadata.create_all(engine)
    assert not {"secret", "derived"} & set(base.metadata.tables["record_history"].c.keys())
    record = Record(name="a")
    session.add(record)
    session.commit()
    record.secret = "ttt"
    session.commit()
    assert record.versions()[0].change_info["hidden_cols_changed"] == ["secret"]
