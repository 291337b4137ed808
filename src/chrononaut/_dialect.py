"""What the databases differ in, where more than one module must know it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, FromClause, Select, Table

#: MariaDB's names: a URL may call it MySQL too.
_MARIADB = ("mariadb", "mysql")


def is_mariadb(name: str) -> bool:
    """Tell whether a dialect's name is one of MariaDB's."""
    return name in _MARIADB


def by_key(query: Select[Any], *tables: FromClause) -> Select[Any]:
    """Make MariaDB look up the rows of tables by their primary key: what it reads to lock, it locks.

    By itself it reads, and so locks, the whole of a small table.
    """
    for table in tables:
        for name in _MARIADB:
            query = query.with_hint(table, "FORCE INDEX (PRIMARY)", name)
    return query


def may_read_the_past(connection: Connection) -> bool:
    """Tell whether a read that locks nothing may miss what others have committed.

    MariaDB's default isolation, REPEATABLE READ, shows the moment of the transaction's first read for as long as
    the transaction lasts, but lets it change what has been committed since. Databases that do not let it need no care.
    """
    return is_mariadb(connection.dialect.name)


def reuses_generated_keys(connection: Connection, table: Table) -> bool:
    """Tell whether the database may generate the key of a deleted row again."""
    # MariaDB's InnoDB remembers the highest one since 10.2.4, through restarts.
    return connection.dialect.name == "sqlite" and not table.dialect_options["sqlite"]["autoincrement"]
