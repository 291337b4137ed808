"""What the database itself deletes or changes, by its foreign keys, when rows are deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    ForeignKeyConstraint,
    Table,
    and_,
    false,
    or_,
    select,
)
from sqlalchemy.exc import NoReferencedColumnError, NoReferencedTableError

from chrononaut._assignments import is_hidden, is_noticed
from chrononaut._associations import Association, find_association
from chrononaut._bulk import Rows, Writer, are_in, as_text, name_hidden
from chrononaut._change_info import ChangeInfoSource
from chrononaut._mapping import VersionedMapping, model_of
from chrononaut.exceptions import UntrackedStatementError

_INFO_KEY = "chrononaut_dependents"


@dataclass(frozen=True, slots=True)
class Dependent:
    """A table whose rows the database deletes or changes with those that they refer to.

    :param table: the table.
    :param columns: its foreign key.
    :param referred: what that refers to.
    :param on_delete: what the database does when those rows are deleted, in capitals.
    :param on_update: the same when their key is changed.
    """

    table: Table
    columns: tuple[Column[Any], ...]
    referred: tuple[Column[Any], ...]
    on_delete: str
    on_update: str

    @property
    def is_deleted(self) -> bool:
        """Whether its rows are deleted with those that they refer to."""
        return self.on_delete == "CASCADE"

    @property
    def is_changed(self) -> bool:
        """Whether its rows lose their reference."""
        return self.on_delete in {"SET NULL", "SET DEFAULT"}


def dependents_of(table: Table) -> tuple[Dependent, ...]:
    """Return what the database changes together with a table's rows, as far as that ends in versioned tables."""
    metadata = table.metadata
    # Made anew when tables or models were added; else each deletion would search all foreign keys.
    stamp = (len(metadata.tables), len(metadata.info.get("chrononaut_models", ())))
    held: tuple[Any, dict[Table, tuple[Dependent, ...]]] | None = metadata.info.get(_INFO_KEY)
    known = held[1] if held is not None and held[0] == stamp else dict[Table, tuple[Dependent, ...]]()
    if table not in known:
        metadata.info[_INFO_KEY] = (stamp, known)
        referring = _referring(table)
        ends = {each for each in referring if _ends_versioned(each, {table})}
        # A tree's descendants are deleted with their ancestors, and what refers to them goes too.
        known[table] = tuple(each for each in referring if each in ends or (ends and _is_tree(each, table)))
    return known[table]


def _is_tree(dependent: Dependent, table: Table) -> bool:
    return dependent.table is table and dependent.is_deleted


def _referring(table: Table) -> tuple[Dependent, ...]:
    return tuple(
        Dependent(
            other,
            tuple(constraint.columns),
            tuple(element.column for element in constraint.elements),
            (constraint.ondelete or "").upper(),
            (constraint.onupdate or "").upper(),
        )
        for other in table.metadata.tables.values()
        for constraint in other.foreign_key_constraints
        if _refers_to(constraint, table) and not _is_inheritance(constraint, other, table)
    )


def _refers_to(constraint: ForeignKeyConstraint, table: Table) -> bool:
    try:
        return constraint.referred_table is table
    except (NoReferencedTableError, NoReferencedColumnError):
        return False


def _is_inheritance(constraint: ForeignKeyConstraint, child: Table, table: Table) -> bool:
    """Tell whether a foreign key holds the parts of one record together."""
    one, other = model_of(child), model_of(table)
    return (
        one is not None
        and other is not None
        and one.base is other.base
        and child is not table
        and set(constraint.columns) == set(child.primary_key.columns)
    )


def _ends_versioned(dependent: Dependent, seen: set[Table]) -> bool:
    if not (dependent.is_deleted or dependent.is_changed or _moves(dependent)):
        return False
    if _owner_of(dependent.table) is not None:
        return True
    if dependent.table in seen or not dependent.is_deleted:
        return False
    return any(_ends_versioned(each, seen | {dependent.table}) for each in _referring(dependent.table))


def _moves(dependent: Dependent) -> bool:
    return dependent.on_update in {"CASCADE", "SET NULL", "SET DEFAULT"}


def refuse_key_change(table: Table, names: Iterator[str] | frozenset[str]) -> None:
    """Refuse to change columns that the database would change in versioned rows as well.

    :param names: keys of the columns that change.
    :raises UntrackedStatementError: if there are such rows.
    """
    changed = set(names)
    for each in dependents_of(table):
        if _moves(each) and _owner_of(each.table) is not None and changed & {column.key for column in each.referred}:
            raise UntrackedStatementError(
                f"With the key of {table.name} the database changes {each.table.name} (ON UPDATE "
                f"{each.on_update}), past its history. Drop ON UPDATE from the foreign key, and use "
                "`passive_updates=False` on the relationship, so that the session changes the references."
            )


