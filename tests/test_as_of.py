"""``as_of``: what it shows, what it refuses, and what it leaves alone."""

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)

from chrononaut import (
    ChrononautException,
    HiddenAttributeError,
    RecordChanges,
    UntrackedAttributeError,
    Versioned,
    as_of,
    history_class,
    versioned_session,
)
from chrononaut.exceptions import NaiveDatetimeError, ReadOnlyError
from chrononaut.unsafe import suppress_versioning
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Models:
    """A versioned user with a hidden and an untracked column, its posts, and a table that is not versioned."""

    def __init__(self, base: type[DeclarativeBase]) -> None:
        class Country(base):
            __tablename__ = "country"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]

        class User(Versioned, RecordChanges, base):
            __tablename__ = "appuser"
            __chrononaut_hidden__ = ["password"]
            __chrononaut_untracked__ = ["login_count", "country_id"]
            id: Mapped[int] = mapped_column(primary_key=True)
            email: Mapped[str]
            password: Mapped[str]
            login_count: Mapped[int] = mapped_column(default=0)
            color: Mapped[Color | None]
            note: Mapped[str | None] = mapped_column(deferred=True)
            country_id: Mapped[int | None] = mapped_column(sa.ForeignKey("country.id"))
            country: Mapped[Country | None] = relationship()
            posts: Mapped[list["Post"]] = relationship(back_populates="author", order_by="Post.id")

        class Post(Versioned, base):
            __tablename__ = "post"
            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str]
            author_id: Mapped[int] = mapped_column(sa.ForeignKey("appuser.id"))
            author: Mapped[User] = relationship(back_populates="posts")

        self.Country, self.User, self.Post = Country, User, Post


@pytest.fixture
def models(base: type[DeclarativeBase], engine: sa.Engine) -> Models:
    models = Models(base)
    base.metadata.create_all(engine)
    return models


@pytest.fixture
def session(engine: sa.Engine, clock: Clock) -> Iterator[Session]:
    with versioned_session(sessionmaker(engine), clock=clock, change_info=lambda: {"user_id": "ann"})() as session:
        yield session


@pytest.fixture
def then(models: Models, session: Session, clock: Clock) -> datetime:
    """An instant after which everything has changed."""
    user = models.User(id=1, email="old", password="secret", login_count=3, color=Color.RED, note="n0")
    user.country = models.Country(id=1, name="here")
    user.posts = [models.Post(id=1, title="one"), models.Post(id=2, title="two")]
    session.add(user)
    session.commit()
    then = clock.now
    clock.advance()
    user.email, user.password, user.color, user.note = "new", "secret 2", Color.BLUE, "n1"
    user.login_count = 4
    session.delete(user.posts[0])
    user.posts[1].title = "changed"
    session.commit()
    clock.advance()
    return then


def test_real_instances_come_back_in_their_own_identity_map(models: Models, session: Session, then: datetime) -> None:
    """A record of the past is an instance of the model, and another than the live one, which stays as it is."""
    live = session.get(models.User, 1)
    assert live is not None
    with as_of(session, then) as past:
        user = past.get(models.User, 1)
        assert type(user) is models.User
        assert user is not live
        assert (user.email, user.color, user.version) == ("old", Color.RED, 0)
        assert [post.title for post in user.posts] == ["one", "two"]
        assert user.posts[0].author is user
    assert live.email == "new"


def test_an_instant_may_come_from_a_version(models: Models, session: Session, then: datetime) -> None:
    """The time at which a state ended is the beginning of the next one."""
    live = session.get_one(models.User, 1)
    with as_of(session, live.versions()[0].changed) as past:
        assert past.get_one(models.User, 1).email == "new"


def test_nothing_existed_before_it_was_inserted(models: Models, session: Session, then: datetime) -> None:
    """Before its birth, and after its deletion, a record is absent."""
    with as_of(session, then - timedelta(seconds=1)) as past:
        assert past.get(models.User, 1) is None
        assert past.scalars(sa.select(models.Post)).all() == []
    with as_of(session, then + timedelta(days=1)) as past:
        assert past.scalars(sa.select(models.Post.id)).all() == [2]


