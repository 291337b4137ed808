"""The least that a library above SQLAlchemy could do: one statement copies what a flush is about to change.

It checks nothing, knows no inheritance, no hidden columns, no births, no change info but a constant, and misses
whatever relationships or listeners change. It is a yardstick, not a recommendation.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    Column,
    DateTime,
    Integer,
    String,
    Table,
    event,
    select,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from . import Peer
from .models import Columns


class Base(DeclarativeBase):
    pass


class Record(Columns, Base):
    __tablename__ = "record"
    version: Mapped[int] = mapped_column(default=0)


live = Record.__table__
history = Table(
    "record_history",
    Base.metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, primary_key=True, autoincrement=False),
    *(Column(name, live.c[name].type) for name in ("name", "email", "amount", "note")),
    Column("changed", DateTime(timezone=True)),
    Column("operation", String(6)),
)
_COPY = (
    "INSERT INTO record_history (id, version, name, email, amount, note, changed, operation) "
    "SELECT id, version, name, email, amount, note, :at, :operation FROM record WHERE id "
)
_COPIES = {
    "postgresql": text(_COPY + "= ANY(:ids)"),
    "sqlite": text(_COPY + "IN (SELECT value FROM json_each(:ids))"),
}


def _before_flush(session: Session, *_: Any) -> None:
    dirty = [record for record in session.dirty if session.is_modified(record)]
    dialect = session.get_bind().dialect.name
    for operation, records in (("update", dirty), ("delete", list(session.deleted))):
        if records:
            ids = [record.id for record in records]
            at = datetime.now(timezone.utc)
            parameters = {
                "ids": ids if dialect == "postgresql" else json.dumps(ids),
                "at": at if dialect == "postgresql" else at.isoformat(" "),
                "operation": operation,
            }
            session.connection().execute(_COPIES[dialect], parameters)
    for record in dirty:
        record.version += 1


def _session(engine: Any) -> Session:
    session = Session(engine, expire_on_commit=False)
    event.listen(session, "before_flush", _before_flush)
    return session


peer = Peer(
    Record,
    Base.metadata.create_all,
    _session,
    ("record_history",),
    versions=lambda session, record: list(session.execute(select(history).where(history.c.id == record.id))),
    does_not={
        "insert": "does not record births",
        "bulk_update": "records nothing",
        "version_at": "knows no intervals",
        "as_of_get": "cannot",
        "as_of_scan": "cannot",
    },
)
