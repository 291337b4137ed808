"""``as_of`` through unusual mappings, names and queries."""

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    WriteOnlyMapped,
    aliased,
    column_property,
    composite,
    defer,
    immediateload,
    joinedload,
    lazyload,
    load_only,
    mapped_column,
    query_expression,
    raiseload,
    relationship,
    selectinload,
    subqueryload,
    undefer,
    with_expression,
)
from sqlalchemy.orm.exc import DetachedInstanceError

from chrononaut import ChrononautException, Versioned, as_of, history_class, versioned_session
from chrononaut.exceptions import NaiveDatetimeError, ReadOnlyError
from tests.fix_models import Clock
from tests.fix_statements import RecordStatements


class Money:
    def __init__(self, amount: int, currency: str) -> None:
        self.amount, self.currency = amount, currency

    def __composite_values__(self) -> tuple[int, str]:
        return self.amount, self.currency

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class World:
    """A tree of nodes, orders with lines under a key of two parts, a table whose every name is a reserved word."""

    def __init__(self, base: type[DeclarativeBase]) -> None:
        class Node(Versioned, base):
            __tablename__ = "node"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            weight: Mapped[int]
            parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("node.id"))
            parent: Mapped["Node | None"] = relationship(remote_side=[id], back_populates="children")
            children: Mapped[list["Node"]] = relationship(back_populates="parent", order_by=id, join_depth=2)

            @hybrid_property
            def is_heavy(self) -> bool:
                return self.weight > 5

        class Order(Versioned, base):
            __tablename__ = "order"  # reserved
            year: Mapped[int] = mapped_column(primary_key=True)
            number: Mapped[int] = mapped_column(primary_key=True)
            group: Mapped[str] = mapped_column("Group", sa.String(20))
            amount: Mapped[int] = mapped_column("select")
            currency: Mapped[str] = mapped_column("The currency")
            price: Mapped[Money] = composite("amount", "currency")
            secret: Mapped[str | None] = mapped_column(deferred=True)
            lines: Mapped[list["Line"]] = relationship(
                back_populates="order", order_by="Line.position", cascade="all, delete-orphan"
            )
            written: WriteOnlyMapped["Line"] = relationship(viewonly=True, order_by="Line.position")
            texts: AssociationProxy[list[str]] = association_proxy("lines", "text")
            doubled: Mapped[int | None] = query_expression()

        class Line(Versioned, base):
            __tablename__ = "L"  # the subqueries of the past use "l" themselves
            year: Mapped[int] = mapped_column(primary_key=True)
            number: Mapped[int] = mapped_column(primary_key=True)
            position: Mapped[int] = mapped_column(primary_key=True)
            text: Mapped[str]
            order: Mapped[Order] = relationship(back_populates="lines")
            __table_args__ = (sa.ForeignKeyConstraint(["year", "number"], ["order.year", "order.number"]),)

        class Short(Versioned, base):
            __tablename__ = "h"  # and "h", "p" and "b"
            id: Mapped[int] = mapped_column(primary_key=True)
            p: Mapped[str]

        Order.line_count = column_property(
            sa.select(sa.func.count(Line.position))
            .where(Line.year == Order.year, Line.number == Order.number)
            .correlate_except(Line)
            .scalar_subquery()
        )
        self.Node, self.Order, self.Line, self.Short = Node, Order, Line, Short

    def fill(self, session: Session) -> None:
        Node, Order, Line, Short = self.Node, self.Order, self.Line, self.Short
        root = Node(id=1, name="root", weight=9)
        session.add(root)
        session.add_all([Node(id=n, name=f"n{n}", weight=n, parent=root) for n in (2, 3)])
        session.flush()
        session.add(Node(id=4, name="n4", weight=8, parent_id=2))
        for number in (1, 2, 3):
            order = Order(year=2024, number=number, group=f"g{number % 2}", amount=number, currency="€", secret="s")
            order.lines = [Line(position=at, text=f"{number}.{at}") for at in range(number)]
            session.add(order)
        session.add_all([Short(id=1, p="one"), Short(id=2, p="two")])

    def change(self, session: Session) -> None:
        Node, Order, Short = self.Node, self.Order, self.Short
        for node in session.scalars(sa.select(Node)).all():
            node.name, node.weight = node.name.upper(), 10 - node.weight
        session.get_one(Node, 3).parent_id = 4
        session.delete(session.get_one(Order, (2024, 3)))
        first, second = (session.get_one(Order, (2024, number)) for number in (1, 2))
        first.group, second.amount, first.secret = "changed", 50, "t"
        second.lines[0].text = "changed"
        del second.lines[1]
        session.delete(session.get_one(Short, 1))
        session.get_one(Short, 2).p = "changed"
        session.add(Short(id=3, p="three"))

    # --- queries, each with an answer that can be compared

    def query_recursive_cte_of_entities(self, session: Session) -> Any:
        Node = self.Node
        top = sa.select(Node).where(Node.id == 1).cte("tree", recursive=True)
        Child = aliased(Node)
        tree = top.union_all(sa.select(Child).join(top, Child.parent_id == top.c.id))
        found = session.scalars(sa.select(aliased(Node, tree)).order_by(tree.c.id))
        return [(node.id, node.name, node.parent and node.parent.name) for node in found]

    def query_nested_ctes(self, session: Session) -> Any:
        Order, Line = self.Order, self.Line
        counts = sa.select(Line.year, Line.number, sa.func.count().label("n")).group_by(Line.year, Line.number).cte()
        large = sa.select(counts).where(counts.c.n > 1).cte("large")
        query = sa.select(Order.number, large.c.n).join(
            large, sa.and_(large.c.year == Order.year, large.c.number == Order.number)
        )
        return [tuple(row) for row in session.execute(query.order_by(Order.number))]

    def query_cte_named_like_a_table(self, session: Session) -> Any:
        Short = self.Short
        node = sa.select(Short.id, Short.p).cte("node")
        return [tuple(row) for row in session.execute(sa.select(node.c.id, node.c.p).order_by(node.c.id))]

    def query_subquery_named_like_its_table(self, session: Session) -> Any:
        Short = self.Short
        inner = sa.select(Short).where(Short.id > 0).subquery("h")
        return [(s.id, s.p) for s in session.scalars(sa.select(aliased(Short, inner)).order_by(inner.c.id))]

    def query_union_in_subquery(self, session: Session) -> Any:
        Order = self.Order
        union = sa.union(
            sa.select(Order).where(Order.group == "g1"), sa.select(Order).where(Order.number == 2)
        ).subquery()
        orders = session.scalars(sa.select(aliased(Order, union)).order_by(union.c.number))
        return [(o.number, o.price, o.texts, o.line_count) for o in orders]

    def query_except_and_intersect(self, session: Session) -> Any:
        Order, Line = self.Order, self.Line
        without = sa.except_(sa.select(Order.number), sa.select(Line.number).where(Line.position == 1))
        both = sa.intersect(sa.select(Order.number), sa.select(Line.position))
        return sorted(session.scalars(without)), sorted(session.scalars(both))

    def query_window_over_a_subquery(self, session: Session) -> Any:
        Order = self.Order
        rank = sa.func.rank().over(partition_by=Order.group, order_by=Order.amount.desc()).label("place")
        ranked = sa.select(Order, rank).subquery()
        found = session.execute(sa.select(aliased(Order, ranked), ranked.c.place).order_by(ranked.c.number))
        return [(order.number, place, order.currency) for order, place in found]

    def query_hybrid(self, session: Session) -> Any:
        Node = self.Node
        Other = aliased(Node, name="node_1")
        heavy = sa.select(Node).where(Node.is_heavy).order_by(Node.id)
        pairs = sa.select(Node.id, Other.id).join(Other, Node.parent_id == Other.id).where(Other.is_heavy)
        return [n.name for n in session.scalars(heavy)], sorted(map(tuple, session.execute(pairs)))

    def query_composite(self, session: Session) -> Any:
        Order = self.Order
        return [(o.number, o.price) for o in session.scalars(sa.select(Order).where(Order.price == Money(2, "€")))]

    def query_column_property(self, session: Session) -> Any:
        Order = self.Order
        query = sa.select(Order.number, Order.line_count).where(Order.line_count > 0).order_by(Order.number)
        orders = session.scalars(sa.select(Order).order_by(Order.line_count.desc()))
        return [tuple(row) for row in session.execute(query)], [(o.number, o.line_count) for o in orders]

    def query_expressions_and_options(self, session: Session) -> Any:
        Order = self.Order
        options = with_expression(Order.doubled, Order.amount * 2), undefer(Order.secret), load_only(Order.amount)
        orders = session.scalars(sa.select(Order).options(*options).order_by(Order.number))
        return [(o.number, o.doubled, o.secret, o.group) for o in orders]

    def query_get_by_composite_key(self, session: Session) -> Any:
        found = [session.get(self.Order, (2024, number)) for number in range(5)]
        return [(o.number, o.secret, [(line.text, line.order is o) for line in o.lines]) for o in found if o]

    def query_get_with_options(self, session: Session) -> Any:
        Order, Line = self.Order, self.Line
        order = session.get(
            Order, (2024, 3), options=[joinedload(Order.lines).joinedload(Line.order), defer(Order.group)]
        )
        return order and [(line.text, line.order.group) for line in order.lines]

    def query_loaders_at_depth(self, session: Session) -> Any:
        Node, Order = self.Node, self.Order
        answers = []
        for load in (joinedload, selectinload, subqueryload, immediateload, lazyload):
            nodes = session.scalars(sa.select(Node).options(load(Node.children)).order_by(Node.id)).unique()
            answers.append([(n.name, [(c.name, [g.name for g in c.children]) for c in n.children]) for n in nodes])
            orders = session.scalars(sa.select(Order).options(load(Order.lines)).order_by(Order.number).limit(2))
            answers.append([(o.number, o.texts) for o in orders.unique()])
            session.expunge_all()
        return answers

    def query_write_only(self, session: Session) -> Any:
        orders = session.scalars(sa.select(self.Order).order_by(self.Order.number)).all()
        return [[line.text for line in session.scalars(order.written.select())] for order in orders]

    def query_association_proxy(self, session: Session) -> Any:
        Order = self.Order
        return session.scalars(sa.select(Order.number).where(Order.texts.contains("2.1"))).all()

    def query_tuples_and_in(self, session: Session) -> Any:
        Order, Line = self.Order, self.Line
        lines = sa.select(Line.year, Line.number).where(Line.position == 1)
        query = sa.select(Order.number).where(sa.tuple_(Order.year, Order.number).in_(lines)).order_by(Order.number)
        return session.scalars(query).all()

    def query_exists_of_entities(self, session: Session) -> Any:
        Order, Line = self.Order, self.Line
        lines = sa.select(Line).where(Line.number == Order.number, Line.position == 2)
        return session.scalars(sa.select(Order.number).where(sa.exists(lines))).all()

    def query_lateral_scalars(self, session: Session) -> Any:
        Order, Line = self.Order, self.Line
        last = sa.select(sa.func.max(Line.text)).where(Line.number == Order.number).scalar_subquery()
        return [tuple(r) for r in session.execute(sa.select(Order.number, last.label("l")).order_by(Order.number))]

    def query_group_and_having(self, session: Session) -> Any:
        Order = self.Order
        query = sa.select(Order.group, sa.func.sum(Order.amount)).group_by(Order.group).having(sa.func.count() > 1)
        return [tuple(row) for row in session.execute(query.order_by(Order.group))]

    def query_streams(self, session: Session) -> Any:
        Line = self.Line
        lines = session.scalars(
            sa.select(Line).order_by(Line.number, Line.position), execution_options={"stream_results": True}
        )
        first = [line.text for part in lines.partitions(2) for line in part]
        query = sa.select(self.Order).order_by(self.Order.number)
        return first, [o.line_count for o in session.scalars(query.execution_options(yield_per=2))]

    def query_core_tables(self, session: Session) -> Any:
        order, line = self.Order.__table__, self.Line.__table__
        other = line.alias("x")
        query = sa.select(order.c.number, order.c["select"], other.c.text).join_from(order, other)
        answers = [sorted(map(tuple, session.execute(query)))]
        joined = sa.select(line.c.text, order.c.Group).select_from(line.join(order))
        return [*answers, sorted(map(tuple, session.execute(joined)))]

    def query_bundles_and_entities(self, session: Session) -> Any:
        Order, Line = self.Order, self.Line
        bundle: Any = sa.orm.Bundle("b", Order.number, Line.text)
        query = sa.select(bundle, Order).join(Order.lines).order_by(Order.number, Line.position)
        return [(tuple(b), o.group) for b, o in session.execute(query)]

    def query_legacy(self, session: Session) -> Any:
        Order, Line = self.Order, self.Line
        query = session.query(Order, sa.func.count(Line.position)).outerjoin(Order.lines)
        rows = query.group_by(*Order.__table__.c).order_by(Order.number).all()
        subquery = session.query(Line.number).filter(Line.position == 1).subquery()
        found = session.query(Order).filter(Order.number.in_(sa.select(subquery))).count()
        exists = session.query(session.query(Order).filter_by(group="g1").exists()).scalar()
        return (
            [(o.number, n) for o, n in rows],
            found,
            bool(exists),
            session.query(Line).filter_by(text="1.0").all() == [],
        )

    def query_slices_and_distinct(self, session: Session) -> Any:
        Order, Line = self.Order, self.Line
        groups = session.scalars(sa.select(Order.group).distinct().order_by(Order.group)).all()
        texts = session.scalars(sa.select(Line.text).order_by(Line.text.desc()).limit(2).offset(1)).all()
        return groups, texts, session.query(self.Node).order_by(self.Node.id)[1:3] != []

    def query_case_and_functions(self, session: Session) -> Any:
        Node, Short = self.Node, self.Short
        kind = sa.case((Node.weight > 5, sa.func.upper(Node.name)), else_=Node.name)
        query = sa.select(kind, sa.func.coalesce(Short.p, "none")).outerjoin(Short, Short.id == Node.id)
        return [tuple(row) for row in session.execute(query.order_by(Node.id))]

    def query_of_short_names(self, session: Session) -> Any:
        Short, Line = self.Short, self.Line
        p, b = aliased(Short, name="p"), aliased(Line, name="b")
        query = sa.select(p.p, b.text).join(b, b.number == p.id).order_by(p.id, b.position)
        return [tuple(row) for row in session.execute(query)]


