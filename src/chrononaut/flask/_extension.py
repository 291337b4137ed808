"""Flask-SQLAlchemy with a session that records history."""

from __future__ import annotations

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from chrononaut._session import versioned_session
from chrononaut.flask._change_info import (
    EXTENSION,
    FlaskChangeInfo,
    fetch_change_info,
    requires_extra_change_info,
)
from chrononaut.flask._user import watch_user_loading


class VersionedSQLAlchemy(SQLAlchemy):
    """Flask-SQLAlchemy's ``SQLAlchemy``, with its arguments, whose session records the history of versioned models.

    History tells who changed a record as Flask-Login and the request tell it: see :class:`FlaskChangeInfo`. E.g.::

        db = VersionedSQLAlchemy(app)  # or db.init_app(app) in a factory

        class User(Versioned, db.Model):
            id: Mapped[int] = mapped_column(primary_key=True)
            email: Mapped[str]

    It reads these keys of ``app.config``, at each flush:

    ``CHRONONAUT_REQUIRE_EXTRA_CHANGE_INFO``
        Whether to refuse changes made without ``extra_change_info``, ``rationale`` or ``append_change_info``.
    ``CHRONONAUT_EXTRA_CHANGE_INFO_FUNC``
        A callable without arguments; the mapping that it returns is recorded beside ``user_id`` and ``remote_addr``.
    """

    def init_app(self, app: Flask) -> None:
        """Set the extension up on an application; one extension can serve several.

        :param app: the application, configured already.
        """
        super().init_app(app)
        app.extensions.setdefault(EXTENSION, FlaskChangeInfo())
        watch_user_loading(app)
        versioned_session(
            self.session, change_info=fetch_change_info, require_extra_change_info=requires_extra_change_info
        )
