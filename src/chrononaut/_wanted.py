"""The records that one statement is for, as something that the statement can join."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from itertools import islice
from typing import Any, Literal, TypeVar, cast
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Dialect,
    FromClause,
    Integer,
    Text,
    and_,
    bindparam,
    column,
    func,
    literal_column,
    null,
    tuple_,
    type_coerce,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.types import TypeEngine

from chrononaut._dialect import is_mariadb

Item = TypeVar("Item")
#: How many keys one IN list may have: row values are compared one by one on PostgreSQL, and MariaDB makes a longer
#: list a table, to which it may join, and so lock, all of ours.
_SINGLE_KEYS, _ROW_VALUES = 5_000, 500

#: A record to copy: its primary key, the version it must have, and the change info as JSON text.
WantedRecord = tuple[tuple[Any, ...], int, str]

#: How a statement is told its records. ``rows``: one by one, which is the plainest statement for a single record.
#: ``arrays``: all at once, as PostgreSQL's arrays. ``document``: all at once, as a JSON list of lists.
#: ``object``: all at once, as a JSON object of versions by key, which is read faster but can hold no more than that.
#: A tuple: all at once, as a JSON list of lists that MariaDB is told to read as a table with such a key.
Shape = Literal["rows", "arrays", "object", "document"] | tuple["KeyPart", ...]
KeyPart = Literal["integer", "text", "bytes"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The wanted records inside a statement: what to join, and their columns."""

    source: FromClause | None
    key: tuple[ColumnElement[Any], ...]
    version: ColumnElement[int]
    info: ColumnElement[str]

    def is_key(self, columns: Sequence[ColumnElement[Any]]) -> ColumnElement[bool]:
        """Return the condition that these columns are a wanted record's key."""
        return and_(*(mine == wanted for mine, wanted in zip(columns, self.key, strict=True)))


def choose_shape(dialect: Dialect, key: Sequence[Column[Any]], records: Sequence[WantedRecord]) -> Shape:
    """Return the shape that suits a database, the types of a key, and a number of records."""
    if len(records) == 1 or not all(_can_be_listed(column_.type) for column_ in key):
        return "rows"
    if dialect.name == "postgresql":
        return "arrays"
    if is_mariadb(dialect.name):
        parts = tuple(_key_part(part) for part in next(_bound(dialect, key, records)))
        return "rows" if None in parts else cast("tuple[KeyPart, ...]", parts)
    if not all(isinstance(part, int | str) for part in next(_bound(dialect, key, records))):
        return "rows"
    is_plain = len(key) == 1 and all(info == records[0][2] for _, _, info in records)
    return "object" if is_plain else "document"


def _can_be_listed(type_: TypeEngine[Any]) -> bool:
    # An array of arrays would be unnested to the ground, and an expression around each value would be lost.
    return not isinstance(type_, ARRAY) and type_.bind_expression(bindparam(None, type_=type_)) is None


def wanted_records(key: Sequence[Column[Any]], shape: Shape) -> Wanted:
    """Return the wanted records for a statement about a table with this primary key."""
    names = [*(f"key_{number}" for number in range(len(key))), "version", "info"]
    types: list[TypeEngine[Any]] = [*(part.type for part in key), Integer(), Text()]
    if shape == "rows":
        binds = [bindparam(f"wanted_{name}", type_=type_) for name, type_ in zip(names, types, strict=True)]
        return Wanted(None, tuple(binds[:-2]), cast("ColumnElement[int]", binds[-2]), binds[-1])
    source: FromClause
    if shape == "arrays":
        arrays = (
            sql_cast(bindparam(f"wanted_{name}", type_=ARRAY(type_)), ARRAY(type_))
            for name, type_ in zip(names, types, strict=True)
        )
        columns = (column(name, type_) for name, type_ in zip(names, types, strict=True))
        source = func.unnest(*arrays).table_valued(*columns, name="wanted").render_derived()
        fields: list[ColumnElement[Any]] = [source.c[name] for name in names]
    elif shape == "object":
        source = _json_each("key", "value")
        fields = [type_coerce(source.c.key, types[0]), type_coerce(source.c.value, Integer()), null()]
    elif isinstance(shape, tuple):
        source = _json_table(shape, names)
        fields = [_comparable(part, source.c[name]) for name, part in zip(names, shape, strict=False)]
        fields += [source.c.version, source.c.info]
    else:
        source = _json_each("value")
        fields = [
            func.json_extract(source.c.value, literal_column(f"'$[{number}]'"), type_=type_)
            for number, type_ in enumerate(types)
        ]
    # Most records of a flush share one change info, which is not sent again with each of them.
    info = func.coalesce(fields[-1], bindparam("wanted_info_of_most", type_=Text()), type_=Text())
    return Wanted(source, tuple(fields[:-2]), fields[-2], info)


