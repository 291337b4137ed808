"""Build the history table of a live table."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any, cast

from sqlalchemy import Column, Enum, Index, Integer, MetaData, String, Table
from sqlalchemy.orm import MappedColumn
from sqlalchemy.schema import BLANK_SCHEMA, conv
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.visitors import replacement_traverse
from sqlalchemy.types import NullType, TypeEngine

from chrononaut._options import reserved_name_error
from chrononaut._types import change_info_type, instant_type, plain_enum, stored_type
from chrononaut.exceptions import MappingError

VERSION, BEGAN, CHANGED = "version", "began", "changed"
CHANGE_INFO, OPERATION = "change_info", "operation"

#: The attribute of ``RecordChanges`` that is mapped to its column ``changed``.
CHANGED_ATTRIBUTE = "_chrononaut_changed"

#: The shortest identifier limit of the supported databases (PostgreSQL's, in bytes).
_IDENTIFIER_LIMIT = 63
_INFO_KEY = "chrononaut"
#: Index options that databases accept for unique indexes only.
_UNIQUE_ONLY = frozenset({"postgresql_nulls_not_distinct"})


class VersionColumn(Column[int]):
    """The live table's ``version``; a class of its own tells it from a column that the user declared."""

    inherit_cache = True


class LockColumn(Column[bool]):
    """A live column that ``Lockable`` declared."""

    inherit_cache = True


class RecordChangesColumn(Column[Any]):
    """A live column that ``RecordChanges`` declared."""

    inherit_cache = True


class _FollowingColumn(Column[Any]):
    """A history column whose type follows a foreign key column that has none until its target is declared."""

    inherit_cache = True
    _source: Column[Any]
    _given_type: TypeEngine[Any]

    @classmethod
    def of(cls, source: Column[Any], **kw: Any) -> _FollowingColumn:
        column = cls(source.name, key=source.key, **kw)
        column._source = source
        return column

    @property
    def type(self) -> TypeEngine[Any]:  # an attribute of Column, looked up late here
        source = self.__dict__.get("_source")
        return self._given_type if source is None else stored_type(source.type)

    @type.setter
    def type(self, value: TypeEngine[Any]) -> None:
        self._given_type = value  # that of a copy, which has no source


def version_column() -> VersionColumn:
    """Make the live table's version column."""
    return VersionColumn(VERSION, Integer, nullable=False, default=0, server_default="0")


def declared_column(cls: type, column: Column[Any]) -> Column[Any]:
    """Return what a mixin declares on a class: a column, which a table that the class was given must get first.

    :raises MappingError: if the class is given something that is no table, or has a column of that name.
    """
    given: object = vars(cls).get("__table__")
    if given is None:
        if any(_column_name(value) == column.name for value in vars(cls).values()):
            raise reserved_name_error(cls, column.name)
        return column
    table = required_table(cls, given)
    if column.key not in table.c:
        table.append_column(column)
    return table.c[column.key]


def _column_name(value: object) -> str | None:
    given: Any = value
    column: object = given.column if isinstance(value, MappedColumn) else value
    return column.name if isinstance(column, Column) else None


def required_table(cls: type, mapped_to: object) -> Table:
    """Return what a class is mapped to if that is a table.

    :raises MappingError: if it is not.
    """
    given = mapped_to  # not narrowed: a checker forgets the type arguments then
    if isinstance(mapped_to, Table):
        return cast("Table", given)
    raise MappingError(
        f"{cls.__name__} is mapped to {type(mapped_to).__name__}, not to a table, so its rows cannot be versioned. "
        "Remove the mixin, or put it on the models of the tables."
    )


def is_tracked(column: Column[Any]) -> bool:
    """Tell whether a live column can have a copy in history: ours and the database's own have none."""
    return not (column.system or isinstance(column, VersionColumn | RecordChangesColumn))


def build_history_table(
    live: Table, name: str | None, left_out: Collection[Column[Any]], disabled_indexes: Collection[str]
) -> Table:
    """Build the history table of a table that stands alone or is the base of a hierarchy.

    :param live: the live table.
    :param name: the history table's name; ``<table>_history`` if None.
    :param left_out: columns that history does not hold.
    :param disabled_indexes: names of columns and indexes whose index is not copied.
    """
    history = _bare_table(live, name)
    for column in _columns(live, left_out):
        history.append_column(column)
    for column in (
        Column(VERSION, Integer, primary_key=True),
        Column(BEGAN, instant_type()),
        # What ended lately is asked for by each look at the past and by every feed.
        Column(CHANGED, instant_type(), nullable=False, index=CHANGED not in disabled_indexes),
        Column(CHANGE_INFO, change_info_type(), nullable=False),
        Column(OPERATION, String(6), nullable=False),
    ):
        history.append_column(column)
    _copy_indexes(live, history, disabled_indexes)
    return history


