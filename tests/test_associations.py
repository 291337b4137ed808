"""Many-to-many tables with a history."""

from datetime import timezone
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from chrononaut import (
    ChrononautException,
    UntrackedStatementError,
    Versioned,
    extra_change_info,
    versioned_session,
    versioned_table,
)
from chrononaut.exceptions import ReadOnlyError
from chrononaut.unsafe import suppress_versioning
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements


class Models:
    """Users and groups, and the table between them."""

    def __init__(self, base: type[DeclarativeBase], *columns: Any, own_key: bool = False) -> None:
        keys = [sa.Column("id", sa.Integer, primary_key=True)] if own_key else []
        self.table = versioned_table(
            sa.Table(
                "membership",
                base.metadata,
                *keys,
                sa.Column("user_id", sa.ForeignKey("appuser.id"), primary_key=not own_key),
                sa.Column("group_id", sa.ForeignKey("appgroup.id"), primary_key=not own_key),
                *columns,
            )
        )
        self.history = base.metadata.tables["membership_history"]

        class User(base):
            __tablename__ = "appuser"
            id: Mapped[int] = mapped_column(primary_key=True)
            groups = relationship("Group", secondary=self.table, back_populates="users", order_by="Group.id")

        class Group(Versioned, base):
            __tablename__ = "appgroup"
            id: Mapped[int] = mapped_column(primary_key=True)
            users = relationship("User", secondary=self.table, back_populates="groups")

        self.User: Any = User
        self.Group: Any = Group

    def life(self, session: Session) -> list[tuple[Any, ...]]:
        """All rows of history, by key."""
        c = self.history.c
        query = sa.select(c.user_id, c.group_id, c.version, c.operation).order_by(c.group_id, c.version)
        return [tuple(row) for row in session.execute(query)]


@pytest.fixture
def models(base: type[DeclarativeBase], engine: sa.Engine, session: Session) -> Models:
    models = Models(base)
    base.metadata.create_all(engine)
    session.add_all([models.User(id=1), *(models.Group(id=n) for n in range(1, 5))])
    session.commit()
    return models


def groups(session: Session, models: Models, *keys: int) -> list[Any]:
    return [session.get_one(models.Group, key) for key in keys]


def test_adding_and_removing(models: Models, session: Session) -> None:
    """Each pair that is added is born, and each that is removed ends its history."""
    user = session.get_one(models.User, 1)
    user.groups = groups(session, models, 1, 2)
    session.commit()
    assert models.life(session) == [(1, 1, -1, "insert"), (1, 2, -1, "insert")]
    user.groups.remove(user.groups[0])
    session.commit()
    assert models.life(session) == [(1, 1, -1, "insert"), (1, 1, 0, "delete"), (1, 2, -1, "insert")]
    assert [group.id for group in user.groups] == [2]
    assert session.scalars(sa.select(models.table.c.version)).all() == [0]


def test_replacing_the_whole_collection(models: Models, session: Session, statements: RecordStatements) -> None:
    """Replacing a collection captures what goes by one statement and what comes by another."""
    user = session.get_one(models.User, 1)
    user.groups = groups(session, models, 1, 2)
    session.commit()
    assert len(user.groups) == 2
    user.groups = groups(session, models, 3, 4)
    with statements() as log:
        session.flush()
    assert len(log.matching("INSERT INTO membership_history")) == 2
    session.commit()
    assert models.life(session) == [
        (1, 1, -1, "insert"),
        (1, 1, 0, "delete"),
        (1, 2, -1, "insert"),
        (1, 2, 0, "delete"),
        (1, 3, -1, "insert"),
        (1, 4, -1, "insert"),
    ]


def test_removing_and_adding_again(models: Models, session: Session) -> None:
    """A pair that comes again goes on where its history ended, within one transaction too."""
    user = session.get_one(models.User, 1)
    user.groups = groups(session, models, 1)
    session.commit()
    user.groups = []
    session.flush()
    user.groups = groups(session, models, 1)
    session.commit()
    assert models.life(session) == [(1, 1, -1, "insert"), (1, 1, 0, "delete"), (1, 1, 1, "insert")]
    assert session.scalars(sa.select(models.table.c.version)).all() == [2]
    user.groups = []
    session.commit()
    assert models.life(session)[3:] == [(1, 1, 2, "delete")]
    user.groups = groups(session, models, 1)
    user.groups = []
    session.commit()
    assert len(models.life(session)) == 4