@dataclass(frozen=True, slots=True)
class Cascade:
    """Captures what the database is about to do to the rows that refer to others.

    :param writer: where history is written.
    :param info: who deletes, and why.
    """

    writer: Writer
    info: Callable[[], ChangeInfoSource]

    def capture(self, table: Table, criteria: ColumnElement[bool]) -> None:
        """Capture what follows from the deletion of a table's rows, before they are deleted.

        :param criteria: which rows are deleted.
        :raises RecordLockedError: if a locked record would be deleted or changed.
        :raises UntrackedStatementError: if it cannot be captured.
        """
        if dependents_of(table) and _are_enforced(self.writer.connection):
            self._follow(table, criteria, (table,))

    def _follow(self, table: Table, criteria: ColumnElement[bool], path: tuple[Table, ...]) -> None:
        dependents = dependents_of(table)
        for each in dependents:
            if _is_tree(each, table):
                criteria = self._follow_tree(each, criteria)
        changed: dict[Table, list[tuple[Dependent, ColumnElement[bool]]]] = {}
        for each in dependents:
            # A row that is there twice was captured by the way that came first.
            reached = are_in(each.columns, select(*each.referred).where(criteria))
            if each.is_changed:
                changed.setdefault(each.table, []).append((each, reached))
            elif each.is_deleted and not _is_tree(each, table):
                if each.table in path:
                    raise UntrackedStatementError(
                        f"The database would delete in a circle ({' -> '.join(t.name for t in (*path, each.table))}), "
                        "which cannot be captured. Delete these rows through the session, without ON DELETE CASCADE."
                    )
                self._delete(each.table, reached)
                self._follow(each.table, reached, (*path, each.table))
        for other, references in changed.items():
            self._change(other, references)

    def _follow_tree(self, dependent: Dependent, criteria: ColumnElement[bool]) -> ColumnElement[bool]:
        """Capture the descendants in a tree that is kept in one table; return which rows go altogether."""
        table, key = dependent.table, tuple(dependent.table.primary_key)
        if dependent.referred != key:
            raise UntrackedStatementError(
                f"{table.name} refers to itself by other columns than its primary key, ON DELETE CASCADE: what the "
                "database would delete cannot be captured. Delete these rows through the session."
            )
        gone = select(*key).where(criteria).cte("gone", recursive=True, nesting=True)
        child = table.alias("child")
        links = zip(dependent.columns, key, strict=True)
        link = and_(*(child.c[column.key] == gone.c[part.key] for column, part in links))
        gone = gone.union(select(*(child.c[part.key] for part in key)).select_from(child.join(gone, link)))
        keys: Any = select(*gone.c)
        everything = are_in(key, keys)
        self._delete(table, and_(everything, ~criteria))
        return or_(everything, criteria)

    def _delete(self, table: Table, criteria: ColumnElement[bool]) -> None:
        owner = _owner_of(table)
        if owner is None:
            return
        _refuse_part(owner, table)
        rows = Rows(owner, owner.base, criteria, is_plain=True)
        if self.writer.lock(rows, "delete").matching:
            self.writer.copy(rows, "delete", as_text(self.info().of_class(owner.hooks)), only_new=True)

    def _change(self, live: Table, references: list[tuple[Dependent, ColumnElement[bool]]]) -> None:
        owner = _owner_of(live)
        if owner is None:
            return
        table = next(each for each in owner.tables if each.live is live)
        reached: list[ColumnElement[bool]] = []
        hidden: dict[str, ColumnElement[bool]] = {}
        for dependent, condition in references:
            if isinstance(owner, Association):
                reached.append(condition)
                continue
            columns = [column for column in dependent.columns if is_noticed(owner, table, column)]
            reached += [condition] if columns else []
            hidden |= {
                owner.mapper.get_property_by_column(column).key: condition
                for column in columns
                if is_hidden(owner, column)
            }
        rows = Rows(owner, table, or_(false(), *reached), is_plain=True)
        if reached and self.writer.lock(rows, "update").matching:
            on_base = {name: rows.on_base(condition) for name, condition in hidden.items()}
            info = name_hidden(self.info(), owner.hooks, on_base)
            self.writer.copy(rows, "update", info, only_new=True)
            self.writer.raise_version(rows, info)


def _owner_of(table: Table) -> VersionedMapping | Association | None:
    return model_of(table) or find_association(table)


def _refuse_part(owner: VersionedMapping | Association, table: Table) -> None:
    part = owner.tables[-1]
    if table is part.live and part.live_version is None:
        raise UntrackedStatementError(
            f"The database would delete rows of {table.name} alone (ON DELETE CASCADE), half of each "
            f"{owner.name}. Put the foreign key on {owner.base.live.name}, or delete through the session."
        )


def _are_enforced(connection: Connection) -> bool:
    """Tell whether the database does what its foreign keys say: SQLite only if it is told to."""
    return connection.dialect.name != "sqlite" or bool(connection.exec_driver_sql("PRAGMA foreign_keys").scalar())
