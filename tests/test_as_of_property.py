"""At every instant, queries through ``as_of`` return what they returned on the database then."""

import os
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    contains_eager,
    joinedload,
    mapped_column,
    relationship,
    selectin_polymorphic,
    selectinload,
    subqueryload,
    with_polymorphic,
)

from chrononaut import RecordChanges, Versioned, as_of, versioned_session, versioned_table
from tests.fix_models import Clock

Query = Callable[[Session], Any]

#: A few hundred examples over the three backends; thousands were run with a higher number.
EXAMPLES = int(os.environ.get("CHRONONAUT_TEST_EXAMPLES", "80"))

OPERATIONS = (
    "add_team", "add_person", "add_engineer", "join", "join", "rename_team", "change_person", "change_engineer",
    "change_role", "like", "like", "move_team", "leave", "delete_team", "delete_person",
    "commit", "commit", "commit", "rollback",
)  # fmt: skip
STEPS = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(1, 6), st.integers(1, 6)), min_size=5, max_size=30)


class World:
    """Three related models, and what can happen to their records."""

    def __init__(self, base: type[DeclarativeBase]) -> None:
        fan = versioned_table(
            sa.Table(
                "fan",
                base.metadata,
                sa.Column("team_id", sa.ForeignKey("team.id"), primary_key=True),
                sa.Column("person_id", sa.ForeignKey("person.id"), primary_key=True),
            )
        )

        class Team(Versioned, base):
            __tablename__ = "team"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("team.id"))
            parent: Mapped["Team | None"] = relationship(remote_side=[id], back_populates="children")
            children: Mapped[list["Team"]] = relationship(back_populates="parent", order_by=id)
            members: Mapped[list["Membership"]] = relationship(
                back_populates="team", cascade="all, delete-orphan", order_by="Membership.person_id"
            )
            people: Mapped[list["Person"]] = relationship(secondary="membership", viewonly=True, order_by="Person.id")
            fans: Mapped[list["Person"]] = relationship(secondary=fan, order_by="Person.id", back_populates="idols")

        class Person(Versioned, RecordChanges, base):
            __tablename__ = "person"
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            name: Mapped[str]
            memberships: Mapped[list["Membership"]] = relationship(
                back_populates="person", cascade="all, delete-orphan", order_by="Membership.team_id"
            )
            idols: Mapped[list[Team]] = relationship(secondary=fan, order_by=Team.id, back_populates="fans")
            __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}

        class Engineer(Person):
            __tablename__ = "engineer"
            id: Mapped[int] = mapped_column(sa.ForeignKey("person.id"), primary_key=True)
            level: Mapped[int]
            __mapper_args__ = {"polymorphic_identity": "engineer"}

        class Membership(Versioned, base):
            __tablename__ = "membership"
            person_id: Mapped[int] = mapped_column(sa.ForeignKey("person.id"), primary_key=True)
            team_id: Mapped[int] = mapped_column(sa.ForeignKey("team.id"), primary_key=True)
            role: Mapped[str]
            person: Mapped[Person] = relationship(back_populates="memberships")
            team: Mapped[Team] = relationship(back_populates="members")

        self.Team, self.Person, self.Engineer, self.Membership = Team, Person, Engineer, Membership

    def operate(self, session: Session, operation: str, one: int, other: int) -> None:
        Team, Person, Engineer, Membership = self.Team, self.Person, self.Engineer, self.Membership
        team, person = session.get(Team, one), session.get(Person, other)
        if operation == "add_team" and team is None:
            session.add(Team(id=one, name=f"team {other}"))
        elif operation == "add_person" and person is None:
            session.add(Person(id=other, name=f"name {one}"))
        elif operation == "add_engineer" and person is None:
            session.add(Engineer(id=other, name=f"name {one}", level=one))
        elif operation == "join" and team and person and session.get(Membership, (other, one)) is None:
            session.add(Membership(person=person, team=team, role=f"role {one}"))
        elif operation == "rename_team" and team:
            team.name = f"team {other}"
        elif operation == "change_person" and person:
            person.name = f"name {one}"
        elif operation == "change_engineer" and isinstance(person, Engineer):
            person.level = one
        elif operation == "change_role" and (membership := session.get(Membership, (other, one))):
            membership.role += "!"
        elif operation == "move_team" and team:
            team.parent = session.get(Team, other) if other < one else None
        elif operation == "like" and team and person:
            (team.fans.remove if person in team.fans else team.fans.append)(person)
        elif operation == "leave" and (membership := session.get(Membership, (other, one))):
            session.delete(membership)
        elif operation == "delete_team" and team:
            session.delete(team)
        elif operation == "delete_person" and person:
            session.delete(person)
        session.flush()

    # --- the queries, each with an answer that can be compared

    def queries(self) -> dict[str, Query]:
        named = {name.removeprefix("query_"): getattr(self, name) for name in dir(self) if name.startswith("query_")}
        return dict(sorted(named.items()))

    def query_get(self, session: Session) -> Any:
        return [(t.id, t.name, t.parent_id, t.version) for n in range(7) if (t := session.get(self.Team, n))]

    def query_polymorphic(self, session: Session) -> Any:
        people = session.scalars(sa.select(self.Person).order_by(self.Person.id))
        return [
            (type(p).__name__, p.id, p.name, getattr(p, "level", None), p.version, p.changed, p.change_info)
            for p in people
        ]

    def query_subclass(self, session: Session) -> Any:
        Engineer = self.Engineer
        query = sa.select(Engineer).where(Engineer.level > 1).order_by(Engineer.level.desc(), Engineer.id)
        return [(e.id, e.name, e.level) for e in session.scalars(query)]

    def query_lazy(self, session: Session) -> Any:
        teams = session.query(self.Team).order_by(self.Team.id).all()
        return [(t.name, t.parent and t.parent.name, [(m.role, m.person.name) for m in t.members]) for t in teams]

    def query_selectin(self, session: Session) -> Any:
        Team, Membership = self.Team, self.Membership
        options = selectinload(Team.members).selectinload(Membership.person), selectinload(Team.children)
        teams = session.scalars(sa.select(Team).options(*options).order_by(Team.id))
        return [(t.id, [(m.role, m.person.name) for m in t.members], [c.id for c in t.children]) for t in teams]

    def query_joined(self, session: Session) -> Any:
        Person, Membership = self.Person, self.Membership
        options = joinedload(Person.memberships).joinedload(Membership.team)
        people = session.scalars(sa.select(Person).options(options).order_by(Person.id).limit(4)).unique()
        return [(p.name, [(m.role, m.team.name) for m in p.memberships]) for p in people]

    def query_subqueryload(self, session: Session) -> Any:
        teams = session.scalars(sa.select(self.Team).options(subqueryload(self.Team.people)).order_by(self.Team.id))
        return [(t.name, [(type(p).__name__, p.name) for p in t.people]) for t in teams]

    def query_secondary(self, session: Session) -> Any:
        teams = session.scalars(sa.select(self.Team).options(selectinload(self.Team.fans)).order_by(self.Team.id))
        people = session.scalars(sa.select(self.Person).where(self.Person.idols.any(self.Team.id < 3)))
        return [(t.id, [p.name for p in t.fans]) for t in teams], sorted((p.id, len(p.idols)) for p in people)

    def query_aggregate(self, session: Session) -> Any:
        Team, Membership = self.Team, self.Membership
        count = sa.func.count(Membership.person_id)
        query = sa.select(Team.name, count).outerjoin(Team.members).group_by(Team.name).order_by(Team.name)
        return [tuple(row) for row in session.execute(query)]

    def query_exists(self, session: Session) -> Any:
        Team, Membership, Person = self.Team, self.Membership, self.Person
        query = sa.select(Team.id).where(Team.members.any(Membership.person.has(Person.name < "name 3")))
        without = sa.select(Person.id).where(~Person.memberships.any()).order_by(Person.id)
        return session.scalars(query.order_by(Team.id)).all(), session.scalars(without).all()

    def query_alias(self, session: Session) -> Any:
        Team = self.Team
        Parent = aliased(Team)
        query = sa.select(Team, Parent).join(Team.parent.of_type(Parent)).order_by(Team.id)
        return [(t.name, p.name, p.id) for t, p in session.execute(query)]

    def query_recursive_cte(self, session: Session) -> Any:
        Team = self.Team
        roots = sa.select(Team.id, sa.literal(0).label("depth")).where(Team.parent_id.is_(None))
        tree = roots.cte("tree", recursive=True)
        tree = tree.union_all(sa.select(Team.id, tree.c.depth + 1).join(tree, Team.parent_id == tree.c.id))
        query = sa.select(tree.c.id, tree.c.depth, Team.name).join(Team, Team.id == tree.c.id)
        return [tuple(row) for row in session.execute(query.order_by(tree.c.id))]

    def query_union(self, session: Session) -> Any:
        Team, Person = self.Team, self.Person
        union = sa.union_all(sa.select(Team.name.label("n")), sa.select(Person.name.label("n"))).subquery()
        return session.execute(sa.select(union.c.n, sa.func.count()).group_by(union.c.n).order_by(union.c.n)).all()

    def query_window(self, session: Session) -> Any:
        Membership = self.Membership
        rank = sa.func.row_number().over(partition_by=Membership.team_id, order_by=Membership.person_id)
        query = sa.select(Membership.team_id, Membership.person_id, rank)
        return [tuple(row) for row in session.execute(query.order_by(Membership.team_id, Membership.person_id))]

    def query_with_polymorphic(self, session: Session) -> Any:
        Everybody = with_polymorphic(self.Person, [self.Engineer])
        condition = sa.or_(Everybody.Engineer.level > 2, Everybody.name == "name 1")
        people = session.scalars(sa.select(Everybody).where(condition).order_by(Everybody.id))
        return [(p.id, getattr(p, "level", None)) for p in people]

    def query_selectin_polymorphic(self, session: Session) -> Any:
        option = selectin_polymorphic(self.Person, [self.Engineer])
        people = session.scalars(sa.select(self.Person).options(option).order_by(self.Person.id))
        return [(p.id, getattr(p, "level", None)) for p in people]

    def query_contains_eager(self, session: Session) -> Any:
        Team, Membership = self.Team, self.Membership
        query = sa.select(Team).join(Team.members).options(contains_eager(Team.members))
        teams = session.scalars(query.order_by(Team.id, Membership.person_id)).unique()
        return [(t.name, [m.person_id for m in t.members]) for t in teams]

    def query_from_statement(self, session: Session) -> Any:
        Person = self.Person
        inner = sa.select(Person).where(Person.id.in_(sa.select(self.Membership.person_id))).order_by(Person.id)
        return [p.name for p in session.scalars(sa.select(Person).from_statement(inner))]

    def query_core(self, session: Session) -> Any:
        person, engineer = self.Person.__table__, self.Engineer.__table__
        query = sa.select(person.c.id, person.c.name, engineer.c.level).select_from(
            person.outerjoin(engineer, person.c.id == engineer.c.id)
        )
        return [tuple(row) for row in session.execute(query.order_by(person.c.id))]


