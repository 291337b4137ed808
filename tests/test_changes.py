"""``changes`` and ``timeline``: what changed, in the order of time."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from chrononaut import Change, ChrononautException, Versioned, as_of, changes, rationale, versioned_session
from chrononaut.exceptions import NaiveDatetimeError
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements


class Models:
    """A hierarchy with integer keys, and a model with a key of two parts."""

    def __init__(self, base: type[DeclarativeBase]) -> None:
        class User(Versioned, base):
            __tablename__ = "appuser"
            __chrononaut_hidden__ = ["password"]
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            email: Mapped[str]
            password: Mapped[str | None]
            __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "user"}

        class Admin(User):
            __tablename__ = "admin"
            id: Mapped[int] = mapped_column(sa.ForeignKey("appuser.id"), primary_key=True)
            level: Mapped[int]
            __mapper_args__ = {"polymorphic_identity": "admin"}

        class Tag(Versioned, base):
            __tablename__ = "tag"
            name: Mapped[str] = mapped_column(primary_key=True)
            user_id: Mapped[int] = mapped_column(primary_key=True)
            weight: Mapped[int]

        self.User, self.Admin, self.Tag = User, Admin, Tag


@pytest.fixture
def models(base: type[DeclarativeBase], engine: sa.Engine) -> Models:
    models = Models(base)
    base.metadata.create_all(engine)
    return models


class Author:
    def __init__(self) -> None:
        self.name = "ann"

    def __call__(self) -> dict[str, Any]:
        return {"user_id": self.name}


@pytest.fixture
def author() -> Author:
    return Author()


@pytest.fixture
def session(engine: sa.Engine, clock: Clock, author: Author) -> Iterator[Session]:
    with versioned_session(sessionmaker(engine), clock=clock, change_info=author)() as session:
        yield session


@pytest.fixture
def start(models: Models, session: Session, clock: Clock, author: Author) -> datetime:
    """Three transactions: births; updates by ann, with a reason; a deletion and an update by bob."""
    start = clock.now
    user = models.User(id=1, email="u0", password="secret")
    admin = models.Admin(id=2, email="a0", level=1)
    tag = models.Tag(name="x", user_id=1, weight=1)
    session.add_all([user, admin, tag])
    session.commit()
    clock.advance()
    with rationale("because"):
        user.email, user.password, admin.level, tag.weight = "u1", "secret 2", 2, 2
        session.commit()
    clock.advance()
    author.name = "bob"
    session.delete(user)
    tag.weight = 3
    session.commit()
    clock.advance()
    return start


def _short(change: Change[Any]) -> tuple[str, tuple[Any, ...], int, str]:
    return change.model.__name__, change.key, change.version, change.operation


ALL = [
    ("Tag", ("x", 1), -1, "insert"),
    ("User", (1,), -1, "insert"),
    ("Admin", (2,), -1, "insert"),
    ("Tag", ("x", 1), 0, "update"),
    ("User", (1,), 0, "update"),
    ("Admin", (2,), 0, "update"),
    ("Tag", ("x", 1), 1, "update"),
    ("User", (1,), 1, "delete"),
]


def test_the_feed_is_ordered_by_time_over_all_models(
    base: type[DeclarativeBase], models: Models, session: Session, start: datetime
) -> None:
    """Each change says what, which, when, who, why and how; hidden values are not in it."""
    feed = list(changes(session, models=[base]))
    assert list(map(_short, feed)) == ALL
    assert [change.changed for change in feed] == [start + timedelta(seconds=n) for n in (0, 0, 0, 1, 1, 1, 2, 2)]
    assert [change.user_id for change in feed] == ["ann"] * 6 + ["bob"] * 2
    assert feed[3].rationale == "because"
    assert [change.diff for change in feed[3:]] == [
        {"weight": (1, 2)},
        {"email": ("u0", "u1")},
        {"level": (1, 2)},
        {"weight": (2, 3)},
        {"email": ("u1", None), "id": (1, None), "kind": ("user", None)},
    ]
    assert feed[0].diff == {"name": (None, "x"), "user_id": (None, 1), "weight": (None, 1)}
    assert feed[4].change_info["hidden_cols_changed"] == ["password"]
    assert "secret" not in repr([vars(change) for change in feed])


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("page_size", [1, 2, 3, 8, 500])
def test_pages_join_without_gaps(
    page_size: int, newest_first: bool, base: type[DeclarativeBase], models: Models, session: Session, start: datetime
) -> None:
    """Whatever the size of a page, and wherever one goes on, each change comes once."""
    expected = ALL[::-1] if newest_first else ALL
    how: dict[str, Any] = {"models": [base], "page_size": page_size, "newest_first": newest_first}
    feed = list(changes(session, **how))
    assert list(map(_short, feed)) == expected
    for index, change in enumerate(feed):
        assert list(map(_short, changes(session, after=change, **how))) == expected[index + 1 :]
        assert len(list(changes(session, after=change.cursor, **how))) == len(expected) - index - 1


def test_filters(models: Models, session: Session, start: datetime) -> None:
    """``since`` is inclusive, ``until`` exclusive; a class stands for its subclasses, too."""
    User, Admin, Tag = models.User, models.Admin, models.Tag
    second = start + timedelta(seconds=1)
    assert [_short(c) for c in changes(session, since=second, models=[User, Tag])] == ALL[3:]
    assert [_short(c) for c in changes(session, until=second, models=[User, Admin, Tag])] == ALL[:3]
    assert [_short(c) for c in changes(session, second, second + timedelta(seconds=1), [Tag])] == [ALL[3]]
    assert [_short(c) for c in changes(session, models=[Admin])] == [ALL[2], ALL[5]]
    assert [_short(c) for c in changes(session, models=[User], user_id="bob")] == [ALL[7]]
    assert list(changes(scoped_session(sessionmaker(session.get_bind())), models=[User], user_id="nobody")) == []
    assert list(changes(session, models=[])) == []


def test_one_statement_for_each_page_and_two_for_each_model(
    base: type[DeclarativeBase], models: Models, session: Session, start: datetime, statements: RecordStatements
) -> None:
    """Reading the feed does not cost a statement for each change."""
    with statements() as log:
        assert len(list(changes(session, models=[base]))) == len(ALL)
    assert len(log.matching("UNION ALL")) == 1
    # For each of two models live rows and history rows; and the subclass's own columns of both.
    assert len(log) <= 1 + 2 * 2 + 2


def test_the_feed_ignores_what_the_session_has_loaded(models: Models, session: Session, start: datetime) -> None:
    """A pending change is neither seen nor lost."""
    tag = session.get_one(models.Tag, ("x", 1))
    with session.no_autoflush:
        tag.weight = 99
        last = list(changes(session, models=[models.Tag]))[-1]
        assert last.diff == {"weight": (2, 3)}
        assert tag.weight == 99
        assert tag in session.dirty


def test_what_the_feed_refuses(models: Models, session: Session, start: datetime) -> None:
    """Naive instants, classes without history, pages of nothing, a place in another feed."""
    with pytest.raises(NaiveDatetimeError):
        changes(session, since=datetime(2024, 1, 1))
    with pytest.raises(ChrononautException, match="int has no history"):
        changes(session, models=[int])
    with pytest.raises(ChrononautException, match="at least 1"):
        changes(session, models=[models.Tag], page_size=0)
    place = next(changes(session, models=[models.User]))
    with pytest.raises(ChrononautException, match="User, which is none of the models"):
        changes(session, models=[models.Tag], after=place)


def test_the_timeline_of_a_record(models: Models, session: Session, start: datetime) -> None:
    """A record's life from its birth to now, each change with what it did."""
    tag = session.get_one(models.Tag, ("x", 1))
    life = list(tag.timeline())
    assert [(c.version, c.operation, c.user_id) for c in life] == [
        (-1, "insert", "ann"), (0, "update", "ann"), (1, "update", "bob"),
    ]  # fmt: skip
    assert life[0].before is None
    assert [c.after and c.after["weight"] for c in life] == [1, 2, 3]
    assert [c.diff for c in life[1:]] == [{"weight": (1, 2)}, {"weight": (2, 3)}]


def test_the_timeline_over_two_lives(models: Models, session: Session, start: datetime, clock: Clock) -> None:
    """A key that was used again has both lives in its timeline."""
    again = models.User(id=1, email="again")
    session.add(again)
    session.commit()
    life = list(again.timeline())
    assert [c.operation for c in life] == ["insert", "update", "delete", "insert"]
    assert (life[2].after, life[3].before) == (None, None)
    assert life[3].diff["email"] == (None, "again")


def test_feeds_and_timelines_of_the_past(models: Models, session: Session, start: datetime) -> None:
    """In the past there are the changes of then."""
    with as_of(session, start + timedelta(seconds=1)) as past:
        assert [_short(c) for c in changes(past, models=[models.User, models.Tag])] == ALL[:6]
        assert [c.version for c in past.get_one(models.Tag, ("x", 1)).timeline()] == [-1, 0]
