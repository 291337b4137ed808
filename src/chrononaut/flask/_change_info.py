"""Who is changing things in a Flask application: each part by a provider of its own, per application."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from flask import Flask, current_app, has_app_context, request

from chrononaut.exceptions import ChangeInfoError
from chrononaut.flask._user import fetch_user_id, is_in_request
from chrononaut.typing import ChangeInfo

EXTENSION = "chrononaut"
REQUIRE_EXTRA = "CHRONONAUT_REQUIRE_EXTRA_CHANGE_INFO"
CUSTOM_INFO = "CHRONONAUT_EXTRA_CHANGE_INFO_FUNC"


def fetch_remote_addr() -> str | None:
    """Return the address that Flask says the request came from.

    Behind a proxy that is the proxy's, unless Werkzeug's ``ProxyFix`` is told how many proxies to trust.

    :return: None outside a request.
    """
    return request.remote_addr if is_in_request() else None


@dataclass(slots=True)
class FlaskChangeInfo:
    """How one application tells who is changing things; ``app.extensions["chrononaut"]``.

    Each part can be replaced alone, in one application alone. E.g.::

        app.extensions["chrononaut"].user_id = lambda: request.headers.get("X-Service-Account")

    :param user_id: returns who is changing things, or None if that is nobody known.
    :param remote_addr: returns where from, or None.
    """

    user_id: Callable[[], str | None] = fetch_user_id
    remote_addr: Callable[[], str | None] = fetch_remote_addr


def fetch_change_info() -> ChangeInfo:
    """Return who is changing things, as the current application tells it; nobody outside of all applications."""
    app = _current_app()
    if app is None:
        return {}
    info = cast("FlaskChangeInfo", app.extensions[EXTENSION])
    return {"user_id": info.user_id(), "remote_addr": info.remote_addr(), **_custom_info(app)}


def requires_extra_change_info() -> bool:
    """Tell whether the current application refuses changes without extra info."""
    app = _current_app()
    return app is not None and bool(_setting(app, REQUIRE_EXTRA))


def _custom_info(app: Flask) -> Mapping[str, Any]:
    fetch = _setting(app, CUSTOM_INFO)
    if fetch is None:
        return {}
    if not callable(fetch):
        raise _wrong_setting("is", fetch)
    given: Any = fetch()
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise _wrong_setting("returned", given)
    return cast("Mapping[str, Any]", given)


def _wrong_setting(what: str, value: object) -> ChangeInfoError:
    return ChangeInfoError(
        f"The config {CUSTOM_INFO} must be a callable that returns a mapping or None, but it {what} a "
        f"{type(value).__name__}."
    )


def _setting(app: Flask, key: str) -> Any:
    return cast("dict[str, Any]", app.config).get(key)


def _current_app() -> Flask | None:
    """Return the current application, if our extension was initialised on it."""
    if not has_app_context() or EXTENSION not in current_app.extensions:
        return None
    return current_app
