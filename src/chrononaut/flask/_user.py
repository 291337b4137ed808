"""Who is logged in, as Flask-Login tells it."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import flask
from flask import Flask, current_app, g, has_request_context, request
from sqlalchemy import inspect, select
from sqlalchemy.orm import InstanceState

_ASKING = "_chrononaut_asks_for_user"
_ASKED = "_chrononaut_asked_in"
_KNOWN = "chrononaut.user_id"

# Flask 3.2 has one context for both; before, a request could be of another application than the current one.
_request_context = vars(flask.globals).get("request_ctx")


class _StillUnknown(Exception):
    """Flask-Login is still finding out who the user is."""


def fetch_user_id() -> str | None:
    """Return who Flask-Login says is logged in: the ``email`` of ``current_user`` if it has one, else its ``get_id()``.

    A user keeps one name for a whole request: the one that the database held when it was asked for first. So nobody
    can make changes in the name of somebody else by taking that person's address.

    :return: None outside a request, for an anonymous user, in an application without Flask-Login, and for what
        the user loader itself changes.
    """
    user = _current_user() if is_in_request() else None
    if user is None or not user.is_authenticated:
        return None
    known, user_id = request.environ.get(_KNOWN, (None, None))
    if known is not user:
        user_id = _email(user) or user.get_id()
        request.environ[_KNOWN] = (user, user_id)
    return None if user_id is None else str(user_id)


def is_in_request() -> bool:
    """Tell whether a request of the current application is being handled."""
    if not has_request_context():
        return False
    return _request_context is None or _request_context.app == current_app


def _current_user() -> Any:
    if not hasattr(current_app, "login_manager"):
        return None
    with _asking():
        try:
            # Through the proxy: SQLAlchemy can inspect the user itself only.
            return _flask_login().current_user._get_current_object()  # noqa: SLF001  # documented by Werkzeug
        except _StillUnknown:
            return None


@contextmanager
def _asking() -> Generator[None]:
    before = g.get(_ASKING, False)
    setattr(g, _ASKING, True)
    try:
        yield
    finally:
        setattr(g, _ASKING, before)


def watch_user_loading(app: Flask) -> None:
    """Notice when Flask-Login loads the user of a request.

    A user loader may change a record itself, such as when the user was last seen. Asking then who the user is would
    call the loader again, and again.
    """
    try:
        flask_login = _flask_login()
    except ModuleNotFoundError as error:
        if error.name != "flask_login":
            raise
    else:
        flask_login.user_accessed.connect(_user_accessed, app)


def _user_accessed(sender: Flask) -> None:
    """Fire when Flask-Login starts to find out who the user of a request is."""
    # The environment tells the request: `g` may outlive it in a test. And `g` tells the thread: each loads for itself.
    if g.get(_ASKING, False) and g.get(_ASKED) is request.environ:
        raise _StillUnknown
    setattr(g, _ASKED, request.environ)


def _flask_login() -> Any:
    # An import by name: Flask-Login is optional, and has no types.
    return importlib.import_module("flask_login")


def _email(user: Any) -> Any:
    state = cast("InstanceState[Any] | None", inspect(user, raiseerr=False))
    if state is not None and state.persistent and "email" in state.mapper.columns:
        history = state.attrs["email"].history
        if history.deleted:
            return history.deleted[0]
        if history.added:
            return _stored_email(state)
    return getattr(user, "email", None)


def _stored_email(state: InstanceState[Any]) -> Any:
    """Return the address that the database holds, of a user whose old one is not loaded."""
    key = state.mapper.primary_key_from_instance(state.obj())
    conditions = [column == part for column, part in zip(state.mapper.primary_key, key, strict=True)]
    session = state.session
    if session is None:
        return None
    with session.no_autoflush:
        return session.scalar(
            select(state.mapper.columns["email"]).where(*conditions), bind_arguments={"mapper": state.mapper}
        )