def test_states_are_contiguous(models: Models, session_factory: sessionmaker[Session], clock: Clock) -> None:
    """Each state begins when the one before it ended, and all of a transaction share one instant."""
    versioned_session(session_factory, clock=clock)
    times = []
    with session_factory() as session:
        user = session.get_one(models.User, 1)
        for wanted in ([1], [], [1], [], [1, 2]):
            times.append(clock.advance())
            user.groups = groups(session, models, *wanted)
            session.commit()
        c = models.history.c
        rows = session.execute(sa.select(c.began, c.changed).where(c.group_id == 1).order_by(c.version)).all()
    utc = [(row.began and _utc(row.began), _utc(row.changed)) for row in rows]
    assert utc == [(None, times[0]), *pairwise(times)]


def _utc(value: Any) -> Any:
    return value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc)


def test_change_info_of_pairs(models: Models, engine: sa.Engine) -> None:
    """Who and why is recorded as for records; the provider is asked once for each flush."""
    asked = []

    def provider() -> dict[str, Any]:
        asked.append(1)
        return {"user_id": "ada"}

    with versioned_session(sessionmaker(engine), change_info=provider)() as session:
        user = session.get_one(models.User, 1)
        with extra_change_info(ticket=7):
            user.groups = groups(session, models, 1, 2)
            session.commit()
        infos = session.scalars(sa.select(models.history.c.change_info)).all()
    assert infos == [{"user_id": "ada", "remote_addr": None, "extra": {"ticket": 7}}] * 2
    assert len(asked) == 1


def test_deleting_a_parent_removes_its_pairs(models: Models, session: Session) -> None:
    """Deleting a record whose pairs the unit of work removes ends their history."""
    user = session.get_one(models.User, 1)
    user.groups = groups(session, models, 1, 2)
    session.commit()
    session.delete(session.get_one(models.Group, 1))
    session.commit()
    session.delete(user)
    session.commit()
    assert [row for row in models.life(session) if row[3] == "delete"] == [(1, 1, 0, "delete"), (1, 2, 0, "delete")]


def test_rollback_takes_the_history_along(models: Models, session: Session) -> None:
    """What is rolled back, wholly or to a savepoint, leaves no history."""
    user = session.get_one(models.User, 1)
    with session.begin_nested() as savepoint:
        user.groups = groups(session, models, 1)
        session.flush()
        savepoint.rollback()
    user.groups = groups(session, models, 2)
    session.commit()
    assert models.life(session) == [(1, 2, -1, "insert")]
    user.groups = []
    session.flush()
    session.rollback()
    assert models.life(session) == [(1, 2, -1, "insert")]


def test_statements_are_captured_too(models: Models, session: Session) -> None:
    """INSERT and DELETE of rows by statements are recorded, whatever their form."""
    table = models.table
    session.execute(sa.insert(table), [{"user_id": 1, "group_id": n} for n in (1, 2)])
    session.execute(sa.insert(table).values(user_id=1, group_id=3))
    four = sa.select(sa.literal(1), models.Group.id).where(models.Group.id == 4)
    session.execute(sa.insert(table).from_select(["user_id", "group_id"], four))
    session.connection().execute(sa.delete(table).where(table.c.group_id < 3))
    session.commit()
    session.execute(sa.delete(table))
    session.execute(sa.insert(table).values([{"user_id": 1, "group_id": 1}, {"user_id": 1, "group_id": 2}]))
    session.commit()
    assert models.life(session) == [
        (1, 1, -1, "insert"),
        (1, 1, 0, "delete"),
        (1, 1, 1, "insert"),
        (1, 2, -1, "insert"),
        (1, 2, 0, "delete"),
        (1, 2, 1, "insert"),
        (1, 3, -1, "insert"),
        (1, 3, 0, "delete"),
        (1, 4, -1, "insert"),
        (1, 4, 0, "delete"),
    ]
    assert session.scalars(sa.select(table.c.version)).all() == [2, 2]