def build_child_history_table(
    live: Table, name: str | None, left_out: Collection[Column[Any]], disabled_indexes: Collection[str]
) -> Table:
    """Build the history table of a joined-inheritance child: tied to its parent's by key and version."""
    history = _bare_table(live, name)
    for column in _columns(live, left_out):
        history.append_column(column)
    history.append_column(Column(VERSION, Integer, primary_key=True))
    _copy_indexes(live, history, disabled_indexes)
    return history


def extend_history_table(live: Table, history: Table, left_out: Collection[Column[Any]]) -> None:
    """Add the columns that a single-table subclass has added to the live table."""
    for column in _columns(live, left_out):
        if column.key not in history.c:
            history.append_column(column)


def register_history_table(live: Table, history: Table) -> None:
    """Remember which table holds the history of which."""
    tables: dict[Table, Table] = live.metadata.info.setdefault(_INFO_KEY, {})
    tables[live] = history


def history_table_of(live: Table) -> Table | None:
    """Return the table that holds the history of a live table."""
    tables: dict[Table, Table] = live.metadata.info.get(_INFO_KEY, {})
    return tables.get(live)


def versioned_tables(metadata: MetaData) -> dict[Table, Table]:
    """Return all history tables of a collection, by live table."""
    return dict(metadata.info.get(_INFO_KEY, {}))


def limited_name(name: str) -> str:
    """Shorten an identifier that no database would take, in a way that is stable and stays unique."""
    if len(name.encode()) <= _IDENTIFIER_LIMIT:
        return name
    digest = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()[:8]
    head = name.encode()[: _IDENTIFIER_LIMIT - 9].decode(errors="ignore")
    return f"{head}_{digest}"


def moved(expression: Any, live: Table, history: Table) -> Any:
    """Return an expression over the live table's columns as one over history's."""

    def replace(element: Any, **kw: Any) -> Any:
        if isinstance(element, Column) and element.table is live:
            return history.c[element.key]
        return None

    return cast("Any", replacement_traverse(expression, {}, replace))


def history_comment(live: str) -> str:
    """Return the comment on the history table of a live table."""
    return f"States of {live} that have ended"


def _bare_table(live: Table, name: str | None) -> Table:
    if history_table_of(live) is not None:
        raise MappingError(
            f"The table {live.name!r} has a history already, which is made by the class that was mapped to it first: "
            "only one class may have the mixin."
        )
    name = limited_name(name or f"{live.name}_history")
    if _qualified(live.schema, name) in live.metadata.tables:
        raise MappingError(
            f"The history table of {live.name!r} would be called {name!r}, as another table is already. "
            "Choose another name by `__chrononaut_tablename__`."
        )
    return Table(
        name,
        live.metadata,
        # Not None: that would be the schema of the whole metadata.
        schema=BLANK_SCHEMA if live.schema is None else live.schema,
        comment=history_comment(live.name),
        quote_schema=getattr(live.schema, "quote", None),
    )


def _qualified(schema: str | None, name: str) -> str:
    return name if schema is None else f"{schema}.{name}"


def _columns(live: Table, left_out: Collection[Column[Any]]) -> Iterator[Column[Any]]:
    for column in live.columns:
        if is_tracked(column) and not any(column is other for other in left_out):
            yield _copy_column(column)


def _copy_column(column: Column[Any]) -> Column[Any]:
    settings: dict[str, Any] = {
        "primary_key": column.primary_key,
        "nullable": not column.primary_key,
    }
    if isinstance(column.type, NullType) and column.foreign_keys:
        return _FollowingColumn.of(column, **settings)
    type_ = stored_type(column.type)
    if column.primary_key and isinstance(column.type, Enum):
        type_ = plain_enum(column.type)
    return Column(column.name, type_, key=column.key, **settings)


def _copy_indexes(live: Table, history: Table, disabled: Collection[str]) -> None:
    """Give history the live table's indexes, as plain ones: a key may well occur there many times."""
    for index in sorted(live.indexes, key=lambda index: str(index.name)):
        names = {index.name, *(column.key for column in index.columns), *(column.name for column in index.columns)}
        keys = [column.key for column in index.columns]
        if names & set(disabled) or not keys or not all(key in history.c for key in keys):
            continue
        options = {
            name: moved(value, live, history) if isinstance(value, ClauseElement) else value
            for name, value in index.dialect_kwargs.items()
            if name not in _UNIQUE_ONLY
        }
        Index(
            None if isinstance(index.name, conv) else limited_name(f"{index.name}_history"),
            *(moved(expression, live, history) for expression in index.expressions),
            **options,
        )
