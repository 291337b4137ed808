"""Write history by the original SQLAlchemy-Continuum, in an environment that has it.

Called with a URL. Prints, as JSON, what the records were at some instants.
"""

import enum
import json
import sys
import time
from datetime import datetime, timezone

import sqlalchemy as sa
from sqlalchemy.orm import Session, configure_mappers, declarative_base
from sqlalchemy_continuum import make_versioned, plugins


class Who(plugins.Plugin):
    def transaction_args(self, uow, session):
        return {"remote_addr": "192.0.2.1"}


make_versioned(user_cls=None, plugins=[Who()])
Base = declarative_base()


class Colour(enum.Enum):
    red = 1
    blue = 2


class User(Base):
    __versioned__ = {"exclude": ["password"]}
    __tablename__ = "appuser"
    id = sa.Column(sa.Integer, primary_key=True)
    email = sa.Column("mail", sa.String(255), nullable=False, index=True)
    score = sa.Column(sa.Numeric(10, 2), nullable=False)
    colour = sa.Column(sa.Enum(Colour))
    settings = sa.Column(sa.JSON)
    born = sa.Column(sa.Date)
    password = sa.Column(sa.Text)


class Task(Base):
    __versioned__ = {}
    __tablename__ = "task"
    id = sa.Column(sa.Integer, primary_key=True)
    kind = sa.Column(sa.String(20), nullable=False)
    title = sa.Column(sa.String(50), nullable=False)
    __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "task"}


class SpecialTask(Task):
    __tablename__ = "special_task"
    id = sa.Column(sa.Integer, sa.ForeignKey("task.id"), primary_key=True)
    note = sa.Column(sa.Text)
    __mapper_args__ = {"polymorphic_identity": "special"}


class Membership(Base):
    __versioned__ = {}
    __tablename__ = "membership"
    user_id = sa.Column(sa.Integer, primary_key=True, autoincrement=False)
    team = sa.Column(sa.String(10), primary_key=True)
    role = sa.Column(sa.String(10))


configure_mappers()
expected = []


def note(session):
    session.commit()
    time.sleep(0.01)
    found = []
    for user in session.query(User):
        found.append(
            [
                "appuser",
                [user.id],
                {
                    "email": user.email,
                    "score": str(user.score),
                    "colour": user.colour and user.colour.name,
                    "settings": user.settings,
                    "born": user.born and str(user.born),
                },
            ]
        )
    for task in session.query(Task):
        found.append(["task", [task.id], {"title": task.title, "note": getattr(task, "note", None)}])
    for each in session.query(Membership):
        found.append(["membership", [each.user_id, each.team], {"role": each.role}])
    expected.append([datetime.now(timezone.utc).isoformat(), found])
    session.rollback()
    time.sleep(0.01)


engine = sa.create_engine(sys.argv[1].replace("postgresql://", "postgresql+psycopg2://"))
Base.metadata.create_all(engine)
with engine.begin() as connection:
    connection.execute(
        sa.text("INSERT INTO membership (user_id, team, role) VALUES (7, 'old', 'older'), (8, 'old', 'o')")
    )
with Session(engine) as session:
    from datetime import date
    from decimal import Decimal

    for number in (1, 2, 3):
        session.add(
            User(
                id=number,
                email=f"u{number}@example.org",
                score=Decimal("1.50"),
                colour=Colour.red,
                settings={"a": [number]},
                born=date(2000, 1, number),
                password="secret",
            )
        )
    session.add(SpecialTask(id=1, title="first", note="n0"))
    session.add(Task(id=2, title="second"))
    note(session)
    session.get(User, 1).email = "new@example.org"
    session.get(User, 1).settings = {"b": None}
    session.get(Task, 1).note = "n1"
    note(session)
    session.get(User, 1).colour = Colour.blue
    session.get(User, 1).score = Decimal("2.25")
    session.get(Task, 1).title = "renamed"
    session.get(Membership, (7, "old")).role = "newer"
    note(session)
    session.get(Membership, (7, "old")).role = "newest"
    session.delete(session.get(User, 3))
    session.delete(session.get(Task, 2))
    note(session)
    session.add(User(id=3, email="back@example.org", score=Decimal(1)))
    note(session)
    session.get(User, 3).email = "again@example.org"
    note(session)
json.dump(expected, sys.stdout)
