"""A hand-written trigger on PostgreSQL: what the database alone can do."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import DeclarativeBase, Session

from . import Peer
from .models import Columns


class Base(DeclarativeBase):
    pass


class Record(Columns, Base):
    __tablename__ = "record"


def _create(engine):
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        connection.execute(
            text(
                "CREATE TABLE record_history (LIKE record, number bigserial PRIMARY KEY, changed timestamptz NOT NULL, "
                "operation text NOT NULL)"
            )
        )
        connection.execute(text("CREATE INDEX ON record_history (id, changed)"))
        connection.execute(
            text(
                "CREATE FUNCTION record_keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "INSERT INTO record_history (id, name, email, amount, note, changed, operation) "
                "VALUES (OLD.id, OLD.name, OLD.email, OLD.amount, OLD.note, now(), TG_OP); RETURN NULL; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE TRIGGER record_keep AFTER UPDATE OR DELETE ON record "
                "FOR EACH ROW EXECUTE FUNCTION record_keep()"
            )
        )


peer = Peer(
    Record,
    _create,
    lambda engine: Session(engine, expire_on_commit=False),
    ("record_history",),
    versions=lambda session, record: list(
        session.execute(text("SELECT * FROM record_history WHERE id = :id ORDER BY number"), {"id": record.id})
    ),
    version_at=lambda session, record, at: session.execute(
        text("SELECT * FROM record_history WHERE id = :id AND changed > :at ORDER BY changed, number LIMIT 1"),
        {"id": record.id, "at": at},
    ).first(),
    does_not={"insert": "does not record births", "as_of_get": "cannot", "as_of_scan": "cannot"},
)
