"""Plain SQLAlchemy: what everything is measured against."""

from __future__ import annotations

from sqlalchemy.orm import DeclarativeBase, Session

from . import Peer
from .models import Columns


class Base(DeclarativeBase):
    pass


class Record(Columns, Base):
    __tablename__ = "record"


peer = Peer(
    Record,
    Base.metadata.create_all,
    lambda engine: Session(engine, expire_on_commit=False),
    does_not=dict.fromkeys(("versions", "version_at", "as_of_get", "as_of_scan"), "has no history"),
)