def test_only_what_a_statement_matches_is_captured(models: Models, session: Session) -> None:
    """A DELETE with a parameter for each part of the key, but another condition than a removal's, ends what it says."""
    table = models.table
    user: Any = sa.bindparam("user_id")
    session.execute(sa.insert(table), [{"user_id": 1, "group_id": n} for n in (1, 2, 3)])
    either = sa.or_(table.c.user_id == user, table.c.group_id == sa.bindparam("group_id"))
    session.execute(sa.delete(table).where(either), [{"user_id": 9, "group_id": 3}])
    other = sa.and_(table.c.user_id == user, table.c.group_id != sa.bindparam("group_id"))
    session.execute(sa.delete(table).where(other), [{"user_id": 1, "group_id": 2}])
    session.commit()
    assert [row for row in models.life(session) if row[3] == "delete"] == [(1, 1, 0, "delete"), (1, 3, 0, "delete")]


def test_a_failed_insert_leaves_no_birth(models: Models, session: Session) -> None:
    """A pair that was there already is neither added nor born again."""
    session.execute(sa.insert(models.table), {"user_id": 1, "group_id": 1})
    session.commit()
    with pytest.raises(sa.exc.IntegrityError), session.begin_nested():
        session.execute(sa.insert(models.table), [{"user_id": 1, "group_id": 2}, {"user_id": 1, "group_id": 1}])
    session.commit()
    assert models.life(session) == [(1, 1, -1, "insert")]


@pytest.mark.backends("sqlite-file", "sqlite-memory", "postgresql")  # which know ON CONFLICT
def test_inserts_that_pass_over_rows(models: Models, session: Session) -> None:
    """ON CONFLICT DO NOTHING gives birth to the new rows only; DO UPDATE is refused."""
    from sqlalchemy.dialects import postgresql, sqlite

    insert: Any = (postgresql if session.get_bind().dialect.name == "postgresql" else sqlite).insert
    session.execute(sa.insert(models.table), {"user_id": 1, "group_id": 1})
    rows = [{"user_id": 1, "group_id": 1}, {"user_id": 1, "group_id": 2}]
    session.execute(insert(models.table).on_conflict_do_nothing(), rows)
    assert models.life(session) == [(1, 1, -1, "insert"), (1, 2, -1, "insert")]
    overwrite = insert(models.table).on_conflict_do_update(index_elements=["user_id", "group_id"], set_={"group_id": 9})
    with pytest.raises(UntrackedStatementError, match="overwrites"):
        session.execute(overwrite, rows)


def test_suppressed_pairs_leave_no_history(models: Models, session: Session) -> None:
    """Inside suppress_versioning nothing is recorded, and a key that comes again still goes on."""
    user = session.get_one(models.User, 1)
    user.groups = groups(session, models, 1)
    session.commit()
    with suppress_versioning():
        user.groups = []
        session.commit()
        user.groups = groups(session, models, 1)
        session.commit()
    assert models.life(session) == [(1, 1, -1, "insert")]
    user.groups = []
    session.commit()
    assert models.life(session) == [(1, 1, -1, "insert"), (1, 1, 0, "delete")]


def test_extra_columns(base: type[DeclarativeBase], engine: sa.Engine, session: Session) -> None:
    """Further columns of the table are in its history, with their defaults, and an UPDATE of them is a version."""
    models = Models(base, sa.Column("role", sa.String(10), server_default="member"), sa.Column("rank", sa.Integer))
    base.metadata.create_all(engine)
    session.add_all([models.User(id=1, groups=[models.Group(id=1), models.Group(id=2)])])
    session.commit()
    table, history = models.table, models.history
    session.execute(sa.update(table).where(table.c.group_id == 1).values(role="boss", rank=1))
    session.commit()
    session.get_one(models.User, 1).groups = []
    session.commit()
    c = history.c
    rows = session.execute(
        sa.select(c.group_id, c.version, c.operation, c.role, c.rank)
        .where(c.operation != "insert")
        .order_by(c.group_id, c.version)
    ).all()
    assert [tuple(row) for row in rows] == [
        (1, 0, "update", "member", None),
        (1, 1, "delete", "boss", 1),
        (2, 0, "delete", "member", None),
    ]


