"""What an upsert does with the rows that are there already, and which these are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BindParameter,
    Column,
    Connection,
    Insert,
    Table,
    UniqueConstraint,
    select,
)
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.elements import Null
from sqlalchemy.sql.visitors import iterate

from chrononaut._assignments import is_noticed
from chrononaut._capture import CurrentRow, Key, live_version, lock_rows
from chrononaut._history_table import RecordChangesColumn, VersionColumn
from chrononaut._mapping import VersionedMapping, VersionedTable
from chrononaut._wanted import keys_in
from chrononaut.exceptions import UntrackedStatementError

#: What each database calls the clause, as SQLAlchemy's visitors know it.
ON_CONFLICT, ON_DUPLICATE = "on_conflict_do_update", "on_duplicate_key_update"
#: A value that only the database knows.
UNKNOWN: Any = object()

Target = tuple[Column[Any], ...]


def is_upsert(statement: Any) -> bool:
    """Tell whether an INSERT updates the rows that it conflicts with."""
    return any(node.__visit_name__ in (ON_CONFLICT, ON_DUPLICATE) for node in statement.get_children())


@dataclass(frozen=True, slots=True)
class GivenRow:
    """A row that an upsert is given.

    :param values: its plain values, ``UNKNOWN`` ones, and nothing where nothing is given.
    """

    values: dict[Column[Any], Any]

    def value(self, column: Column[Any]) -> Any:
        """Return what the row has in a column, or ``UNKNOWN``."""
        if column in self.values:
            return self.values[column]
        return UNKNOWN if has_default(column) else None

    def target(self, target: Target) -> Key | None:
        """Return what it has in the columns of a unique key; None if it cannot conflict there."""
        key = tuple(self.value(column) for column in target)
        return None if any(part is None or part is UNKNOWN for part in key) else key


def has_default(column: Column[Any]) -> bool:
    """Tell whether a column may get another value than NULL if it is given none."""
    return column.default is not None or column.server_default is not None


@dataclass(frozen=True, slots=True)
class OnConflict:
    """What an upsert does with the rows that are there already.

    :param name: the model.
    :param targets: the unique keys by which it finds them.
    :param assigned: the columns that it sets, but for those of the targets that keep their values.
    :param sources: for each noticed column that it sets the value, the column of the given row that the value is in,
        or ``UNKNOWN``.
    :param is_touching: whether whatever is updated changes a noticed column, too.
    """

    name: str
    targets: tuple[Target, ...]
    assigned: frozenset[Column[Any]]
    sources: Mapping[Column[Any], Any]
    is_touching: bool

    def checked(self, given: Sequence[GivenRow]) -> Sequence[GivenRow]:
        """Return the rows that it is given.

        :raises UntrackedStatementError: if it is not certain which rows these are in the database.
        """
        for row in given:
            if all(row.target(target) is None for target in self.targets):
                names = " or ".join(", ".join(column.key for column in target) for target in self.targets)
                raise UntrackedStatementError(
                    f"An upsert of {self.name} can be captured only if it is given plain values for {names}."
                )
        for target in self.targets:
            keys = [key for row in given if (key := row.target(target)) is not None]
            if len(set(keys)) < len(keys):
                raise self._listed_twice()
        return given

    def _listed_twice(self) -> UntrackedStatementError:
        return UntrackedStatementError(f"An upsert that lists a {self.name} twice cannot be captured: list it once.")

    def changed(self, row: GivenRow, current: Mapping[Column[Any], Any]) -> set[Column[Any]]:
        """Return the columns of a row that really change.

        :raises UntrackedStatementError: if its primary key does.
        """
        changed: set[Column[Any]] = set()
        for column, source in self.sources.items():
            known: Any = source  # not narrowed: a checker forgets the type arguments then
            value = row.value(known) if isinstance(source, Column) else source
            if value is UNKNOWN or column.type.compare_values(current[column], value) is not True:
                changed.add(column)
                if column.primary_key:
                    raise UntrackedStatementError(
                        f"An upsert that changes the primary key of {self.name} cannot be captured. Leave "
                        f"{column.key} out of what it sets."
                    )
        return changed


# --- reading the clause


def read_on_conflict(statement: Insert, mapping: VersionedMapping) -> OnConflict:
    """Return what an upsert does with the rows that are there already.

    :raises UntrackedStatementError: if that cannot be captured.
    """
    clauses: list[Any] = [node for node in statement.get_children() if "on_conflict" in node.__visit_name__]
    clauses += [node for node in statement.get_children() if node.__visit_name__ == ON_DUPLICATE]
    clause, table = clauses[0], mapping.base
    if len(clauses) > 1:
        raise UntrackedStatementError(f"An upsert of {mapping.name} with several ON CONFLICT cannot be captured.")
    for name, meaning in (("update_whereclause", "where"), ("inferred_target_whereclause", "index_where")):
        if getattr(clause, name, None) is not None:
            raise UntrackedStatementError(
                f"An upsert of {mapping.name} with `{meaning}=` cannot be captured. Rows that keep their values make "
                "no version in any case; for another condition use an update and an insert."
            )
    targets = _targets(clause, mapping)
    sources: dict[Column[Any], Any] = {}
    assigned: set[Column[Any]] = set()
    for key, value in _assignments(clause):
        column = _column(key, table.live, mapping)
        source = _source(value, table.live)
        if isinstance(column, VersionColumn | RecordChangesColumn):
            raise UntrackedStatementError(
                f"{mapping.name}.{column.key} is chrononaut's own: a statement cannot set it."
            )
        is_kept = source is column and any(column in target for target in targets)
        if not is_kept and any(column in target for target in targets):
            raise UntrackedStatementError(
                f"An upsert of {mapping.name} that sets {column.key}, by which it finds its rows, to another value "
                "than the given one cannot be captured."
            )
        if isinstance(value, ClauseElement) and any(isinstance(node, VersionColumn) for node in iterate(value)):
            raise UntrackedStatementError(
                f"An upsert of {mapping.name} that sets {column.key} by the version cannot be captured."
            )
        if not is_kept:
            assigned.add(column)
        if is_noticed(mapping, table, column):
            sources[column] = source
    is_touching = any(
        column.server_onupdate is not None and column not in sources and is_noticed(mapping, table, column)
        for column in table.live.c
    )
    return OnConflict(mapping.name, targets, frozenset(assigned), sources, is_touching)


def _assignments(clause: Any) -> Iterator[tuple[Any, Any]]:
    values: Any = clause.update if clause.__visit_name__ == ON_DUPLICATE else clause.update_values_to_set
    for key, value in pairs_of(values):
        yield key, value.__clause_element__() if hasattr(value, "__clause_element__") else value


def _column(key: Any, live: Table, mapping: VersionedMapping) -> Column[Any]:
    name = name_of(key)
    if name not in live.c:
        raise UntrackedStatementError(
            f"An upsert of {mapping.name} that sets {key} cannot be captured: {live.name} has no such column."
        )
    return live.c[name]


def name_of(key: Any) -> str:
    """Return the key of what a clause names: a column, an attribute, or the key itself."""
    return key if isinstance(key, str) else str(getattr(key, "key", ""))


def _source(value: Any, live: Table) -> Any:
    """Return the value that a column is set to, the column of the given row that it is in, or ``UNKNOWN``."""
    given: Any = value  # not narrowed: a checker forgets the type arguments then
    if isinstance(value, BindParameter):
        return UNKNOWN if given.required else given.effective_value
    if isinstance(value, Null):
        return None
    table = getattr(value, "table", None)
    if isinstance(value, Column) and table is not live and getattr(table, "name", None) in ("excluded", "inserted"):
        return live.c[value.key]
    return UNKNOWN if isinstance(value, ClauseElement) else value


def _targets(clause: Any, mapping: VersionedMapping) -> tuple[Target, ...]:
    live = mapping.base.live
    if clause.__visit_name__ == ON_DUPLICATE:
        return tuple(dict.fromkeys(_in_key_order(target, mapping) for _, target in _unique_keys(mapping)))
    name = getattr(clause, "constraint_target", None)
    if name is not None:
        for each, target in _unique_keys(mapping):
            if each == name:
                return (_in_key_order(target, mapping),)
        raise UntrackedStatementError(
            f"An upsert of {mapping.name} by the constraint {name} cannot be captured, for {live.name} has no unique "
            "constraint of that name. Use `index_elements=`."
        )
    found: list[Column[Any]] = []
    for element in clause.inferred_target_elements or ():
        key = name_of(element)
        if key not in live.c:
            raise UntrackedStatementError(
                f"An upsert of {mapping.name} by something else than columns cannot be captured."
            )
        found.append(live.c[key])
    return (_in_key_order(tuple(found), mapping),)


def _in_key_order(target: Target, mapping: VersionedMapping) -> Target:
    key = mapping.base.key
    return key if set(target) == set(key) else target


def _unique_keys(mapping: VersionedMapping) -> Iterator[tuple[str, Target]]:
    """Yield the unique keys of a table, each with its name."""
    live = mapping.base.live
    # PostgreSQL's own name for a primary key that was given none.
    yield str(live.primary_key.name or f"{live.name}_pkey"), mapping.base.key
    for constraint in live.constraints:
        if isinstance(constraint, UniqueConstraint):
            yield str(constraint.name), tuple(constraint.columns)
    for index in live.indexes:
        if index.unique:
            if not all(isinstance(each, Column) for each in index.expressions):
                raise UntrackedStatementError(
                    f"An upsert of {mapping.name} cannot be captured, for the unique index {index.name} is about "
                    "expressions."
                )
            yield str(index.name), tuple(index.columns)


def pairs_of(values: Any) -> list[tuple[Any, Any]]:
    """Return what a clause sets: SQLAlchemy 2.0 has a list there, 2.1 a mapping."""
    return list(values.items() if hasattr(values, "items") else values)


# --- which rows are there


def find_by_targets(
    connection: Connection,
    table: VersionedTable,
    targets: Iterable[Target],
    given: Sequence[GivenRow],
    lock: bool = False,
) -> dict[Key, int]:
    """Return the keys and versions of the rows that have a unique key of given ones.

    :param lock: lock them, and on MariaDB the gaps where one is missing.
    """
    dialect, found = connection.dialect.name, dict[Key, int]()
    for target in targets:
        keys = [key for row in given if (key := row.target(target)) is not None]
        for condition in keys_in(target, keys, dialect):
            query = select(*table.key, live_version(table)).where(condition)
            rows = connection.execute(lock_rows(query, table, "update", dialect) if lock else query)
            found |= {tuple(row[:-1]): row[-1] for row in rows}
    return found


def match(
    mapping: VersionedMapping,
    targets: Sequence[Target],
    given: Sequence[GivenRow],
    current: Sequence[CurrentRow],
    columns: Sequence[Column[Any]],
    find_one: Callable[[GivenRow], Iterable[Key]],
) -> list[tuple[GivenRow, CurrentRow]]:
    """Return which of the rows that are there each given one is about.

    :param columns: what the values of the current rows are in.
    :param find_one: returns the keys of the rows that one given row is about, as the database compares them.
    :raises UntrackedStatementError: if two rows are one, or one is two.
    """
    by_key = {row.key: row for row in current}
    places = {column: number for number, column in enumerate(columns)}
    index = {
        (target, tuple(row.values[places[column]] for column in target)): row.key
        for row in current
        for target in targets
    }
    found: list[set[Key]] = []
    for row in given:
        known = ((target, key) for target in targets if (key := row.target(target)) is not None)
        found.append({index[each] for each in known if each in index})
    if len({key for keys in found for key in keys}) < len(current):
        # A collation may take 'a' for 'A', and a type may round.
        for keys, row in zip(found, given, strict=True):
            if not keys:
                keys |= by_key.keys() & set(find_one(row))
    pairs = [(row, by_key[key]) for row, keys in zip(given, found, strict=True) for key in keys]
    if any(len(keys) > 1 for keys in found) or len({row.key for _, row in pairs}) < len(pairs):
        raise UntrackedStatementError(
            f"An upsert that is given one {mapping.name} twice, or whose unique keys are those of two, cannot be "
            "captured: give each record once, by one key."
        )
    return pairs
