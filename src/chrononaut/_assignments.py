"""What an UPDATE sets, and which rows that really changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnElement,
    Text,
    Update,
    false,
    literal,
    or_,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.sql import ClauseElement, operators
from sqlalchemy.sql.elements import BinaryExpression, Cast, Grouping, Null, TypeCoerce
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import Boolean, Date, DateTime, Integer, Interval, Numeric, Time, TypeEngine, Uuid

from chrononaut._bulk import with_values
from chrononaut._dialect import is_mariadb
from chrononaut._history_table import RecordChangesColumn, VersionColumn
from chrononaut._mapping import VersionedMapping, VersionedTable, mapped_columns
from chrononaut.exceptions import UntrackedStatementError

#: SQL functions that give the same again for the same arguments, whenever they are called in a transaction.
_STEADY = frozenset(
    [
        "abs",
        "ceil",
        "char_length",
        "coalesce",
        "concat",
        "floor",
        "greatest",
        "least",
        "left",
        "length",
        "lower",
        "ltrim",
        "lpad",
        "max",
        "min",
        "nullif",
        "replace",
        "right",
        "round",
        "rpad",
        "rtrim",
        "substr",
        "substring",
        "trim",
        "upper",
        "jsonb_set",
    ]
)
#: Types of which equal values are the same value. Text is not among them: a collation may take 'a' for 'A'.
_EXACT = (Integer, Numeric, Boolean, Date, DateTime, Time, Interval, Uuid)


def read_assignments(
    statement: Update, table: VersionedTable, parameters: Mapping[str, Any]
) -> dict[Column[Any], ColumnElement[Any]]:
    """Return what an UPDATE sets: the new value of each column.

    SQLAlchemy tells no one what a statement sets. So each column in turn is set to something else: the value
    that the statement loses by this is what it sets the column to.

    :param parameters: what the statement is executed with.
    :raises UntrackedStatementError: if the statement cannot be asked.
    """
    before = list(statement.get_children())
    probe = literal(0)
    found: dict[Column[Any], ColumnElement[Any]] = {}
    for column in table.live.c:
        for name in (column, column.key):
            try:
                after = statement.values({name: probe}).get_children()
            except InvalidRequestError as error:
                raise UntrackedStatementError(
                    f"An UPDATE of {table.live.name} with ordered_values() cannot be captured: use values()."
                ) from error
            left = Counter(map(id, after))
            for child in before:
                if left[id(child)] == 0:
                    found[column] = _typed(child, column, parameters)
                    break
                left[id(child)] -= 1
        if column not in found and column.key in parameters:
            found[column] = literal(parameters[column.key], column.type)
    return found


def _typed(value: Any, column: Column[Any], parameters: Mapping[str, Any]) -> ColumnElement[Any]:
    bound: Any = value  # not narrowed: a checker forgets the type arguments then
    if isinstance(value, BindParameter):
        given = parameters.get(bound.key, bound.effective_value)
        return literal(given, column.type)
    return with_values(value, parameters)


def changes_by(assignments: Mapping[Column[Any], ColumnElement[Any]], dialect: str) -> ColumnElement[bool] | None:
    """Return the condition that a row has another value than it is set to; None if that cannot be known before."""
    conditions: list[ColumnElement[bool]] = []
    for column, value in assignments.items():
        if not is_steady(value):
            return None
        old, new = (_comparable(side, column.type, dialect) for side in (column, value))
        conditions.append(old.is_distinct_from(new))
    return or_(false(), *conditions)


def is_steady(value: ClauseElement) -> bool:
    """Tell whether an expression is known to have one value however often it is computed."""
    return all(_is_steady_node(node) for node in iterate(value))


def _is_steady_node(node: Any) -> bool:
    given: Any = node  # not narrowed: a checker forgets the type arguments then
    if isinstance(node, FunctionElement):
        return getattr(given, "name", None) in _STEADY
    if isinstance(node, BinaryExpression):
        return not isinstance(node.operator, operators.custom_op)
    if isinstance(node, Column):
        return not isinstance(node, VersionColumn)
    return isinstance(node, BindParameter | Null | Grouping | Cast | TypeCoerce) or node.__visit_name__ in _PLAIN_NODES


_BINARY_COLLATIONS = {"sqlite": "BINARY", "postgresql": "C"}
_PLAIN_NODES = frozenset(
    {"clauselist", "expression_clauselist", "unary", "case", "true", "false", "type_clause", "typeclause"}
)


def _comparable(side: ColumnElement[Any], type_: TypeEngine[Any], dialect: str) -> ColumnElement[Any]:
    """Return a value as something that the database compares to the last bit."""
    if isinstance(type_, _EXACT):
        return side
    is_typed = isinstance(side, Column) or dialect == "sqlite" or is_mariadb(dialect)  # which has no CAST to JSON
    typed = side if is_typed else sql_cast(side, type_)
    return sql_cast(typed, Text()).collate(_BINARY_COLLATIONS.get(dialect, "utf8mb4_bin"))


def attributes_of(mapping: VersionedMapping, column: Column[Any]) -> Iterable[tuple[VersionedMapping, str]]:
    """Yield the attributes that a column of a table is in the models that share the table."""
    for each in mapping.family:
        for name, mapped in mapped_columns(each.mapper).items():
            if mapped is column or column in each.mapper.get_property_by_column(mapped).columns:
                yield each, name


def is_noticed(mapping: VersionedMapping, table: VersionedTable, column: Column[Any]) -> bool:
    """Tell whether a change of a column makes a version."""
    if isinstance(column, VersionColumn | RecordChangesColumn):
        return False
    return column.key in table.history.c or is_hidden(mapping, column)


def is_hidden(mapping: VersionedMapping, column: Column[Any]) -> bool:
    """Tell whether a column is hidden."""
    return any(name in each.hidden for each, name in attributes_of(mapping, column))
