"""Columns and tables change later, and the history that is already there stays readable."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.orm import Session

from chrononaut import ChrononautException, versioned_session
from chrononaut.alembic import alter_column_type, rename_column, rename_table, upgrade_history_tables
from chrononaut.check import check_schema
from chrononaut.verify import verify_history
from tests.fix_alembic import Project

# A migration environment has a connection of its own: a database in memory would be another one.
pytestmark = pytest.mark.backends("sqlite-file", "postgresql", "mariadb")

MODELS = """
import enum
from typing import Optional
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from chrononaut import Versioned

class Base(DeclarativeBase):
    pass

class Size(enum.Enum):
    small = 1
    large = 2

class Item(Versioned, Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(20))
    price: Mapped[Optional[int]] = mapped_column(sa.Integer)
    note: Mapped[Optional[str]]
"""
HELPERS = "from chrononaut.alembic import add_column, alter_column_type, drop_column, rename_column, rename_table"


@pytest.fixture
def items(project: Project) -> Project:
    """A table of a versioned model, with a record that has two ended states."""
    models = project.models(MODELS)
    project.migrate()
    with versioned_session(Session(project.engine)) as session:
        item = models.Item(name="first", price=1, note="a note")
        session.add(item)
        session.commit()
        for number in (2, 3):
            item.name, item.price = f"number {number}", number
            session.commit()
    return project


def _change_again(project: Project, **values: Any) -> list[Any]:
    """Change the record once more, and return its versions, having made sure that all is well."""
    models = project.reload()
    with project.engine.connect() as connection:
        assert [each for each in check_schema(connection, models.Base.metadata) if each.severity == "error"] == []
    with versioned_session(Session(project.engine)) as session:
        item = session.scalars(sa.select(models.Item)).one()
        for name, value in values.items():
            setattr(item, name, value)
        session.commit()
        versions: list[Any] = item.versions()
        assert len(versions) == 3
        session.expunge_all()
    with project.engine.connect() as connection:
        assert list(verify_history(connection, models.Base.metadata)) == []
    return versions


NEW_COLUMN = 'colour: Mapped[str] = mapped_column(sa.String(9), server_default="grey")'


def test_a_generated_column_reads_as_none_in_older_states(items: Project) -> None:
    """What a state did not have is not made up, although the live column has a default."""
    items.models(MODELS + f"    {NEW_COLUMN}\n")
    items.migrate()
    assert items.differences() == []
    versions = _change_again(items, colour="red")
    assert [row.colour for row in versions] == [None, None, "grey"]


def test_a_column_is_added_to_table_and_history_by_one_operation(items: Project) -> None:
    """The helper does what autogenerate does."""
    items.models(MODELS + f"    {NEW_COLUMN}\n")
    column = 'sa.Column("colour", sa.String(9), nullable=False, server_default="grey")'
    items.write_revision(f"add_column(op, 'item', {column})", imports=HELPERS)
    items.upgrade()
    assert items.differences() == []
    versions = _change_again(items, colour="red")
    assert [row.colour for row in versions] == [None, None, "grey"]


def test_an_enum_is_added_to_history_as_text(items: Project) -> None:
    """History does not depend on the live type."""
    items.models(MODELS + "    size: Mapped[Optional[Size]]\n")
    if items.engine.dialect.name == "postgresql":
        with items.engine.begin() as connection:
            connection.exec_driver_sql("CREATE TYPE size AS ENUM ('small', 'large')")
    column = 'sa.Column("size", sa.Enum("small", "large", name="size"))'
    items.write_revision(f"add_column(op, 'item', {column})", imports=HELPERS)
    items.upgrade()
    assert items.differences() == []
    versions = _change_again(items, size="small")
    assert [row.size for row in versions] == [None, None, None]


def test_a_renamed_column_keeps_its_values_in_older_states(items: Project) -> None:
    """One operation renames it in both tables, and back."""
    items.models(MODELS.replace("note:", "remark:"))
    items.write_revision(
        "rename_column(op, 'item', 'note', 'remark')", "rename_column(op, 'item', 'remark', 'note')", HELPERS
    )
    items.upgrade()
    assert items.differences() == []
    versions = _change_again(items, remark="new")
    assert [row.remark for row in versions] == ["a note"] * 3
    items.downgrade()
    items.models(MODELS)
    assert items.differences() == []


PAINTED = (
    MODELS
    + """\
    colour: Mapped[str] = mapped_column(sa.String(9), server_default="a: b", comment="The paint")
    data: Mapped[Optional[dict]] = mapped_column(sa.JSON)
