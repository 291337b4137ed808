"""Versioned hierarchies: single-table, joined, concrete, and mixtures."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.declarative import AbstractConcreteBase, ConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    class_mapper,
    configure_mappers,
    declared_attr,
    mapped_column,
    with_polymorphic,
)

from chrononaut import ChrononautException, Versioned, history_class
from tests.fix_statements import RecordStatements


@pytest.fixture
def lasting_base() -> type[DeclarativeBase]:
    """A base that is not disposed: SQLAlchemy 2.0 asks concrete bases for their mappers ever after."""

    class Base(DeclarativeBase):
        type_annotation_map = {str: sa.String(100)}

    return Base


def test_single_table_subclasses_share_history_with_their_own_columns(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """History of a single-table hierarchy holds the subclasses' columns and loads as their classes."""

    class Person(Versioned, base):
        __tablename__ = "person"
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        name: Mapped[str]

    class Engineer(Person):
        __mapper_args__ = {"polymorphic_identity": "engineer"}
        language: Mapped[str | None]

    class Manager(Person):
        __mapper_args__ = {"polymorphic_identity": "manager"}
        budget: Mapped[int | None]

    base.metadata.create_all(engine)
    session.add_all([Engineer(name="Ada", language="C"), Manager(name="Bo", budget=1), Person(name="Cy")])
    session.commit()
    for person in session.scalars(sa.select(Person)):
        person.name += "!"
    session.scalars(sa.select(Engineer)).one().language = "Rust"
    session.scalars(sa.select(Manager)).one().budget = 2
    session.commit()

    assert class_mapper(history_class(Engineer)).local_table is base.metadata.tables["person_history"]
    history = history_class(Person)
    rows = session.scalars(sa.select(history).where(history.version == 0).order_by(history.name)).all()
    assert [type(row) for row in rows] == [history_class(Engineer), history_class(Manager), history]
    assert [row.name for row in rows] == ["Ada", "Bo", "Cy"]
    assert rows[0].language == "C"
    assert rows[1].budget == 1
    managers = history_class(Manager)
    assert session.scalars(sa.select(managers).where(managers.budget == 1, managers.version == 0)).one() is rows[1]
    births = session.scalars(sa.select(history).where(history.operation == "insert")).all()
    assert {type(row).__name__ for row in births} == {"PersonHistory", "EngineerHistory", "ManagerHistory"}


def joined_models(base: type[DeclarativeBase]) -> tuple[type[Any], type[Any], type[Any]]:
    class Asset(Versioned, base):
        __tablename__ = "asset"
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "asset"}
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        label: Mapped[str]

    class Vehicle(Asset):
        __tablename__ = "vehicle"
        __mapper_args__ = {"polymorphic_identity": "vehicle"}
        id: Mapped[int] = mapped_column(sa.ForeignKey("asset.id"), primary_key=True)
        wheels: Mapped[int]

    class Truck(Vehicle):
        __tablename__ = "truck"
        __mapper_args__ = {"polymorphic_identity": "truck"}
        # Another name than the parents' keys have.
        truck_id: Mapped[int] = mapped_column("vehicle_id", sa.ForeignKey("vehicle.id"), primary_key=True)
        load: Mapped[int]

    return Asset, Vehicle, Truck


