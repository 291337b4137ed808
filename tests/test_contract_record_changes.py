"""``RecordChanges``: who changed a live row last, and when."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from chrononaut import append_change_info, history_class, rationale, versioned_session
from chrononaut.unsafe import suppress_versioning
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements
from tests.models import Base, Page, Visit


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


@pytest.fixture
def session_factory(engine: sa.Engine, clock: Clock) -> sessionmaker[Session]:
    """With a clock and a provider."""
    return versioned_session(
        sessionmaker(engine), clock=clock, change_info=lambda: {"user_id": "ann", "remote_addr": None}
    )


def info(extra: str) -> dict[str, Any]:
    return {"user_id": "ann", "remote_addr": None, "extra": {"rationale": extra}}


# --- alone


def test_insert_and_update_set_the_marks(session: Session, clock: Clock) -> None:
    """In the same layout as in history, at the instant of the transaction."""
    visit = Visit(note="a")
    session.add(visit)
    with rationale("first"):
        session.commit()
    assert (visit.change_info, visit.changed) == (info("first"), clock.now)
    clock.advance()
    visit.note = "b"
    with rationale("second"):
        session.commit()
    assert (visit.change_info, visit.changed) == (info("second"), clock.now)


def test_insert_of_one_row_by_parameters_sets_the_marks(session: Session, clock: Clock) -> None:
    """As one of several rows does."""
    with rationale("first"):
        session.execute(sa.insert(Visit), {"id": 1, "note": "a"})
    visit = session.get_one(Visit, 1)
    assert (visit.change_info, visit.changed) == (info("first"), clock.now)


def test_no_change_leaves_the_marks(session: Session, clock: Clock) -> None:
    """Neither an untouched record nor one set to the same value."""
    visit = Visit(note="a")
    session.add(visit)
    session.commit()
    before = clock.now
    clock.advance()
    assert visit.note == "a"
    visit.note = "a"
    session.commit()
    assert visit.changed == before


def test_marks_are_unknown_before_the_first_change(session: Session) -> None:
    """A row that is older than these columns."""
    with suppress_versioning():
        session.execute(sa.text("INSERT INTO visit (id, note) VALUES (1, 'old')"))
    visit = session.get_one(Visit, 1)
    assert (visit.change_info, visit.changed) == (None, None)
    visit.note = "new"
    session.commit()
    assert visit.changed is not None


def test_changed_is_a_column_to_query_by(session: Session, clock: Clock) -> None:
    """Aware datetimes in, aware datetimes out."""
    session.add(Visit(id=1, note="a"))
    session.commit()
    clock.advance()
    session.add(Visit(id=2, note="b"))
    session.commit()
    assert session.scalars(sa.select(Visit.id).where(Visit.changed >= clock.now)).all() == [2]
    changed = session.scalars(sa.select(Visit.changed).order_by(Visit.changed)).all()
    assert changed == [clock.now - timedelta(seconds=1), clock.now]
    assert session.scalars(sa.select(Visit.id).order_by(Visit.changed.desc())).first() == 2


def test_appended_info_is_spent_by_a_mark(session: Session) -> None:
    """As by a version."""
    visit = Visit(note="a")
    append_change_info(visit, why="born")
    session.add(visit)
    session.commit()
    assert visit.change_info is not None
    assert visit.change_info["extra"] == {"why": "born"}
    visit.note = "b"
    session.commit()
    assert "extra" not in visit.change_info


def test_many_records_are_marked_in_batches(session: Session, statements: RecordStatements) -> None:
    """No statement of its own for each of them."""
    visits = [Visit(id=n, note="a") for n in range(50)]
    session.add_all(visits)
    session.commit()
    for visit in session.scalars(sa.select(Visit)):
        visit.note = "b"
    with statements() as log:
        session.flush()
    assert log.verbs == ["UPDATE"]


# --- with Versioned


@pytest.fixture
def page(session: Session) -> Page:
    page = Page(id=1, text="a", draft="d")
    session.add(page)
    with rationale("first"):
        session.commit()
    return page


def test_marks_are_set_whenever_a_version_is_made(session: Session, page: Page, clock: Clock) -> None:
    """Live ``changed`` is what history will call ``began``."""
    assert (page.change_info, page.changed) == (info("first"), clock.now)
    clock.advance()
    page.text = "b"
    with rationale("second"):
        session.commit()
    assert (page.change_info, page.changed) == (info("second"), clock.now)
    page.draft = "e"
    with rationale("third"):
        session.commit()
    assert page.change_info == {**info("third"), "hidden_cols_changed": ["draft"]}
    rows = page.versions()
    assert [row.change_info for row in rows] == [info("second"), page.change_info]
    assert rows[1].began == rows[0].changed


@pytest.mark.parametrize("loaded", [True, False])
def test_what_makes_no_version_leaves_the_marks(session: Session, page: Page, clock: Clock, loaded: bool) -> None:
    """An untracked column, or the same value."""
    before = page.changed if loaded else clock.now
    clock.advance()
    page.views = 3
    page.text = "a"
    session.commit()
    assert (page.changed, page.version, page.versions()) == (before, 0, [])


def test_suppressed_change_leaves_the_marks(session: Session, page: Page, clock: Clock) -> None:
    """What leaves no trace leaves none here either."""
    before = clock.now
    clock.advance()
    with suppress_versioning():
        page.text = "b"
        session.commit()
    assert (page.text, page.changed, page.version, page.change_info) == ("b", before, 0, info("first"))


def test_marks_are_not_copied_into_history(engine: sa.Engine) -> None:
    """History has its own columns of these names, and no others."""
    assert set(Base.metadata.tables["page_history"].c.keys()) == {
        *("id", "text", "version", "began", "changed", "change_info", "operation")
    }


def test_history_says_of_changed_what_it_always_says(session: Session, page: Page, clock: Clock) -> None:
    """When the state ended, not when the live row was marked."""
    born = clock.now
    clock.advance()
    page.text = "b"
    session.commit()
    [row] = page.versions()
    assert (row.began, row.changed, page.changed) == (born, clock.now, clock.now)
    assert isinstance(row, history_class(Page))


def test_marks_follow_the_clamp(session: Session, page: Page, clock: Clock) -> None:
    """A clock that runs backwards does not make them disagree with history."""
    born = clock.now
    clock.advance(-60)
    page.text = "b"
    session.commit()
    [row] = page.versions()
    assert (row.changed, page.changed) == (born, born)


def test_reborn_record_is_marked(session: Session, page: Page, clock: Clock) -> None:
    """Under a key that was used before."""
    session.delete(page)
    session.commit()
    clock.advance()
    again = Page(id=1, text="again")
    session.add(again)
    with rationale("reborn"):
        session.commit()
    assert (again.version, again.changed, again.change_info) == (2, clock.now, info("reborn"))


def test_many_versioned_records_are_marked_in_batches(session: Session, statements: RecordStatements) -> None:
    """One history statement, and the UPDATE."""
    session.add_all([Page(id=n, text="a") for n in range(50)])
    session.commit()
    for page in session.scalars(sa.select(Page)):
        page.text = "b"
    with statements() as log:
        session.flush()
    assert log.verbs == ["INSERT", "UPDATE"]