@pytest.mark.parametrize("name", ["password", "login_count", "country", "country_id"])
@pytest.mark.parametrize("current", [False, True])
def test_what_history_does_not_hold_raises_its_own_error(
    name: str, current: bool, models: Models, session: Session, then: datetime, clock: Clock
) -> None:
    """Hidden and untracked attributes, and relationships along them, raise for ended and for current states."""
    error = HiddenAttributeError if name == "password" else UntrackedAttributeError
    culprit = "country_id" if name == "country" else name
    with as_of(session, clock.now if current else then) as past:
        user = past.get_one(models.User, 1)
        for _ in range(2):
            with pytest.raises(error, match=f"User.{culprit} is"):
                getattr(user, name)
            past.expire(user)
            assert user.email
        past.refresh(user)
        past.scalars(sa.select(models.Post).options(joinedload(models.Post.author))).all()
        past.scalars(sa.select(models.User).execution_options(populate_existing=True)).all()
        with pytest.raises(error):
            getattr(user, name)
        assert name not in user.__dict__
    with pytest.raises(error):
        getattr(user, name)
    assert getattr(session.get_one(models.User, 1), name)


def test_hidden_values_are_not_selected(models: Models, session: Session, then: datetime, statements: Any) -> None:
    """The value of a hidden column of a live row does not even travel."""
    seen: list[Any] = []
    with as_of(session, then + timedelta(days=1)) as past:
        seen += past.execute(sa.select(sa.literal_column("appuser.password"), models.User.email)).all()
    assert seen == [(None, "new")]


@pytest.mark.parametrize("name", ["password", "login_count"])
def test_a_query_by_what_history_does_not_hold_is_refused(
    name: str, models: Models, session: Session, then: datetime
) -> None:
    """To filter by it, order by it, select it or join along it would find what was not so."""
    User, Post = models.User, models.Post
    column = getattr(User, name)
    error = HiddenAttributeError if name == "password" else UntrackedAttributeError
    aliased = sa.orm.aliased(User)
    for query in (
        sa.select(User).where(column == "x"),
        sa.select(User).order_by(column),
        sa.select(column),
        sa.select(Post).where(Post.author.has(column == "x")),
        sa.select(aliased).where(getattr(aliased, name).is_not(None)),
        sa.select(sa.select(User).subquery().c[name]),
    ):
        with as_of(session, then) as past, pytest.raises(error):
            past.execute(query)
    with as_of(session, then) as past, pytest.raises(UntrackedAttributeError):
        past.execute(sa.select(User).options(joinedload(User.country)))
    with as_of(session, then) as past, pytest.raises(UntrackedAttributeError):
        past.execute(sa.select(User).join(User.country))


def test_a_merge_of_the_past_leaves_hidden_values_alone(
    models: Models, session: Session, then: datetime, clock: Clock
) -> None:
    """Merging a current record out of the past does not overwrite what the past does not know."""
    with as_of(session, clock.now) as past:
        user = past.get_one(models.User, 1)
        past.scalars(sa.select(models.Post).options(joinedload(models.Post.author))).all()
    live = session.merge(user)
    session.commit()
    assert (live.password, live.login_count) == ("secret 2", 4)


def test_record_changes_read_as_they_were(models: Models, session: Session, then: datetime) -> None:
    """``changed`` and ``change_info`` are those of the state, not of the row today."""
    User = models.User
    session.get_one(User, 1).email = "newest"
    session.commit()
    with as_of(session, then) as past:
        user = past.get_one(User, 1)
        assert (user.changed, user.change_info) == (then, {"user_id": "ann", "remote_addr": None})
        assert past.scalars(sa.select(User.id).where(User.changed == then)).all() == [1]


def test_history_is_as_it_was_too(models: Models, session: Session, then: datetime) -> None:
    """A record of the past has only the versions that it had then."""
    session.get_one(models.User, 1).email = "newest"
    session.commit()
    with as_of(session, then) as past:
        assert past.get_one(models.User, 1).versions() == []
    with as_of(session, then + timedelta(seconds=1)) as past:
        assert [row.email for row in past.get_one(models.User, 1).versions()] == ["old"]
        assert past.scalars(sa.select(history_class(models.User).version)).all() == [-1, 0]


