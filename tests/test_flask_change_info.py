"""Who changed what, as Flask tells it, through real requests with cookies."""

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, copy_current_request_context, current_app, g, request
from flask_login import UserMixin, current_user, login_user, logout_user
from werkzeug.middleware.proxy_fix import ProxyFix

from chrononaut import (
    ChrononautException,
    VersionedSQLAlchemy,
    append_change_info,
    extra_change_info,
    history_class,
    rationale,
)
from chrononaut.flask import fetch_user_id
from tests.fix_flask import MakeApp, Site

FIRST = {"user_id": "user1@example.org", "remote_addr": "127.0.0.1"}


def edit(site: Site, text: str) -> None:
    site.db.session.get(site.Note, 1).text = text
    site.db.session.commit()


# --- the user


def test_change_names_the_user_who_is_logged_in_by_cookie(site: Site) -> None:
    """A change made in a request is recorded with the user that its cookie logs in, and where the request came from."""
    one, two = site.client(1), site.client(2)
    assert one.post("/notes/1", data={"text": "second"}).text == "edited"
    assert site.last_info() == FIRST
    assert two.post("/notes/1", data={"text": "third"}).text == "edited"
    assert site.last_info() == {"user_id": "user2@example.org", "remote_addr": "127.0.0.1"}


def test_anonymous_user_is_nobody(site: Site) -> None:
    """A change by who is not logged in, or not any more, has no user but an address."""
    client = site.client()
    client.post("/notes/1", data={"text": "second"})
    assert site.last_info() == {"user_id": None, "remote_addr": "127.0.0.1"}
    client = site.client(1)
    client.post("/logout")
    client.post("/notes/1", data={"text": "third"})
    assert site.last_info()["user_id"] is None


def test_outside_a_request_there_is_nobody(site: Site) -> None:
    """A change made in an application context without a request has neither user nor address."""
    with site.app.app_context():
        edit(site, "second")
    assert site.last_info() == {"user_id": None, "remote_addr": None}


def test_application_without_flask_login_has_no_users(make_app: MakeApp) -> None:
    """Where Flask-Login is not set up there is no user, only an address."""
    db = VersionedSQLAlchemy()
    site = Site(db, make_app(db))
    del site.app.login_manager  # type: ignore[attr-defined]
    with site.app.test_request_context(environ_base={"REMOTE_ADDR": "192.0.2.7"}):
        edit(site, "second")
    assert site.last_info() == {"user_id": None, "remote_addr": "192.0.2.7"}


def test_birth_and_death_name_the_user_too(site: Site) -> None:
    """Whoever creates or deletes a record is named in its history."""

    @site.app.post("/replace")
    def replace() -> str:
        site.db.session.add(site.Note(id=2, text="new"))
        site.db.session.delete(site.db.session.get(site.Note, 1))
        site.db.session.commit()
        return "replaced"

    site.client(1).post("/replace")
    with site.app.app_context():
        history = history_class(site.Note)
        rows = site.db.session.scalars(
            sa.select(history).where(history.change_info["user_id"].as_string().is_not(None))
        )
        assert {(row.id, row.operation, row.change_info["user_id"]) for row in rows} == {
            (1, "delete", "user1@example.org"),
            (2, "insert", "user1@example.org"),
        }


def test_test_with_one_context_around_several_requests(site: Site) -> None:
    """A test suite may keep one application context, and so one ``g``, for requests of several users."""
    one, two = site.client(1), site.client(2)
    with site.app.app_context():
        one.post("/notes/1", data={"text": "second"})
        g.pop("_login_user")  # which Flask-Login would take for the next request's
        two.post("/notes/1", data={"text": "third"})
    assert site.last_info()["user_id"] == "user2@example.org"


@pytest.mark.parametrize("email", [None, ""])
def test_user_without_an_address_is_named_by_the_id(site: Site, email: str | None) -> None:
    """A user whose email is empty is named by what ``get_id()`` returns."""
    with site.app.app_context():
        site.db.session.get(site.User, 1).email = email
        site.db.session.commit()
    site.client(1).post("/notes/1", data={"text": "second"})
    assert site.last_info()["user_id"] == "1"


def test_user_that_is_no_model_is_named_by_the_id(site: Site) -> None:
    """A user class of any kind will do, also one that has no email at all."""

    class ServiceAccount(UserMixin):
        id = "importer"

    with site.app.test_request_context():
        login_user(ServiceAccount())
        edit(site, "second")
    assert site.last_info()["user_id"] == "importer"


