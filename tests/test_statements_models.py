"""Statements about models that are marked as well, and about records that are spread over several tables."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from chrononaut import RecordChanges, Versioned, extra_change_info, history_class, versioned_session
from tests.fix_models import Clock

Model = Any


# --- marks of a model that is RecordChanges too


@pytest.fixture(params=["marks first", "version first"])
def memo(request: pytest.FixtureRequest, base: type[DeclarativeBase], engine: sa.Engine) -> Model:
    """MariaDB assigns columns in their order, so that it matters which comes first."""
    mixins: tuple[Any, ...] = (
        (RecordChanges, Versioned) if request.param == "marks first" else (Versioned, RecordChanges)
    )

    class Memo(*mixins, base):
        __tablename__ = "memo"
        __chrononaut_hidden__ = ["pin"]
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str] = mapped_column(default="")
        pin: Mapped[int] = mapped_column(default=0)

    base.metadata.create_all(engine)
    return Memo


def test_statement_marks_what_it_changes(session: Session, memo: Model, clock: Clock) -> None:
    """The live row tells what the history of its last state does; a row that keeps its values keeps its marks."""
    versioned_session(session, clock=clock)
    session.add_all([memo(id=number, text=text) for number, text in enumerate("abb", 1)])
    with extra_change_info(step=1):
        session.commit()
    clock.advance()
    with extra_change_info(step=2):
        session.execute(sa.update(memo).where(memo.id < 3).values(text="b", pin=memo.id))
        session.commit()
    clock.advance()
    with extra_change_info(step=3):
        session.execute(sa.update(memo).values(text="b", pin=2))
        session.execute(sa.update(memo).values(text="b"))
        session.commit()
    history = history_class(memo)
    steps: dict[int, list[int]] = {}
    for record in session.scalars(sa.select(memo).order_by(memo.id)):
        last = session.scalars(sa.select(history).filter_by(id=record.id, version=record.version - 1)).one()
        assert (record.change_info, record.changed) == (last.change_info, last.changed)
        steps[record.id] = [record.version, record.change_info["extra"]["step"], record.pin]
        assert record.change_info["hidden_cols_changed"] == ["pin"]
    assert steps == {1: [2, 3, 2], 2: [1, 2, 2], 3: [1, 3, 2]}


# --- records that are spread over several tables


@pytest.fixture
def dog(base: type[DeclarativeBase], engine: sa.Engine) -> Model:
    class Animal(Versioned, base):
        __tablename__ = "animal"
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        name: Mapped[str]
        touched: Mapped[int] = mapped_column(default=0, onupdate=1)

    class Dog(Animal):
        __tablename__ = "dog"
        __mapper_args__ = {"polymorphic_identity": "dog"}
        __chrononaut_hidden__ = ["chip"]
        id: Mapped[int] = mapped_column(sa.ForeignKey("animal.id", ondelete="CASCADE"), primary_key=True)
        trick: Mapped[str]
        chip: Mapped[str | None]

    base.metadata.create_all(engine)
    with versioned_session(Session(engine)) as session:
        session.add_all([Dog(id=1, name="a", trick="sit"), Dog(id=2, name="b", trick="roll"), Animal(id=3, name="c")])
        session.commit()
    return Dog


@pytest.mark.parametrize("of_table", [False, True])
def test_update_of_a_joined_child_raises_the_record_s_version(session: Session, dog: Model, of_table: bool) -> None:
    """Both tables of the record get history, for those rows alone that change."""
    first = session.get(dog, 1)
    assert first is not None
    target = dog.__table__ if of_table else dog
    key = target.c.id if of_table else dog.id
    result: Any = session.execute(sa.update(target).values(chip="x").where(key < 9))
    assert result.rowcount == 2
    session.expire_all()
    assert {each.id: each.version for each in session.scalars(sa.select(dog))} == {1: 1, 2: 1}
    assert [(old.name, old.trick, old.version) for old in first.versions()] == [("a", "sit", 0)]
    assert first.touched == 0, "the statement did not update the base"
    assert first.versions()[0].change_info["hidden_cols_changed"] == ["chip"]
    session.execute(sa.update(target).values(trick="sit"))
    session.expire_all()
    assert {each.id: each.version for each in session.scalars(sa.select(dog))} == {1: 1, 2: 2}


def test_update_of_a_joined_base_copies_the_child_too(session: Session, dog: Model) -> None:
    """A state is the whole record."""
    animal = dog.__mro__[1]
    session.execute(sa.update(animal).values(name="z"))
    found = {
        each.id: each
        for each in session.scalars(sa.select(history_class(animal)).where(history_class(animal).version == 0))
    }
    assert {key: (old.name, getattr(old, "trick", None)) for key, old in found.items()} == {
        1: ("a", "sit"),
        2: ("b", "roll"),
        3: ("c", None),
    }
    session.commit()


def test_delete_of_a_joined_base_keeps_the_child_s_last_state(session: Session, dog: Model) -> None:
    """The database deletes the child's row; its history has it."""
    animal = dog.__mro__[1]
    session.execute(sa.delete(animal).where(animal.name == "b"))
    session.commit()
    history = history_class(dog)
    (last,) = session.scalars(sa.select(history).where(history.operation == "delete"))
    assert (last.id, last.name, last.trick, last.version) == (2, "b", "roll", 0)