QUERIES = sorted(name.removeprefix("query_") for name in dir(World) if name.startswith("query_"))


@pytest.fixture
def world(base: type[DeclarativeBase], engine: sa.Engine) -> World:
    world = World(base)
    base.metadata.create_all(engine)
    return world


@pytest.fixture
def session(engine: sa.Engine, clock: Clock) -> Iterator[Session]:
    with versioned_session(Session(engine), clock=clock) as session:
        yield session


def test_queries_of_every_form_return_what_they_returned_then(world: World, session: Session, clock: Clock) -> None:
    """Each query returns, after everything has changed, what it returned before, and each live one what it does now."""
    queries = {name: getattr(world, f"query_{name}") for name in QUERIES}

    def ask(on: Session) -> dict[str, Any]:
        answers = {}
        for name, query in queries.items():
            answers[name] = query(on)
            on.expunge_all()
        return answers

    world.fill(session)
    session.commit()
    then, expected = clock.now, ask(session)
    clock.advance()
    world.change(session)
    session.commit()
    now, current = clock.now, ask(session)
    assert [name for name in QUERIES if expected[name] == current[name]] == []
    with as_of(session, then) as past:
        assert ask(past) == expected
    with as_of(session, now) as past:
        assert ask(past) == current


def test_a_cte_that_hides_a_history_table_is_refused(world: World, session: Session, clock: Clock) -> None:
    """A CTE named like the history of a table in the query would be read in its place, and is refused by name."""
    Short = world.Short
    history = history_class(Short)
    cte = sa.select(history).cte("H_History")
    query = sa.select(Short.p).join(cte, cte.c.id == Short.id)
    with as_of(session, clock.now) as past:
        with pytest.raises(ChrononautException, match="h_history, and this query has a CTE of that name"):
            past.execute(query)
        other = sa.select(history).cte("other")
        assert past.execute(sa.select(Short.p).join(other, other.c.id == Short.id)).all() == []