def test_keys_cannot_be_changed_in_place(models: Models, session: Session) -> None:
    """An UPDATE of a key is refused before anything is written, in every form."""
    session.execute(sa.insert(models.table), {"user_id": 1, "group_id": 1})
    session.commit()
    for statement, parameters in (
        (sa.update(models.table).values(group_id=2), {}),
        (sa.update(models.table).values(group_id=models.table.c.group_id + 1), {}),
        (sa.update(models.table), {"group_id": 2}),
    ):
        with pytest.raises(UntrackedStatementError, match="key"):
            session.execute(statement, parameters)
    assert models.life(session) == [(1, 1, -1, "insert")]


def test_a_table_with_a_key_of_its_own(base: type[DeclarativeBase], engine: sa.Engine, session: Session) -> None:
    """Rows that are known by a generated key are born and ended under it, duplicates included."""
    models = Models(base, own_key=True)
    base.metadata.create_all(engine)
    user = models.User(id=1, groups=[models.Group(id=n) for n in range(1, 4)])
    session.add(user)
    session.commit()
    user.groups = user.groups[:1]
    session.commit()
    user.groups = []
    session.commit()
    c = models.history.c
    rows = session.execute(sa.select(c.group_id, c.operation).where(c.operation != "insert").order_by(c.group_id))
    assert [tuple(row) for row in rows] == [(1, "delete"), (2, "delete"), (3, "delete")]
    births = session.execute(sa.select(c.id, c.version).where(c.operation == "insert").order_by(c.id)).all()
    assert [tuple(row) for row in births] == [(1, -1), (2, -1), (3, -1)]
    session.execute(sa.insert(models.table), [{"user_id": 1, "group_id": 1}] * 2)
    session.commit()
    assert session.scalar(sa.select(sa.func.count()).select_from(models.history)) == 8


def test_a_self_referential_relationship(base: type[DeclarativeBase], engine: sa.Engine, session: Session) -> None:
    """A table between rows of one table is versioned like any other."""
    follows = versioned_table(
        sa.Table(
            "follows",
            base.metadata,
            sa.Column("a", sa.ForeignKey("appuser.id"), primary_key=True, key="follower"),
            sa.Column("b", sa.ForeignKey("appuser.id"), primary_key=True, key="followed"),
        ),
        tablename="follows_log",
    )

    class User(base):
        __tablename__ = "appuser"
        id: Mapped[int] = mapped_column(primary_key=True)
        following = relationship(
            "User",
            secondary=follows,
            primaryjoin=id == follows.c.follower,
            secondaryjoin=id == follows.c.followed,
        )

    base.metadata.create_all(engine)
    one, two = User(id=1), User(id=2)
    one.following, two.following = [two], [one]
    session.add_all([one, two])
    session.commit()
    one.following = []
    session.commit()
    c = base.metadata.tables["follows_log"].c
    rows = session.execute(sa.select(c.follower, c.followed, c.version).where(c.operation == "delete")).all()
    assert [tuple(row) for row in rows] == [(1, 2, 0)]


def test_many_pairs_cost_few_statements(models: Models, session: Session, statements: RecordStatements) -> None:
    """The number of statements does not grow with the number of pairs."""
    user = session.get_one(models.User, 1)
    session.add_all([models.Group(id=n) for n in range(10, 60)])
    session.commit()
    counts = []
    for keys in (range(10, 12), range(12, 60)):
        user.groups = groups(session, models, *keys)
        with statements() as log:
            session.flush()
        counts.append(len(log.matching("membership")))
        session.commit()
        user.groups = []
        with statements() as log:
            session.flush()
        counts.append(len(log.matching("membership")))
        session.commit()
    assert counts[0] == counts[2]
    assert counts[1] == counts[3]


def test_a_table_that_cannot_be_versioned(base: type[DeclarativeBase]) -> None:
    """A table without a key, with a column of history's names, or with a class, is refused, saying what to do."""
    with pytest.raises(ChrononautException, match="primary_key=True"):
        versioned_table(sa.Table("one", base.metadata, sa.Column("a", sa.Integer)))
    with pytest.raises(ChrononautException, match="rename"):
        versioned_table(
            sa.Table(
                "two", base.metadata, sa.Column("a", sa.Integer, primary_key=True), sa.Column("changed", sa.Integer)
            )
        )

    class User(Versioned, base):
        __tablename__ = "appuser"
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(ChrononautException):
        versioned_table(base.metadata.tables["appuser"])


