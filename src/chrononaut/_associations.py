"""The tables without a class that have a history: the ``secondary`` tables of many-to-many relationships."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table

from chrononaut._change_info import ChangeInfoHooks
from chrononaut._history_table import build_history_table, register_history_table, version_column
from chrononaut._mapping import VersionedTable
from chrononaut._options import RESERVED
from chrononaut.exceptions import MappingError

_REGISTERED = "chrononaut_associations"
_ATTRIBUTE = "__chrononaut_association__"


@dataclass(frozen=True, eq=False)
class Association:
    """A versioned table that has no class.

    :param base: the live table and its history.
    :param hooks: stands for the class in the change info.
    """

    base: VersionedTable
    hooks: type[ChangeInfoHooks]

    @property
    def name(self) -> str:
        """The table's name."""
        return self.base.live.name

    @property
    def tables(self) -> tuple[VersionedTable, ...]:
        """Its only table."""
        return (self.base,)

    @property
    def family_tables(self) -> tuple[VersionedTable, ...]:
        """Its only table."""
        return (self.base,)

    @property
    def lock_column(self) -> None:
        """Its rows cannot be locked."""
        return None


def versioned_table(table: Table, *, tablename: str | None = None) -> Table:
    """Give a table without a class a history: the ``secondary`` table of a many-to-many relationship.

    The table gets one column, ``version``, and a table ``<table>_history`` beside it, which has the same shape as that
    of a model. What attached sessions add and remove is recorded, by relationships and by statements. E.g.::

        membership = versioned_table(
            Table(
                "membership",
                Base.metadata,
                Column("user_id", ForeignKey("appuser.id"), primary_key=True),
                Column("group_id", ForeignKey("appgroup.id"), primary_key=True),
            )
        )

        class User(Versioned, Base):
            groups: Mapped[list[Group]] = relationship(secondary=membership)

    :param table: the table. It needs a primary key, by which its rows are known. A table that has a class gets the
        ``Versioned`` mixin there instead.
    :param tablename: the name of the history table; ``<table>_history`` if None.
    :return: the table.
    :raises ChrononautException: if it has no primary key, or a column of one of history's own names.
    """
    if not table.primary_key.columns:
        raise MappingError(
            f"The table {table.name!r} has no primary key, so its rows cannot be told apart: "
            "make its foreign keys `primary_key=True`."
        )
    taken = RESERVED & {name for column in table.c for name in (column.key, column.name)}
    if taken:
        raise MappingError(
            f"The table {table.name!r} has a column {min(taken)!r}, which history needs for itself: rename it."
        )
    history = build_history_table(table, tablename, (), ())
    table.append_column(version_column())
    register_history_table(table, history)
    tables = VersionedTable(table, history, tuple(table.primary_key), set())
    association = Association(tables, type(table.name, (ChangeInfoHooks,), {}))
    setattr(association.hooks, _ATTRIBUTE, association)
    known: dict[Table, Association] = table.metadata.info.setdefault(_REGISTERED, {})
    known[table] = known[history] = association
    return table


def find_association(table: object) -> Association | None:
    """Return how a table without a class, or its history table, is versioned; None if it is not, or has a class."""
    known: Mapping[Any, Association] = table.metadata.info.get(_REGISTERED, {}) if isinstance(table, Table) else {}
    return known.get(table)


def find_association_of(hooks: type) -> Association | None:
    """Return the association that a class stands for in the change info; None if it stands for none."""
    found: Association | None = vars(hooks).get(_ATTRIBUTE)
    return found
