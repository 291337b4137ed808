"""The records that one statement is for, as something that the statement can join."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar, cast

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
    tuple_,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.types import TypeEngine

Item = TypeVar("Item")
_CHUNK = 500

#: How a statement is told its records. ``rows``: it is executed once for each of them, which costs nothing where the
#: database lives in the process, and is the plainest statement for a single one. ``arrays``: once for all.
Shape = Literal["rows", "arrays"]


class WantedRecord(NamedTuple):
    """A record to copy: its primary key, the version it must have, and the change info as JSON text."""

    key: tuple[Any, ...]
    version: int
    info: str


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


def choose_shape(dialect: Dialect, records: Sequence[WantedRecord]) -> Shape:
    """Return the shape that suits a database and a number of records."""
    return "arrays" if dialect.name == "postgresql" and len(records) > 1 else "rows"


def wanted_records(key: Sequence[Column[Any]], shape: Shape) -> Wanted:
    """Return the wanted records for a statement about a table with this primary key."""
    types: list[TypeEngine[Any]] = [*(part.type for part in key), Integer(), Text()]
    names = [*(f"key_{number}" for number in range(len(key))), "version", "info"]
    if shape == "rows":
        binds = [bindparam(f"wanted_{name}", type_=type_) for name, type_ in zip(names, types, strict=True)]
        return Wanted(None, tuple(binds[:-2]), cast("ColumnElement[int]", binds[-2]), binds[-1])
    arrays = [
        sql_cast(bindparam(f"wanted_{name}", type_=ARRAY(type_)), ARRAY(type_))
        for name, type_ in zip(names, types, strict=True)
    ]
    columns = [column(name, type_) for name, type_ in zip(names, types, strict=True)]
    source = func.unnest(*arrays).table_valued(*columns, name="wanted").render_derived()
    return Wanted(source, tuple(source.c[name] for name in names[:-2]), source.c.version, source.c.info)


def wanted_parameters(records: Sequence[WantedRecord], shape: Shape) -> list[dict[str, Any]]:
    """Return the parameters that tell a statement of that shape its records."""
    if shape == "rows":
        return [
            {
                **{f"wanted_key_{number}": part for number, part in enumerate(record.key)},
                "wanted_version": record.version,
                "wanted_info": record.info,
            }
            for record in records
        ]
    parameters: dict[str, Any] = {
        f"wanted_key_{number}": list(parts)
        for number, parts in enumerate(zip(*(record.key for record in records), strict=True))
    }
    parameters["wanted_version"] = [record.version for record in records]
    parameters["wanted_info"] = [record.info for record in records]
    return [parameters]


def keys_in(columns: Sequence[ColumnElement[Any]], keys: Iterable[tuple[Any, ...]]) -> Iterator[ColumnElement[bool]]:
    """Yield conditions that together cover all these keys, each small enough for any database's limits."""
    rest = iter(keys)
    while chunk := list(islice(rest, _CHUNK)):
        first = columns[0].in_([key[0] for key in chunk])
        # Row values alone would scan the table on SQLite.
        yield first if len(columns) == 1 else and_(first, tuple_(*columns).in_(chunk))
