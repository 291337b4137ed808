"""What the database deletes or changes by its foreign keys is in history as well."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from chrononaut import Lockable, RecordLockedError, UntrackedStatementError, Versioned, history_class
from tests.fix_statements import RecordStatements

Model = Any


class Family:
    """An unversioned and a versioned parent, with children of every kind."""

    def __init__(self, base: type[DeclarativeBase], parent_mixin: type, passive: Any) -> None:
        class Parent(parent_mixin, base):
            __tablename__ = "parent"
            id: Mapped[int] = mapped_column(primary_key=True)
            children = relationship("Child", passive_deletes=passive, cascade="all" if passive is True else "merge")

        class Middle(base):
            __tablename__ = "middle"
            id: Mapped[int] = mapped_column(primary_key=True)
            parent_id: Mapped[int] = mapped_column(sa.ForeignKey("parent.id", ondelete="CASCADE"))

        class Child(Versioned, base):
            __tablename__ = "child"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(default="c")
            parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("parent.id", ondelete="CASCADE"))

        class Friend(Versioned, base):
            __tablename__ = "friend"
            __chrononaut_hidden__ = ["secret_id"]
            id: Mapped[int] = mapped_column(primary_key=True)
            parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("parent.id", ondelete="SET NULL"))
            secret_id: Mapped[int | None] = mapped_column(sa.ForeignKey("parent.id", ondelete="SET NULL"))

        class Grandchild(Versioned, base):
            __tablename__ = "grandchild"
            id: Mapped[int] = mapped_column(primary_key=True)
            middle_id: Mapped[int | None] = mapped_column(sa.ForeignKey("middle.id", ondelete="CASCADE"))
            child_id: Mapped[int | None] = mapped_column(sa.ForeignKey("child.id", ondelete="CASCADE"))

        self.parent, self.middle, self.child = Parent, Middle, Child
        self.friend, self.grandchild = Friend, Grandchild


class Plain:
    pass


@pytest.fixture(params=[(Plain, True), (Versioned, True), (Plain, "all"), (Versioned, "all")], ids=str)
def family(request: pytest.FixtureRequest, base: type[DeclarativeBase], engine: sa.Engine) -> Family:
    made = Family(base, *request.param)
    base.metadata.create_all(engine)
    return made


@pytest.fixture
def populated(family: Family, session: Session) -> Family:
    """Two parents, each with a child, a friend, and grandchildren by two ways."""
    for number in (1, 2):
        session.add(family.parent(id=number))
        session.flush()
        session.add_all([family.middle(id=number, parent_id=number), family.child(id=number, parent_id=number)])
        session.flush()
        session.add(family.friend(id=number, parent_id=number, secret_id=number))
        session.add(family.grandchild(id=number, middle_id=number, child_id=number))
    session.commit()
    session.expunge_all()
    return family


def past(session: Session, model: Model) -> list[tuple[Any, ...]]:
    history = history_class(model)
    rows = session.scalars(sa.select(history).where(history.operation != "insert").order_by(history.id))
    return [(row.id, row.version, row.operation) for row in rows]


def check(session: Session, family: Family) -> None:
    """What became of the first parent's relatives."""
    for model in (family.child, family.grandchild):
        assert past(session, model) == [(1, 0, "delete")]
        assert session.scalars(sa.select(model.id)).all() == [2]
    assert past(session, family.friend) == [(1, 0, "update")]
    friend = session.get_one(family.friend, 1)
    assert (friend.version, friend.parent_id) == (1, None)
    (row,) = friend.versions()
    assert row.parent_id == 1
    assert row.change_info["hidden_cols_changed"] == ["secret_id"]
    friend.parent_id = 2
    session.commit()
    assert friend.version == 2


def test_flush_deletes_a_parent(session: Session, populated: Family) -> None:
    """Rows that the database deletes or nulls, several levels down, are captured before they go."""
    session.delete(session.get_one(populated.parent, 1))
    session.commit()
    check(session, populated)


def test_statement_deletes_a_parent(session: Session, populated: Family) -> None:
    """A DELETE of parents captures their children, by condition."""
    parent = populated.parent
    result: Any = session.execute(sa.delete(parent).where(parent.id < 2))
    assert result.rowcount == 1
    session.commit()
    check(session, populated)


def test_connection_deletes_a_parent(session: Session, populated: Family) -> None:
    """A DELETE that does not pass the session is refused."""
    with pytest.raises(UntrackedStatementError):
        session.connection().execute(sa.delete(populated.parent.__table__))
    assert past(session, populated.child) == []