@pytest.mark.parametrize("level", ["label", "wheels", "load"])
def test_a_change_on_any_level_is_one_version_of_all_levels(
    level: str, engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """Changing a column of any of three joined tables makes one version with every table's values."""
    *_, Truck = joined_models(base)
    base.metadata.create_all(engine)
    truck = Truck(label="T", wheels=4, load=10)
    session.add(truck)
    session.commit()
    old = {"label": "T", "wheels": 4, "load": 10}
    setattr(truck, level, {"label": "U", "wheels": 6, "load": 20}[level])
    session.commit()

    assert truck.version == 1
    (row,) = truck.versions()
    assert {name: getattr(row, name) for name in old} == old
    assert (row.version, row.operation, row.id, row.kind) == (0, "update", truck.id, "truck")
    session.delete(truck)
    session.commit()
    assert session.scalars(sa.select(history_class(Truck).version).order_by(sa.desc("version"))).first() == 1


def test_history_of_a_joined_base_loads_as_its_subclasses(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """Selecting the base's history gives rows of the subclasses' history classes, with all their values."""
    Asset, Vehicle, Truck = joined_models(base)
    base.metadata.create_all(engine)
    session.add_all(
        [
            Asset(label="a"),
            Vehicle(label="v", wheels=2),
            Truck(label="t", wheels=4, load=10),
            Truck(label="u", wheels=8, load=20),
        ]
    )
    session.commit()
    for asset in session.scalars(sa.select(Asset)):
        asset.label = asset.label.upper()
    session.commit()

    history = history_class(Asset)
    rows = session.scalars(sa.select(history).where(history.operation == "update").order_by(history.label)).all()
    assert [type(row) for row in rows] == [history, history_class(Truck), history_class(Truck), history_class(Vehicle)]
    assert [(row.wheels, row.load) for row in rows[1:3]] == [(4, 10), (8, 20)]
    assert rows[3].wheels == 2
    everything = with_polymorphic(history, "*")
    assert len(session.scalars(sa.select(everything)).all()) == 8
    wheeled = history_class(Vehicle)
    assert sorted(session.scalars(sa.select(wheeled.wheels).where(wheeled.operation == "update"))) == [2, 4, 8]
    births = session.scalars(sa.select(history_class(Truck)).where(history.operation == "insert")).all()
    assert [(birth.version, birth.load) for birth in births] == [(-1, None), (-1, None)]


def test_many_joined_records_change_with_one_copy_for_each_table(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase], statements: RecordStatements
) -> None:
    """A flush copies all records of a hierarchy by one statement for each history table."""
    _, _, Truck = joined_models(base)
    base.metadata.create_all(engine)
    trucks = [Truck(label=f"t{n}", wheels=4, load=n) for n in range(20)]
    session.add_all(trucks)
    session.commit()
    for truck in trucks:
        truck.load += 1
    with statements() as log:
        session.flush()
    assert len(log.matching("INSERT INTO")) == 3
    session.commit()
    assert all(truck.versions()[0].load == truck.load - 1 for truck in trucks)


def test_a_joined_subclass_can_have_single_table_subclasses(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A single-table subclass of a joined subclass keeps its columns in the joined history table."""
    _, Vehicle, _ = joined_models(base)

    class Boat(Vehicle):
        __mapper_args__ = {"polymorphic_identity": "boat"}
        draught: Mapped[int | None]

    base.metadata.create_all(engine)
    boat = Boat(label="b", wheels=0, draught=3)
    session.add(boat)
    session.commit()
    boat.draught = 4
    session.commit()
    (row,) = boat.versions()
    assert (row.label, row.wheels, row.draught) == ("b", 0, 3)
    assert boat.diff(row) == {"draught": (3, 4)}


def test_joined_inheritance_without_a_discriminator(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A joined subclass without polymorphic identity has a complete history too."""

    class Parent(Versioned, base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Child(Parent):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(sa.ForeignKey("parent.id"), primary_key=True)
        toy: Mapped[str]

    base.metadata.create_all(engine)
    child = Child(name="n", toy="t")
    session.add(child)
    session.commit()
    child.toy = "u"
    session.commit()
    assert [(row.name, row.toy) for row in child.versions()] == [("n", "t")]


def test_hidden_and_untracked_columns_of_a_joined_subclass(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A joined subclass has hidden and untracked columns of its own, which its history table lacks."""

    class Account(Versioned, base):
        __tablename__ = "account"
        __chrononaut_hidden__ = ["pin"]
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "account"}
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        pin: Mapped[str]

    class Staff(Account):
        __tablename__ = "staff"
        __chrononaut_hidden__ = ["secret"]
        __chrononaut_untracked__ = ["hits"]
        __mapper_args__ = {"polymorphic_identity": "staff"}
        id: Mapped[int] = mapped_column(sa.ForeignKey("account.id"), primary_key=True)
        secret: Mapped[str]
        hits: Mapped[int]
        desk: Mapped[str]

    base.metadata.create_all(engine)
    assert set(base.metadata.tables["staff_history"].c.keys()) == {"id", "desk", "version"}
    staff = Staff(pin="1", secret="s", hits=0, desk="d")
    session.add(staff)
    session.commit()
    staff.hits = 1
    session.commit()
    assert staff.version == 0
    staff.pin, staff.secret = "2", "t"
    session.commit()
    (row,) = staff.versions()
    assert row.change_info["hidden_cols_changed"] == ["pin", "secret"]
    for name in ("pin", "secret", "hits"):
        with pytest.raises(AttributeError, match=name):
            getattr(row, name)


def test_a_versioned_child_of_an_unversioned_joined_parent_is_refused(base: type[DeclarativeBase]) -> None:
    """Versioning only the child of a joined hierarchy is refused, naming the base."""

    class Parent(base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(ChrononautException, match="Put the Versioned mixin on Parent"):

        class Child(Versioned, Parent):
            __tablename__ = "child"
            id: Mapped[int] = mapped_column(sa.ForeignKey("parent.id"), primary_key=True)


def test_concrete_tables_have_histories_of_their_own(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """Each class of a concrete hierarchy has its own complete history table and numbering."""

    class Shape(Versioned, base):
        __tablename__ = "shape"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Circle(Shape):
        __tablename__ = "circle"
        __mapper_args__ = {"concrete": True}
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        radius: Mapped[int]

    base.metadata.create_all(engine)
    shape, circle = Shape(id=1, name="s"), Circle(id=1, name="c", radius=1)
    session.add_all([shape, circle])
    session.commit()
    circle.radius = 2
    session.commit()
    circle.name, shape.name = "d", "t"
    session.commit()
    assert [(row.version, row.name, row.radius) for row in circle.versions()] == [(0, "c", 1), (1, "c", 2)]
    assert [(row.version, row.name) for row in shape.versions()] == [(0, "s")]
    assert (shape.version, circle.version) == (1, 2)
    session.delete(circle)
    session.commit()
    assert session.scalar(sa.select(sa.func.count()).select_from(history_class(Circle))) == 4


def test_concrete_base_and_its_polymorphic_union(
    engine: sa.Engine, session: Session, lasting_base: type[DeclarativeBase]
) -> None:
    """Classes under a ConcreteBase are versioned, and still load polymorphically."""

    class Shape(Versioned, ConcreteBase, lasting_base):
        __tablename__ = "shape"
        __mapper_args__ = {"polymorphic_identity": "shape", "concrete": True}
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Circle(Shape):
        __tablename__ = "circle"
        __mapper_args__ = {"polymorphic_identity": "circle", "concrete": True}
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        radius: Mapped[int]

    lasting_base.metadata.create_all(engine)
    session.add_all([Shape(id=1, name="s"), Circle(id=2, name="c", radius=1)])
    session.commit()
    for shape in session.scalars(sa.select(Shape)):
        shape.name += "!"
    session.commit()
    circle = session.scalars(sa.select(Circle)).one()
    assert [(row.name, row.radius) for row in circle.versions()] == [("c", 1)]
    (shape,) = session.scalars(sa.select(Shape).where(Shape.id == 1))
    assert [row.name for row in shape.versions()] == ["s"]


def test_an_abstract_concrete_base_versions_its_subclasses(
    engine: sa.Engine, session: Session, lasting_base: type[DeclarativeBase]
) -> None:
    """The mixin on an AbstractConcreteBase versions each class that has a table."""

    class Shape(Versioned, AbstractConcreteBase, lasting_base):
        strict_attrs = True
        name: Mapped[str]

    class Circle(Shape):
        __tablename__ = "circle"
        __mapper_args__ = {"polymorphic_identity": "circle", "concrete": True}
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        radius: Mapped[int]

    class Square(Shape):
        __tablename__ = "square"
        __mapper_args__ = {"polymorphic_identity": "square", "concrete": True}
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        side: Mapped[int]

    configure_mappers()
    lasting_base.metadata.create_all(engine)
    session.add_all([Circle(name="c", radius=1), Square(name="q", side=2)])
    session.commit()
    for shape in session.scalars(sa.select(Shape)):
        shape.name += "!"
    session.commit()
    circle = session.scalars(sa.select(Circle)).one()
    assert [(row.name, row.radius) for row in circle.versions()] == [("c", 1)]
    with pytest.raises(ChrononautException, match="no table of its own"):
        history_class(Shape)


def test_abstract_bases_and_column_mixins(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """The mixin may sit on an abstract base, and columns may come from mixins and declared_attr."""

    class Stamped:
        @declared_attr
        def note(cls) -> Mapped[str]:
            return mapped_column("note_text", sa.String(50))

        colour: Mapped[str | None] = mapped_column(default="red")

    class Record(Versioned, base):
        __abstract__ = True
        __chrononaut_hidden__ = ["token"]
        id: Mapped[int] = mapped_column(primary_key=True)
        token: Mapped[str | None]

        @declared_attr.directive
        def __tablename__(cls) -> str:
            return str(cls.__name__).lower()

    class Page(Stamped, Record):
        title: Mapped[str]

    class Post(Record, Stamped):
        body: Mapped[str]

    base.metadata.create_all(engine)
    page, post = Page(title="t", note="n", token="x"), Post(body="b", note="m", token="x")
    session.add_all([page, post])
    session.commit()
    page.note, post.colour = "n2", "blue"
    session.commit()
    assert [(row.title, row.note, row.colour) for row in page.versions()] == [("t", "n", "red")]
    assert [(row.body, row.note, row.colour) for row in post.versions()] == [("b", "m", "red")]
    assert "token" not in base.metadata.tables["page_history"].c


def test_a_polymorphic_expression_tells_the_class_of_history_rows(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A hierarchy whose class is told by an SQL expression loads its history by the same expression."""

    class Item(Versioned, base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        size: Mapped[int] = mapped_column()
        __mapper_args__ = {
            "polymorphic_on": sa.case((size > 10, "big"), else_="small"),
            "polymorphic_identity": "small",
        }

    class Big(Item):
        __mapper_args__ = {"polymorphic_identity": "big"}

    base.metadata.create_all(engine)
    big, small = Big(size=20), Item(size=1)
    session.add_all([big, small])
    session.commit()
    big.size, small.size = 30, 2
    session.commit()
    history = history_class(Item)
    rows = session.scalars(sa.select(history).where(history.operation == "update").order_by(history.size)).all()
    assert [(type(row), row.size) for row in rows] == [(history, 1), (history_class(Big), 20)]
