"""chrononaut 0.4, on Flask-SQLAlchemy 2.5 and SQLAlchemy 1.4, the newest that it runs on."""

from __future__ import annotations

import flask

from chrononaut import Versioned, VersionedSQLAlchemy

from . import Peer
from .models import Columns


class _Database(VersionedSQLAlchemy):
    """It reads by a session of its own, so all has to go through that, on the worker's engine."""

    own = None

    def create_engine(self, url, options):
        return self.own


app = flask.Flask(__name__)
app.config.update(SQLALCHEMY_DATABASE_URI="postgresql://", SQLALCHEMY_TRACK_MODIFICATIONS=False)
db = _Database(app, session_options={"expire_on_commit": False})
app.app_context().push()


class Record(Columns, db.Model, Versioned):
    __tablename__ = "record"


def _session(engine):
    db.own = engine
    return db.session()


peer = Peer(
    Record,
    db.metadata.create_all,
    _session,
    ("chrononaut_activity",),
    versions=lambda session, record: record.versions(),
    version_at=lambda session, record, at: record.version_at(at),
    does_not={"bulk_update": "records nothing", "as_of_get": "cannot", "as_of_scan": "cannot"},
)
