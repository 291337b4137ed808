"""``adopt_records`` gives records that are older than their versioning a birth."""

from datetime import date, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from chrononaut import ChrononautException, Versioned, history_class
from chrononaut.adopt import adopt_records
from chrononaut.exceptions import NaiveDatetimeError
from chrononaut.unsafe import suppress_versioning
from chrononaut.verify import verify_history
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements

INFO = {"user_id": "legacy", "remote_addr": None}
LONG_AGO = datetime(2020, 1, 1, tzinfo=timezone.utc)
BEFORE_THAT = LONG_AGO - timedelta(days=1)


@pytest.fixture
def library(base: type[DeclarativeBase], engine: sa.Engine, session_factory: sessionmaker[Session]) -> Any:
    """Books and novels that were there before their versioning."""

    class Library:
        class Book(Versioned, base):
            __tablename__ = "book"
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str] = mapped_column(sa.String(10))
            title: Mapped[str] = mapped_column(sa.String(30))
            bought: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
            local: Mapped[datetime | None]
            day: Mapped[date | None]
            __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "book"}

        class Untold(Versioned, base):
            __tablename__ = "untold"
            __chrononaut_track_inserts__ = False
            id: Mapped[int] = mapped_column(primary_key=True)

        class Loan(Versioned, base):
            __tablename__ = "loan"
            book_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
            reader: Mapped[str] = mapped_column(sa.String(10), primary_key=True)

    class Novel(Library.Book):
        __tablename__ = "novel"
        id: Mapped[int] = mapped_column(sa.ForeignKey("book.id"), primary_key=True)
        hero: Mapped[str] = mapped_column(sa.String(30))
        __mapper_args__ = {"polymorphic_identity": "novel"}

    base.metadata.create_all(engine)
    with session_factory() as session, suppress_versioning():
        for number in range(1, 6):
            at = LONG_AGO + timedelta(hours=number)
            given = {"bought": at, "local": at.replace(tzinfo=None), "day": date(2020, 1, number)}
            session.add(Library.Book(id=number, title="b", **given))
            session.add(Novel(id=number + 10, title="n", hero="h", **given))
            session.add(Library.Loan(book_id=number, reader="r"))
        session.add(Library.Untold(id=1))
        session.commit()
    Library.Novel = Novel  # type: ignore[attr-defined]  # a subclass cannot be declared beside its base
    return Library


def _assert_whole(engine: sa.Engine, base: Any) -> None:
    with engine.connect() as connection:
        assert list(verify_history(connection, base.metadata)) == []


@pytest.mark.parametrize("chunk_size", [1, 3, 5_000])
def test_adopted_records_are_born_at_the_instant(
    engine: sa.Engine, base: Any, library: Any, session_factory: sessionmaker[Session], chunk_size: int
) -> None:
    """They did not exist before it, and subclass records have their part; a second run writes nothing."""
    told: list[Any] = []
    number = adopt_records(
        engine, base.metadata, INFO, LONG_AGO, chunk_size=chunk_size, progress=lambda *each: told.append(each)
    )
    assert number == 15
    assert ("book", 10, 10) in told
    assert told[-1] == ("loan", 5, 5)
    assert adopt_records(engine, base.metadata, INFO, LONG_AGO) == 0
    _assert_whole(engine, base)
    with session_factory() as session:
        novel = session.get_one(library.Novel, 11)
        assert novel.version_at(BEFORE_THAT) is None
        assert novel.version_at(LONG_AGO) is novel
        assert novel.versions() == []
        [birth] = session.scalars(sa.select(history_class(library.Novel)).where(sa.text("novel_history.id = 11")))
        assert (birth.version, birth.operation, birth.change_info) == (-1, "insert", INFO)
        novel.hero = "other"
        session.commit()
        [row] = novel.versions()
        assert (row.hero, row.began) == ("h", LONG_AGO)
    _assert_whole(engine, base)


