"""What a flush changes is captured, all of it and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import ForeignKey, event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    load_only,
    mapped_column,
    relationship,
    sessionmaker,
)
from sqlalchemy.orm.attributes import flag_modified

from chrononaut import HistoryRecord, StaleVersionError, Versioned, extra_change_info
from chrononaut.unsafe import suppress_versioning
from tests.fix_statements import RecordStatements
from tests.models import Base, Node, Setting, Team, User


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)


@pytest.fixture
def user(session: Session) -> User:
    """A user in the database, whose attributes are expired."""
    user = User(id=1, email="a", name="n", password="p", settings={"theme": "light"}, biography="long")
    session.add(user)
    session.commit()
    return user


def emails(user: User) -> list[Any]:
    return [row.email for row in user.versions()]


# --- what is a change


def test_change_is_captured_with_the_values_before(session: Session, user: User) -> None:
    """One change, one version: history has the state that ended."""
    assert (user.version, user.versions()) == (0, [])
    user.email = "b"
    session.commit()
    [row] = user.versions()
    assert (row.version, row.email, row.name, row.operation) == (0, "a", "n", "update")
    assert (user.version, user.email) == (1, "b")


def test_several_attributes_changed_at_once_are_one_version(session: Session, user: User) -> None:
    """A version is a state, not an assignment."""
    user.email = "x"
    user.email = "b"
    user.name = "m"
    session.commit()
    [row] = user.versions()
    assert (row.email, row.name, user.version) == ("a", "n", 1)


@pytest.mark.parametrize("loaded", [True, False])
def test_same_value_is_no_change(session: Session, user: User, statements: RecordStatements, loaded: bool) -> None:
    """Neither where the old value is loaded, nor where it is not."""
    if loaded:
        assert user.email == "a"
    user.email = "a"
    with statements() as log:
        session.flush()
    assert log.matching("INSERT|appuser_history") == []
    session.commit()
    assert (user.version, user.versions()) == (0, [])


def test_change_and_change_back_before_the_flush_is_no_change(session: Session, user: User) -> None:
    """Only what differs from the row counts."""
    assert user.email == "a"
    user.email = "b"
    user.email = "a"
    session.commit()
    assert (user.version, user.versions()) == (0, [])


def test_expired_attribute_set_to_its_value_with_another_changed(session: Session, user: User) -> None:
    """The one that changed is the reason, the other is in the row all the same."""
    user.email = "a"
    user.password = "q"
    session.commit()
    [row] = user.versions()
    assert row.change_info["hidden_cols_changed"] == ["password"]
    user.password = "q"
    user.email = "b"
    session.commit()
    assert "hidden_cols_changed" not in user.versions()[1].change_info


def test_flag_modified_without_a_change_is_no_loss(session: Session, user: User) -> None:
    """An attribute that is declared changed is a version, for SQLAlchemy writes it."""
    assert user.email == "a"
    flag_modified(user, "email")
    session.commit()
    assert emails(user) in ([], ["a"])
    assert user.version == len(user.versions())


def test_touched_object_is_no_change(session: Session, user: User) -> None:
    """A collection or another object that changes does not make a version of this one."""
    node = Node(id=1, name="root")
    session.add(node)
    session.commit()
    node.children.append(Node(id=2, name="leaf"))
    session.commit()
    assert node.version == 0
    assert node.children[0].version == 0


def test_untracked_column_is_no_change(session: Session, user: User) -> None:
    """It is written, and history does not hear of it."""
    user.login_count = 7
    session.commit()
    assert (user.login_count, user.version, user.versions()) == (7, 0, [])


def test_hidden_column_is_a_change_whose_value_stays_hidden(
    session: Session, user: User, engine: sa.Engine, statements: RecordStatements
) -> None:
    """The name of the column is in history; its value is neither there nor in the statement that writes it."""
    user.password = "topsecret"
    with statements() as log:
        session.commit()
    [row] = user.versions()
    assert row.change_info["hidden_cols_changed"] == ["password"]
    [written] = log.matching("INSERT INTO appuser_history")
    assert "password" not in written.sql
    assert "topsecret" not in str(written.parameters)
    with engine.connect() as connection:
        everything = connection.execute(sa.text("SELECT * FROM appuser_history")).all()
    assert not [value for row in everything for value in row if value in ("p", "topsecret")]


def test_relationship_sets_the_foreign_key(session: Session, user: User) -> None:
    """A foreign key that is only known during the flush is captured, with a relationship of one side."""
    user.team = Team(name="red")
    session.commit()
    [row] = user.versions()
    assert row.team_id is None
    user.team = Team(name="blue")
    session.commit()
    assert [row.team_id for row in user.versions()] == [None, 1]


def test_relationship_with_back_reference_sets_the_foreign_key(session: Session) -> None:
    """From either side, also when only the other side is touched."""
    one, two, child = Node(id=1), Node(id=2), Node(id=3)
    one.children.append(child)
    session.add_all([one, two])
    session.commit()
    two.children.append(child)
    session.commit()
    child.parent = one
    session.commit()
    one.children.remove(child)
    session.commit()
    assert [row.parent_id for row in child.versions()] == [1, 2, 1]
    assert (one.version, two.version, child.version) == (0, 0, 3)


def test_relationship_without_back_reference_on_the_many_side(
    session: Session, engine: sa.Engine, base: type[DeclarativeBase]
) -> None:
    """The child is not even dirty when the flush begins."""

    class Parent(base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        children: Mapped[list[Child]] = relationship()

    class Child(Versioned, base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int | None] = mapped_column(ForeignKey("parent.id"))

    Parent.__annotations__["children"] = Mapped[list[Child]]
    base.metadata.create_all(engine)
    parent, child = Parent(id=1), Child(id=1)
    session.add_all([parent, child])
    session.commit()
    parent.children.append(child)
    session.commit()
    parent.children.clear()
    session.commit()
    assert [row.parent_id for row in child.versions()] == [None, 1]
    assert child.version == 2


def test_deleted_parent_nulls_its_children(session: Session) -> None:
    """The children that SQLAlchemy detaches have a version of it."""
    parent = Node(id=1, children=[Node(id=2), Node(id=3)])
    session.add(parent)
    session.commit()
    session.delete(parent)
    session.commit()
    for child in session.scalars(sa.select(Node)):
        [row] = child.versions()
        assert (row.parent_id, row.operation, child.parent_id) == (1, "update", None)


def test_delete_orphan_is_captured(session: Session, engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """An orphan that the flush deletes is not in ``session.deleted`` before."""

    class Item(Versioned, base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        order_id: Mapped[int | None] = mapped_column(ForeignKey("purchase.id"))

    class Purchase(base):
        __tablename__ = "purchase"
        id: Mapped[int] = mapped_column(primary_key=True)
        items: Mapped[list[Any]] = relationship(Item, cascade="all, delete-orphan")

    base.metadata.create_all(engine)
    purchase = Purchase(id=1, items=[Item(id=1), Item(id=2)])
    session.add(purchase)
    session.commit()
    del purchase.items[0]
    session.commit()
    assert operations(session, "item") == [(1, -1, "insert"), (1, 0, "delete"), (2, -1, "insert")]
    session.delete(purchase)
    session.commit()
    assert operations(session, "item")[-1] == (2, 0, "delete")


def operations(session: Session, table: str) -> list[tuple[Any, ...]]:
    rows = session.execute(sa.text(f"SELECT id, version, operation FROM {table}_history ORDER BY id, version"))
    return [tuple(row) for row in rows]


def test_self_referential_tree_in_one_flush(session: Session) -> None:
    """Rows that refer to each other, added, moved and deleted in any order."""
    root = Node(id=1, name="root", children=[Node(id=2, children=[Node(id=3)])])
    session.add(root)
    session.commit()
    leaf = session.get_one(Node, 3)
    leaf.parent = None
    leaf.children.append(root)
    session.delete(session.get_one(Node, 2))
    session.commit()
    assert [row.parent_id for row in leaf.versions()] == [2]
    assert [row.parent_id for row in root.versions()] == [None]
    assert (2, 0, "delete") in operations(session, "node")


# --- how a change is made


def test_sql_expression_is_captured(session: Session, user: User) -> None:
    """An attribute set to an SQL expression."""
    user.login_count = 1
    user.email = sa.func.upper("b")
    session.commit()
    user.email = User.email + "!"
    session.commit()
    assert emails(user) == ["a", "B"]
    assert user.email == "B!"


def test_in_place_change_of_json_is_captured(session: Session, user: User) -> None:
    """History has the old value, not the new one."""
    assert user.settings is not None
    user.settings["theme"] = "dark"
    session.commit()
    user.settings["theme"] = "black"
    session.commit()
    assert [row.settings for row in user.versions()] == [{"theme": "light"}, {"theme": "dark"}]


def test_flag_modified_after_an_in_place_change_is_captured(
    session: Session, engine: sa.Engine, base: type[DeclarativeBase]
) -> None:
    """Plain JSON that is changed in place and declared so."""

    class Document(Versioned, base):
        __tablename__ = "document"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[Any] = mapped_column(sa.JSON)

    base.metadata.create_all(engine)
    document = Document(id=1, body={"a": [1]})
    session.add(document)
    session.commit()
    document.body["a"].append(2)
    flag_modified(document, "body")
    session.commit()
    [row] = document.versions()
    assert (row.body, document.body) == ({"a": [1]}, {"a": [1, 2]})


@pytest.mark.parametrize("when", ["expired", "deferred", "load_only"])
def test_attributes_set_without_being_read_cost_no_query_for_each_record(
    session_factory: sessionmaker[Session], statements: RecordStatements, when: str
) -> None:
    """What is not loaded is found out for all records at once."""
    with session_factory() as session:
        session.add_all([User(email="a", biography="long") for _ in range(20)])
        session.commit()
        query = sa.select(User).order_by(User.id)
        if when == "load_only":
            query = query.options(load_only(User.id))
        users = session.scalars(query).all()
        if when == "expired":
            session.expire_all()
        with statements() as log:
            for user in users:
                if when == "deferred":
                    user.biography = "longer"
                else:
                    user.email = "b"
            session.flush()
        assert len(log.matching("INSERT INTO appuser_history")) == 1
        assert len(log.matching("^SELECT")) <= 1
        assert len(log) <= 3
        session.commit()
        for user in users:
            [row] = user.versions()
            assert (row.email, row.biography, user.version) == ("a", "long", 1)


def test_deferred_column_survives_a_delete(session_factory: sessionmaker[Session], user: User) -> None:
    """Nobody has loaded it when the record is deleted."""
    with session_factory() as session:
        found = session.get_one(User, 1)
        assert "biography" in sa.inspect(found).unloaded
        session.delete(found)
        session.commit()
        text = session.scalar(sa.text("SELECT biography FROM appuser_history WHERE operation = 'delete'"))
        assert text == "long"


def test_expired_record_is_deleted(session: Session, user: User) -> None:
    """Its version is not loaded either."""
    session.delete(user)
    session.commit()
    assert operations(session, "appuser") == [(1, -1, "insert"), (1, 0, "delete")]


# --- several flushes


def test_two_flushes_in_a_transaction_are_two_versions(session: Session, user: User) -> None:
    """Each with the values that the row held then."""
    user.email = "b"
    session.flush()
    user.email = "c"
    session.commit()
    assert emails(user) == ["a", "b"]
    assert user.version == 2


def test_insert_and_delete_in_a_transaction(session: Session) -> None:
    """A life that nobody else saw is in history all the same."""
    setting = Setting(name="x", value="1")
    session.add(setting)
    session.flush()
    session.delete(setting)
    session.commit()
    rows = session.execute(sa.text("SELECT version, value, operation FROM setting_history ORDER BY version"))
    assert [tuple(row) for row in rows] == [(-1, None, "insert"), (0, "1", "delete")]


def test_rollback_takes_history_back(session: Session, user: User) -> None:
    """History is in the transaction of the change."""
    user.email = "b"
    session.flush()
    session.rollback()
    assert (user.version, emails(user)) == (0, [])
    user.email = "c"
    session.commit()
    assert emails(user) == ["a"]


def test_savepoint_rollback_takes_back_its_own_part(session: Session, user: User) -> None:
    """What came before it stays, and what comes after is captured."""
    user.email = "b"
    savepoint = session.begin_nested()
    user.email = "c"
    session.flush()
    savepoint.rollback()
    assert user.email == "b"
    user.email = "d"
    session.commit()
    assert emails(user) == ["a", "b"]
    assert user.version == 2


def test_savepoint_rolled_back_as_the_first_versioned_work(session: Session, user: User) -> None:
    """The transaction goes on as if nothing had been."""
    with pytest.raises(ZeroDivisionError), session.begin_nested():
        user.email = "b"
        session.flush()
        raise ZeroDivisionError
    assert (user.version, emails(user)) == (0, [])
    user.email = "c"
    session.commit()
    assert (user.version, emails(user)) == (1, ["a"])


def test_work_after_a_failed_flush(session: Session, user: User) -> None:
    """A flush that fails leaves nothing behind, neither in history nor in the session."""
    user.email = "b"
    session.add(Setting(name="x"))
    session.flush()
    with suppress_versioning():
        session.execute(sa.text("INSERT INTO setting (name, version) VALUES ('y', 0)"))
    session.add(Setting(name="y"))
    user.email = "c"
    with pytest.raises(IntegrityError):
        session.flush()
    session.rollback()
    assert (user.version, emails(user)) == (0, [])
    user.email = "d"
    session.add(Setting(name="x"))
    session.commit()
    assert (user.version, emails(user)) == (1, ["a"])
    assert session.scalar(sa.text("SELECT count(*) FROM setting_history")) == 1


def test_work_after_a_flush_that_failed_inside_a_savepoint(session: Session, user: User) -> None:
    """Only the savepoint is lost."""
    session.add(Setting(name="x"))
    session.commit()
    session.expunge_all()
    user = session.get_one(User, 1)
    user.name = "m"
    session.flush()
    with pytest.raises(IntegrityError), session.begin_nested():
        user.email = "b"
        session.add(Setting(name="x"))
        session.flush()
    user.email = "c"
    session.commit()
    assert [(row.name, row.email) for row in user.versions()] == [("n", "a"), ("m", "a")]


def test_records_kept_loaded_after_commit(engine: sa.Engine, session_factory: sessionmaker[Session]) -> None:
    """``expire_on_commit=False``: the versions in memory are the ones in the database."""
    with session_factory(expire_on_commit=False) as session:
        user = User(email="a")
        session.add(user)
        session.commit()
        for email in "bcd":
            user.email = email
            session.commit()
        assert user.version == 3
        assert emails(user) == ["a", "b", "c"]


def test_detached_copy_is_merged(session_factory: sessionmaker[Session], user: User) -> None:
    """A current copy from elsewhere is written as a change like any other."""
    with session_factory() as elsewhere:
        copy = elsewhere.get_one(User, 1)
    copy.email = "b"
    with session_factory() as session:
        merged = session.merge(copy)
        session.commit()
        assert emails(merged) == ["a"]


# --- listeners of the application


def test_before_flush_listener_changes_a_record(session: Session, user: User) -> None:
    """What it changes is captured with the rest."""

    def rename(session: Session, *_: object) -> None:
        for changed in session.dirty:
            changed.name = "listened"
        if session.new:
            user.biography = "found"

    event.listen(session, "before_flush", rename)
    user.email = "b"
    session.commit()
    session.add(Setting(name="x"))
    session.commit()
    assert [(row.email, row.name, row.biography) for row in user.versions()] == [
        ("a", "n", "long"),
        ("b", "listened", "long"),
    ]


@pytest.mark.parametrize("when", ["class", "configured"])
def test_before_update_listener_changes_a_record(
    session: Session, engine: sa.Engine, base: type[DeclarativeBase], when: str
) -> None:
    """Also where its change is the only one, and never silently lost where it comes too late."""

    class Thing(Versioned, base):
        __tablename__ = "thing"
        __chrononaut_untracked__ = ["hits"]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(sa.String(50))
        hits: Mapped[int] = mapped_column(default=0)

    def listen() -> None:
        @event.listens_for(Thing, "before_update")
        def stamp(mapper: object, connection: object, target: Thing) -> None:
            target.name = "stamped"

    if when == "class":
        listen()
    base.metadata.create_all(engine)
    thing = Thing(id=1, name="a")
    session.add(thing)
    session.commit()
    if when == "configured":
        listen()
    thing.hits = 1
    if when == "configured":
        with pytest.raises(Exception, match="too late to record"):
            session.commit()
        return
    session.commit()
    assert ([row.name for row in thing.versions()], thing.name) == (["a"], "stamped")


def test_after_flush_listener_changes_a_record(session: Session, user: User) -> None:
    """What it changes is captured by the flush that follows."""

    def again(session: Session, *_: object) -> None:
        if user.name != "later":
            user.name = "later"

    assert user.name == "n"
    event.listen(session, "after_flush_postexec", again)
    user.email = "b"
    session.commit()
    assert [(row.email, row.name) for row in user.versions()] == [("a", "n"), ("b", "n")]


def test_before_delete_listener_sees_the_record(session: Session, user: User) -> None:
    """What it changes on a record that is deleted is not written, so history does not say it either."""

    def farewell(mapper: object, connection: object, target: User) -> None:
        target.email = "never was"

    event.listen(User, "before_delete", farewell)
    try:
        session.delete(user)
        session.commit()
    finally:
        event.remove(User, "before_delete", farewell)
    assert session.scalar(sa.text("SELECT email FROM appuser_history WHERE operation = 'delete'")) == "a"


# --- one of many


def test_records_of_several_classes_and_operations_in_one_flush(session: Session, user: User) -> None:
    """Adds, changes and deletions of several models together."""
    session.add_all([Setting(name="x", value="1"), Setting(name="y", value="1")])
    session.commit()
    user.email = "b"
    session.get_one(Setting, "x").value = "2"
    session.delete(session.get_one(Setting, "y"))
    session.add(Setting(name="z", value="1"))
    with extra_change_info(batch=1):
        session.commit()
    rows = session.execute(sa.text("SELECT name, version, value, operation FROM setting_history ORDER BY 1, 2"))
    assert [tuple(row) for row in rows] == [
        ("x", -1, None, "insert"),
        ("x", 0, "1", "update"),
        ("y", -1, None, "insert"),
        ("y", 0, "1", "delete"),
        ("z", -1, None, "insert"),
    ]
    assert emails(user) == ["a"]


def test_history_rows_are_generated_classes(session: Session, user: User) -> None:
    """A row says in its ``repr`` which state of which record it is."""
    user.email = "b"
    session.commit()
    [row] = user.versions()
    assert isinstance(row, HistoryRecord)
    assert repr(row) == "<UserHistory 1, 0>"


@pytest.mark.parametrize("how", ["update", "update expired", "delete"])
def test_row_that_is_gone_is_not_written_over(session: Session, user: User, how: str) -> None:
    """Nothing is said of a row that somebody else has deleted, whether it was loaded here or not."""
    if how != "update expired":
        assert user.email == "a"
    with suppress_versioning():
        session.execute(sa.text("DELETE FROM appuser"))
    if how == "delete":
        session.delete(user)
    else:
        user.email = "b"
    with pytest.raises(StaleVersionError, match=r"User\(1\) is stale: somebody else deleted it") as caught:
        session.flush()
    assert (caught.value.key, caught.value.found) == ((1,), None)


def test_record_takes_the_place_of_a_deleted_one(session: Session, user: User) -> None:
    """A delete and an add of the same key in one flush is an update; only what is given is changed."""
    session.delete(user)
    session.add(new := User(id=1, email="b", password="p"))
    session.commit()
    [row] = new.versions()
    assert (row.email, row.operation, new.version, new.name) == ("a", "update", 1, "n")
    assert "hidden_cols_changed" not in row.change_info
    session.delete(new)
    session.add(newer := User(id=1, email="b", password=sa.func.lower("Q")))
    session.commit()
    assert newer.versions()[1].change_info["hidden_cols_changed"] == ["password"]
    assert (newer.password, newer.version) == ("q", 2)