"""
)


def test_a_column_that_is_renamed_or_retyped_is_otherwise_what_it_was(items: Project) -> None:
    """Neither NOT NULL nor the default, the comment, or what checks its values is lost, there and back."""
    items.models(PAINTED)
    items.migrate()
    items.models(PAINTED.replace("colour", "paint").replace("String(9)", "String(99)").replace("data", "facts"))
    items.write_revision(
        """
        rename_column(op, "item", "data", "facts")
        rename_column(op, "item", "colour", "paint")
        alter_column_type(op, "item", "paint", sa.String(99))
        alter_column_type(op, "item", "id", sa.BigInteger())
        alter_column_type(op, "item", "id", sa.Integer())
        """,
        """
        alter_column_type(op, "item", "paint", sa.String(9))
        rename_column(op, "item", "paint", "colour")
        rename_column(op, "item", "facts", "data")
        """,
        HELPERS,
    )
    items.upgrade()
    assert items.differences() == []
    models = items.reload()
    with versioned_session(Session(items.engine)) as session:
        session.add(models.Item(name="keyless"))
        session.flush()
        assert session.scalars(sa.select(models.Item.paint)).all() == ["a: b"] * 2
        session.rollback()
    versions = _change_again(items, paint="red", facts={"a": 1})
    assert [row.paint for row in versions] == [None, None, "a: b"]
    items.downgrade()
    items.models(PAINTED)
    assert items.differences() == []


@pytest.mark.backends("mariadb")  # the others alter nothing but the type
def test_a_computed_column_is_not_retyped_to_an_ordinary_one(items: Project) -> None:
    """MariaDB would forget how it is computed, so the operation says what to do instead."""
    with items.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE item ADD double_price INTEGER GENERATED ALWAYS AS (2 * price) STORED")
        op = Operations(MigrationContext.configure(connection))
        with pytest.raises(ChrononautException, match="double_price is computed"):
            alter_column_type(op, "item", "double_price", sa.BigInteger())
        with pytest.raises(ChrononautException, match="item has no column 'half_price'"):
            alter_column_type(op, "item", "half_price", sa.BigInteger())


def test_a_generated_drop_takes_the_column_from_history_too(items: Project) -> None:
    """Autogenerate follows the models."""
    items.models(MODELS.replace("    note: Mapped[Optional[str]]\n", ""))
    items.migrate()
    assert items.differences() == []
    _change_again(items, name="after")
    with items.engine.connect() as connection:
        assert "note" not in {each["name"] for each in sa.inspect(connection).get_columns("item_history")}


@pytest.mark.parametrize("by", ["autogenerate", "helper"])
def test_a_dropped_column_stays_in_history_as_long_as_the_user_keeps_it(items: Project, by: str) -> None:
    """The hook in env.py lets autogenerate leave it; states made later have NULL there; check says that it is kept."""
    items.env(
        imports="from chrononaut.alembic import keep_dropped_columns",
        settings="include_object=keep_dropped_columns(Base.metadata),",
    )
    items.models(MODELS.replace("    note: Mapped[Optional[str]]\n", ""))
    if by == "autogenerate":
        items.migrate()
    else:
        items.write_revision("drop_column(op, 'item', 'note', keep_history=True)", imports=HELPERS)
        items.upgrade()
    assert items.differences() == []
    _change_again(items, name="after")
    models = items.reload()
    with items.engine.connect() as connection:
        kept = connection.exec_driver_sql("SELECT note FROM item_history WHERE operation <> 'insert' ORDER BY version")
        assert kept.scalars().all() == ["a note", "a note", None]
        [note] = check_schema(connection, models.Base.metadata)
        assert (note.severity, "`note` is in no model" in note.what) == ("note", True)


def test_what_is_hidden_later_is_not_kept(items: Project) -> None:
    """Check says that history still holds it, and autogenerate drops it in spite of the hook."""
    items.env(
        imports="from chrononaut.alembic import keep_dropped_columns",
        settings="include_object=keep_dropped_columns(Base.metadata),",
    )
    models = items.models(MODELS.replace("    id:", '    __chrononaut_hidden__ = ["note"]\n    id:'))
    with items.engine.connect() as connection:
        [found] = check_schema(connection, models.Base.metadata)
    assert (found.severity, "still holds its older values" in found.what) == ("error", True)
    assert "a note" not in str(found)
    items.migrate()
    assert items.differences() == []
    _change_again(items, note="new")


def test_a_generated_change_of_type_reaches_history(items: Project) -> None:
    """Older states are converted like the live rows."""
    items.models(MODELS.replace("sa.Integer", "sa.BigInteger").replace("sa.String(20)", "sa.String(200)"))
    items.migrate()
    assert items.differences() == []
    versions = _change_again(items, price=2**40, name="x" * 150)
    assert [row.price for row in versions] == [1, 2, 3]


def test_a_change_of_type_with_a_conversion_is_one_operation(items: Project) -> None:
    """Table and history are converted alike."""
    items.models(MODELS.replace("Optional[int]] = mapped_column(sa.Integer)", "Optional[str]]"))
    operation = "alter_column_type(op, 'item', 'price', sa.String(), using=\"price || ' EUR'\")"
    items.write_revision(operation, imports=HELPERS)
    items.upgrade()
    assert items.differences() == []
    versions = _change_again(items, price="4 EUR")
    unit = " EUR" if items.engine.dialect.name == "postgresql" else ""
    assert [row.price for row in versions] == [f"1{unit}", f"2{unit}", f"3{unit}"]


def test_check_finds_a_type_that_only_the_table_got(items: Project) -> None:
    """History would refuse what the live table takes."""
    statements = {
        "sqlite": ["ALTER TABLE item DROP COLUMN name", "ALTER TABLE item ADD COLUMN name VARCHAR(200)"],
        "postgresql": ["ALTER TABLE item ALTER COLUMN name TYPE VARCHAR(200)"],
        "mariadb": ["ALTER TABLE item MODIFY COLUMN name VARCHAR(200) NOT NULL"],
    }
    with items.engine.begin() as connection:
        for statement in statements[items.engine.dialect.name]:
            connection.exec_driver_sql(statement)
    with items.engine.connect() as connection:
        [found] = check_schema(connection, items.reload().Base.metadata)
    assert found.what == "`name` is VARCHAR(20) there but VARCHAR(200) in item."


def test_a_table_is_renamed_with_its_history(items: Project) -> None:
    """Nothing is left to autogenerate, and older states are there."""
    indexed = MODELS.replace("sa.String(20)", "sa.String(20), index=True")
    items.models(indexed)
    items.migrate()
    items.models(indexed.replace('"item"', '"article"'))
    items.write_revision("rename_table(op, 'item', 'article')", "rename_table(op, 'article', 'item')", HELPERS)
    items.upgrade()
    assert items.differences() == []
    versions = _change_again(items, name="after")
    assert [row.name for row in versions] == ["first", "number 2", "number 3"]
    items.downgrade()
    items.models(indexed)
    assert items.differences() == []


# --- without a database


def _offline(dialect: str) -> tuple[Operations, io.StringIO]:
    written = io.StringIO()
    return Operations(
        MigrationContext.configure(dialect_name=dialect, opts={"as_sql": True, "output_buffer": written})
    ), written


@pytest.mark.parametrize("dialect", ["postgresql", "mariadb"])
def test_a_rename_is_written_as_sql_in_offline_mode(dialect: str) -> None:
    """It needs to know nothing more than the names."""
    op, written = _offline(dialect)
    rename_column(op, "item", "note", "order", schema="shop")
    quoted = '"order"' if dialect == "postgresql" else "`order`"
    statements = [" ".join(each.split()) for each in written.getvalue().split(";")]
    assert [each.replace(" RENAME COLUMN", " RENAME") for each in statements if each] == [
        f"ALTER TABLE shop.item RENAME note TO {quoted}",
        f"ALTER TABLE shop.item_history RENAME note TO {quoted}",
    ]


def test_what_has_to_be_looked_up_is_refused_in_offline_mode() -> None:
    """Rather than written half, as a column that lost its NOT NULL or a table whose indexes keep the old name."""
    op, written = _offline("mariadb")
    calls: list[Callable[[], None]] = [
        lambda: alter_column_type(op, "item", "name", sa.Text()),
        lambda: rename_table(op, "item", "article"),
        lambda: upgrade_history_tables(op, sa.MetaData()),
    ]
    for call in calls:
        with pytest.raises(ChrononautException, match="--sql"):
            call()
    assert written.getvalue() == ""