def test_unversioned_tables_are_seen_as_they_are_now(models: Models, session: Session, then: datetime) -> None:
    """Tables without history show the present, or are refused by name."""
    session.get_one(models.Country, 1).name = "renamed"
    session.commit()
    with as_of(session, then) as past:
        assert past.scalars(sa.select(models.Country.name)).all() == ["renamed"]
    with as_of(session, then, unversioned="raise") as past:
        assert past.get_one(models.User, 1).versions() == []
        with pytest.raises(ChrononautException, match="country is not versioned"):
            past.scalars(sa.select(models.Country.name))
    with pytest.raises(ChrononautException, match="not 'never'"):
        as_of(session, then, unversioned="never")  # type: ignore[call-overload]


def test_deferred_columns_load_from_the_past(models: Models, session: Session, then: datetime) -> None:
    """A deferred attribute is loaded from the state of then."""
    with as_of(session, then) as past:
        assert past.get_one(models.User, 1).note == "n0"


def test_nothing_can_be_written(models: Models, session: Session, then: datetime) -> None:
    """Neither by DML, nor in a CTE, nor by the unit of work, nor by the bulk methods."""
    User = models.User
    with as_of(session, then) as past:
        for statement in (
            sa.update(User).values(email="x"),
            sa.delete(User),
            sa.insert(User).values(email="x"),
            sa.text("SELECT 1"),
            sa.text("SELECT id FROM appuser").columns(User.id),
            sa.select(sa.text("1 FROM appuser")),
            sa.select(User).from_statement(sa.text("SELECT * FROM appuser")),
            sa.select(sa.insert(User).values(email="x", password="x").returning(User.id).cte("made").c.id),
        ):
            with pytest.raises(ReadOnlyError):
                past.execute(statement)
        with pytest.raises(ReadOnlyError):
            past.query(User).delete()
        with pytest.raises(ReadOnlyError):
            past.connection()
        with pytest.raises(ReadOnlyError):
            past.bulk_insert_mappings(sa.inspect(User), [{"id": 3}])
        user = past.get_one(User, 1)
        user.email = "rewritten"
        with pytest.raises(ReadOnlyError, match=r"\(User\)"):
            past.flush()
        past.rollback()
        assert user.email == "old"
    with pytest.raises(ReadOnlyError), as_of(session, then) as past:  # at the end of the block
        past.add(User(id=9))
    assert session.scalar(sa.select(sa.func.count()).select_from(User)) == 1


def test_fragments_of_text_may_name_the_columns_of_the_query(models: Models, session: Session, then: datetime) -> None:
    """A textual condition over the tables of a query sees the past like the query itself."""
    query = sa.select(models.User.email).where(sa.text("appuser.email = 'old'")).order_by(sa.text("appuser.id"))
    with as_of(session, then) as past:
        assert past.scalars(query).all() == ["old"]


def test_the_outer_transaction_is_used_and_left_alone(
    models: Models, session: Session, then: datetime, clock: Clock
) -> None:
    """What the session has flushed is seen, what is pending is not, and nothing of it is ended."""
    User = models.User
    user = session.get_one(User, 1)
    user.email = "flushed"
    session.flush()
    transaction = session.get_transaction()
    session.add(User(id=2, email="pending", password="x"))
    with as_of(session, clock.now) as past:
        assert past.scalars(sa.select(User.email)).all() == ["flushed"]
        past.commit()
        past.rollback()
        assert past.get_one(User, 1).email == "flushed"
    with as_of(session, then) as past:
        assert past.get_one(User, 1).email == "old"
    assert session.get_transaction() is transaction
    assert len(session.new) == 1
    session.rollback()
    assert session.get_one(User, 1).email == "new"


def test_the_outer_session_may_end_its_transaction_meanwhile(models: Models, session: Session, then: datetime) -> None:
    """A commit of the outer session inside the block does not end the past."""
    with as_of(session, then) as past:
        assert past.get_one(models.User, 1).email == "old"
        session.get_one(models.User, 1).email = "newest"
        session.commit()
        past.expire_all()
        assert past.get_one(models.User, 1).email == "old"
        assert [post.title for post in past.get_one(models.User, 1).posts] == ["one", "two"]


