"""Models that the tests of the core share. Tests that need others build them on the ``base`` fixture."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, String
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from chrononaut import RecordChanges, Versioned


class Base(DeclarativeBase):
    type_annotation_map = {str: String(200), dict[str, Any]: MutableDict.as_mutable(JSON())}


class Team(Base):
    """Not versioned."""

    __tablename__ = "team"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class User(Versioned, Base):
    """With a generated key, a hidden and an untracked column, and one that is loaded on demand."""

    __tablename__ = "appuser"
    __chrononaut_untracked__ = ["login_count"]
    __chrononaut_hidden__ = ["password"]

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str | None]
    name: Mapped[str | None]
    password: Mapped[str | None]
    login_count: Mapped[int] = mapped_column(default=0)
    settings: Mapped[dict[str, Any] | None]
    biography: Mapped[str | None] = mapped_column(deferred=True)
    team_id: Mapped[int | None] = mapped_column(ForeignKey("team.id"))

    team: Mapped[Team | None] = relationship()


class Setting(Versioned, Base):
    """With a key that the application chooses."""

    __tablename__ = "setting"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str | None]


class Page(RecordChanges, Versioned, Base):
    """Keeps on the live row, too, who changed it last."""

    __tablename__ = "page"
    __chrononaut_hidden__ = ["draft"]
    __chrononaut_untracked__ = ["views"]

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str | None]
    draft: Mapped[str | None]
    views: Mapped[int] = mapped_column(default=0)


class Visit(RecordChanges, Base):
    """Not versioned, but knows who changed it last."""

    __tablename__ = "visit"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None]


class Node(Versioned, Base):
    """A tree."""

    __tablename__ = "node"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("node.id"))

    parent: Mapped[Node | None] = relationship(back_populates="children", remote_side=[id])
    children: Mapped[list[Node]] = relationship(back_populates="parent", order_by=id)


class Animal(Versioned, Base):
    """The base of a hierarchy with a table for each class."""

    __tablename__ = "animal"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    name: Mapped[str | None]


class Dog(Animal):
    """One of them."""

    __tablename__ = "dog"
    __chrononaut_hidden__ = ["chip"]
    __mapper_args__ = {"polymorphic_identity": "dog"}

    id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
    trick: Mapped[str | None]
    chip: Mapped[str | None]
