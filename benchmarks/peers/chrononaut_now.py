"""This library."""

from __future__ import annotations

from sqlalchemy.orm import DeclarativeBase, sessionmaker

from chrononaut import Versioned, as_of, versioned_session

from . import Peer
from .models import Columns


class Base(DeclarativeBase):
    pass


class Record(Versioned, Columns, Base):
    __tablename__ = "record"


peer = Peer(
    Record,
    Base.metadata.create_all,
    lambda engine: versioned_session(sessionmaker(engine, expire_on_commit=False))(),
    ("record_history",),
    versions=lambda session, record: record.versions(),
    version_at=lambda session, record, at: record.version_at(at),
    as_of=as_of,
)
