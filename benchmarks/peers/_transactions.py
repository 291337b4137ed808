"""What SQLAlchemy-Continuum and its fork have in common: a version table for each model, and one of transactions."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy.orm import DeclarativeBase, Session, configure_mappers

from . import Peer
from .models import Columns


def make_peer(make_versioned: Callable[..., Any], version_class: Callable[[type], Any]) -> Peer:
    """Return the peer of a library with these two functions."""
    make_versioned(user_cls=None)

    class Base(DeclarativeBase):
        pass

    class Record(Columns, Base):
        __tablename__ = "record"
        __versioned__ = {}

    configure_mappers()
    version = version_class(Record)
    transaction = version.transaction.property.mapper.class_

    def version_at(session: Session, record: Any, at: datetime) -> Any:
        return (
            session.query(version)
            .join(transaction, transaction.id == version.transaction_id)
            .filter(version.id == record.id, transaction.issued_at <= at.replace(tzinfo=None))
            .order_by(version.transaction_id.desc())
            .first()
        )

    return Peer(
        Record,
        Base.metadata.create_all,
        lambda engine: Session(engine, expire_on_commit=False),
        ("record_version", "transaction"),
        versions=lambda session, record: list(record.versions),
        version_at=version_at,
        does_not={"bulk_update": "records nothing", "as_of_get": "cannot", "as_of_scan": "cannot"},
    )
