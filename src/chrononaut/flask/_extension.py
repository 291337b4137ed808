"""Flask-SQLAlchemy with a session that records history."""

from __future__ import annotations

from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import MappedAsDataclass

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

    def _make_declarative_base(self, model_class: Any, *arguments: Any, **options: Any) -> Any:
        # Flask-SQLAlchemy 3.1 makes `db.Model` from a copy of the class, which SQLAlchemy 2.1 refuses where it
        # finds that the copy is a dataclass already. It is made one again, with the same fields.
        base: Any = model_class
        if "__dataclass_fields__" not in vars(base) or not issubclass(base, MappedAsDataclass):
            return super()._make_declarative_base(model_class, *arguments, **options)
        fields = model_class.__dataclass_fields__
        del model_class.__dataclass_fields__
        try:
            return super()._make_declarative_base(model_class, *arguments, **options)
        finally:
            model_class.__dataclass_fields__ = fields
