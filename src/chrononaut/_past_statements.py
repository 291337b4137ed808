"""Have statements read the past: have checked what they ask for, and rewrite what they name.

The statements of a past session are compiled with a marker in place of each schema. What is sent to the database has
each marked table replaced by a subquery of the table's past under the table's own name, so that whatever the ORM
makes of a statement, eager loads and inheritance included, comes out right without being looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Literal
from weakref import WeakSet

from sqlalchemy import Connection, Dialect, MetaData, Table
from sqlalchemy.orm import Session
from sqlalchemy.sql import ClauseElement, visitors

from chrononaut._history_table import limited_name, versioned_tables
from chrononaut._mapping import versioned_models
from chrononaut._past_checks import check_names, check_statement, unversioned_error
from chrononaut._past_tables import AT, SchemaMap, render_instant, render_past
from chrononaut._transaction import PAST
from chrononaut.exceptions import ChrononautException

#: Where a session of the past keeps its instant, in its ``info``.
AS_OF = "chrononaut_as_of"

_MARKER = "chrononaut_past_"
_MARKED = re.compile(
    _MARKER + r'(\d+)\.("(?:[^"]|"")*"|`(?:[^`]|``)*`|[^\s"`.,()]+)'  # the table
    r"(?=(\.)|(\s+AS\s)|)"  # as the prefix of a column, with an alias, or bare
)
_CACHE_LIMIT = 1000

Unversioned = Literal["live", "raise"]


@dataclass(eq=False)
class PastCache:
    """What is kept for all past sessions that read the tables of one collection."""

    compiled: dict[Any, Any] = field(default_factory=dict[Any, Any])
    checked: WeakSet[Any] = field(default_factory=WeakSet[Any])
    tables: dict[Any, str | None] = field(default_factory=dict[Any, "str | None"])

    @classmethod
    def of(cls, metadata: MetaData) -> PastCache:
        cache: PastCache = metadata.info.setdefault(PAST, cls())
        return cache

    def compiled_statements(self) -> dict[Any, Any]:
        """Return the cache of compiled statements: ours, for SQLAlchemy's cannot tell two maps of schemas apart."""
        if len(self.compiled) > _CACHE_LIMIT:
            self.compiled.clear()
        return self.compiled


@dataclass(frozen=True, eq=False)
class Request:
    """What a statement of a past session carries along."""

    past: Past
    home: MetaData | None
    schemas: SchemaMap
    is_column_load: bool


