"""Half a year in the life of one customer, and what chrononaut remembers of it.

    python examples/timeline.py                                   # SQLite, a file in a temporary directory
    python examples/timeline.py postgresql+psycopg://user@host/db # the same on a database of yours, or on MariaDB

The program makes its tables (`demo_*`) in that database and drops them when it is done.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import DateTime, ForeignKey, String, create_engine, inspect, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, class_mapper, mapped_column, relationship, sessionmaker

from chrononaut import (
    HiddenAttributeError,
    HistoryRecord,
    Versioned,
    append_change_info,
    extra_change_info,
    history_class,
    rationale,
    versioned_session,
)

# --- The models: the mixin is all that versioning asks of them ----------------------------------


class Base(DeclarativeBase):
    type_annotation_map = {str: String(200), datetime: DateTime(timezone=True)}


class Customer(Versioned, Base):
    __tablename__ = "demo_customer"
    __chrononaut_hidden__ = ["password"]  # that it changed is recorded, its value never is
    __chrononaut_untracked__ = ["last_seen"]  # changes too often, and nobody will ask

    number: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]
    discount: Mapped[int] = mapped_column(default=0)
    password: Mapped[str]
    last_seen: Mapped[datetime | None]
    subscriptions: Mapped[list[Subscription]] = relationship(back_populates="customer", cascade="all, delete-orphan")


class Subscription(Versioned, Base):
    __tablename__ = "demo_subscription"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_number: Mapped[str] = mapped_column(ForeignKey(Customer.number))
    product: Mapped[str]
    seats: Mapped[int]
    customer: Mapped[Customer] = relationship(back_populates="subscriptions")


# --- Who is acting: a web application would ask its request, a worker its job ---------------------

_actor: ContextVar[str | None] = ContextVar("actor", default=None)


@contextmanager
def acting(user_id: str) -> Generator[None]:
    token = _actor.set(user_id)
    try:
        yield
    finally:
        _actor.reset(token)


def who_is_acting() -> dict[str, Any]:
    """The ChangeInfoProvider: called whenever something is about to be recorded."""
    return {"user_id": _actor.get(), "program": "timeline"}


class Calendar:
    """A clock that is set by hand, because this program lives through half a year in a second.

    A real program leaves `clock` out: the database tells the time.
    """

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        return self.now

    def turn_to(self, month: int, day: int, hour: int = 0, minute: int = 0) -> datetime:
        self.now = self.now.replace(month=month, day=day, hour=hour, minute=minute)
        return self.now


# --- The story: ordinary SQLAlchemy, nothing in it writes history -----------------------------------


def live(sessions: sessionmaker[Session], calendar: Calendar) -> None:
    calendar.turn_to(3, 2, 9, 15)
    with acting("ada@sales"), rationale("Signed up at the spring fair"), sessions.begin() as session:
        grace = Customer(number="C-1042", name="Grace Hopper", email="grace@navy.example", password="cobol")
        grace.subscriptions = [Subscription(product="Compiler", seats=5)]
        session.add(grace)

    calendar.turn_to(3, 3, 8, 1)
    with acting("grace@portal"), sessions.begin() as session:
        session.get_one(Customer, "C-1042").last_seen = calendar.now  # untracked: leaves no trace

    calendar.turn_to(3, 9, 18, 40)
    with acting("grace@portal"), sessions.begin() as session:
        session.get_one(Customer, "C-1042").password = "nanosecond"  # hidden

    calendar.turn_to(4, 1, 10, 5)
    with acting("ada@sales"), rationale("Agreed on the phone"), sessions.begin() as session:
        grace = session.get_one(Customer, "C-1042")
        grace.discount = 50
        grace.subscriptions[0].seats = 20

    calendar.turn_to(4, 2, 11, 30)
    with (
        acting("mary@finance"),
        rationale("A slip: 5 % was agreed"),
        extra_change_info(ticket="FIN-311"),
        sessions.begin() as session,
    ):
        session.get_one(Customer, "C-1042").discount = 5

    calendar.turn_to(5, 12, 7, 55)
    with acting("grace@portal"), sessions.begin() as session:
        grace = session.get_one(Customer, "C-1042")
        grace.email = "grace@eckert.example"
        append_change_info(grace, confirmed_by="link in a mail")  # goes with this one record

    calendar.turn_to(6, 30, 23, 0)
    with acting("nightly job"), rationale("Contract ended"), sessions.begin() as session:
        session.delete(session.get_one(Customer, "C-1042"))  # and, by the ORM's cascade, her subscription

    calendar.turn_to(9, 15, 14, 20)
    with acting("ada@sales"), rationale("She is back"), sessions.begin() as session:
        session.add(Customer(number="C-1042", name="Grace Hopper", email="grace@univac.example", password="flow-matic"))


# --- Reading it back --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """What one history row tells: a row is a state that has ended, so it is the event that ended it, too."""

    record: str
    row: HistoryRecord[Any]
    changes: dict[str, tuple[Any, Any]]


def events(session: Session, model: type[Base]) -> Iterator[Event]:
    """Compare each ended state with the one that followed it: the next row or, after the last, the live record."""
    history = history_class(model)
    key = inspect(model).primary_key[0].name
    recorded = class_mapper(history).column_attrs
    names = [column.key for column in inspect(model).column_attrs if column.key in recorded and column.key != "version"]
    rows = session.scalars(select(history).order_by(getattr(history, key), history.version))
    for identity, group in groupby(rows, key=lambda row: getattr(row, key)):
        states = list(group)
        for state, after in zip(states, [*states[1:], session.get(model, identity)], strict=True):
            pairs = {name: (getattr(state, name), getattr(after, name, None)) for name in names}
            changes = {} if state.operation == "delete" else {name: (a, b) for name, (a, b) in pairs.items() if a != b}
            yield Event(f"{model.__name__} {identity}", state, changes)


def tell_timeline(session: Session) -> None:
    heading("Who changed what, when and why")
    happened = [*events(session, Customer), *events(session, Subscription)]
    for event in sorted(happened, key=lambda event: event.row.changed):
        done = {"insert": "created", "update": "changed", "delete": "deleted"}[event.row.operation]
        info = event.row.change_info
        say(f"{bold(date(event.row.changed))}  {info['user_id']:<12}  {done} {bold(event.record)}")
        for name, (before, after) in event.changes.items():
            detail(name, after if before is None else f"{before} → {after}")
        for name in info.get("hidden_cols_changed", ()):
            detail(name, "changed (history does not hold its value)")
        for name, value in sorted(info.get("extra", {}).items()):
            detail(name, value)
        print()


def tell_difference(session: Session) -> None:
    heading("What differs between 15 March and 1 June")
    grace = session.get_one(Customer, "C-1042")
    march = grace.version_at(datetime(2026, 3, 15, tzinfo=timezone.utc))
    june = grace.version_at(datetime(2026, 6, 1, tzinfo=timezone.utc))
    # Neither None, for there was such a record, nor the record itself, for it has changed since.
    assert isinstance(march, HistoryRecord)
    assert isinstance(june, HistoryRecord)
    for name, (before, after) in grace.diff(march, june).items():
        say(f"{name}: {before} → {after}")
    print()


def tell_earlier_states(session: Session) -> None:
    heading("The record as it was")
    grace = session.get_one(Customer, "C-1042")
    for month, day in [(2, 1), (3, 15), (4, 1), (4, 2), (6, 1), (8, 1), (10, 1)]:
        evening = datetime(2026, month, day, 22, tzinfo=timezone.utc)
        state = grace.version_at(evening)
        if state is None:
            say(f"{date(evening)}  {dim('(no such customer)')}")
        else:
            now = dim("  the record itself") if state is grace else ""
            say(f"{date(evening)}  version {state.version}: {state.email}, {state.discount} %{now}")
    print()
    try:
        print(grace.versions()[0].password)
    except HiddenAttributeError as error:
        say(f"And her password of then? {error}")
    print()


# The whole database as of an instant comes here.


def tell_rows(session: Session) -> None:
    heading("The rows of demo_customer_history that all this was read from")
    row = history_class(Customer)
    who, why = row.change_info["user_id"].as_string(), row.change_info["extra", "rationale"].as_string()
    columns = [row.version, row.began, row.changed, row.operation, row.discount, who.label("who"), why.label("why")]
    result = session.execute(select(*columns).order_by(row.version))
    table = [tuple(result.keys()), *(tuple(map(cell, values)) for values in result)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        say("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
    print()


# --- How it looks -------------------------------------------------------------------------------------


def heading(title: str) -> None:
    print(f"{bold(title)}\n{'─' * len(title)}\n")


def say(line: str) -> None:
    print(f"  {line}")


def detail(name: str, value: object) -> None:
    say(f"{dim(f'{name:>29}')}  {value}")


def bold(line: str) -> str:
    return f"\033[1m{line}\033[0m" if in_colour() else line


def dim(line: str) -> str:
    return f"\033[2m{line}\033[0m" if in_colour() else line


def in_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def date(at: datetime) -> str:
    return f"{at.day:2} {at:%b %H:%M}"


def cell(value: object) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    return "NULL" if value is None else str(value)


# --- Run it -------------------------------------------------------------------------------------------


def run(url: str) -> None:
    engine = create_engine(url)
    Base.metadata.create_all(engine, checkfirst=False)
    try:
        calendar = Calendar()
        sessions = versioned_session(sessionmaker(engine), change_info=who_is_acting, clock=calendar)
        live(sessions, calendar)
        with sessions() as session:
            tell_timeline(session)
            tell_difference(session)
            tell_earlier_states(session)
            tell_rows(session)
    finally:
        Base.metadata.drop_all(engine)
        engine.dispose()


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as directory:
            run(f"sqlite:///{Path(directory) / 'demo.db'}")
