"""Read a long result page by page, in the order of its key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, literal, tuple_


def read_pages(
    connection: Connection, query: Select[Any], key: Sequence[ColumnElement[Any]], size: int
) -> Iterator[Sequence[Row[Any]]]:
    """Yield the rows of a query in pages, each by a statement that starts after the last row of the page before.

    :param query: a query that selects the key's columns first.
    :param key: columns that are unique together, and not null.
    :param size: how many rows a page has.
    """
    query = query.order_by(*key).limit(size)
    page = connection.execute(query).all()
    while page:
        yield page
        if len(page) < size:
            return
        page = connection.execute(query.where(is_after(key, page[-1][: len(key)]))).all()


def is_after(key: Sequence[ColumnElement[Any]], values: Sequence[Any]) -> ColumnElement[bool]:
    """Return the condition that a key comes after some values, in the key's order."""
    return _row(key) > _bound(key, values)


def is_between(key: Sequence[ColumnElement[Any]], first: Sequence[Any], last: Sequence[Any]) -> ColumnElement[bool]:
    """Return the condition that a key is one of a page: from its first to its last, in the key's order."""
    return and_(_row(key) >= _bound(key, first), _row(key) <= _bound(key, last))


def _row(key: Sequence[ColumnElement[Any]]) -> ColumnElement[Any]:
    return key[0] if len(key) == 1 else tuple_(*key)


def _bound(key: Sequence[ColumnElement[Any]], values: Sequence[Any]) -> ColumnElement[Any]:
    return _row([literal(value, column.type) for column, value in zip(key, values, strict=True)])