@pytest.fixture
def then(world: World, session: Session, clock: Clock) -> datetime:
    """An instant after which everything has changed."""
    world.fill(session)
    session.commit()
    then = clock.now
    clock.advance()
    world.change(session)
    session.commit()
    return then


def test_rows_of_the_past_cannot_be_locked(world: World, session: Session, then: datetime) -> None:
    """Every way to ask for a row lock is refused in the same words on every backend, before the database is asked."""
    Node = world.Node
    with as_of(session, then) as past:
        node = past.get_one(Node, 1)
        attempts = (
            lambda: past.scalars(sa.select(Node).with_for_update()).all(),
            lambda: past.scalars(sa.select(Node.id).with_for_update(read=True, of=Node)).all(),
            lambda: past.execute(sa.select(sa.select(Node).with_for_update().subquery())).all(),
            lambda: past.execute(sa.select(Node.__table__).with_for_update()).all(),
            lambda: past.get(Node, 1, with_for_update=True),
            lambda: past.get(Node, 2, with_for_update={"nowait": True}),
            lambda: past.query(Node).with_for_update(skip_locked=True).first(),
            lambda: past.refresh(node, with_for_update=True),
            lambda: past.refresh(node, ["name"], with_for_update={"read": True}),
        )
        for attempt in attempts:
            with pytest.raises(ReadOnlyError, match="cannot be locked"):
                attempt()
        past.refresh(node, ["name"])
        assert node.name == "root"