def test_loaded_children_are_deleted_once(session: Session, populated: Family) -> None:
    """Children that the session deletes itself are not captured again."""
    parent = session.get_one(populated.parent, 1)
    assert len(parent.children) == 1
    session.delete(parent)
    session.commit()
    check(session, populated)


def test_tree_in_one_table(base: type[DeclarativeBase], engine: sa.Engine, session: Session) -> None:
    """A tree that refers to itself is captured down to its leaves."""

    class Node(Versioned, base):
        __tablename__ = "node"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("node.id", ondelete="CASCADE"))

    base.metadata.create_all(engine)
    for number, parent in ((1, None), (2, 1), (3, 2), (4, 3), (5, None), (6, 5)):
        session.add(Node(id=number, parent_id=parent))
        session.flush()
    session.commit()
    session.expunge_all()
    session.delete(session.get_one(Node, 2))
    session.commit()
    assert past(session, Node) == [(2, 0, "delete"), (3, 0, "delete"), (4, 0, "delete")]
    session.execute(sa.delete(Node).where(Node.id == 5))
    assert past(session, Node)[3:] == [(5, 0, "delete"), (6, 0, "delete")]
    assert session.scalars(sa.select(Node.id)).all() == [1]


@pytest.mark.backends("sqlite-file")
def test_cascades_that_sqlite_ignores(base: type[DeclarativeBase], tmp_path: Any) -> None:
    """Where foreign keys are off the database deletes nothing, and history says so."""
    from chrononaut import versioned_session

    family = Family(base, Plain, "all")
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'off.db'}")
    base.metadata.create_all(engine)
    with versioned_session(sessionmaker(engine))() as session:
        session.add(family.parent(id=1))
        session.flush()
        session.add(family.child(id=1, parent_id=1))
        session.commit()
        session.execute(sa.delete(family.parent))
        session.commit()
        assert past(session, family.child) == []
    engine.dispose()


def test_locked_children_stop_the_deletion(base: type[DeclarativeBase], engine: sa.Engine, session: Session) -> None:
    """The database must not delete a locked record."""

    class Year(base):
        __tablename__ = "year"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Booking(Lockable, Versioned, base):
        __tablename__ = "booking"
        id: Mapped[int] = mapped_column(primary_key=True)
        year_id: Mapped[int] = mapped_column(sa.ForeignKey("year.id", ondelete="CASCADE"))

    base.metadata.create_all(engine)
    session.add(Year(id=1))
    session.flush()
    session.add(Booking(id=7, year_id=1, is_locked=True))
    session.commit()
    with pytest.raises(RecordLockedError) as caught:
        session.execute(sa.delete(Year))
    assert caught.value.key == (7,)
    session.delete(session.get_one(Year, 1))
    with pytest.raises(RecordLockedError):
        session.flush()


def test_changed_key_that_the_database_passes_on_is_refused(
    base: type[DeclarativeBase], engine: sa.Engine, session: Session
) -> None:
    """ON UPDATE CASCADE changes children past their history."""

    class Country(base):
        __tablename__ = "country"
        code: Mapped[str] = mapped_column(sa.String(9), primary_key=True)
        name: Mapped[str | None]

    class City(Versioned, base):
        __tablename__ = "city"
        id: Mapped[int] = mapped_column(primary_key=True)
        code: Mapped[str] = mapped_column(sa.ForeignKey("country.code", onupdate="CASCADE"))

    base.metadata.create_all(engine)
    session.add(Country(code="x"))
    session.flush()
    session.add(City(id=1, code="x"))
    session.commit()
    country = session.get_one(Country, "x")
    country.name = "fine"
    session.commit()
    session.execute(sa.update(Country).values(name="still fine"))
    with pytest.raises(UntrackedStatementError, match="passive_updates"):
        session.execute(sa.update(Country).values(code="y"))
    country.code = "y"
    with pytest.raises(UntrackedStatementError, match="passive_updates"):
        session.flush()


def test_deletion_costs_nothing_where_nothing_refers(
    base: type[DeclarativeBase], engine: sa.Engine, session: Session, statements: RecordStatements
) -> None:
    """A table that no versioned table refers to is deleted from by the same statement as ever."""

    class Log(base):
        __tablename__ = "log"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Line(Versioned, base):
        __tablename__ = "line"
        id: Mapped[int] = mapped_column(primary_key=True)
        log_id: Mapped[int | None] = mapped_column(sa.ForeignKey("log.id"))

    base.metadata.create_all(engine)
    session.add(Log(id=1))
    session.commit()
    log = session.get_one(Log, 1)
    with statements() as sent:
        session.delete(log)
        session.flush()
        session.execute(sa.delete(Log))
    assert sent.verbs == ["DELETE", "DELETE"]