@dataclass(eq=False)
class Past:
    """The database as it was at an instant, as one session reads it.

    :param at: the instant, aware.
    :param unversioned: what to do about tables that have no history.
    """

    at: datetime
    unversioned: Unversioned
    _sources: dict[Any, tuple[str, str]] = field(default_factory=dict[Any, tuple[str, str]])
    _rewritten: dict[Any, str] = field(default_factory=dict[Any, str])

    @cached_property
    def metadatas(self) -> list[MetaData]:
        """All collections that versioned tables are in."""
        return list(dict.fromkeys(mapping.base.live.metadata for mapping in versioned_models()))

    @cached_property
    def _schemas(self) -> list[str | None]:
        tables = (table for metadata in self.metadatas for table in metadata.tables.values())
        return list(dict.fromkeys([None, *(None if table.schema is None else str(table.schema) for table in tables)]))

    @cached_property
    def _markers(self) -> SchemaMap:
        return {schema: f"{_MARKER}{number}" for number, schema in enumerate(self._schemas)}

    @cached_property
    def _literals(self) -> dict[str, str]:
        return {}

    def execution_options(self, home: MetaData | None, schemas: SchemaMap, is_column_load: bool) -> dict[str, Any]:
        """Return what makes a statement one about the past.

        :param home: the collection that the statement's first table is in, if known.
        :param schemas: by which names the application reaches its schemas.
        """
        options: dict[str, Any] = {
            "schema_translate_map": self._markers,
            PAST: Request(self, home, schemas, is_column_load),
            # What is not in history would come as NULL into objects that exist; the past does not change anyway.
            "populate_existing": False,
        }
        if home is not None:
            options["compiled_cache"] = PastCache.of(home).compiled_statements()
        return options

    def schemas_of(self, options: Mapping[str, Any]) -> SchemaMap | None:
        """Return the application's own map of schemas among the options of a statement; None if it has none."""
        schemas: SchemaMap | None = options.get("schema_translate_map")
        if schemas != self._markers:
            return schemas
        # An eager load has the options of the statement that it belongs to.
        request: Request = options[PAST]
        return request.schemas

    def rewrite(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> tuple[str, Any]:
        """Fire before a statement is sent: replace its tables by their past if it is one of ours."""
        request: Request | None = None if context is None else context.execution_options.get(PAST)
        if request is None or request.past is not self:
            return statement, parameters
        self._check(context, request)
        memo = (request, connection.dialect, statement)
        rewritten = self._rewritten.get(memo)
        if rewritten is None:
            if len(self._rewritten) > _CACHE_LIMIT:
                self._rewritten.clear()
            rewritten = self._rewritten[memo] = self._rewrite(connection.dialect, request, statement)
        return rewritten, parameters

    def _rewrite(self, dialect: Dialect, request: Request, statement: str) -> str:
        def replace(match: re.Match[str]) -> str:
            number, token, is_prefix, has_alias = match.groups()
            name, source = self._source(dialect, request, int(number), token)
            if is_prefix or not source:
                return name
            return source if has_alias else f"{source} AS {name}"

        return _MARKED.sub(replace, statement)

    # --- what may be asked

    def _check(self, context: Any, request: Request) -> None:
        compiled = context.compiled
        if compiled is None or request.is_column_load:
            return
        cache = None if request.home is None else PastCache.of(request.home)
        if cache is not None and self.unversioned == "live" and compiled in cache.checked:
            return
        tables, ctes = check_statement(context.invoked_statement, compiled.compile_state)
        for table in tables:
            self._check_table(table)
            check_names(table, ctes)
        if cache is not None:
            cache.checked.add(compiled)

    def _check_table(self, table: Table) -> None:
        is_read_as_was = _has_past(table)
        if self.unversioned == "raise" and not is_read_as_was:
            raise unversioned_error(table.fullname)
        if is_read_as_was and table.metadata not in self.metadatas:
            raise ChrononautException(f"{table.fullname} was versioned after as_of() began: open the past anew.")

    # --- what a table is replaced by

    def _source(self, dialect: Dialect, request: Request, number: int, token: str) -> tuple[str, str]:
        """Return the name that columns have as a prefix, and the subquery; or the real name, and no subquery."""
        memo = (dialect, request.home, number, token)
        if memo not in self._sources:
            self._sources[memo] = self._find_source(dialect, request, self._schemas[number], token)
        return self._sources[memo]

    def _find_source(self, dialect: Dialect, request: Request, schema: str | None, token: str) -> tuple[str, str]:
        table = self._find_table(dialect, request.home, schema, token)
        sql = None if table is None else _past_sql(table, dialect, request.schemas)
        if sql is None:
            if self.unversioned == "raise":
                raise unversioned_error(token)
            real = request.schemas.get(schema, schema)
            return (token if real is None else f"{dialect.identifier_preparer.quote(real)}.{token}"), ""
        name = token
        if table is not None and schema is not None:
            # Same-named tables of two schemas must stay two.
            name = dialect.identifier_preparer.quote(limited_name(f"{schema}.{table.name}"))
        instant = self._literals.setdefault(dialect.name, render_instant(self.at, dialect))
        return name, f"({sql.replace(AT, instant)})"

    def _find_table(self, dialect: Dialect, home: MetaData | None, schema: str | None, token: str) -> Table | None:
        name = _unquoted(dialect, token)
        key = name if schema is None else f"{schema}.{name}"
        for metadata in self.metadatas if home is None else [home, *self.metadatas]:
            if key in metadata.tables:
                return metadata.tables[key]
        return None


def is_past(session: Session) -> bool:
    """Tell whether a session reads the past."""
    return PAST in session.info


def mark_past(session: Session, past: Past) -> None:
    """Remember that a session reads the past."""
    session.info[PAST] = past
    session.info[AS_OF] = past.at


def home_of(statement: ClauseElement) -> MetaData | None:
    """Return the collection of the first table that a statement names."""
    return next((element.metadata for element in visitors.iterate(statement) if isinstance(element, Table)), None)


def _has_past(table: Table) -> bool:
    """Tell whether a table's past can be read: it is versioned, or history."""
    tables = versioned_tables(table.metadata)
    return table in tables or table in tables.values()


def _past_sql(table: Table, dialect: Dialect, schemas: SchemaMap) -> str | None:
    cache = PastCache.of(table.metadata).tables
    preparer = dialect.identifier_preparer
    memo = (table, len(table.c), dialect.name, dialect.driver, preparer.initial_quote, tuple(schemas.items()))
    if memo not in cache:
        cache[memo] = render_past(table, dialect, schemas)
    return cache[memo]


def _unquoted(dialect: Dialect, token: str) -> str:
    if token[0] in '"`':
        token = token[1:-1].replace(token[0] * 2, token[0])
    return token.replace("%%", "%") if dialect.paramstyle in ("format", "pyformat") else token
