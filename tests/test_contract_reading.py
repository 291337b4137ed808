"""Reading the history of a record."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Query, Session, sessionmaker

from chrononaut import (
    ChrononautException,
    HiddenAttributeError,
    HistoryRecord,
    UntrackedAttributeError,
    history_class,
    select_versions,
    versioned_session,
)
from chrononaut.unsafe import suppress_versioning
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements
from tests.models import Base, Page, Setting, Team, User

TINY = timedelta(microseconds=1)


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


@pytest.fixture
def session_factory(engine: sa.Engine, clock: Clock) -> sessionmaker[Session]:
    """With a clock."""
    return versioned_session(sessionmaker(engine), clock=clock)


@pytest.fixture
def times(clock: Clock) -> list[datetime]:
    """The instants at which ``user`` was created and changed, one second apart."""
    return [clock.now + timedelta(seconds=n) for n in range(4)]


@pytest.fixture
def user(session: Session, clock: Clock, times: list[datetime]) -> User:
    """Created, and then changed three times: emails a, b, c, d."""
    user = User(id=1, email="a", password="p", login_count=0)
    session.add(user)
    session.commit()
    for email in "bcd":
        clock.advance()
        user.email = email
        session.commit()
    clock.advance()
    return user


def emails(rows: Any) -> list[Any]:
    return [row.email for row in rows]


# --- versions


def test_versions_are_oldest_first(user: User, times: list[datetime]) -> None:
    """All states that have ended, each with when it lived; the birth is not one of them."""
    rows = user.versions()
    assert isinstance(rows, list)
    assert [(row.version, row.email, row.began, row.changed) for row in rows] == [
        (n, email, times[n], times[n + 1]) for n, email in enumerate("abc")
    ]
    assert {row.operation for row in rows} == {"update"}


def test_versions_come_by_version_also_when_times_are_equal(session: Session, user: User) -> None:
    """Time does not order what happened in one transaction."""
    for email in "efgh":
        user.email = email
        session.flush()
    session.commit()
    assert [row.version for row in user.versions()] == list(range(7))
    assert emails(user.versions()) == list("abcdefg")


def test_bounds_of_versions_are_inclusive(user: User, times: list[datetime]) -> None:
    """Both, on the end of the states."""
    assert emails(user.versions(after=times[2])) == ["b", "c"]
    assert emails(user.versions(after=times[2] + TINY)) == ["c"]
    assert emails(user.versions(before=times[2])) == ["a", "b"]
    assert emails(user.versions(before=times[2] - TINY)) == ["a"]
    assert emails(user.versions(before=times[2], after=times[2])) == ["b"]
    assert user.versions(before=times[1], after=times[2]) == []
    assert emails(user.versions(times[2], times[2])) == ["b"]


def test_bounds_may_be_in_any_zone(user: User, times: list[datetime]) -> None:
    """An instant is the same in every zone."""
    assert emails(user.versions(after=times[2].astimezone(ZoneInfo("Asia/Kathmandu")))) == ["b", "c"]


def test_versions_as_a_query(user: User, times: list[datetime]) -> None:
    """To be filtered and paged."""
    query = user.versions(return_query=True)
    assert isinstance(query, Query)
    assert emails(query.all()) == ["a", "b", "c"]
    assert query.count() == 3
    history = history_class(User)
    assert emails(query.filter(history.email != "b")) == ["a", "c"]
    assert emails(query.limit(1).offset(1)) == ["b"]
    assert emails(user.versions(after=times[2], return_query=True)) == ["b", "c"]
    assert emails(user.versions(before=times[2], return_query=True)) == ["a", "b"]


def test_select_versions_is_the_same_for_any_session(
    user: User, session_factory: sessionmaker[Session], times: list[datetime]
) -> None:
    """Run it where you like."""
    with session_factory() as other:
        assert emails(other.scalars(select_versions(user))) == ["a", "b", "c"]
        assert emails(other.scalars(select_versions(user, before=times[2], after=times[2]))) == ["b"]


def test_fresh_record_has_no_versions(session: Session) -> None:
    """Its birth is not a state."""
    user = User(email="a")
    session.add(user)
    session.commit()
    assert user.versions() == []
    assert user.versions(return_query=True).all() == []
    assert session.scalars(select_versions(user)).all() == []
    assert user.previous_version() is None


def test_pending_record_is_flushed_to_be_read(session: Session) -> None:
    """It has no key before, and no history either."""
    user = User(email="a")
    session.add(user)
    assert user.versions() == []
    assert user.id is not None


def test_record_without_a_session_is_refused() -> None:
    """The message says what to do."""
    with pytest.raises(ChrononautException, match="add it to a session"):
        select_versions(User(email="a"))
    with pytest.raises(ChrononautException, match="Add or merge it"):
        User(email="a").versions()


def test_unversioned_model_has_no_history_class() -> None:
    """The message says why."""
    with pytest.raises(ChrononautException, match=r"Team.*Versioned"):
        history_class(Team)


# --- version_at


def test_version_at_an_instant(user: User, times: list[datetime]) -> None:
    """From when a state began, inclusive, to when it ended, exclusive."""
    for n, email in enumerate("abc"):
        for at in (times[n], times[n] + TINY, times[n + 1] - TINY):
            row = user.version_at(at)
            assert isinstance(row, HistoryRecord)
            assert row.email == email


def test_version_at_now_is_the_record_itself(user: User, times: list[datetime], clock: Clock) -> None:
    """From the last change on."""
    for at in (times[3], clock.now, clock.now + timedelta(days=1000)):
        assert user.version_at(at) is user
    assert user.version_at(times[3] - TINY) is not user


def test_version_at_an_instant_before_the_record_was(user: User, times: list[datetime]) -> None:
    """There was none."""
    assert user.version_at(times[0] - TINY) is None
    assert user.version_at(times[0] - timedelta(days=1)) is None


@pytest.mark.parametrize("erased", [range(0), range(0, 100, 3), range(40, 100), range(20, 75)])
def test_version_at_of_a_record_with_many_versions(
    session: Session, clock: Clock, statements: RecordStatements, erased: range
) -> None:
    """Each instant finds its state by one statement, whatever of the history was erased."""
    setting = Setting(name="x", value="0")
    session.add(setting)
    born = clock.now
    session.commit()
    ends: list[datetime] = []
    for number in range(1, 81):
        clock.advance()
        setting.value = str(number)
        session.commit()
        ends.append(clock.now)
    history = history_class(Setting)
    with suppress_versioning(allow_deleting_history=True):
        session.execute(sa.delete(history).where(history.version.in_(list(erased))))
    session.commit()
    assert setting.version == 80
    for number, ended in enumerate(ends):
        began = ends[number - 1] if number else born
        for at in (began, ended - TINY):
            with statements() as log:
                row = setting.version_at(at)
            assert log.verbs == ["SELECT"]
            is_after_all = not [each for each in range(number, 80) if each not in erased]
            assert row is not None or number in erased
            if number not in erased:
                assert row is not None
                assert row.value == str(number)
            elif is_after_all:
                assert row is setting
    assert setting.version_at(ends[-1]) is setting
    assert setting.version_at(born - TINY) is None


def test_version_at_of_a_fresh_record(session: Session, clock: Clock) -> None:
    """Its birth tells when it began."""
    user = User(email="a")
    session.add(user)
    session.commit()
    assert user.version_at(clock.now) is user
    assert user.version_at(clock.now - TINY) is None


def test_version_at_in_a_gap_between_two_lives(session: Session, clock: Clock) -> None:
    """A key that was used before: the former life, nothing, and the present one."""
    born = clock.now
    setting = Setting(name="x", value="first")
    session.add(setting)
    session.commit()
    died = clock.advance()
    session.delete(setting)
    session.commit()
    reborn = clock.advance()
    setting = Setting(name="x", value="second")
    session.add(setting)
    session.commit()
    first = setting.version_at(born)
    assert first is not None
    assert first.value == "first"
    assert setting.version_at(died - TINY) is first
    assert setting.version_at(died) is None
    assert setting.version_at(reborn - TINY) is None
    assert setting.version_at(reborn) is setting
    assert [(row.version, row.value, row.operation) for row in setting.versions()] == [(0, "first", "delete")]
    assert setting.version == 2


def test_row_older_than_its_versioning_has_always_been(session: Session, clock: Clock) -> None:
    """No birth is known, so the earliest known state reaches back."""
    with suppress_versioning():
        session.execute(sa.text("INSERT INTO appuser (id, email, login_count) VALUES (9, 'old', 0)"))
    session.commit()
    user = session.get_one(User, 9)
    past = clock.now - timedelta(days=10_000)
    assert user.version == 0
    assert user.version_at(past) is user
    user.email = "new"
    session.commit()
    [row] = user.versions()
    assert (row.version, row.began, row.email) == (0, None, "old")
    assert user.version_at(past) is row
    assert user.version_at(clock.now) is user


def test_state_inside_a_transaction_is_never_seen(session: Session, user: User, clock: Clock) -> None:
    """It began and ended at one instant."""
    user.email = "e"
    session.flush()
    user.email = "f"
    session.commit()
    assert [(row.email, row.began == row.changed) for row in user.versions()][-1] == ("e", True)
    assert user.version_at(clock.now) is user
    before = user.version_at(clock.now - TINY)
    assert before is not None
    assert before.email == "d"


def test_version_at_of_a_deleted_record(session: Session, user: User, times: list[datetime], clock: Clock) -> None:
    """As long as its session knows it: what it was, and that it is no more."""
    session.delete(user)
    session.flush()
    assert user.version_at(clock.now) is None
    row = user.version_at(times[3])
    assert row is not None
    assert row is not user
    assert row.email == "d"


# --- previous_version, has_changed_since


def test_previous_version_is_the_latest_ended_state(session: Session, user: User) -> None:
    """However many there are."""
    row = user.previous_version()
    assert row is not None
    assert (row.version, row.email) == (2, "c")


def test_has_changed_since(user: User, times: list[datetime]) -> None:
    """A change at just that instant has happened already."""
    assert user.has_changed_since(times[0] - TINY)
    assert user.has_changed_since(times[2])
    assert user.has_changed_since(times[3] - TINY)
    assert not user.has_changed_since(times[3])


def test_has_changed_since_before_it_was_created(session: Session, clock: Clock) -> None:
    """Being created is a change."""
    user = User(email="a")
    session.add(user)
    session.commit()
    assert user.has_changed_since(clock.now - TINY)
    assert not user.has_changed_since(clock.now)


# --- naive points in time


@pytest.mark.parametrize(
    "ask",
    [
        lambda user, at: user.versions(before=at),
        lambda user, at: user.versions(after=at),
        lambda user, at: user.versions(after=at, return_query=True),
        lambda user, at: select_versions(user, before=at),
        lambda user, at: select_versions(user, after=at),
        lambda user, at: user.version_at(at),
        lambda user, at: user.has_changed_since(at),
    ],
)
def test_naive_datetime_is_refused(user: User, ask: Any) -> None:
    """A point in time needs a zone; the error is a ``ValueError`` too, and names the argument."""
    with pytest.raises(ChrononautException, match=r"^(before|after|at|since) is a naive") as caught:
        ask(user, datetime(2024, 1, 1))
    assert isinstance(caught.value, ValueError)


def test_naive_datetime_in_a_query_of_history_is_refused(session: Session, user: User) -> None:
    """Also where it is compared with a column."""
    history = history_class(User)
    with pytest.raises(Exception, match="naive"):
        session.scalars(sa.select(history).where(history.changed > datetime(2024, 1, 1))).all()


# --- diff


def test_diff_to_the_present(user: User) -> None:
    """What differs, from and to, of tracked attributes only."""
    first, second, _ = user.versions()
    assert user.diff(first) == {"email": ("a", "d")}
    assert user.diff(second, to=user) == {"email": ("b", "d")}


def test_diff_between_two_rows(user: User) -> None:
    """Up to a later one; to itself nothing differs."""
    first, second, _ = user.versions()
    assert user.diff(first, to=second) == {"email": ("a", "b")}
    assert user.diff(first, to=first) == {}


def test_diff_includes_what_is_not_flushed(user: User) -> None:
    """The present is the object."""
    [*_, last] = user.versions()
    user.name = "new"
    assert user.diff(last) == {"email": ("c", "d"), "name": (None, "new")}


def test_diff_back_in_time_is_refused(user: User) -> None:
    """The message says to swap them."""
    first, second, _ = user.versions()
    with pytest.raises(ChrononautException, match="swap"):
        user.diff(second, to=first)


def test_diff_from_what_is_no_history_row_is_refused(session: Session, user: User) -> None:
    """Neither the record itself nor anything else."""
    first, *_ = user.versions()
    for wrong in (user, User(email="x"), "a", None):
        with pytest.raises(ChrononautException, match="history row"):
            user.diff(wrong)  # type: ignore[arg-type]
    with pytest.raises(ChrononautException, match="history row"):
        user.diff(first, to=User(email="x"))


def test_diff_with_another_records_history_is_refused(session: Session, user: User) -> None:
    """Of another record, or of another model."""
    other = User(id=2, email="x")
    page = Page(id=1, text="x")
    session.add_all([other, page])
    session.commit()
    other.email = "y"
    page.text = "y"
    session.commit()
    [row], [page_row] = other.versions(), page.versions()
    first, *_ = user.versions()
    for wrong in (row, page_row):
        with pytest.raises(ChrononautException, match="not part of the history"):
            user.diff(wrong)  # type: ignore[arg-type]
        with pytest.raises(ChrononautException, match="not part of the history"):
            user.diff(first, to=wrong)  # type: ignore[arg-type]


def test_diff_with_hidden_columns(session: Session, user: User) -> None:
    """What they hold now, where they changed in between; what they held is nowhere."""
    user.password = "q"
    session.commit()
    user.email = "e"
    session.commit()
    rows = user.versions()
    assert user.diff(rows[0]) == {"email": ("a", "e")}
    assert user.diff(rows[0], include_hidden=True) == {"email": ("a", "e"), "password": (None, "q")}
    assert user.diff(rows[3], include_hidden=True) == {"email": ("d", "e"), "password": (None, "q")}
    assert user.diff(rows[4], include_hidden=True) == {"email": ("d", "e")}
    assert user.diff(rows[0], to=rows[3], include_hidden=True) == {"email": ("a", "d")}
    assert user.diff(rows[3], to=rows[4], include_hidden=True) == {"password": (None, None)}


# --- history rows


def test_hidden_and_untracked_attributes_have_their_own_errors(user: User) -> None:
    """On the row and on the class; both are ``AttributeError`` too and name the attribute."""
    row = user.previous_version()
    for target in (row, history_class(User)):
        with pytest.raises(HiddenAttributeError, match=r"User\.password"):
            getattr(target, "password")  # noqa: B009
        with pytest.raises(UntrackedAttributeError, match=r"User\.login_count"):
            getattr(target, "login_count")  # noqa: B009
        assert not hasattr(target, "password")
        assert getattr(target, "login_count", "default") == "default"


def test_name_that_was_never_there_is_an_ordinary_attribute_error(user: User) -> None:
    """Nothing of ours."""
    with pytest.raises(AttributeError) as caught:
        _ = user.previous_version().nothing  # type: ignore[union-attr]
    assert not isinstance(caught.value, ChrononautException)


def test_history_class_is_queried_like_any_other(session: Session, user: User, times: list[datetime]) -> None:
    """Ordinary SQLAlchemy, with ordinary columns."""
    history = history_class(User)
    assert history is history_class(User)
    assert history.__name__ == "UserHistory"
    query = sa.select(history).where(history.email.in_(["a", "c"]), history.changed >= times[1])
    assert emails(session.scalars(query.order_by(history.version.desc()))) == ["c", "a"]
    assert session.scalar(sa.select(sa.func.count()).select_from(history)) == 4  # the birth is a row too
    assert session.scalar(sa.select(sa.func.max(history.changed))) == times[3]
    assert session.get(history, (1, 0)) is user.versions()[0]


def test_times_are_aware_and_in_utc_with_microseconds(session: Session, clock: Clock) -> None:
    """On every backend."""
    clock.now = clock.now.replace(microsecond=123_457)
    user = User(email="a")
    session.add(user)
    session.commit()
    clock.advance()
    user.email = "b"
    session.commit()
    [row] = user.versions()
    for value, expected in ((row.began, clock.now - timedelta(seconds=1)), (row.changed, clock.now)):
        assert value == expected
        assert value is not None
        assert value.utcoffset() == timedelta(0)
        assert value.microsecond == 123_457


# --- what it costs

READS: dict[str, Any] = {
    "versions": lambda session, user, at: user.versions(before=at, after=at),
    "return_query": lambda session, user, at: user.versions(return_query=True).all(),
    "select_versions": lambda session, user, at: session.scalars(select_versions(user, after=at)).all(),
    "version_at": lambda session, user, at: user.version_at(at),
    "previous_version": lambda session, user, at: user.previous_version(),
    "has_changed_since": lambda session, user, at: user.has_changed_since(at),
}


@pytest.mark.parametrize("read", sorted(READS))
def test_each_question_is_one_indexed_query(
    session: Session, user: User, statements: RecordStatements, times: list[datetime], read: str, engine: sa.Engine
) -> None:
    """One SELECT, which finds the record by the history table's primary key."""
    assert user.email == "d"
    with statements() as log:
        READS[read](session, user, times[2])
    assert log.verbs == ["SELECT"]
    if engine.dialect.name == "sqlite":
        plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {log[0].sql}", log[0].parameters).all()
        details = [row[-1] for row in plan if "appuser_history" in row[-1]]
        assert details
        assert all("SEARCH appuser_history USING INDEX" in detail and "(id=?" in detail for detail in details)
        assert not any("TEMP B-TREE" in row[-1] for row in plan)


@pytest.mark.parametrize("read", ["version_at", "previous_version"])
def test_one_state_is_read_alone(
    session: Session, user: User, statements: RecordStatements, times: list[datetime], read: str
) -> None:
    """Whoever asks for one state does not load the others."""
    loaded: list[object] = []
    event.listen(session, "loaded_as_persistent", lambda _session, obj: loaded.append(obj))
    assert user.email == "d"
    READS[read](session, user, times[1])
    assert len(loaded) == 1


def test_diff_reads_nothing_but_hidden_changes(session: Session, user: User, statements: RecordStatements) -> None:
    """What is loaded is compared; the names of hidden changes are one query."""
    first, *_ = user.versions()
    user.diff(first)
    with statements() as log:
        user.diff(first)
    assert log.verbs == []
    with statements() as log:
        user.diff(first, include_hidden=True)
    assert log.verbs == ["SELECT"]
