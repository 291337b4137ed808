"""Versioned models declared in every style that SQLAlchemy knows."""

import dataclasses
import inspect as python_inspect
import types
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    column_property,
    composite,
    deferred,
    mapped_column,
    registry,
    relationship,
    synonym,
    undefer_group,
    validates,
)
from sqlmodel import Field, SQLModel

from chrononaut import (
    ChrononautException,
    HiddenAttributeError,
    RecordChanges,
    UntrackedAttributeError,
    Versioned,
    history_class,
)
from tests.fix_statements import RecordStatements


@pytest.mark.parametrize("mixin_first", [True, False])
def test_dataclass_models_keep_their_constructor(mixin_first: bool, engine: sa.Engine, session: Session) -> None:
    """A model mapped as a dataclass is versioned, and neither constructor, repr nor fields change."""

    class Base(MappedAsDataclass, DeclarativeBase):
        type_annotation_map = {str: sa.String(100)}

    bases = (Versioned, Base) if mixin_first else (Base, Versioned)

    def body(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = __name__
        namespace["__tablename__"] = "appuser"
        namespace["__annotations__"] = {"id": Mapped[int], "name": Mapped[str], "age": Mapped[int]}
        namespace["id"] = mapped_column(init=False, primary_key=True)
        namespace["age"] = mapped_column(default=1)

    User: Any = types.new_class("User", bases, {}, body)
    assert list(python_inspect.signature(User).parameters) == ["name", "age"]
    assert [field.name for field in dataclasses.fields(User)] == ["id", "name", "age"]
    Base.metadata.create_all(engine)
    user = User("Ada")
    session.add(user)
    session.commit()
    user.name = "Bo"
    session.commit()
    assert [(row.version, row.name, row.age) for row in user.versions()] == [(0, "Ada", 1)]
    assert user.version == 1
    assert "version" not in repr(user)
    Base.registry.dispose()


@pytest.mark.parametrize("mixin_first", [True, False])
def test_sqlmodel_tables_are_versioned(mixin_first: bool, engine: sa.Engine, session: Session) -> None:
    """A SQLModel with table=True is versioned, and neither its fields nor what it dumps change."""
    metadata = sa.MetaData()

    class Table(SQLModel, registry=registry(metadata=metadata)):
        pass

    if mixin_first:

        class User(Versioned, Table, table=True):  # pyright: ignore[reportRedeclaration]
            __tablename__ = "appuser"  # pyright: ignore[reportAssignmentType]
            __chrononaut_hidden__ = ["password"]
            id: int | None = Field(default=None, primary_key=True)
            name: str
            password: str = "x"

    else:

        class User(Table, Versioned, table=True):  # type: ignore[no-redef]
            __tablename__ = "appuser"  # pyright: ignore[reportAssignmentType]
            __chrononaut_hidden__ = ["password"]
            id: int | None = Field(default=None, primary_key=True)
            name: str
            password: str = "x"

    metadata.create_all(engine)
    assert set(User.model_fields) == {"id", "name", "password"}
    user = User(name="Ada")
    session.add(user)
    session.commit()
    session.refresh(user)
    user.name = "Bo"
    user.password = "y"
    session.commit()
    (row,) = user.versions()
    assert (row.version, row.name, row.change_info["hidden_cols_changed"]) == (0, "Ada", ["password"])
    assert user.version == 1
    assert user.model_dump() == {"id": user.id, "name": "Bo", "password": "y"}
    assert isinstance(row, history_class(User))
    session.delete(user)
    session.add(User(id=user.id, name="Cy"))
    session.commit()
    with pytest.raises(HiddenAttributeError):
        row.password  # noqa: B018


def test_sqlmodel_with_change_marks(engine: sa.Engine, session: Session) -> None:
    """A SQLModel takes RecordChanges beside Versioned."""
    metadata = sa.MetaData()

    class Table(SQLModel, registry=registry(metadata=metadata)):
        pass

    class Page(RecordChanges, Versioned, Table, table=True):
        id: int | None = Field(default=None, primary_key=True)
        text: str

    metadata.create_all(engine)
    page = Page(text="a")
    session.add(page)
    session.commit()
    page.text = "b"
    session.commit()
    (row,) = page.versions()
    assert page.changed == row.changed
    assert page.change_info == {"user_id": None, "remote_addr": None}


def test_imperatively_mapped_classes_are_versioned(engine: sa.Engine, session: Session) -> None:
    """A class mapped imperatively gets its version column, and may have attributes of other names."""
    mappers = registry()
    table = sa.Table(
        "appuser",
        mappers.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("user_name", sa.String(50), key="uname"),
        sa.Column("password", sa.String(50)),
        sa.Column("ignored", sa.String(50)),
    )

    class User(Versioned):
        __chrononaut_hidden__ = ["password"]

        def __init__(self, name: str) -> None:
            self.name = name

        id: int
        password: str

    mappers.map_imperatively(User, table, properties={"name": table.c.uname}, exclude_properties=["ignored"])
    assert "version" in table.c
    mappers.metadata.create_all(engine)
    user = User("Ada")
    session.add(user)
    session.commit()
    user.name = "Bo"
    user.password = "p"
    session.commit()
    (row,) = user.versions()
    assert (row.name, row.change_info["hidden_cols_changed"]) == ("Ada", ["password"])
    assert session.scalars(sa.select(User).where(User.version == 1)).one() is user
    mappers.dispose()


def test_imperative_joined_inheritance(engine: sa.Engine, session: Session) -> None:
    """An imperatively mapped joined hierarchy has a complete history."""
    mappers = registry()
    parent = sa.Table(
        "parent",
        mappers.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String(10)),
        sa.Column("name", sa.String(10)),
    )
    child = sa.Table(
        "child",
        mappers.metadata,
        sa.Column("id", sa.ForeignKey("parent.id"), primary_key=True),
        sa.Column("toy", sa.String(10)),
    )

    class Parent(Versioned):
        pass

    class Child(Parent):
        pass

    mappers.map_imperatively(Parent, parent, polymorphic_on=parent.c.kind, polymorphic_identity="p")
    mappers.map_imperatively(Child, child, inherits=Parent, polymorphic_identity="c")
    mappers.metadata.create_all(engine)
    record: Any = Child()
    record.name, record.toy = "n", "t"
    session.add(record)
    session.commit()
    record.name = "m"
    session.commit()
    assert [(row.name, row.toy, row.kind) for row in record.versions()] == [("n", "t", "c")]
    mappers.dispose()


