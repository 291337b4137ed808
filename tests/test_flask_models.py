"""``VersionedSQLAlchemy`` with every kind of model that Flask-SQLAlchemy knows, several databases, and own sessions."""

# What Flask-SQLAlchemy's own types do not tell:
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

from datetime import datetime, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.query import Query
from flask_sqlalchemy.session import Session
from sqlalchemy.orm import (
    DeclarativeBase,
    DeclarativeBaseNoMeta,
    Mapped,
    MappedAsDataclass,
    declared_attr,
    mapped_column,
)

from chrononaut import (
    ChrononautException,
    HiddenAttributeError,
    RecordChanges,
    UntrackedAttributeError,
    Versioned,
    VersionedSQLAlchemy,
    history_class,
)
from chrononaut.exceptions import UnattachedSessionError
from tests.fix_flask import MakeApp


def make_db(style: str) -> VersionedSQLAlchemy:
    if style == "classic":
        return VersionedSQLAlchemy()
    if style == "declarative base":

        class Base(DeclarativeBase):
            pass

        return VersionedSQLAlchemy(model_class=Base)
    if style == "no meta":

        class NoMeta(DeclarativeBaseNoMeta):
            pass

        return VersionedSQLAlchemy(model_class=NoMeta)

    class DataclassBase(MappedAsDataclass, DeclarativeBase):
        pass

    return VersionedSQLAlchemy(model_class=DataclassBase)


def bases(db: VersionedSQLAlchemy, order: str) -> tuple[Any, ...]:
    return (Versioned, db.Model) if order == "mixin first" else (db.Model, Versioned)


def change(db: VersionedSQLAlchemy, record: Any, **values: Any) -> Any:
    """Add a record, change it, and return its last ended state."""
    db.create_all()
    db.session.add(record)
    db.session.commit()
    for name, value in values.items():
        setattr(record, name, value)
    db.session.commit()
    return record.previous_version()


both_orders = pytest.mark.parametrize("order", ["mixin first", "model first"])
all_styles = pytest.mark.parametrize("style", ["classic", "declarative base", "no meta", "dataclass"])


@both_orders
@all_styles
def test_every_style_of_model_has_history_under_its_generated_name(make_app: MakeApp, style: str, order: str) -> None:
    """A model without ``__tablename__`` is named by Flask-SQLAlchemy, and its history after that."""
    db = make_db(style)

    class BlogPost(*bases(db, order)):
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str] = mapped_column()

    with make_app(db).app_context():
        row = change(db, BlogPost(id=1, title="old"), title="new")
        assert (BlogPost.__table__.name, type(row).__table__.name) == ("blog_post", "blog_post_history")
        assert (row.title, row.version, row.operation) == ("old", 0, "update")
        assert BlogPost.query.one().versions() == [row]


@both_orders
@pytest.mark.parametrize("style", ["classic", "declarative base", "no meta"])
def test_columns_may_be_declared_without_annotations(make_app: MakeApp, style: str, order: str) -> None:
    """Models written with ``db.Column`` have history as those with ``Mapped`` have."""
    db = make_db(style)

    class Post(*bases(db, order)):
        __tablename__ = "posts"
        __chrononaut_tablename__ = "old_posts"
        id = db.Column("post_id", db.Integer, primary_key=True)
        title = db.Column(db.String(60), index=True)

    with make_app(db).app_context():
        row = change(db, Post(title="old"), title="new")
        assert row.title == "old"
        assert db.session.scalar(sa.text("SELECT title FROM old_posts WHERE operation = 'update'")) == "old"


@both_orders
@all_styles
def test_subclasses_in_one_table_and_in_two(make_app: MakeApp, style: str, order: str) -> None:
    """Flask-SQLAlchemy decides by the primary key whether a subclass has a table; history follows."""
    db = make_db(style)

    class Animal(*bases(db, order)):
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(default=None)

    class Bird(Animal):
        __mapper_args__ = {"polymorphic_identity": "bird"}
        song: Mapped[str | None] = mapped_column(default=None)

    class SeaFish(Animal):
        __mapper_args__ = {"polymorphic_identity": "fish"}
        id: Mapped[int] = mapped_column(sa.ForeignKey(Animal.id), primary_key=True)
        depth: Mapped[int] = mapped_column(default=0)

    assert set(db.metadata.tables) == {"animal", "animal_history", "sea_fish", "sea_fish_history"}
    with make_app(db).app_context():
        bird = change(db, Bird(id=1, kind="bird", song="old"), song="new")
        fish = change(db, SeaFish(id=2, kind="fish", depth=10), depth=20)
        assert (type(bird), bird.song) == (history_class(Bird), "old")
        assert (type(fish), fish.depth) == (history_class(SeaFish), 10)