def test_two_instants_at_once(models: Models, session: Session, then: datetime, clock: Clock) -> None:
    """Past sessions of different instants may be open on one connection."""
    with as_of(session, then) as one, as_of(session, clock.now) as other:
        emails = [past.get_one(models.User, 1).email for past in (one, other)]
        assert emails == ["old", "new"]
    assert session.get_one(models.User, 1).email == "new"


def test_engines_connections_and_scoped_sessions(
    models: Models, session: Session, engine: sa.Engine, then: datetime
) -> None:
    """A past of its own is opened on an engine and closed; a connection and its transaction are left as they are."""
    session.close()
    with as_of(engine, then) as past:
        assert past.get_one(models.User, 1).email == "old"
    with engine.connect() as connection:
        connection.begin()
        with as_of(connection, then) as past:
            assert past.get_one(models.User, 1).email == "old"
        assert connection.in_transaction()
    with as_of(scoped_session(sessionmaker(engine)), then) as past:
        assert past.get_one(models.User, 1).email == "old"
    with pytest.raises(ChrononautException, match="not through 'sqlite'"):
        as_of("sqlite", then)  # type: ignore[call-overload]


def test_an_instant_needs_a_zone(session: Session, models: Models) -> None:
    """A naive datetime is refused at once; another zone is the same instant."""
    with pytest.raises(NaiveDatetimeError):
        as_of(session, datetime(2024, 1, 1))


def test_any_zone_will_do(models: Models, session: Session, then: datetime) -> None:
    """An instant is the same in every zone."""
    with as_of(session, then.astimezone(timezone(timedelta(hours=5, minutes=45)))) as past:
        assert past.get_one(models.User, 1).email == "old"


def test_streams_and_legacy_queries(models: Models, session: Session, then: datetime) -> None:
    """``yield_per``, ``Query`` and counts read the past."""
    with as_of(session, then) as past:
        titles = [post.title for post in past.scalars(sa.select(models.Post).order_by(models.Post.id)).yield_per(1)]
        assert titles == ["one", "two"]
        assert past.query(models.Post).filter_by(title="two").count() == 1


def test_rows_older_than_their_versioning_were_always_so(models: Models, session: Session, then: datetime) -> None:
    """A row without a birth row counts as having been in its earliest known state ever since."""
    with suppress_versioning():
        session.add(models.User(id=5, email="ancient", password="x"))
        session.commit()
    long_ago = datetime(1990, 1, 1, tzinfo=timezone.utc)
    with as_of(session, long_ago) as past:
        assert past.scalars(sa.select(models.User.email)).all() == ["ancient"]
    session.get_one(models.User, 5).email = "modern"
    session.commit()
    with as_of(session, long_ago) as past:
        user = past.get_one(models.User, 5)
        assert (user.email, user.changed) == ("ancient", None)


def test_names_that_need_quotes(engine: sa.Engine, base: type[DeclarativeBase], session: Session, clock: Clock) -> None:
    """Tables and columns with capitals, spaces, quotes and percent signs are read as they were."""

    class Odd(Versioned, base):
        __tablename__ = 'Odd "per%cent" table'
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[str] = mapped_column('The "Value" %s')

    base.metadata.create_all(engine)
    odd = Odd(id=1, value="old")
    session.add(odd)
    session.commit()
    then = clock.now
    clock.advance()
    odd.value = "new"
    session.commit()
    with as_of(session, then) as past:
        assert past.scalars(sa.select(Odd.value).where(Odd.value.like("%ol%"))).all() == ["old"]
        assert past.get_one(Odd, 1).value == "old"


@contextmanager
def _schemas(engine: sa.Engine) -> Iterator[None]:
    with engine.begin() as connection:
        for schema in ("one", "two"):
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    yield