@pytest.mark.parametrize("is_expired", [False, True])
def test_user_who_changes_the_own_address_is_named_by_the_old_one(site: Site, is_expired: bool) -> None:
    """Nobody can make changes in somebody else's name by taking that person's address in the same request."""

    @site.app.post("/address")
    def change_address() -> str:
        user = site.db.session.get(site.User, 1)
        if is_expired:
            site.db.session.expire(user)
        user.email = "user2@example.org"
        site.db.session.get(site.Note, 1).text = "second"
        site.db.session.commit()
        site.db.session.get(site.Note, 1).text = "third"
        site.db.session.commit()
        return "changed"

    site.client(1).post("/address")
    with site.app.app_context():
        versions = site.db.session.get(site.Note, 1).versions()
        assert [row.change_info["user_id"] for row in versions] == ["user1@example.org", "user1@example.org"]
        (address,) = site.db.session.get(site.User, 1).versions()
        assert address.change_info["user_id"] == "user1@example.org"


def test_user_loader_may_change_records_itself(site: Site) -> None:
    """What a user loader changes has no user, because who that is is still being found out; all later changes have."""

    @site.app.login_manager.user_loader  # type: ignore[attr-defined,untyped-decorator]
    def load(user_id: str) -> Any:
        user = site.db.session.get(site.User, int(user_id))
        edit(site, "by the loader")
        return user

    @site.app.post("/twice")
    def change() -> str:
        assert current_user.is_authenticated
        edit(site, "by the view")
        return "changed"

    assert site.client(1).post("/twice").text == "changed"
    with site.app.app_context():
        versions = site.db.session.get(site.Note, 1).versions()
        assert [row.change_info["user_id"] for row in versions] == [None, "user1@example.org"]


def test_user_is_loaded_once_even_if_only_the_flush_asks(site: Site) -> None:
    """A view that never asks for the user has it loaded by the first flush, and not again."""
    loaded: list[str] = []

    @site.app.login_manager.user_loader  # type: ignore[attr-defined,untyped-decorator]
    def load(user_id: str) -> Any:
        loaded.append(user_id)
        return site.db.session.get(site.User, int(user_id))

    @site.app.post("/twice")
    def change() -> str:
        edit(site, "second")
        edit(site, "third")
        return "changed"

    client = site.client(1)
    loaded.clear()
    client.post("/twice")
    assert loaded == ["1"]
    assert site.last_info()["user_id"] == "user1@example.org"


def test_user_is_still_named_when_the_view_has_closed_the_session(site: Site) -> None:
    """A view that has its session removed in the middle goes on in the user's name."""

    @site.app.post("/close")
    def close() -> str:
        edit(site, "second")
        site.db.session.remove()
        edit(site, "third")
        return "changed"

    assert site.client(1).post("/close").text == "changed"
    assert site.last_info() == FIRST


def test_login_as_somebody_else_within_a_request_counts_at_once(site: Site) -> None:
    """Who logs in or out within a request is named from then on."""

    @site.app.post("/switch")
    def switch() -> str:
        edit(site, "second")
        login_user(site.db.session.get(site.User, 2))
        edit(site, "third")
        logout_user()
        edit(site, "fourth")
        return "changed"

    site.client(1).post("/switch")
    with site.app.app_context():
        versions = site.db.session.get(site.Note, 1).versions()
        assert [row.change_info["user_id"] for row in versions] == ["user1@example.org", "user2@example.org", None]


def test_user_who_deletes_the_own_account_is_named(site: Site) -> None:
    """The last change of a user is recorded with the name, and so is what follows in the same request."""

    @site.app.post("/leave")
    def leave() -> str:
        site.db.session.delete(site.db.session.get(site.User, 1))
        site.db.session.commit()
        edit(site, "second")
        return "gone"

    site.client(1).post("/leave")
    assert site.last_info()["user_id"] == "user1@example.org"


# --- the address


