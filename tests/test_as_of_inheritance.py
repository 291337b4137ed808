"""``as_of`` over a hierarchy of joined and single-table subclasses, with a many-to-many relationship."""

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
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
    with_polymorphic,
)

from chrononaut import HiddenAttributeError, Versioned, as_of, versioned_session, versioned_table
from tests.fix_models import Clock


class World:
    """A company and its staff, of whom some have a table of their own, one level further down, and some have not."""

    def __init__(self, base: type[DeclarativeBase]) -> None:
        skill = versioned_table(
            sa.Table(
                "skill",
                base.metadata,
                sa.Column("engineer_id", sa.ForeignKey("engineer.person_id"), primary_key=True),
                sa.Column("topic_id", sa.ForeignKey("topic.id"), primary_key=True),
            )
        )

        class Company(Versioned, base):
            __tablename__ = "company"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            staff: Mapped[list["Person"]] = relationship(back_populates="company", order_by="Person.id")

        class Topic(Versioned, base):
            __tablename__ = "topic"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]

        class Person(Versioned, base):
            __tablename__ = "person"
            __chrononaut_hidden__ = ["password"]
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            name: Mapped[str]
            password: Mapped[str | None]
            company_id: Mapped[int] = mapped_column(sa.ForeignKey("company.id"))
            company: Mapped[Company] = relationship(back_populates="staff")
            __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}

        class Intern(Person):
            until: Mapped[int | None]
            __mapper_args__ = {"polymorphic_identity": "intern"}

        class Engineer(Person):
            __tablename__ = "engineer"
            person_id: Mapped[int] = mapped_column(sa.ForeignKey("person.id"), primary_key=True)
            level: Mapped[int]
            topics: Mapped[list[Topic]] = relationship(secondary=skill, order_by=Topic.id)
            __mapper_args__ = {"polymorphic_identity": "engineer"}

        class Lead(Engineer):
            __tablename__ = "lead_engineer"
            engineer_id: Mapped[int] = mapped_column(sa.ForeignKey("engineer.person_id"), primary_key=True)
            budget: Mapped[int]
            __mapper_args__ = {"polymorphic_identity": "lead"}

        self.Company, self.Topic, self.Person = Company, Topic, Person
        self.Intern, self.Engineer, self.Lead, self.skill = Intern, Engineer, Lead, skill

    def fill(self, session: Session) -> None:
        topics = [self.Topic(id=n, name=f"t{n}") for n in (1, 2, 3)]
        session.add_all([*topics, self.Company(id=1, name="one"), self.Company(id=2, name="two")])
        session.flush()
        session.add(self.Person(id=1, name="p1", company_id=1))
        session.add(self.Intern(id=2, name="p2", company_id=1, until=3))
        session.add(self.Engineer(id=3, name="p3", company_id=1, level=3, topics=topics[:2], password="x"))
        session.add(self.Lead(id=4, name="p4", company_id=2, level=4, budget=40, topics=topics[1:]))
        session.add(self.Lead(id=5, name="p5", company_id=2, level=5, budget=50))

    def change(self, session: Session) -> None:
        people = {person.id: person for person in session.scalars(sa.select(self.Person))}
        people[1].name, people[2].until, people[3].level, people[4].budget = "P1", 4, 1, 41
        people[3].topics, people[4].topics = [session.get_one(self.Topic, 3)], []
        session.get_one(self.Topic, 2).name = "T2"
        session.get_one(self.Company, 1).name = "ONE"
        session.delete(people[5])
        session.add(self.Lead(id=6, name="p6", company_id=1, level=1, budget=1))

    # --- queries, each with an answer that can be compared

    def query_aliases(self, session: Session) -> Any:
        Boss = aliased(self.Lead, flat=True)
        Other = aliased(self.Engineer)
        query = sa.select(Boss.name, Boss.budget, Other.level).join(Other, Other.company_id != Boss.company_id)
        return [tuple(row) for row in session.execute(query.order_by(Boss.id, Other.id))]

    def query_with_polymorphic(self, session: Session) -> Any:
        answers = []
        for flat, is_aliased in ((False, False), (True, False), (False, True)):
            Staff = with_polymorphic(self.Person, "*", flat=flat, aliased=is_aliased)
            query = sa.select(Staff).where(sa.or_(Staff.Engineer.level > 2, Staff.Intern.until > 3))
            answers.append([(type(p).__name__, p.name) for p in session.scalars(query.order_by(Staff.id))])
        return answers

    def query_of_type(self, session: Session) -> Any:
        Company, Lead = self.Company, self.Lead
        Staff = with_polymorphic(self.Person, [self.Engineer, Lead], flat=True)
        rich = sa.select(Company.name).join(Company.staff.of_type(Lead)).where(Lead.budget > 40)
        anybody = sa.select(Company.id).where(Company.staff.of_type(self.Engineer).any(self.Engineer.level == 3))
        eager = (
            sa.select(Company).join(Company.staff.of_type(Staff)).options(contains_eager(Company.staff.of_type(Staff)))
        )
        companies = session.scalars(eager.order_by(Company.id, Staff.id)).unique()
        return (
            [[getattr(p, "level", None) for p in company.staff] for company in companies],
            session.scalars(rich).all(),
            session.scalars(anybody).all(),
        )

    def query_eager_loads_of_subclasses(self, session: Session) -> Any:
        Company, Engineer = self.Company, self.Engineer
        load = selectinload(Company.staff.of_type(Engineer)).selectinload(Engineer.topics)
        companies = session.scalars(sa.select(Company).options(load).order_by(Company.id))
        answers = [[[t.name for t in getattr(p, "topics", [])] for p in company.staff] for company in companies]
        session.expunge_all()
        joined = joinedload(Company.staff.of_type(with_polymorphic(self.Person, "*", flat=True)))
        companies = session.scalars(sa.select(Company).options(joined).order_by(Company.id)).unique()
        return answers, [[(p.name, getattr(p, "budget", None)) for p in company.staff] for company in companies]

    def query_selectin_polymorphic(self, session: Session) -> Any:
        option = selectin_polymorphic(self.Person, [self.Engineer, self.Lead, self.Intern])
        people = session.scalars(sa.select(self.Person).options(option).order_by(self.Person.id))
        return [(p.name, getattr(p, "level", None), getattr(p, "until", None)) for p in people]

    def query_each_class(self, session: Session) -> Any:
        answers = []
        for cls in (self.Person, self.Intern, self.Engineer, self.Lead):
            found = [session.get(cls, n) for n in range(8)]
            answers.append([(type(p).__name__, p.name, p.version, p.company.name) for p in found if p])
            session.expunge_all()
            answers.append([session.scalar(sa.select(sa.func.count()).select_from(cls))])
        return answers

    def query_lazy_columns_of_subclasses(self, session: Session) -> Any:
        people = session.scalars(sa.select(self.Person).order_by(self.Person.id)).all()
        return [(getattr(p, "budget", None), [t.name for t in getattr(p, "topics", [])]) for p in people]

    def query_union_of_classes(self, session: Session) -> Any:
        Intern, Lead = self.Intern, self.Lead
        union = sa.union_all(
            sa.select(Intern.id, Intern.until.label("n")), sa.select(Lead.id, Lead.budget.label("n"))
        ).subquery()
        query = sa.select(self.Person, union.c.n).join(union, union.c.id == self.Person.id)
        return [(p.name, n) for p, n in session.execute(query.order_by(self.Person.id))]

    def query_secondary_table(self, session: Session) -> Any:
        query = sa.select(self.skill.c.engineer_id, self.Topic.name).join(self.Topic)
        return sorted(map(tuple, session.execute(query)))

    def query_child_table_alone(self, session: Session) -> Any:
        table: Any = self.Lead.__table__
        return sorted(map(tuple, session.execute(sa.select(table))))


@pytest.fixture
def world(base: type[DeclarativeBase], engine: sa.Engine) -> World:
    world = World(base)
    base.metadata.create_all(engine)
    return world


@pytest.fixture
def session(engine: sa.Engine, clock: Clock) -> Iterator[Session]:
    with versioned_session(Session(engine), clock=clock) as session:
        yield session


def test_queries_over_a_hierarchy_return_what_they_returned_then(world: World, session: Session, clock: Clock) -> None:
    """Each query returns, after everything has changed, what it returned before, and each live one what it does now."""
    queries = {name: getattr(world, name) for name in sorted(dir(World)) if name.startswith("query_")}

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
    assert [name for name in queries if expected[name] == current[name]] == []
    with as_of(session, then) as past:
        assert ask(past) == expected
        for cls in (world.Person, world.Engineer, aliased(world.Lead), with_polymorphic(world.Person, "*")):
            with pytest.raises(HiddenAttributeError):
                past.execute(sa.select(cls).where(cls.password == "x"))
        with pytest.raises(HiddenAttributeError):
            past.get_one(world.Lead, 4).password  # noqa: B018
    with as_of(session, now) as past:
        assert ask(past) == current