def test_sessions_that_share_a_connection(models: Models, engine: sa.Engine) -> None:
    """Sessions one after the other on one connection each capture for themselves, and nothing is captured twice."""
    with engine.connect() as connection:
        outer = connection.begin()
        factory = versioned_session(sessionmaker(connection, join_transaction_mode="create_savepoint"))
        for key in (1, 2):
            with factory() as session:
                user = session.get_one(models.User, 1)
                user.groups.append(session.get_one(models.Group, key))
                session.commit()
        with factory() as session:
            assert models.life(session) == [(1, 1, -1, "insert"), (1, 2, -1, "insert")]
        outer.rollback()


# --- what the database does, and what cannot be captured


class Cascading:
    """A parent without versions, whose pairs the database deletes or changes with it."""

    def __init__(self, base: type[DeclarativeBase]) -> None:
        class Tag(base):
            __tablename__ = "tag"
            id: Mapped[int] = mapped_column(primary_key=True)
            parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("tag.id", ondelete="CASCADE"))

        self.Tag: Any = Tag
        self.table = versioned_table(
            sa.Table(
                "tagging",
                base.metadata,
                sa.Column("page", sa.Integer, primary_key=True, autoincrement=False),
                sa.Column("tag_id", sa.ForeignKey("tag.id", ondelete="CASCADE"), primary_key=True),
                sa.Column("by_id", sa.ForeignKey("tag.id", ondelete="SET NULL")),
            )
        )
        self.history = base.metadata.tables["tagging_history"]


@pytest.fixture
def cascading(base: type[DeclarativeBase], engine: sa.Engine, session: Session) -> Cascading:
    """Tag 2 is below tag 1, tag 3 stands alone and is named by a pair of tag 4."""
    made = Cascading(base)
    base.metadata.create_all(engine)
    session.add_all([made.Tag(id=1), made.Tag(id=3), made.Tag(id=4)])
    session.flush()
    session.add(made.Tag(id=2, parent_id=1))
    session.flush()
    pairs = [(1, 1, None), (2, 2, None), (1, 3, None), (1, 4, 3)]
    rows = [{"page": page, "tag_id": tag, "by_id": by} for page, tag, by in pairs]
    session.execute(made.table.insert(), rows)
    session.commit()
    return made


@pytest.mark.parametrize("how", ["statement", "table", "flush"])
def test_pairs_that_the_database_deletes_or_changes(session: Session, cascading: Cascading, how: str) -> None:
    """ON DELETE CASCADE, also by way of a tree, and SET NULL: the ended states are in history."""
    tag, history = cascading.Tag, cascading.history
    with extra_change_info(why="gone"):
        if how == "flush":
            session.execute(sa.delete(tag).where(tag.id == 2))
            session.delete(session.get(tag, 1))
            session.delete(session.get(tag, 3))
        else:
            target = tag.__table__ if how == "table" else tag
            key = target.c.id if how == "table" else tag.id
            session.execute(sa.delete(target).where(key.in_([1, 3])))
        session.commit()
    query = sa.select(history).where(history.c.operation != "insert").order_by(history.c.tag_id)
    found = [(row.page, row.tag_id, row.by_id, row.version, row.operation) for row in session.execute(query)]
    assert found == [
        (1, 1, None, 0, "delete"),
        (2, 2, None, 0, "delete"),
        (1, 3, None, 0, "delete"),
        (1, 4, 3, 0, "update"),
    ]
    assert {row.change_info["extra"]["why"] for row in session.execute(query)} == {"gone"}
    assert [tuple(row) for row in session.execute(sa.select(cascading.table))] == [(1, 4, None, 1)]


def test_text_about_pairs_is_refused(session: Session, models: Models) -> None:
    """What text changes cannot be captured; history is read-only for text and statements."""
    for sql in ("INSERT INTO membership VALUES (1, 1, 0)", "DELETE FROM membership"):
        with pytest.raises(UntrackedStatementError, match="membership"):
            session.execute(sa.text(sql))
    for statement in (sa.text("DELETE FROM membership_history"), models.history.delete(), models.history.update()):
        with pytest.raises(ReadOnlyError, match="membership_history"):
            session.execute(statement)
    with suppress_versioning(allow_deleting_history=True):
        session.execute(models.history.delete())
        session.execute(sa.text("DELETE FROM membership"))
    session.commit()
