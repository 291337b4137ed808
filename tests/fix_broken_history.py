"""Models whose history a test damages, with a history that is whole to begin with."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import Versioned
from tests.fix_models import Clock


@pytest.fixture
def zoo(base: type[DeclarativeBase], engine: sa.Engine, session_factory: sessionmaker[Session], clock: Clock) -> Any:
    """Animals, some of them birds, and their keepers; a few changes, a deletion, and a key that came back."""

    class Animal(Versioned, base):
        __tablename__ = "animal"
        __chrononaut_hidden__ = ["secret"]
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(sa.String(10))
        name: Mapped[str] = mapped_column(sa.String(30))
        secret: Mapped[str | None] = mapped_column(sa.String(30))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

    class Bird(Animal):
        __tablename__ = "bird"
        id: Mapped[int] = mapped_column(sa.ForeignKey("animal.id"), primary_key=True)
        wings: Mapped[int]
        __mapper_args__ = {"polymorphic_identity": "bird"}

    class Keeper(Versioned, base):
        __tablename__ = "keeper"
        first: Mapped[str] = mapped_column(sa.String(10), primary_key=True)
        last: Mapped[str] = mapped_column(sa.String(10), primary_key=True)
        room: Mapped[int | None]

    base.metadata.create_all(engine)
    with session_factory() as session:
        session.add_all([Animal(id=1, name="Leo"), Bird(id=2, name="Polly", wings=2), Animal(id=3, name="Ape")])
        session.add_all(Keeper(first=first, last=last) for first in "ab" for last in "xy")
        session.commit()
        for number in range(3):
            for each in session.scalars(sa.select(Animal)):
                each.name = f"{each.name}{number}"
            for keeper in session.scalars(sa.select(Keeper)):
                keeper.room = number
            session.commit()
        session.delete(session.get_one(Animal, 3))
        session.commit()
        session.add(Animal(id=3, name="Again"))
        session.commit()
        session.delete(session.get_one(Bird, 2))
        session.commit()
    return base