def test_an_instant_on_a_boundary_belongs_to_the_later_state(
    world: World, session: Session, then: datetime, clock: Clock
) -> None:
    """A state is seen from the instant it began until a microsecond before it ended, in whatever zone that is said."""
    node, tick = session.get_one(world.Node, 2), timedelta(microseconds=1)
    ended = node.versions()[0].changed
    assert (node.versions()[0].began, ended) == (then, clock.now)
    seen = []
    for at in (then - tick, then, ended - tick, ended, ended + tick):
        for zone in (timezone.utc, timezone(timedelta(hours=-9, minutes=-30)), timezone(timedelta(hours=14))):
            with as_of(session, at.astimezone(zone)) as past:
                found = past.get(world.Node, 2)
                seen.append(found and found.name)
    assert seen == [None] * 3 + ["n2"] * 6 + ["N2"] * 6
    with pytest.raises(NaiveDatetimeError):
        as_of(session, datetime.max)


def test_the_ends_of_time(world: World, session: Session, then: datetime) -> None:
    """The first and the last instant that Python knows are instants like any other."""
    with as_of(session, datetime.min.replace(tzinfo=timezone.utc)) as past:
        assert past.scalars(sa.select(world.Node)).all() == []
    with as_of(session, datetime.max.replace(tzinfo=timezone.utc)) as past:
        assert past.get_one(world.Node, 2).name == "N2"


