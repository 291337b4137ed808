"""Plain SQLAlchemy, of whichever version and driver: what everything is measured against."""

from __future__ import annotations

from sqlalchemy.orm import Session, declarative_base

from . import Peer
from .models import Columns

Base = declarative_base()


class Record(Columns, Base):
    __tablename__ = "record"


peer = Peer(
    Record,
    Base.metadata.create_all,
    lambda engine: Session(engine, expire_on_commit=False),
    does_not=dict.fromkeys(("versions", "version_at", "as_of_get", "as_of_scan"), "has no history"),
)
