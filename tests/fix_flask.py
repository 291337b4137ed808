"""Flask applications on the ``engine`` fixture's database."""

# What Flask-SQLAlchemy's own types do not tell:
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, request
from flask.testing import FlaskClient
from flask_login import LoginManager, UserMixin, login_user, logout_user
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Mapped, mapped_column

from chrononaut import StaleVersionError, Versioned, VersionedSQLAlchemy, rationale

MakeApp = Callable[..., Flask]
"""``make_app(db, **config)``."""


@pytest.fixture
def make_app(engine: sa.Engine, tmp_path: Path) -> Iterator[MakeApp]:
    """Make applications on the database of ``engine``; in memory, each has a database of its own."""
    made: list[tuple[SQLAlchemy, Flask]] = []

    def make(db: SQLAlchemy, **config: Any) -> Flask:
        app = Flask("tests", instance_path=str(tmp_path))
        app.config.from_mapping(SECRET_KEY="for tests", SQLALCHEMY_DATABASE_URI=engine.url, TESTING=True)
        if engine.url.get_backend_name() == "sqlite" and engine.url.database:
            app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"connect_args": {"timeout": 60}}
        app.config.from_mapping(config)
        db.init_app(app)
        made.append((db, app))
        return app

    yield make
    for db, app in made:
        with app.app_context():
            for each in db.engines.values():
                each.dispose()


@pytest.fixture
def second_url(engine: sa.Engine, tmp_path: Path) -> Iterator[sa.URL]:
    """The URL of a second, empty database of the same kind."""
    if engine.dialect.name == "sqlite":
        yield engine.url.set(database=str(tmp_path / "second.db") if engine.url.database else None)
        return
    name = f"chrononaut_second_{secrets.token_hex(4)}"
    keeper = engine.execution_options(isolation_level="AUTOCOMMIT")
    with keeper.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield engine.url.set(database=name)
    with keeper.connect() as connection:
        force = " WITH (FORCE)" if engine.dialect.name == "postgresql" else ""
        connection.exec_driver_sql(f"DROP DATABASE {name}{force}")


class Site:
    """An application with users who log in and edit notes."""

    def __init__(self, db: VersionedSQLAlchemy, app: Flask) -> None:
        self.db: Any = db  # its models are made at run time
        self.app = app
        model: Any = db.Model

        class User(UserMixin, Versioned, model):
            __tablename__ = "appuser"
            id: Mapped[int] = mapped_column(primary_key=True)
            email: Mapped[str | None]

        class Note(Versioned, model):
            id: Mapped[int] = mapped_column(primary_key=True)
            text: Mapped[str]

        self.User: Any = User
        self.Note: Any = Note
        self.set_up(app)
        with app.app_context():
            db.drop_all()
            db.create_all()
            db.session.add_all(User(id=number, email=f"user{number}@example.org") for number in range(1, 4))
            db.session.add(Note(id=1, text="first"))
            db.session.commit()

    def set_up(self, app: Flask) -> None:
        """Give an application the views and the logging in."""
        login_manager = LoginManager(app)
        login_manager.user_loader(lambda user_id: self.db.session.get(self.User, int(user_id)))

        @app.post("/login/<int:user_id>")
        def login(user_id: int) -> str:
            login_user(self.db.get_or_404(self.User, user_id))
            return "in"

        @app.post("/logout")
        def logout() -> str:
            logout_user()
            return "out"

        @app.post("/notes/<int:note_id>")
        def edit(note_id: int) -> tuple[str, int]:
            note = self.db.get_or_404(self.Note, note_id)
            note.text = request.form["text"]
            why = rationale(request.form["why"]) if "why" in request.form else contextlib.nullcontext()
            try:
                with why:
                    self.db.session.commit()
            except StaleVersionError:
                self.db.session.rollback()
                return "stale", 409
            return "edited", 200

    def client(self, user_id: int | None = None, **kw: Any) -> FlaskClient:
        """Return a browser; logged in, if a user is given."""
        client = self.app.test_client(**kw)
        if user_id is not None:
            assert client.post(f"/login/{user_id}").text == "in"
        return client

    def last_info(self, note_id: int = 1) -> dict[str, Any]:
        """Return who made the last change of a note."""
        with self.app.app_context():
            note = self.db.session.get(self.Note, note_id)
            assert note is not None
            info: dict[str, Any] = note.previous_version().change_info
            return info


@pytest.fixture
def site(make_app: MakeApp) -> Site:
    db = VersionedSQLAlchemy()
    return Site(db, make_app(db))