def test_the_past_inside_a_savepoint(world: World, session: Session, then: datetime, clock: Clock) -> None:
    """The past can be read inside a savepoint, and a rollback to that savepoint inside the block does not end it."""
    node = session.get_one(world.Node, 2)
    savepoint = session.begin_nested()
    node.name = "in the savepoint"
    session.flush()
    with as_of(session, then) as past, as_of(session, clock.now) as now:
        assert (past.get_one(world.Node, 2).name, now.get_one(world.Node, 2).name) == ("n2", "in the savepoint")
        savepoint.rollback()
        past.expire_all()
        now.expire_all()
        assert (past.get_one(world.Node, 2).name, now.get_one(world.Node, 2).name) == ("n2", "N2")
        own = past.begin_nested()
        assert past.get_one(world.Node, 3).name == "n3"
        own.rollback()
        assert past.get_one(world.Node, 3).name == "n3"
    session.commit()
    assert node.name == "N2"


def test_a_past_opened_on_a_past_is_another_instant_of_the_present(
    world: World, session: Session, engine: sa.Engine, then: datetime, clock: Clock
) -> None:
    """A session of the past stands for what it was opened on: the later instant is not seen through the earlier."""
    session.commit()
    for target in (engine, session, session.connection()):
        with as_of(target, then) as past, as_of(past, clock.now) as later, as_of(later, then) as again:
            assert [each.get_one(world.Node, 2).name for each in (past, later, again)] == ["n2", "N2", "n2"]


