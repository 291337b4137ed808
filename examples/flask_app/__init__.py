"""A small wiki whose articles remember who changed what, when and why.

Run it with ``hatch run flask-demo``, log in as ada or as mary (the password is "demo"), and edit.
"""

# What neither Flask-SQLAlchemy's types nor Flask-Login's missing ones tell:
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import difflib
import os
import re
import secrets
from typing import Any

from flask import Flask, flash, redirect, render_template, request, url_for
from flask_login import LoginManager, UserMixin, login_required, login_user, logout_user
from markupsafe import Markup
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug import Response
from werkzeug.security import check_password_hash, generate_password_hash

from chrononaut import Versioned, VersionedSQLAlchemy, history_class, rationale


class Base(DeclarativeBase):
    pass


db = VersionedSQLAlchemy(model_class=Base)
login_manager = LoginManager()
login_manager.login_view = "login"


class User(UserMixin, Versioned, db.Model):
    __tablename__ = "appuser"
    __chrononaut_hidden__ = ["password_hash"]

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    password_hash: Mapped[str]


class Article(Versioned, db.Model):
    __chrononaut_untracked__ = ["views"]

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    text: Mapped[str]
    views: Mapped[int] = mapped_column(default=0)


@login_manager.user_loader
def load_user(user_id: str) -> User | None:
    return db.session.get(User, int(user_id))


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.from_mapping(
        # Of its own at each start, so everybody has to log in again then.
        SECRET_KEY=secrets.token_hex(),
        SESSION_COOKIE_SAMESITE="Lax",
        SQLALCHEMY_DATABASE_URI=os.environ.get("DATABASE_URL", "sqlite:///wiki.db"),
    )
    db.init_app(app)
    login_manager.init_app(app)
    app.add_template_filter(marked_up)
    app.add_url_rule("/", view_func=index)
    app.add_url_rule("/login", view_func=login, methods=["GET", "POST"])
    app.add_url_rule("/logout", view_func=logout, methods=["POST"])
    app.add_url_rule("/articles/<int:article_id>", view_func=edit, methods=["GET", "POST"])
    app.add_url_rule("/articles/<int:article_id>/history", view_func=history)
    with app.app_context():
        db.create_all()
        if db.session.scalar(select(User).limit(1)) is None:
            add_first_content()
    return app


def add_first_content() -> None:
    password = generate_password_hash("demo")
    with rationale("First content"):
        db.session.add_all(User(email=f"{name}@example.org", password_hash=password) for name in ("ada", "mary"))
        db.session.add(Article(title="Bees", text="Bees are small insects. They make honey and live alone."))
        db.session.commit()


# --- pages


def index() -> str:
    return render_template("index.html", articles=db.session.scalars(select(Article).order_by(Article.title)))


def login() -> str | Response:
    if request.method == "POST":
        user = db.session.scalar(select(User).where(User.email == request.form["email"]))
        if user is not None and check_password_hash(user.password_hash, request.form["password"]):
            login_user(user)
            return redirect(url_for("index"))
        flash("Nobody has this address and password.")
    return render_template("login.html")


def logout() -> Response:
    logout_user()
    return redirect(url_for("index"))


@login_required
def edit(article_id: int) -> str | Response:
    article = db.get_or_404(Article, article_id)
    if request.method == "GET":
        article.views += 1  # untracked: makes no version
        db.session.commit()
    elif int(request.form["version"]) != article.version:
        flash("Somebody else has changed this article since you opened it.")
    else:
        article.title = request.form["title"]
        article.text = request.form["text"]
        with rationale(request.form["why"]):
            db.session.commit()
        return redirect(url_for("history", article_id=article_id))
    return render_template("edit.html", article=article)


def history(article_id: int) -> str:
    article = db.get_or_404(Article, article_id)
    return render_template("history.html", article=article, changes=changes_of(article))


def changes_of(article: Article) -> list[dict[str, Any]]:
    """The changes of an article, the latest first: each is what ended one state, and how the next one differs."""
    history = history_class(Article)
    rows = db.session.scalars(select(history).where(history.id == article.id).order_by(history.version)).all()
    changes = []
    states: list[Any] = [*rows, article]
    for row, following in zip(rows, states[1:], strict=True):
        is_creation = row.operation == "insert"
        fields = ["title", "text"] if is_creation else article.diff(row, to=following)
        values = {name: ("" if is_creation else getattr(row, name), getattr(following, name)) for name in fields}
        changes.append({"row": row, "verb": "created" if is_creation else "changed", "values": values})
    return changes[::-1]


def marked_up(values: tuple[str, str]) -> Markup:
    """Return two texts as one, in which what is gone and what is new are marked."""
    before, after = (re.findall(r"\w+|\W", value) for value in values)
    marked = Markup()
    for operation, start, end, new_start, new_end in difflib.SequenceMatcher(None, before, after).get_opcodes():
        gone, new = "".join(before[start:end]), "".join(after[new_start:new_end])
        if operation == "equal":
            marked += gone
            continue
        marked += Markup("<del>{}</del>").format(gone) if gone else ""
        marked += Markup("<ins>{}</ins>").format(new) if new else ""
    return marked
