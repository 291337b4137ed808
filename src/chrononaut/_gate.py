"""Refuse the statements that would change versioned tables past their history."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import Delete, Insert, Table, TextClause
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.selectable import TextualSelect

from chrononaut._associations import find_association, find_association_of
from chrononaut._cascades import dependents_of
from chrononaut._change_info import ChangeInfoHooks
from chrononaut._history_table import RecordChangesColumn
from chrononaut._mapping import VersionedTable, find_mapping, model_of, target_of
from chrononaut._suppression import is_suppressed, may_delete_history
from chrononaut.exceptions import ReadOnlyError, UntrackedStatementError

_WAY_OUT = (
    "Write it as `session.execute(update(Model)...)` (or insert, delete) or through the session's unit of work, or "
    "take the loss of history upon you by `with suppress_versioning():`."
)
#: What holds a verb of change but changes nothing.
_HARMLESS = re.compile(r"\bfor\s+(no\s+key\s+)?update\b|\bon\s+(update|delete)\b|\bdo\s+update\b", re.IGNORECASE)
_CHANGES_NO_ROWS = re.compile(
    r"\s*(create|alter|drop|comment|grant|revoke|set|pragma|lock|explain(?!.*\banalyze\b))\b", re.IGNORECASE | re.DOTALL
)
_TEXT_VALUE = re.compile(r"'(?:[^']|'')*'")
_CHANGES_ROWS = re.compile(r"\b(update|delete|merge|truncate|replace\s+into|copy)\b", re.IGNORECASE)
_INSERT = re.compile(r"\s*(INSERT\s+INTO|WITH)\b", re.IGNORECASE)
_INSERTS = r"\binsert\s+(?:or\s+\w+\s+|ignore\s+)?into\s+(?:[\w\"`\[\]]+\s*\.\s*)?[\"`\[]?{}(?!\w)"


def refuse_untracked(session: Session, connection: Any, sql: str, context: Any, of_unit_of_work: bool) -> None:
    """Refuse a statement that is about to be sent if it would change versioned tables past their history.

    :param context: SQLAlchemy's context of the execution.
    :param of_unit_of_work: whether the unit of work sends it, for records that it has announced.
    :raises UntrackedStatementError: if it would.
    :raises ReadOnlyError: if it would change history.
    """
    compiled = getattr(context, "compiled", None)
    statement = getattr(compiled, "statement", None)
    if isinstance(statement, UpdateBase):
        _check(statement, of_unit_of_work)
    elif compiled is None or isinstance(statement, TextClause | TextualSelect):
        _check_text(session, connection, sql)
    for cte in getattr(compiled, "ctes", None) or ():
        if isinstance(cte.element, UpdateBase):
            _check(cte.element, of_unit_of_work=False)


def refuse_replacing(sql: str, context: Any) -> None:
    """Refuse an INSERT that may replace or skip rows without a word, e.g. SQLite's INSERT OR REPLACE.

    :raises UntrackedStatementError: if it is about a versioned table.
    """
    if _INSERT.match(sql) or is_suppressed():
        return
    statement = getattr(context.compiled, "statement", None)
    if isinstance(statement, Insert) and model_of(statement.table) is not None:
        raise UntrackedStatementError(
            f"`{sql.split('INTO', maxsplit=1)[0].strip()}` may replace or skip rows of {statement.table}, "
            "which cannot be captured."
        )


def _check(statement: UpdateBase, of_unit_of_work: bool) -> None:
    table: Any = target_of(statement)
    given: Any = table  # not narrowed: a checker forgets the type arguments then
    mapping, association = model_of(table), find_association(table)
    owner = mapping or association
    if owner is not None and owner.tables[-1].history is table:
        if not (isinstance(statement, Delete) and may_delete_history()):
            raise _read_only(table)
    elif is_suppressed() or of_unit_of_work:
        return
    elif mapping is not None or (_has_marks(table) and not isinstance(statement, Delete)):
        raise UntrackedStatementError(
            f"This {type(statement).__visit_name__} of {table.name} does not pass the session's own execute(), "
            f"so its changes cannot be captured. {_WAY_OUT}"
        )
    elif isinstance(statement, Delete) and isinstance(table, Table) and dependents_of(given):
        raise UntrackedStatementError(
            f"With rows of {table.name} the database changes versioned ones that refer to them, and this statement "
            f"does not pass the session's own execute(), so that cannot be captured. {_WAY_OUT}"
        )


def _has_marks(table: Any) -> bool:
    return any(isinstance(column, RecordChangesColumn) for column in getattr(table, "c", ()))


def _read_only(table: Any) -> ReadOnlyError:
    return ReadOnlyError(
        f"{table.name} is history, and history is read-only. To erase some of it, delete it inside "
        "`suppress_versioning(allow_deleting_history=True)`."
    )


def _check_text(session: Session, connection: Any, sql: str) -> None:
    """Refuse SQL text that seems to change a versioned table: rather one too many than one too few."""
    if _CHANGES_NO_ROWS.match(sql):
        return
    sql = _HARMLESS.sub(" ", _TEXT_VALUE.sub("''", sql))
    changes_rows = _CHANGES_ROWS.search(sql) is not None
    if not changes_rows and "insert" not in sql.lower():
        return
    for versioned in _versioned_tables(session, connection):
        if not is_suppressed() and _names(sql, versioned.live.name, changes_rows):
            raise UntrackedStatementError(
                f"This SQL text changes {versioned.live.name}, and what text changes cannot be captured. {_WAY_OUT}"
            )
        if not may_delete_history() and _names(sql, versioned.history.name, changes_rows):
            raise _read_only(versioned.history)


def _names(sql: str, table: str, changes_rows: bool) -> bool:
    name = re.escape(table)
    if changes_rows:
        return re.search(rf"(?<!\w){name}(?!\w)", sql, re.IGNORECASE) is not None
    return re.search(_INSERTS.format(name), sql, re.IGNORECASE) is not None


def _versioned_tables(session: Session, connection: Any) -> Iterator[VersionedTable]:
    """Yield the versioned tables that a session keeps in the database of a connection."""
    for cls in _subclasses(ChangeInfoHooks):
        mapping, association = find_mapping(cls), find_association_of(cls)
        try:
            if mapping is not None and session.get_bind(mapping.mapper).engine is connection.engine:
                yield from mapping.tables
            elif association is not None:
                bind = session.get_bind(clause=association.base.live)
                if bind.engine is connection.engine:
                    yield association.base
        except SQLAlchemyError:  # another program part's, which this session cannot reach
            continue


def _subclasses(cls: type) -> Iterable[type]:
    subclasses: list[type] = cls.__subclasses__()
    for each in subclasses:
        yield each
        yield from _subclasses(each)
