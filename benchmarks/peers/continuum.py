"""SQLAlchemy-Continuum."""

from __future__ import annotations

from sqlalchemy.orm import DeclarativeBase, Session, configure_mappers
from sqlalchemy_continuum import make_versioned, version_class

make_versioned(user_cls=None)

from . import Peer
from .models import Columns


class Base(DeclarativeBase):
    pass


class Record(Columns, Base):
    __tablename__ = "record"
    __versioned__ = {}


configure_mappers()
Version = version_class(Record)


def _version_at(session, record, at):
    transaction = Version.transaction.property.mapper.class_
    return (
        session.query(Version)
        .join(transaction, transaction.id == Version.transaction_id)
        .filter(Version.id == record.id, transaction.issued_at <= at.replace(tzinfo=None))
        .order_by(Version.transaction_id.desc())
        .first()
    )


peer = Peer(
    Record,
    Base.metadata.create_all,
    lambda engine: Session(engine, expire_on_commit=False),
    ("record_version", "transaction"),
    versions=lambda session, record: list(record.versions),
    version_at=_version_at,
    does_not={"bulk_update": "records nothing", "as_of_get": "cannot", "as_of_scan": "cannot"},
)