def wanted_parameters(
    dialect: Dialect, key: Sequence[Column[Any]], records: Sequence[WantedRecord], shape: Shape
) -> list[dict[str, Any]]:
    """Return the parameters that tell a statement of that shape its records."""
    if shape == "rows":
        return [
            {
                **{f"wanted_key_{number}": part for number, part in enumerate(parts)},
                "wanted_version": version,
                "wanted_info": info,
            }
            for parts, version, info in records
        ]
    most = records[0][2]
    parameters: dict[str, Any] = {"wanted_info_of_most": most}
    if shape == "arrays":
        keys, versions, infos = zip(*records, strict=True)
        for number, parts in enumerate(zip(*keys, strict=True)):
            parameters[f"wanted_key_{number}"] = list(parts)
        parameters["wanted_version"] = list(versions)
        parameters["wanted_info"] = [None if info == most else info for info in infos]
    elif shape == "object":
        plain_keys = (part for (part,) in _bound(dialect, key, records))
        parameters["wanted"] = json.dumps(dict(zip(plain_keys, (version for _, version, _ in records), strict=True)))
    else:
        rows = (
            (*parts, version, None if info == most else info)
            for parts, (_, version, info) in zip(_bound(dialect, key, records), records, strict=True)
        )
        # MariaDB takes its locks in the order of the list.
        ordered = sorted(rows, key=lambda row: row[:-2]) if isinstance(shape, tuple) else list(rows)
        parameters["wanted"] = json.dumps(ordered, default=_as_text, ensure_ascii=False)
    return [parameters]


def _json_each(*columns: str) -> TableValuedAlias:
    return func.json_each(bindparam("wanted", type_=Text())).table_valued(*columns, name="wanted")


def _key_part(part: Any) -> KeyPart | None:
    """Return how a part of a key is told to MariaDB; None if it cannot be told so that it surely finds its row."""
    if isinstance(part, int):
        return "integer"
    if isinstance(part, bytes):
        return "bytes"
    return "text" if isinstance(part, str | UUID | Decimal | date) else None


def _as_text(part: bytes | UUID | Decimal | date) -> str:
    return part.hex() if isinstance(part, bytes) else str(part)


def _json_table(parts: Sequence[KeyPart], names: Sequence[str]) -> TableValuedAlias:
    # DECIMAL holds the integers of all sizes and signs.
    types = ["DECIMAL(20, 0)" if part == "integer" else "JSON" for part in parts] + ["INTEGER", "LONGTEXT"]
    columns = ", ".join(
        f"{name} {type_} PATH '$[{number}]'" for number, (name, type_) in enumerate(zip(names, types, strict=True))
    )
    rows = func.json_table(bindparam("wanted", type_=Text()), literal_column(f"'$[*]' COLUMNS ({columns})"))
    return rows.table_valued(*names, name="wanted")


def _comparable(part: KeyPart, field: ColumnElement[Any]) -> ColumnElement[Any]:
    if part == "integer":
        return field
    # The value of a function gives way to the live column's collation, so that its index can be used;
    # a column with a collation of its own would not.
    text = func.json_unquote(field)
    return func.unhex(text) if part == "bytes" else text


def _bound(dialect: Dialect, key: Sequence[Column[Any]], records: Iterable[WantedRecord]) -> Iterator[tuple[Any, ...]]:
    """Yield the keys of records as they are sent to the database."""
    processors = [column_.type.dialect_impl(dialect).bind_processor(dialect) for column_ in key]
    if not any(processors):
        return (parts for parts, _, _ in records)
    return (
        tuple(part if process is None else process(part) for process, part in zip(processors, parts, strict=True))
        for parts, _, _ in records
    )


def keys_in(
    columns: Sequence[ColumnElement[Any]], keys: Iterable[tuple[Any, ...]], dialect: str
) -> Iterator[ColumnElement[bool]]:
    """Yield conditions that together cover all these keys, each small enough for the database's limits."""
    rest, size = iter(keys), _ROW_VALUES if len(columns) > 1 or is_mariadb(dialect) else _SINGLE_KEYS
    while chunk := list(islice(rest, size)):
        first = columns[0].in_([key[0] for key in chunk])
        # Row values alone would scan the table on SQLite.
        yield first if len(columns) == 1 else and_(first, tuple_(*columns).in_(chunk))
