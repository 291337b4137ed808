"""The recipe that SQLAlchemy's documentation describes, in our own words: a history object for each changed record."""

from __future__ import annotations

from datetime import datetime, timezone

from sqlalchemy import Column, DateTime, Integer, Table, event, inspect, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, attributes, mapped_column

from . import Peer
from .models import Columns


class Base(DeclarativeBase):
    pass


class Record(Columns, Base):
    __tablename__ = "record"
    version: Mapped[int] = mapped_column(default=1)
    __mapper_args__ = {"version_id_col": version}


class RecordHistory:
    pass


_names = ("id", "name", "email", "amount", "note", "version")
history = Table(
    "record_history",
    Base.metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, primary_key=True, autoincrement=False),
    *(Column(name, Record.__table__.c[name].type) for name in _names[1:-1]),
    Column("changed", DateTime(timezone=True)),
)
Base.registry.map_imperatively(RecordHistory, history)


def _keep(session, record, deleted):
    values, is_changed = {}, deleted
    for name in _names:
        added, unchanged, removed = attributes.get_history(record, name)
        is_changed = is_changed or bool(removed)
        values[name] = (removed or unchanged or added or (None,))[0]
    if is_changed:
        row = RecordHistory()
        for name, value in values.items():
            setattr(row, name, value)
        row.changed = datetime.now(timezone.utc)
        session.add(row)


def _before_flush(session, *_):
    for record in session.dirty:
        if isinstance(record, Record) and inspect(record).modified:
            _keep(session, record, False)
    for record in session.deleted:
        _keep(session, record, True)


def _session(engine):
    session = Session(engine, expire_on_commit=False)
    event.listen(session, "before_flush", _before_flush)
    return session


peer = Peer(
    Record,
    Base.metadata.create_all,
    _session,
    ("record_history",),
    versions=lambda session, record: list(
        session.scalars(select(RecordHistory).where(history.c.id == record.id).order_by(history.c.version))
    ),
    version_at=lambda session, record, at: session.scalar(
        select(RecordHistory)
        .where(history.c.id == record.id, history.c.changed > at)
        .order_by(history.c.version)
        .limit(1)
    ),
    does_not={
        "insert": "does not record births",
        "bulk_update": "records nothing",
        "as_of_get": "cannot",
        "as_of_scan": "cannot",
    },
)