def test_attribute_key_and_column_names_may_all_differ(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """History maps columns to the model's attribute names, whatever key and database name they have."""

    class Thing(Versioned, base):
        __table__ = sa.Table(
            "thing",
            base.metadata,
            sa.Column("THE ID", sa.Integer, primary_key=True, key="thing_id"),
            sa.Column("db_name", sa.String(20), key="name_key"),
            sa.Column("db_secret", sa.String(20), key="secret_key"),
            sa.Column("db_noise", sa.String(20), key="noise_key"),
            sa.Column("plain", sa.String(5)),
        )
        __chrononaut_hidden__ = ["db_secret"]
        __chrononaut_untracked__ = ["noise_key"]
        ident = __table__.c.thing_id
        name = __table__.c.name_key
        secret = __table__.c.secret_key
        noise = __table__.c.noise_key

    base.metadata.create_all(engine)
    thing: Any = Thing(name="a", secret="s", noise="n", plain="p")
    session.add(thing)
    session.commit()
    thing.name, thing.secret, thing.noise = "b", "t", "m"
    session.commit()
    (row,) = thing.versions()
    assert (row.ident, row.name, row.plain) == (thing.ident, "a", "p")
    assert row.change_info["hidden_cols_changed"] == ["secret"]
    assert thing.diff(row) == {"name": ("a", "b")}
    with pytest.raises(UntrackedAttributeError, match="noise"):
        row.noise  # noqa: B018
    columns = {column["name"] for column in sa.inspect(engine).get_columns("thing_history")}
    assert {"THE ID", "db_name"} <= columns
    assert not columns & {"db_secret", "db_noise"}


@pytest.mark.parametrize(
    "name",
    [
        "two words",
        "order",
        "naïve_ключ",
        'quo"ted',
        "it's",
        "per%cent",
        "paren(s)",
        "colon:name",
        "CamelCase",
        "dot.ted",
        "select",
    ],
)
def test_odd_names_of_tables_and_columns(
    name: str, engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """Tables and columns with spaces, quotes, reserved words and other scripts are versioned."""

    class Odd(Versioned, base):
        __tablename__ = name
        key: Mapped[str] = mapped_column(f"{name} key", sa.String(30), primary_key=True)
        value: Mapped[str] = mapped_column(name, sa.String(30), index=True)

    base.metadata.create_all(engine)
    records = [Odd(key=f"k{n}", value="a") for n in range(3)]
    session.add_all(records)
    session.commit()
    for record in records:
        record.value = "b"
    session.commit()
    records[0].value = "c"
    session.commit()
    assert [row.value for row in records[0].versions()] == ["a", "b"]
    assert [row.value for row in records[1].versions()] == ["a"]
    session.delete(records[0])
    session.commit()
    session.add(Odd(key="k0", value="d"))
    session.commit()
    assert session.get_one(Odd, "k0").version == 4


def test_names_at_the_identifier_limit(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """Tables and indexes whose history names would be too long get shortened ones that stay apart."""

    class One(Versioned, base):
        __tablename__ = "t" * 62 + "1"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column("c" * 63, sa.String(10))
        __table_args__ = (sa.Index("i" * 62 + "1", value),)

    class Two(Versioned, base):
        __tablename__ = "t" * 62 + "2"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column("c" * 63, sa.String(10))
        __table_args__ = (sa.Index("i" * 62 + "2", value),)

    base.metadata.create_all(engine)
    one, two = One(value="a"), Two(value="b")
    session.add_all([one, two])
    session.commit()
    one.value = two.value = "c"
    session.commit()
    assert [row.value for row in one.versions()] == ["a"]
    assert [row.value for row in two.versions()] == ["b"]


def test_column_property_hybrid_and_synonym(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """SQL expressions, hybrids and synonyms stay on the live model and disturb nothing."""

    class User(Versioned, base):
        __tablename__ = "appuser"
        id: Mapped[int] = mapped_column(primary_key=True)
        first: Mapped[str] = mapped_column()
        last: Mapped[str] = mapped_column()
        full = column_property(first + " " + last)
        given = synonym("first")

        @hybrid_property
        def initials(self) -> str:
            return self.first[0] + self.last[0]

        @initials.inplace.setter
        def _set_initials(self, value: str) -> None:
            self.first, self.last = value[0], value[1]

    base.metadata.create_all(engine)
    user = User(first="Ada", last="Lovelace")
    session.add(user)
    session.commit()
    assert user.full == "Ada Lovelace"
    user.given = "Bo"
    session.commit()
    user.initials = "XY"
    session.commit()
    assert [(row.first, row.last) for row in user.versions()] == [("Ada", "Lovelace"), ("Bo", "Lovelace")]
    assert user.diff(user.versions()[0]) == {"first": ("Ada", "X"), "last": ("Lovelace", "Y")}
    assert "full" not in base.metadata.tables["appuser_history"].c


@dataclasses.dataclass
class Point:
    x: int
    y: int


def test_composites_are_tracked_by_their_columns(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A composite's columns are in history under their own names, and changing it is a version."""

    class Line(Versioned, base):
        __tablename__ = "line"
        __chrononaut_hidden__ = ["end_y"]
        id: Mapped[int] = mapped_column(primary_key=True)
        start: Mapped[Point] = composite(mapped_column("start_x"), mapped_column("start_y"))
        end: Mapped[Point] = composite(mapped_column("end_x"), mapped_column("end_y"))

    base.metadata.create_all(engine)
    line = Line(start=Point(1, 2), end=Point(3, 4))
    session.add(line)
    session.commit()
    line.start = Point(5, 2)
    session.commit()
    line.end = Point(3, 9)
    session.commit()
    rows = line.versions()
    assert [(row.start_x, row.start_y, row.end_x) for row in rows] == [(1, 2, 3), (5, 2, 3)]
    assert rows[1].change_info["hidden_cols_changed"] == ["end_y"]
    with pytest.raises(HiddenAttributeError):
        rows[0].end_y  # noqa: B018


def test_deferred_columns_are_copied_without_being_loaded(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase], statements: RecordStatements
) -> None:
    """Deferred columns and groups are in history whole, though an update or delete never loads them."""

    class Book(Versioned, base):
        __tablename__ = "book"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        text: Mapped[str] = mapped_column(deferred=True)
        notes: Mapped[str] = mapped_column(deferred=True, deferred_group="extras")
        index_: Mapped[str] = mapped_column(deferred=True, deferred_group="extras")

    base.metadata.create_all(engine)
    session.add(Book(title="t", text="long", notes="n", index_="i"))
    session.commit()
    session.expunge_all()
    book = session.scalars(sa.select(Book)).one()
    book.title = "u"
    with statements() as log:
        session.flush()
    assert not log.matching(r"^SELECT .*(text|notes)")
    session.delete(book)
    with statements() as log:
        session.flush()
    assert not log.matching(r"^SELECT .*(text|notes)")
    session.commit()
    history = history_class(Book)
    rows = session.scalars(sa.select(history).where(history.operation != "insert").order_by(history.version)).all()
    assert [(row.title, row.text, row.notes, row.index_) for row in rows] == [
        ("t", "long", "n", "i"),
        ("u", "long", "n", "i"),
    ]


def test_validators_are_copied_only_if_asked_for(base: type[DeclarativeBase]) -> None:
    """The history class has the model's validators only with ``__chrononaut_copy_validators__``."""

    class Plain(Versioned, base):
        __tablename__ = "plain"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

        @validates("name")
        def check_name(self, key: str, value: str) -> str:
            if not value:
                raise ValueError(f"{key} is empty")
            return value

    class Copied(Plain):
        __tablename__ = "copied"
        __mapper_args__ = {"concrete": True}
        __chrononaut_copy_validators__ = True
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

        @validates("name")
        def check_name(self, key: str, value: str) -> str:
            return super().check_name(key, value)

    plain: Any = history_class(Plain)
    plain(name="")

    class Own(Versioned, base):
        __tablename__ = "own"
        __chrononaut_copy_validators__ = True
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

        @validates("name")
        def check_name(self, key: str, value: str) -> str:
            if not value:
                raise ValueError(f"{key} is empty")
            return value

    own: Any = history_class(Own)
    with pytest.raises(ValueError, match="name is empty"):
        own(name="")


def test_a_primary_key_that_is_a_foreign_key(engine: sa.Engine, session: Session, base: type[DeclarativeBase]) -> None:
    """A key that refers to another table, declared later even, is versioned with that table's key type."""

    class Profile(Versioned, base):
        __tablename__ = "profile"
        user_code: Mapped[str] = mapped_column(sa.ForeignKey("appuser.code"), primary_key=True)
        group_id = mapped_column(sa.ForeignKey("grp.id"))
        text: Mapped[str]

    class User(base):
        __tablename__ = "appuser"
        code: Mapped[str] = mapped_column(sa.String(7), primary_key=True)

    class Group(base):
        __tablename__ = "grp"
        id: Mapped[str] = mapped_column(sa.Numeric(12, 3), primary_key=True, autoincrement=False)

    # As Alembic does: nothing has configured the mappers yet.
    columns = base.metadata.tables["profile_history"].c
    assert isinstance(columns.group_id.type, sa.Numeric)
    assert isinstance(columns.user_code.type, sa.String)
    base.metadata.create_all(engine)
    from decimal import Decimal

    session.add_all([User(code="x"), Group(id=Decimal("1.5")), Group(id=Decimal("2.5"))])
    session.flush()
    profile = Profile(user_code="x", text="t", group_id=Decimal("1.5"))
    session.add(profile)
    session.commit()
    profile.group_id = Decimal("2.5")
    session.commit()
    (row,) = profile.versions()
    assert (row.user_code, row.group_id) == ("x", Decimal("1.5"))
    session.delete(profile)
    session.flush()
    session.delete(session.get_one(User, "x"))
    session.commit()


def test_foreign_keys_to_late_tables_render_ddl_without_configured_mappers(base: type[DeclarativeBase]) -> None:
    """The history table compiles, copies and reflects its late types as plain metadata."""

    class Child(Versioned, base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id = mapped_column(sa.ForeignKey("parent.id"))

    sa.Table("parent", base.metadata, sa.Column("id", sa.String(9), primary_key=True))
    history = base.metadata.tables["child_history"]
    assert "parent_id VARCHAR(9)" in str(sa.schema.CreateTable(history))
    copied = history.to_metadata(sa.MetaData())
    assert "parent_id VARCHAR(9)" in str(sa.schema.CreateTable(copied))


def test_a_relationship_is_no_column_of_history(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """Relationships stay on the live model; naming one in an option is refused."""

    class Parent(Versioned, base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        children: Mapped[list["Child"]] = relationship()

    class Child(Versioned, base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("parent.id"))

    assert not hasattr(history_class(Parent), "children")
    with pytest.raises(ChrononautException, match="no column"):

        class Other(Versioned, base):
            __tablename__ = "other"
            __chrononaut_untracked__ = ["parents"]
            id: Mapped[int] = mapped_column(primary_key=True)


def test_a_model_mapped_to_a_query_is_refused(base: type[DeclarativeBase]) -> None:
    """A model that is mapped to a join or subquery is refused, saying where the mixin belongs."""
    one = sa.Table("one", base.metadata, sa.Column("id", sa.Integer, primary_key=True))
    two = sa.Table("two", base.metadata, sa.Column("one_id", sa.ForeignKey("one.id"), primary_key=True))
    with pytest.raises(ChrononautException, match="not to a table"):

        class Both(Versioned, base):
            __table__ = one.join(two)
            id = column_property(one.c.id, two.c.one_id)


def test_a_table_that_has_the_name_of_history_is_refused(base: type[DeclarativeBase]) -> None:
    """A history table whose name is taken is refused, naming the option that changes it."""
    sa.Table("appuser_history", base.metadata, sa.Column("id", sa.Integer, primary_key=True))
    with pytest.raises(ChrononautException, match="__chrononaut_tablename__"):

        class User(Versioned, base):
            __tablename__ = "appuser"
            id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.parametrize("name", ["version", "began", "changed", "change_info", "operation"])
def test_reserved_names_are_refused(name: str, base: type[DeclarativeBase]) -> None:
    """A column of the model that has one of history's own names is refused, with a name to take instead."""
    with pytest.raises(ChrononautException, match=f"{name}_"):
        type(base)(
            "User",
            (Versioned, base),
            {
                "__tablename__": "appuser",
                "id": mapped_column(sa.Integer, primary_key=True),
                f"my_{name}": mapped_column(name, sa.Integer),
            },
        )


def test_deferred_expression_of_the_table_keeps_its_group(
    engine: sa.Engine, session: Session, base: type[DeclarativeBase]
) -> None:
    """A column deferred by ``deferred()`` can be loaded by its group on the live model."""

    class Note(Versioned, base):
        __table__ = sa.Table(
            "note", base.metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("body", sa.String(20))
        )
        body = deferred(__table__.c.body, group="big")

    base.metadata.create_all(engine)
    session.add(Note(body="a"))
    session.commit()
    note = session.scalars(sa.select(Note).options(undefer_group("big"))).one()
    note.body = "b"
    session.commit()
    assert [row.body for row in note.versions()] == ["a"]