def test_address_is_the_proxys_unless_flask_trusts_it(site: Site) -> None:
    """Only with ``ProxyFix`` is the address the one that the proxy forwarded; a forged header changes nothing."""
    forwarded = {"X-Forwarded-For": "198.51.100.9, 203.0.113.5"}
    site.client(1).post("/notes/1", data={"text": "second"}, headers=forwarded)
    assert site.last_info()["remote_addr"] == "127.0.0.1"
    site.app.wsgi_app = ProxyFix(site.app.wsgi_app, x_for=1)  # type: ignore[method-assign]
    site.client(1).post("/notes/1", data={"text": "third"}, headers=forwarded)
    assert site.last_info()["remote_addr"] == "203.0.113.5"


# --- providers


def test_each_provider_can_be_replaced_alone(site: Site) -> None:
    """Replacing how the user is found leaves the address as it was, and the other way round."""
    info = site.app.extensions["chrononaut"]
    info.user_id = lambda: request.headers.get("X-Service") or fetch_user_id()
    client = site.client(1)
    client.post("/notes/1", data={"text": "second"}, headers={"X-Service": "importer"})
    assert site.last_info() == {"user_id": "importer", "remote_addr": "127.0.0.1"}
    client.post("/notes/1", data={"text": "third"})
    assert site.last_info() == FIRST
    info.remote_addr = lambda: None
    client.post("/notes/1", data={"text": "fourth"})
    assert site.last_info() == {"user_id": "user1@example.org", "remote_addr": None}


def test_overridden_hook_of_a_model_wins_for_its_key(make_app: MakeApp) -> None:
    """A model that says itself who changes it is believed, and the address still comes from Flask."""
    db = VersionedSQLAlchemy()
    site = Site(db, make_app(db))
    site.Note._fetch_current_user_id = classmethod(lambda cls: "the model")
    site.client(1).post("/notes/1", data={"text": "second"})
    assert site.last_info() == {"user_id": "the model", "remote_addr": "127.0.0.1"}


# --- several applications on one extension


def test_each_application_has_its_own_providers_and_settings(make_app: MakeApp) -> None:
    """Two applications that share one ``db`` differ in providers, required extra info and custom info."""
    db = VersionedSQLAlchemy()
    site = Site(db, make_app(db))
    other = make_app(
        db,
        CHRONONAUT_REQUIRE_EXTRA_CHANGE_INFO=True,
        CHRONONAUT_EXTRA_CHANGE_INFO_FUNC=lambda: {"host": "other"},
        SQLALCHEMY_DATABASE_URI=site.app.config["SQLALCHEMY_DATABASE_URI"],
    )
    other.extensions["chrononaut"].user_id = lambda: "somebody of the other"
    with other.app_context():
        db.create_all()
        if db.session.get(site.Note, 1) is None:  # in memory, each has a database of its own
            with rationale("first content"):
                db.session.add(site.Note(id=1, text="first"))
                db.session.commit()
        with pytest.raises(ChrononautException, match="requires"):
            edit(site, "without reason")
        db.session.rollback()
        with rationale("a reason"):
            edit(site, "second")
        assert site.db.session.get(site.Note, 1).previous_version().change_info == {
            "user_id": "somebody of the other",
            "remote_addr": None,
            "host": "other",
            "extra": {"rationale": "a reason"},
        }
    with site.app.app_context():
        edit(site, "third")
    assert site.last_info() == {"user_id": None, "remote_addr": None}


def test_request_of_another_application_has_no_user_here(make_app: MakeApp) -> None:
    """A request's cookie is never read by another application whose context was entered during the request."""
    db = VersionedSQLAlchemy()
    site = Site(db, make_app(db))
    other = make_app(db)
    site_two = Site.__new__(Site)
    site_two.db, site_two.app, site_two.User, site_two.Note = db, other, site.User, site.Note
    site_two.set_up(other)
    with other.app_context():
        db.create_all()
        db.session.merge(site.User(id=1, email="another.person@example.org"))
        db.session.merge(site.Note(id=1, text="first"))
        db.session.commit()

    @site.app.post("/other")
    def change_other() -> str:
        with other.app_context():
            edit(site, "from the other application's context")
        return "changed"

    assert site.client(1).post("/other").text == "changed"
    assert site_two.last_info() == {"user_id": None, "remote_addr": None}


# --- settings and context managers