@pytest.mark.parametrize(("column", "expected"), [("bought", 1), ("local", 1), ("day", 0)])
def test_each_record_is_born_when_its_column_says(
    engine: sa.Engine, base: Any, library: Any, session_factory: sessionmaker[Session], column: str, expected: int
) -> None:
    """A time without a zone is UTC, a day begins at midnight, and a record without either is left alone."""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE book SET {column} = NULL WHERE id = 2")
    assert adopt_records(engine, base.metadata, INFO, column) == 9
    _assert_whole(engine, base)
    with session_factory() as session:
        book = session.get_one(library.Book, 1)
        born = LONG_AGO + timedelta(hours=expected)
        assert book.version_at(born) is book
        assert book.version_at(born - timedelta(microseconds=1)) is None
        assert session.get_one(library.Book, 2).version_at(BEFORE_THAT) is session.get_one(library.Book, 2)


def test_records_with_a_history_stay_as_they_are(
    engine: sa.Engine, base: Any, library: Any, session_factory: sessionmaker[Session]
) -> None:
    """Their first state has no known beginning, and history is never rewritten."""
    with session_factory() as session:
        session.get_one(library.Book, 1).title = "changed"
        session.add(library.Book(id=100, title="born under versioning"))
        session.commit()
    assert adopt_records(engine, base.metadata, INFO, LONG_AGO, tables=["book"]) == 9
    _assert_whole(engine, base)
    with session_factory() as session:
        [row] = session.get_one(library.Book, 1).versions()
        assert row.began is None


def test_an_interrupted_run_goes_on_where_it_stopped(engine: sa.Engine, base: Any, library: Any) -> None:
    """Every chunk is a transaction of its own."""

    class StopError(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done == 6:
            raise StopError

    with pytest.raises(StopError):
        adopt_records(engine, base.metadata, INFO, LONG_AGO, tables=["book"], chunk_size=2, progress=stop)
    assert adopt_records(engine, base.metadata, INFO, LONG_AGO, tables=["book"], chunk_size=2) == 4
    _assert_whole(engine, base)


def test_a_chunk_costs_three_statements(
    engine: sa.Engine, base: Any, library: Any, statements: RecordStatements
) -> None:
    """One finds the keys, one writes the births, and one more each subclass table."""
    with statements() as log:
        adopt_records(engine, base.metadata, INFO, LONG_AGO, tables=["book"])
    assert len(log.matching("INSERT INTO")) == 2
    assert log.verbs == ["SELECT", "SELECT", "INSERT", "INSERT", "SELECT"]


def test_what_cannot_be_adopted_is_refused(engine: sa.Engine, base: Any, library: Any) -> None:
    """The message says why."""
    with pytest.raises(ChrononautException, match=r"nothing is no versioned table. There are: book, loan, untold"):
        adopt_records(engine, base.metadata, INFO, LONG_AGO, tables=["nothing"])
    with pytest.raises(ChrononautException, match="loan has no column 'bought'"):
        adopt_records(engine, base.metadata, INFO, "bought", tables=["loan"])
    with pytest.raises(ChrononautException, match="Untold does not record births"):
        adopt_records(engine, base.metadata, INFO, LONG_AGO, tables=["untold"])
    with pytest.raises(NaiveDatetimeError):
        adopt_records(engine, base.metadata, INFO, datetime(2020, 1, 1))


def test_adopting_beside_a_writer_leaves_history_whole(
    engine: sa.Engine, base: Any, library: Any, session_factory: sessionmaker[Session], clock: Clock
) -> None:
    """A record that changes between two chunks keeps the history that it has got."""

    def write(what: str, done: int, total: int) -> None:
        if what == "book" and done == 2:
            with session_factory() as session:
                for book in session.scalars(sa.select(library.Book)):
                    book.title = "meanwhile"
                session.commit()

    assert adopt_records(engine, base.metadata, INFO, LONG_AGO, chunk_size=2, progress=write) == 7
    _assert_whole(engine, base)
