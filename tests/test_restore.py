"""``revert_to`` and ``restore``: the way back."""

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import ChrononautException, Versioned, history_class, versioned_session
from tests.fix_models import Clock


class Models:
    def __init__(self, base: type[DeclarativeBase]) -> None:
        class User(Versioned, base):
            __tablename__ = "appuser"
            __chrononaut_hidden__ = ["password"]
            __chrononaut_untracked__ = ["login_count", "region"]
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            email: Mapped[str]
            prefs: Mapped[Any] = mapped_column(sa.JSON)
            shout: Mapped[str] = mapped_column(sa.Computed("upper(email)"))
            password: Mapped[str]
            login_count: Mapped[int] = mapped_column(default=7)
            region: Mapped[str]
            __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "user"}

        class Admin(User):
            __tablename__ = "admin"
            id: Mapped[int] = mapped_column(sa.ForeignKey("appuser.id"), primary_key=True)
            level: Mapped[int]
            __mapper_args__ = {"polymorphic_identity": "admin"}

        self.User, self.Admin = User, Admin


@pytest.fixture
def models(base: type[DeclarativeBase], engine: sa.Engine) -> Models:
    models = Models(base)
    base.metadata.create_all(engine)
    return models


@pytest.fixture
def session(engine: sa.Engine, clock: Clock) -> Iterator[Session]:
    with versioned_session(sessionmaker(engine), clock=clock)() as session:
        yield session


@pytest.fixture
def admin(models: Models, session: Session) -> Any:
    """An administrator in version 1."""
    admin = models.Admin(id=1, email="old", prefs={"a": [1]}, password="p0", region="eu", level=1)
    session.add(admin)
    session.commit()
    admin.email, admin.level, admin.prefs, admin.password = "new", 2, {"b": 2}, "p1"
    session.commit()
    return admin


def test_revert_to_puts_tracked_values_back_as_a_version(admin: Any, session: Session) -> None:
    """Going back is a change like any other, and leaves alone what history does not hold."""
    admin.revert_to(admin.versions()[0])
    session.commit()
    assert (admin.email, admin.level, admin.prefs, admin.shout) == ("old", 1, {"a": [1]}, "OLD")
    assert (admin.password, admin.version) == ("p1", 2)
    assert [row.email for row in admin.versions()] == ["old", "new"]


def test_what_is_put_back_is_a_copy(admin: Any, session: Session) -> None:
    """A change in place of the live value does not reach into the history row."""
    row = admin.versions()[0]
    admin.revert_to(row)
    admin.prefs["a"].append(2)
    assert row.prefs == {"a": [1]}


def test_revert_to_the_current_values_makes_no_version(admin: Any, session: Session) -> None:
    """Nothing changes, so nothing is written."""
    row = admin.versions()[0]
    admin.revert_to(row)
    session.commit()
    admin.revert_to(row)
    session.commit()
    assert admin.version == 2


def test_revert_to_refuses_what_is_not_the_records_own(admin: Any, models: Models, session: Session) -> None:
    """Another record's history, another kind of thing, a deleted record."""
    other = models.User(id=2, email="x", prefs=None, password="x", region="eu")
    session.add(other)
    session.commit()
    row = admin.versions()[0]
    with pytest.raises(ChrononautException, match="not part of the history"):
        other.revert_to(row)
    with pytest.raises(ChrononautException, match="needs a history row"):
        admin.revert_to(admin)
    birth = session.get_one(history_class(models.Admin), (1, -1))
    with pytest.raises(ChrononautException, match="did not exist"):
        admin.revert_to(birth)
    session.delete(admin)
    session.flush()
    with pytest.raises(ChrononautException, match=r"restore\(\)"):
        admin.revert_to(row)


def test_restore_brings_a_deleted_record_back(admin: Any, models: Models, session: Session) -> None:
    """The record comes back under its key, in the state asked for, and its history goes on."""
    session.delete(admin)
    session.commit()
    last = session.scalars(sa.select(history_class(models.User)).order_by(sa.text("version DESC")).limit(1)).one()
    back = last.restore(password="p2", region="us", email="better")
    session.commit()
    assert type(back) is models.Admin
    assert (back.id, back.level, back.email, back.prefs, back.shout) == (1, 2, "better", {"b": 2}, "BETTER")
    assert (back.password, back.region, back.login_count, back.version) == ("p2", "us", 7, 3)
    assert [row.version for row in back.versions()] == [0, 1]


def test_restore_lists_what_history_does_not_hold(admin: Any, session: Session) -> None:
    """Columns that the row needs and history has not are named, with the reason; those with a default are not."""
    row = admin.versions()[0]
    session.delete(admin)
    session.flush()
    with pytest.raises(ChrononautException, match=r"password \(hidden\), region \(untracked\) of Admin.*region=\.\.\."):
        row.restore()
    with pytest.raises(ChrononautException, match="cannot set id, nonsense, version"):
        row.restore(password="x", region="x", id=3, version=1, nonsense=1)
    assert not session.new


def test_restore_refuses_a_record_that_exists(admin: Any, session: Session) -> None:
    """There is nothing to bring back, unless the deletion is pending."""
    row = admin.versions()[0]
    with pytest.raises(ChrononautException, match="revert_to"):
        row.restore(password="x", region="x")


def test_restore_needs_a_session(admin: Any, session: Session) -> None:
    """A history row in no session cannot bring anything back."""
    row = admin.versions()[0]
    session.expunge(row)
    with pytest.raises(ChrononautException, match="session"):
        row.restore(password="x", region="x")