def test_abstract_model_and_declared_name(make_app: MakeApp) -> None:
    """The mixin may stand on an abstract model, and the table name may be a ``declared_attr``."""
    db = VersionedSQLAlchemy()
    model: Any = db.Model

    class Base(Versioned, model):
        __abstract__ = True
        id: Mapped[int] = mapped_column(primary_key=True)

        @declared_attr.directive
        def __tablename__(cls) -> str:  # noqa: N805
            return f"app_{cls.__name__.lower()}"

    class Page(Base):
        text: Mapped[str]

    with make_app(db).app_context():
        assert change(db, Page(text="old"), text="new").text == "old"
        assert set(db.metadata.tables) == {"app_page", "app_page_history"}


def test_hidden_and_untracked_attributes_raise_their_own_errors(make_app: MakeApp) -> None:
    """History as a view reads it: tracked values are there, others say why they are not."""
    db = VersionedSQLAlchemy()

    class User(db.Model, Versioned):  # type: ignore[name-defined]
        __tablename__ = "appuser"
        __version_untracked__ = ["login_count"]
        __version_hidden__ = ["password"]
        id = db.Column("id", db.Integer, primary_key=True)
        email = db.Column("email", db.String(255), unique=True)
        password = db.Column("password", db.Text())
        login_count = db.Column("login_count", db.Integer())

    with make_app(db).app_context():
        change(db, User(email="a@example.org", password="1", login_count=1), email="b@example.org", password="2")
        user = User.query.first()
        version = user.versions()[0]
        assert (version.email, version.change_info["hidden_cols_changed"]) == ("a@example.org", ["password"])
        with pytest.raises(HiddenAttributeError, match="password"):
            _ = version.password
        with pytest.raises(UntrackedAttributeError, match="login_count"):
            _ = version.login_count
        assert user.diff(version) == {"email": ("a@example.org", "b@example.org")}


def test_record_changes_on_a_flask_model(make_app: MakeApp) -> None:
    """``RecordChanges`` alone is fed by the extension's session as well."""
    db = VersionedSQLAlchemy()
    model: Any = db.Model

    class Page(RecordChanges, model):
        id: Mapped[int] = mapped_column(primary_key=True)

    with make_app(db).test_request_context(environ_base={"REMOTE_ADDR": "192.0.2.1"}):
        db.create_all()
        db.session.add(page := Page())
        db.session.commit()
        assert page.change_info == {"user_id": None, "remote_addr": "192.0.2.1"}


# --- several databases


@all_styles
def test_history_lives_in_its_models_database(make_app: MakeApp, second_url: sa.URL, style: str) -> None:
    """With several binds each history table is in the bind of its model, and all of history is read from there."""
    db = make_db(style)
    model: Any = db.Model

    class Here(Versioned, model):
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str] = mapped_column()

    class There(Versioned, model):
        __bind_key__ = "there"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str] = mapped_column()

    assert {key: set(metadata.tables) for key, metadata in db.metadatas.items()} == {
        None: {"here", "here_history"},
        "there": {"there", "there_history"},
    }
    with make_app(db, SQLALCHEMY_BINDS={"there": second_url}).app_context():
        db.create_all()
        start = datetime.now(timezone.utc)
        for number in (1, 2):
            db.session.add_all([Here(id=number, text="old"), There(id=number, text="old")])
        db.session.commit()
        classes: list[Any] = [Here, There]
        for cls in classes:
            for each in db.session.scalars(sa.select(cls)):
                each.text = "new"
        db.session.commit()
        for cls, engine in zip(classes, (db.engine, db.engines["there"]), strict=True):
            record: Any = db.session.get(cls, 1)
            row = record.previous_version()
            assert [row] == record.versions() == record.versions(return_query=True).all()
            assert record.version_at(datetime.now(timezone.utc)) is record
            assert record.version_at(row.began) is row
            assert record.has_changed_since(start)
            assert record.diff(row, include_hidden=True) == {"text": ("old", "new")}
            assert len(db.session.scalars(sa.select(history_class(cls))).all()) == 4
            with engine.connect() as connection:
                assert set(sa.inspect(connection).get_table_names()) == set(cls.metadata.tables)


def test_expired_records_of_another_bind_are_changed_and_deleted(make_app: MakeApp, second_url: sa.URL) -> None:
    """What a flush must read before it writes, it reads from the record's own database."""
    db = VersionedSQLAlchemy()
    model: Any = db.Model

    class There(Versioned, model):
        __bind_key__ = "there"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    with make_app(db, SQLALCHEMY_BINDS={"there": second_url}).app_context():
        change(db, one := There(id=1, text="first"), text="second")
        one.text = "third"  # expired: neither the version nor the old value is loaded
        db.session.commit()
        db.session.delete(one)
        db.session.commit()
        db.session.add(There(id=1, text="again"))
        db.session.commit()
        history = history_class(There)
        rows = db.session.scalars(sa.select(history).order_by(history.version)).all()
        assert [(row.text, row.operation) for row in rows] == [
            (None, "insert"),
            ("first", "update"),
            ("second", "update"),
            ("third", "delete"),
            (None, "insert"),
        ]


