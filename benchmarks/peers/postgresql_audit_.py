"""postgresql-audit: triggers."""

from __future__ import annotations

from postgresql_audit import versioning_manager
from sqlalchemy import select, text
from sqlalchemy.orm import DeclarativeBase, Session, configure_mappers

from . import Peer
from .models import Columns


class Base(DeclarativeBase):
    pass


versioning_manager.init(Base)


class Record(Columns, Base):
    __tablename__ = "record"
    __versioned__ = {}


configure_mappers()
Activity = versioning_manager.activity_cls


def _create(engine):
    with engine.begin() as connection:
        connection.execute(text("CREATE EXTENSION IF NOT EXISTS btree_gist"))
        # Its functions come with its own tables, which must be there before the first audited one.
        own = [table for table in Base.metadata.sorted_tables if table.name != "record"]
        Base.metadata.create_all(connection, tables=own)
        Base.metadata.create_all(connection)


peer = Peer(
    Record,
    _create,
    lambda engine: Session(engine, expire_on_commit=False),
    ("activity", "transaction"),
    versions=lambda session, record: list(
        session.scalars(
            select(Activity)
            .where(Activity.table_name == "record", Activity.data["id"].astext == str(record.id))
            .order_by(Activity.id)
        )
    ),
    does_not={"version_at": "cannot", "as_of_get": "cannot", "as_of_scan": "cannot"},
)
