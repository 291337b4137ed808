"""Write history by the original chrononaut 0.2 or 0.4, in an environment that has it.

Called with a URL. Prints, as JSON, what the records were at some instants, and what was last known of each.
"""

import json
import sys
import time
from datetime import date, datetime, timezone
from decimal import Decimal

import flask

from chrononaut import Versioned, VersionedSQLAlchemy, extra_change_info

app = flask.Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = sys.argv[1]
app.config["SQLALCHEMY_TRACK_MODIFICATIONS"] = False
db = VersionedSQLAlchemy(app)


class User(db.Model, Versioned):
    __tablename__ = "appuser"
    __chrononaut_hidden__ = ["password"]
    __chrononaut_untracked__ = ["login_count"]
    id = db.Column(db.Integer, primary_key=True)
    email = db.Column(db.String(255), nullable=False, index=True)
    score = db.Column(db.Numeric(10, 2), nullable=False)
    active = db.Column(db.Boolean, nullable=False)
    born = db.Column(db.Date)
    seen = db.Column(db.DateTime(timezone=True))
    colour = db.Column(db.Enum("red", "blue", name="colour"))
    password = db.Column(db.Text)
    login_count = db.Column(db.Integer)


class Task(db.Model, Versioned):
    __tablename__ = "task"
    id = db.Column(db.Integer, primary_key=True)
    kind = db.Column(db.String(20), nullable=False)
    title = db.Column(db.String(50), nullable=False)
    __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "task"}


class SpecialTask(Task):
    __tablename__ = "special_task"
    id = db.Column(db.Integer, db.ForeignKey("task.id"), primary_key=True)
    note = db.Column(db.Text)
    __mapper_args__ = {"polymorphic_identity": "special"}


class Membership(db.Model, Versioned):
    __tablename__ = "membership"
    user_id = db.Column(db.Integer, primary_key=True)
    team = db.Column(db.String(10), primary_key=True)
    role = db.Column(db.String(10))


def states():
    found = []
    for user in User.query:
        found.append(
            [
                "appuser",
                [user.id],
                {
                    "email": user.email,
                    "score": str(user.score),
                    "active": user.active,
                    "born": user.born and str(user.born),
                    "seen": user.seen and user.seen.isoformat(),
                    "colour": user.colour,
                },
            ]
        )
    for task in Task.query:
        found.append(["task", [task.id], {"title": task.title, "note": getattr(task, "note", None)}])
    for each in Membership.query:
        found.append(["membership", [each.user_id, each.team], {"role": each.role}])
    return found


def main():
    db.create_all()
    db.session.execute("INSERT INTO membership (user_id, team, role) VALUES (7, 'old', 'older')")
    db.session.execute("INSERT INTO membership (user_id, team, role) VALUES (8, 'old', 'older')")
    db.session.commit()
    expected = []

    def note():
        db.session.commit()
        time.sleep(0.01)
        at = datetime.now(timezone.utc).isoformat()
        expected.append([at, states()])
        db.session.rollback()
        time.sleep(0.01)

    for number in (1, 2, 3):
        db.session.add(
            User(
                id=number,
                email=f"u{number}@example.org",
                score=Decimal("1.50"),
                active=True,
                born=date(2000, 1, number),
                seen=datetime(2020, 1, 1, 12, tzinfo=timezone.utc),
                colour="red",
                password="secret",
                login_count=0,
            )
        )
    db.session.add(SpecialTask(id=1, title="first", note="n0"))
    db.session.add(Task(id=2, title="second"))
    note()
    with extra_change_info(ticket="SUP-1"):
        User.query.get(1).email = "new@example.org"
        User.query.get(1).score = Decimal("2.25")
        User.query.get(2).password = "other"
        Task.query.get(1).note = "n1"
        db.session.commit()
    note()
    User.query.get(1).active = False
    User.query.get(1).colour = "blue"
    User.query.get(1).born = None
    Task.query.get(1).title = "renamed"
    Task.query.get(2).title = "renamed too"
    Membership.query.get((7, "old")).role = "newer"
    note()
    User.query.get(2).login_count = 5
    db.session.delete(User.query.get(3))
    db.session.delete(Task.query.get(2))
    note()
    User.query.get(1).seen = None
    note()
    json.dump(expected, sys.stdout)


with app.app_context():
    main()