# MariaDB's schemas are databases of their own, which the test has not got.
@pytest.mark.backends("sqlite-file", "sqlite-memory", "postgresql")
def test_same_named_tables_of_two_schemas(engine: sa.Engine, base: type[DeclarativeBase], clock: Clock) -> None:
    """Tables in schemas are read as they were, and stay apart; the application's own map of schemas is honoured."""
    sqlite = engine.dialect.name == "sqlite"
    if sqlite:

        @sa.event.listens_for(engine, "connect")
        def _attach(connection: Any, _record: object) -> None:
            connection.execute("ATTACH ':memory:' AS one")
            connection.execute("ATTACH ':memory:' AS two")

        engine.dispose()
    translated = engine.execution_options(schema_translate_map={"first": "one"})

    class One(Versioned, base):
        __tablename__ = "item"
        __table_args__ = {"schema": "first"}
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Two(Versioned, base):
        __tablename__ = "item"
        __table_args__ = {"schema": "two"}
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        one_id: Mapped[int] = mapped_column(sa.ForeignKey("first.item.id"))
        one: Mapped[One] = relationship()

    with _schemas(engine), translated.connect() as connection:
        base.metadata.create_all(connection)
        if not sqlite:
            connection.commit()
        with versioned_session(Session(connection), clock=clock) as session:
            two = Two(id=1, name="two", one=One(id=1, name="one"))
            session.add(two)
            session.commit()
            then = clock.now
            clock.advance()
            two.name, two.one.name = "changed", "changed"
            session.commit()
            for _ in range(2):
                assert session.execute(sa.select(One.name, Two.name).join(Two.one)).one() == ("changed", "changed")
                with as_of(session, then) as past:
                    assert past.execute(sa.select(One.name, Two.name).join(Two.one)).one() == ("one", "two")
                    assert past.get_one(Two, 1).one.name == "one"


def test_native_enums_and_arrays_keep_their_types(
    engine: sa.Engine, base: type[DeclarativeBase], session: Session, clock: Clock
) -> None:
    """Values of types that history holds as text come back, and compare, as their own type."""

    class Thing(Versioned, base):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        color: Mapped[Color]
        colors: Mapped[Any] = mapped_column(
            sa.JSON().with_variant(postgresql.ARRAY(sa.Enum(Color, name="colors")), "postgresql")
        )

    base.metadata.create_all(engine)
    colors: Any = [Color.RED] if engine.dialect.name == "postgresql" else ["RED"]
    thing = Thing(id=1, color=Color.RED, colors=colors)
    session.add(thing)
    session.commit()
    then = clock.now
    clock.advance()
    thing.color = Color.BLUE
    session.commit()
    with as_of(session, then) as past:
        found = past.scalars(sa.select(Thing).where(Thing.color == Color.RED)).one()
        assert (found.color, found.colors) == (Color.RED, colors)


# A database in memory is not there for a second engine.
@pytest.mark.backends("sqlite-file", "postgresql", "mariadb")
def test_async_sessions_and_engines(models: Models, engine: sa.Engine, session: Session, then: datetime) -> None:
    """``async with`` gives an AsyncSession that reads the past, on a session, a connection or an engine."""
    import asyncio

    session.close()
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg", "mariadb": "mariadb+asyncmy"}
    url = engine.url.set(drivername=drivers[engine.dialect.name])

    async def look() -> list[str]:
        async_engine = create_async_engine(url)
        emails = []
        async with AsyncSession(async_engine) as live:
            async with as_of(live, then) as past:
                emails.append((await past.get_one(models.User, 1)).email)
            emails.append((await live.get_one(models.User, 1)).email)
        async with as_of(async_engine, then) as past:
            emails.append((await past.scalars(sa.select(models.User.email))).one())
        async with async_engine.connect() as connection, as_of(connection, then) as past:
            emails.append((await past.scalars(sa.select(models.User.email))).one())
        await async_engine.dispose()
        return emails

    assert asyncio.run(look()) == ["old", "new", "old", "old"]


def test_listeners_go_when_the_past_is_closed(
    models: Models, session: Session, then: datetime, statements: RecordStatements
) -> None:
    """A live query costs and says the same as before, once the block has ended."""
    query = sa.select(models.User.email)
    with statements() as before:
        session.scalars(query).all()
    with as_of(session, then) as past:
        past.scalars(query).all()
    with statements() as after:
        session.scalars(query).all()
    assert [s.sql for s in before] == [s.sql for s in after]
    assert not list(session.connection().dispatch.before_cursor_execute) or "past" not in str(
        list(session.connection().dispatch.before_cursor_execute)
    )
