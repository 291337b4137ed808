"""Foreign keys that relationships set, in every way that SQLAlchemy knows, are versions of their rows."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from chrononaut import Versioned, history_class


def family(base: type[DeclarativeBase], *, back: bool, cascade: str = "save-update, merge") -> tuple[Any, Any]:
    class Parent(Versioned, base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(sa.String(10), default="p")
        children = relationship("Child", cascade=cascade, back_populates="parent" if back else None)

    class Child(Versioned, base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id = mapped_column(sa.ForeignKey("parent.id"))
        name: Mapped[str] = mapped_column(sa.String(10), default="c")
        if back:
            parent = relationship("Parent", back_populates="children")

    return Parent, Child


@pytest.mark.parametrize("back", [True, False])
def test_foreign_keys_set_through_a_collection(
    back: bool, engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """Moving a child between collections is a version of the child, whether it knows its parent or not."""
    Parent, Child = family(base, back=back)
    base.metadata.create_all(engine)
    one, two, child = Parent(id=1), Parent(id=2), Child()
    one.children.append(child)
    session.add_all([one, two])
    session.commit()
    assert child.version == 0
    with session.no_autoflush:
        one.children.remove(child)
        two.children.append(child)
    session.commit()
    two.children.remove(child)
    session.commit()
    two.children = [child]
    session.commit()
    session.expire_all()
    assert [row.parent_id for row in child.versions()] == [1, 2, None]
    assert (child.parent_id, child.version) == (2, 3)
    assert (one.version, two.version) == (0, 0)


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("back", [True, False])
def test_deleting_a_parent_nulls_its_children(
    back: bool, loaded: bool, engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """Children whose foreign key is set to NULL because their parent goes have a version each."""
    Parent, Child = family(base, back=back)
    base.metadata.create_all(engine)
    parent = Parent(id=1, children=[Child(id=n) for n in range(1, 4)])
    session.add(parent)
    session.commit()
    if loaded:
        assert len(parent.children) == 3
    else:
        session.expunge_all()
        parent = session.get_one(Parent, 1)
    session.delete(parent)
    session.commit()
    children = session.scalars(sa.select(Child)).all()
    assert [child.version for child in children] == [1, 1, 1]
    assert [[row.parent_id for row in child.versions()] for child in children] == [[1]] * 3


def test_delete_orphans(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """A child that is deleted because nobody has it any more ends its history."""
    Parent, Child = family(base, back=True, cascade="all, delete-orphan")
    base.metadata.create_all(engine)
    parent = Parent(id=1, children=[Child(id=n, name=f"c{n}") for n in range(1, 4)])
    session.add(parent)
    session.commit()
    del parent.children[0]
    session.commit()
    parent.children = []
    session.commit()
    history = history_class(Child)
    rows = session.scalars(sa.select(history).where(history.operation == "delete").order_by(history.id)).all()
    assert [(row.id, row.name, row.parent_id) for row in rows] == [(1, "c1", 1), (2, "c2", 1), (3, "c3", 1)]
    parent.children = [Child(id=9)]
    session.commit()
    session.delete(parent)
    session.commit()
    assert session.scalars(sa.select(history.operation).where(history.id == 9).order_by(history.version)).all() == [
        "insert",
        "delete",
    ]


def test_post_update_rows(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """Two tables that refer to each other, one by post_update, have each change in history."""

    class Person(Versioned, base):
        __tablename__ = "person"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(sa.String(10), default="p")
        favourite_id = mapped_column(sa.ForeignKey("pet.id", name="fk_favourite", use_alter=True))
        pets = relationship("Pet", primaryjoin="Person.id == Pet.owner_id", back_populates="owner")
        favourite = relationship("Pet", primaryjoin="Person.favourite_id == Pet.id", post_update=True)

    class Pet(Versioned, base):
        __tablename__ = "pet"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(sa.String(10), default="a")
        owner_id = mapped_column(sa.ForeignKey("person.id"))
        owner = relationship("Person", primaryjoin="Person.id == Pet.owner_id", back_populates="pets")

    base.metadata.create_all(engine)
    person, one, two = Person(), Pet(name="one"), Pet(name="two")
    person.pets = [one, two]
    person.favourite = one
    session.add(person)
    session.commit()
    version = person.version
    person.favourite = two
    session.commit()
    assert person.version == version + 1
    assert person.versions()[-1].favourite_id == one.id
    person.name, person.favourite = "q", one
    session.commit()
    assert person.version == version + 2
    assert (person.versions()[-1].name, person.versions()[-1].favourite_id) == ("p", two.id)
    key = person.id
    session.delete(person)
    session.commit()
    history = history_class(Person)
    rows = session.scalars(sa.select(history).where(history.id == key).order_by(history.version)).all()
    assert (rows[-1].operation, rows[-1].favourite_id) == ("delete", one.id)
    assert [row.version for row in rows] == list(range(-1, len(rows) - 1))
    assert [pet.owner_id for pet in session.scalars(sa.select(Pet))] == [None, None]
    assert all(pet.versions()[-1].owner_id == key for pet in session.scalars(sa.select(Pet)))


def test_post_update_through_a_collection(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """Children whose foreign key is set by post_update, on a parent's change or deletion, have a version each."""

    class Parent(Versioned, base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        children = relationship("Child", post_update=True)

    class Child(Versioned, base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id = mapped_column(sa.ForeignKey("parent.id"))

    base.metadata.create_all(engine)
    one, two = Child(id=1), Child(id=2)
    parent = Parent(id=1, children=[one])
    session.add_all([parent, two])
    session.commit()
    parent.children.append(two)
    session.commit()
    assert [row.parent_id for row in two.versions()] == [None]
    session.delete(parent)
    session.commit()
    assert [row.parent_id for row in one.versions()] == [1]
    assert [row.parent_id for row in two.versions()] == [None, 1]
    assert [child.parent_id for child in (one, two)] == [None, None]


def test_self_referential_trees(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """Nodes of a tree that are moved, and deleted with their subtree, have their histories."""

    class Node(Versioned, base):
        __tablename__ = "node"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id = mapped_column(sa.ForeignKey("node.id"))
        children = relationship("Node", cascade="all", back_populates="parent")
        parent = relationship("Node", remote_side=[id], back_populates="children")

    base.metadata.create_all(engine)
    root, left, right, leaf = (Node(id=n) for n in range(1, 5))
    root.children = [left, right]
    left.children = [leaf]
    session.add(root)
    session.commit()
    leaf.parent = right
    session.commit()
    assert [row.parent_id for row in leaf.versions()] == [2]
    session.delete(root)
    session.commit()
    history = history_class(Node)
    rows = session.scalars(sa.select(history).where(history.operation == "delete").order_by(history.id)).all()
    assert [(row.id, row.parent_id) for row in rows] == [(1, None), (2, 1), (3, 1), (4, 3)]


def keyed(base: type[DeclarativeBase], *, passive: bool, versioned_child: bool = True) -> tuple[Any, Any]:
    class Parent(Versioned, base):
        __tablename__ = "parent"
        code: Mapped[str] = mapped_column(sa.String(10), primary_key=True)
        children = relationship("Child", passive_updates=passive, back_populates="parent")

    bases = (Versioned, base) if versioned_child else (base,)

    class Child(*bases):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_code = mapped_column(
            sa.ForeignKey("parent.code", onupdate="CASCADE")
            if passive
            else sa.ForeignKey("parent.code", deferrable=True, initially="DEFERRED")
        )
        parent = relationship("Parent", passive_updates=passive, back_populates="children")

    return Parent, Child


@pytest.mark.backends("sqlite-file", "sqlite-memory", "postgresql")  # MariaDB cannot defer foreign keys
def test_a_changed_key_that_the_session_passes_on(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """With passive_updates=False the session updates the children, and each has a version."""
    Parent, Child = keyed(base, passive=False)
    base.metadata.create_all(engine)
    parent = Parent(code="a", children=[Child(id=1), Child(id=2)])
    session.add(parent)
    session.commit()
    parent.code = "b"
    session.commit()
    children = session.scalars(sa.select(Child)).all()
    assert [child.parent_code for child in children] == ["b", "b"]
    assert [[row.parent_code for row in child.versions()] for child in children] == [["a"], ["a"]]


def test_a_changed_key_with_unversioned_children_is_no_concern(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """ON UPDATE CASCADE into a table without history is left to the database."""
    Parent, Child = keyed(base, passive=True, versioned_child=False)
    base.metadata.create_all(engine)
    parent = Parent(code="a", children=[Child(id=1)])
    session.add(parent)
    session.commit()
    parent.code = "b"
    session.commit()
    assert session.scalars(sa.select(Child.parent_code)).all() == ["b"]
