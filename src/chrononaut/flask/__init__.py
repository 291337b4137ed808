"""Flask: the Flask-SQLAlchemy extension whose session records history, and who Flask says is changing things."""

from __future__ import annotations

from chrononaut.exceptions import MissingExtraError

try:
    from chrononaut.flask._change_info import FlaskChangeInfo, fetch_remote_addr
    from chrononaut.flask._extension import VersionedSQLAlchemy
    from chrononaut.flask._user import fetch_user_id
except ModuleNotFoundError as _error:
    if _error.name in {"flask", "flask_sqlalchemy"}:
        raise MissingExtraError("chrononaut.flask", "flask") from _error
    raise

__all__ = ["FlaskChangeInfo", "VersionedSQLAlchemy", "fetch_remote_addr", "fetch_user_id"]