def test_required_extra_info_is_looked_up_at_each_flush(site: Site) -> None:
    """``CHRONONAUT_REQUIRE_EXTRA_CHANGE_INFO`` refuses changes without extra info, from when it is set."""
    with site.app.app_context():
        edit(site, "second")
        site.app.config["CHRONONAUT_REQUIRE_EXTRA_CHANGE_INFO"] = True
        with pytest.raises(ChrononautException, match="rationale"):
            edit(site, "third")
        site.db.session.rollback()
        assert site.db.session.get(site.Note, 1).text == "second"
        with extra_change_info(ticket=1):
            edit(site, "third")
        note = site.db.session.get(site.Note, 1)
        with append_change_info(note, why="because"):
            note.text = "fourth"
        site.db.session.commit()
        site.app.config["CHRONONAUT_REQUIRE_EXTRA_CHANGE_INFO"] = False
        edit(site, "fifth")
        assert [row.change_info.get("extra") for row in note.versions()] == [
            None,
            {"ticket": 1},
            {"why": "because"},
            None,
        ]


def test_custom_info_is_recorded_beside_user_and_address(site: Site) -> None:
    """What ``CHRONONAUT_EXTRA_CHANGE_INFO_FUNC`` returns is recorded, and sees the request."""
    site.app.config["CHRONONAUT_EXTRA_CHANGE_INFO_FUNC"] = lambda: {"endpoint": request.endpoint}
    site.client(1).post("/notes/1", data={"text": "second"})
    assert site.last_info() == FIRST | {"endpoint": "edit"}


@pytest.mark.parametrize("wrong", [lambda: "text", {"not": "callable"}, list])
def test_custom_info_that_is_no_mapping_is_refused(site: Site, wrong: Any) -> None:
    """A wrong ``CHRONONAUT_EXTRA_CHANGE_INFO_FUNC`` fails the flush by an error that names the key."""
    site.app.config["CHRONONAUT_EXTRA_CHANGE_INFO_FUNC"] = wrong
    with site.app.app_context(), pytest.raises(ChrononautException, match="CHRONONAUT_EXTRA_CHANGE_INFO_FUNC"):
        edit(site, "second")


def test_custom_info_may_be_none(site: Site) -> None:
    """A ``CHRONONAUT_EXTRA_CHANGE_INFO_FUNC`` that has nothing to say may return None."""
    site.app.config["CHRONONAUT_EXTRA_CHANGE_INFO_FUNC"] = lambda: None
    site.client(1).post("/notes/1", data={"text": "second"})
    assert site.last_info() == FIRST


def test_context_managers_in_a_view(site: Site) -> None:
    """Extra info and rationale given in a view are recorded with the user, and with nothing after the block."""

    @site.app.post("/why")
    def change() -> str:
        with rationale("spelling"), extra_change_info(ticket=7):
            edit(site, "second")
        edit(site, "third")
        return "changed"

    site.client(1).post("/why")
    with site.app.app_context():
        infos = [row.change_info for row in site.db.session.get(site.Note, 1).versions()]
    assert infos == [FIRST | {"extra": {"rationale": "spelling", "ticket": 7}}, FIRST]


def test_context_managers_in_a_command(site: Site) -> None:
    """A CLI command has no user and no address, but can say who it is and why."""

    @site.app.cli.command("tidy")
    def tidy() -> None:
        with rationale("tidy up"):
            edit(site, "tidied")

    result = site.app.test_cli_runner().invoke(args=["tidy"])
    assert result.exit_code == 0, result.output
    assert site.last_info() == {"user_id": None, "remote_addr": None, "extra": {"rationale": "tidy up"}}


# --- background threads


def in_thread(target: Any) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_background_thread_of_a_request_is_nobody_unless_told(site: Site) -> None:
    """A thread that a view starts has its own context: nobody by default, the user with the request's context."""

    @site.app.post("/thread/<how>")
    def change(how: str) -> str:
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]

        def work() -> None:
            with app.app_context(), rationale("in the background"):
                edit(site, "in the background")

        def work_for_user() -> None:
            with rationale("for the user"):
                edit(site, "for the user")

        assert current_user.is_authenticated
        with rationale("in the view"):  # does not reach the thread
            in_thread(work if how == "bare" else copy_current_request_context(work_for_user))
        return "changed"

    client = site.client(1)
    client.post("/thread/bare")
    assert site.last_info() == {"user_id": None, "remote_addr": None, "extra": {"rationale": "in the background"}}
    client.post("/thread/copied")
    assert site.last_info() == FIRST | {"extra": {"rationale": "for the user"}}