def test_objects_of_the_past_outlive_it(world: World, session: Session, then: datetime) -> None:
    """What was loaded can be read after the block; the rest raises, or comes from another past."""
    Order = world.Order
    with as_of(session, then) as past:
        order = past.get_one(Order, (2024, 3), options=[selectinload(Order.lines)])
        node = past.get_one(world.Node, 2)
        past.expire(node)
    assert (order.group, [line.text for line in order.lines]) == ("g1", ["3.0", "3.1", "3.2"])
    for instance, name in ((order, "secret"), (node, "name")):
        with pytest.raises(DetachedInstanceError):
            getattr(instance, name)
    with as_of(session, then) as past:
        past.add(order)
        assert order.secret == "s"


def test_what_was_deleted_since_can_be_expired_and_refreshed(world: World, session: Session, then: datetime) -> None:
    """An object whose live row is gone is still there in the past, however it is loaded again."""
    with as_of(session, then) as past:
        order = past.get_one(world.Order, (2024, 3))
        line = order.lines[2]
        past.expire_all()
        assert (line.text, line.order.group) == ("3.2", "g1")
        past.refresh(order, ["group", "lines"])
        assert len(order.lines) == 3
        order.lines.pop()
        past.rollback()
        assert len(order.lines) == 3


def test_raiseload_keeps_raising(world: World, session: Session, then: datetime) -> None:
    """Options that forbid lazy loads hold in the past."""
    with as_of(session, then) as past:
        order = past.scalars(sa.select(world.Order).options(raiseload("*")).limit(1)).one()
        with pytest.raises(sa.exc.InvalidRequestError, match="raise"):
            order.lines  # noqa: B018


def test_a_connection_of_the_outer_session_reads_the_present(world: World, session: Session, then: datetime) -> None:
    """Statements on the outer session's own connection are the present's, while the past is open on it."""
    query = sa.select(world.Node.__table__.c.name).where(world.Node.__table__.c.id == 2)
    with as_of(session, then) as past:
        assert past.scalar(query) == "n2"
        assert session.connection().scalar(query) == "N2"
        assert session.scalar(query) == "N2"
        assert session.connection().exec_driver_sql("SELECT name FROM node WHERE id = 2").scalar() == "N2"
        assert past.scalar(query) == "n2"


def test_one_statement_answers_each_get(
    world: World, session: Session, then: datetime, statements: RecordStatements
) -> None:
    """A look-up by key costs one statement, be it the first of its kind or not."""
    with as_of(session, then) as past:
        for number in (1, 2, 3):
            with statements() as sent:
                assert past.get(world.Order, (2024, number)) is not None
            assert len(sent) == 1