# --- sessions


def test_session_class_and_options_are_kept(make_app: MakeApp) -> None:
    """A session class of the application's own, its options, and the query class are as they were given."""

    class OwnSession(Session):
        pass

    class OwnQuery(Query):
        pass

    db = VersionedSQLAlchemy(
        session_options={"class_": OwnSession, "expire_on_commit": False, "info": {"own": True}}, query_class=OwnQuery
    )

    class Page(Versioned, db.Model):  # type: ignore[name-defined]
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    with make_app(db).app_context():
        session = db.session()
        assert isinstance(session, OwnSession)
        assert (session.expire_on_commit, session.info["own"], isinstance(Page.query, OwnQuery)) == (False, True, True)
        page = Page(text="old")
        assert change(db, page, text="new").text == "old"
        assert isinstance(page.versions(return_query=True), OwnQuery)
        versions: Any = page.versions(return_query=True)
        assert versions.paginate(page=1, per_page=1).total == 1


def test_other_extensions_of_the_same_session_class_stay_unversioned(make_app: MakeApp) -> None:
    """Attaching one extension does not attach a plain ``SQLAlchemy``, which is refused to write versioned models."""
    db = VersionedSQLAlchemy()

    class Page(Versioned, db.Model):  # type: ignore[name-defined]
        id: Mapped[int] = mapped_column(primary_key=True)

    make_app(db)
    plain = SQLAlchemy()
    with make_app(plain).app_context():
        plain.session.add(Page())
        with pytest.raises(UnattachedSessionError):
            plain.session.flush()


def test_session_made_by_hand_has_history(make_app: MakeApp) -> None:
    """``db.session()`` is not the only session: one made by its factory is attached as well."""
    db = VersionedSQLAlchemy()

    class Page(Versioned, db.Model):  # type: ignore[name-defined]
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    with make_app(db).app_context():
        db.create_all()
        with db.session.session_factory() as session:
            session.add(page := Page(text="old"))
            session.commit()
            page.text = "new"
            session.commit()
            assert [row.text for row in page.versions()] == ["old"]


def test_extension_given_the_application_at_once(engine: sa.Engine) -> None:
    """``VersionedSQLAlchemy(app)`` does the same as ``init_app`` later, and is found where Flask-SQLAlchemy is."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = engine.url
    db = VersionedSQLAlchemy(app)

    class Page(Versioned, db.Model):  # type: ignore[name-defined]
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    assert app.extensions["sqlalchemy"] is db
    with app.app_context():
        own_engine = db.engine
        assert change(db, Page(text="old"), text="new").text == "old"
    own_engine.dispose()
    with pytest.raises(RuntimeError, match="already been registered"):
        VersionedSQLAlchemy(app)


def test_sessions_of_several_applications_are_captured_once(make_app: MakeApp) -> None:
    """Setting one extension up on several applications does not make it record twice."""
    db = VersionedSQLAlchemy()

    class Page(Versioned, db.Model):  # type: ignore[name-defined]
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    apps = [make_app(db) for _ in range(3)]
    with apps[0].app_context():
        change(db, page := Page(text="old"), text="new")
        assert len(page.versions()) == 1


def test_track_modifications_still_works(make_app: MakeApp) -> None:
    """Flask-SQLAlchemy's own signal of changed models is sent as before."""
    from flask_sqlalchemy.track_modifications import models_committed

    db = VersionedSQLAlchemy()

    class Page(Versioned, db.Model):  # type: ignore[name-defined]
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    app = make_app(db, SQLALCHEMY_TRACK_MODIFICATIONS=True)
    seen: list[str] = []

    def note(sender: Flask, changes: list[tuple[Any, str]]) -> None:
        seen.extend(operation for _, operation in changes)

    with app.app_context(), models_committed.connected_to(note, app):
        change(db, Page(text="old"), text="new")
    assert seen == ["insert", "update"]


def test_failing_flush_fails_the_request_and_leaves_nothing(make_app: MakeApp) -> None:
    """An error of the capture reaches the view, and its rollback leaves neither change nor history."""
    db = VersionedSQLAlchemy()

    class Page(Versioned, db.Model):  # type: ignore[name-defined]
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    app = make_app(db)
    with app.app_context():
        change(db, page := Page(text="old"), text="new")
        app.extensions["chrononaut"].user_id = lambda: object()
        page.text = "newer"
        with pytest.raises(ChrononautException, match="JSON"):
            db.session.commit()
        db.session.rollback()
        assert (page.text, len(page.versions())) == ("new", 1)