def _answers(world: World, session: Session) -> dict[str, Any]:
    # Each query starts with an empty identity map, so that none is answered by what another has loaded.
    answers = {}
    for name, query in world.queries().items():
        answers[name] = query(session)
        session.expunge_all()
    return answers


@pytest.fixture
def world(base: type[DeclarativeBase], engine: sa.Engine) -> World:
    world = World(base)
    base.metadata.create_all(engine)
    return world


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS)
def test_every_query_through_as_of_returns_what_it_returned_then(
    steps: list[tuple[str, int, int]], world: World, base: type[DeclarativeBase], engine: sa.Engine
) -> None:
    """Random operations on three related models; at each committed instant, each query sees what it saw then."""
    clock = Clock()
    _empty(base, engine)
    recorded: list[tuple[datetime, dict[str, Any]]] = []

    def record() -> None:
        with Session(engine) as plain:
            recorded.append((clock.now, _answers(world, plain)))
        clock.advance()

    with versioned_session(Session(engine), clock=clock) as session:
        record()
        for operation, one, other in steps:
            if operation == "commit":
                session.commit()
                record()
            elif operation == "rollback":
                session.rollback()
            else:
                world.operate(session, operation, one, other)
        session.commit()
        record()
        for at, expected in recorded:
            with as_of(session, at) as past:
                assert _answers(world, past) == expected
    at, expected = recorded[len(recorded) // 2]
    with as_of(engine, at) as past:
        assert _answers(world, past) == expected


def _empty(base: type[DeclarativeBase], engine: sa.Engine) -> None:
    with engine.begin() as connection:
        for table in reversed(base.metadata.sorted_tables):
            if table.name == "team":
                connection.execute(table.update().values(parent_id=None))
            connection.execute(table.delete())
