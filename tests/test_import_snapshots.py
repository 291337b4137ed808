"""What other libraries recorded, turned into history: each rule by itself."""

import enum
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from chrononaut.importers._json import read_value
from chrononaut.importers._snapshots import UNRECORDED_END, Snapshot, build_chain
from chrononaut.typing import Operation

NOON = datetime(2024, 1, 1, 12, tzinfo=timezone.utc)
NAME: sa.Column[str] = sa.Column("name", sa.String)


def _change(operation: Operation, hour: int | None, name: str) -> Snapshot:
    at = None if hour is None else NOON + timedelta(hours=hour)
    return Snapshot(at, {"user_id": name}, operation, {NAME: name})


def _told(changes: list[Snapshot], is_alive: bool) -> tuple[list[Any], int | None]:
    def hour(at: datetime | None) -> Any:
        return None if at is None else int((at - NOON).total_seconds() // 3600)

    chain = build_chain(changes, is_alive)
    rows = [
        (row.version, row.operation, row.values.get(NAME), hour(row.began), hour(row.changed), row.info.get("user_id"))
        for row in chain.rows
    ]
    return rows, chain.live_version


def test_a_life_from_birth_to_deletion_and_another_one() -> None:
    """A state ends when the next one begins, by whom brought that about; a gap is exact."""
    changes = [
        _change("insert", 0, "a"),
        _change("update", 1, "b"),
        _change("delete", 2, "b"),
        _change("insert", 5, "c"),
    ]
    assert _told(changes, True) == (
        [
            (-1, "insert", None, None, 0, "a"),
            (0, "update", "a", 0, 1, "b"),
            (1, "delete", "b", 1, 2, "b"),
            (2, "insert", None, 2, 5, "c"),
        ],
        3,
    )


def test_time_never_goes_backwards() -> None:
    """A change that a clock put before the one before it takes that one's time."""
    changes = [_change("insert", 3, "a"), _change("update", 1, "b"), _change("update", 2, "c")]
    rows, _ = _told(changes, True)
    assert [(row[3], row[4]) for row in rows] == [(None, 3), (3, 3), (3, 3)]


def test_what_was_before_the_first_recorded_change_is_not_made_up() -> None:
    """There was a state, it ended then, and who ended it is known; what it was is not."""
    assert _told([_change("update", 1, "b")], True) == ([(0, "update", None, None, 1, "b")], 1)


def test_a_first_state_of_unknown_beginning_has_none() -> None:
    """It has its values, all the same."""
    assert _told([_change("update", None, "a"), _change("update", 1, "b")], True) == (
        [(0, "update", "a", None, 1, "b")],
        1,
    )


@pytest.mark.parametrize("then", [None, "insert"])
def test_a_record_that_vanished_is_said_to_have(then: Operation | None) -> None:
    """Its last state is kept, has no length, and the reason says that its end was not recorded."""
    changes = [_change("insert", 0, "a"), _change("update", 1, "b")]
    if then is not None:
        changes.append(_change(then, 3, "c"))
    chain = build_chain(changes, then is not None)
    ending = chain.rows[2]
    assert (ending.values[NAME], ending.operation, ending.began, ending.changed) == (
        "b",
        "delete",
        NOON + timedelta(hours=1),
        NOON + timedelta(hours=1),
    )
    assert ending.info == UNRECORDED_END


class _Colour(enum.Enum):
    red = 1


@pytest.mark.parametrize(
    ("value", "type_", "expected"),
    [
        (None, sa.Integer(), None),
        (1, sa.Integer(), 1),
        (1.5, sa.Float(), 1.5),
        (True, sa.Boolean(), True),
        ("text", sa.String(), "text"),
        ("2.50", sa.Numeric(10, 2), Decimal("2.50")),
        (2, sa.Numeric(10, 2), Decimal(2)),
        ("2024-02-29", sa.Date(), date(2024, 2, 29)),
        ("12:30:00", sa.Time(), time(12, 30)),
        ("2024-01-01T12:00:00+00:00", sa.DateTime(timezone=True), NOON),
        ("2024-01-01T12:00:00.000001+00:00", sa.DateTime(), datetime(2024, 1, 1, 12, 0, 0, 1)),
        ("1 day, 2:03:04.5", sa.Interval(), timedelta(days=1, hours=2, minutes=3, seconds=4.5)),
        ("-1 day, 23:00:00", sa.Interval(), timedelta(hours=-1)),
        ("0:00:01", sa.Interval(), timedelta(seconds=1)),
        ("12345678-1234-5678-1234-567812345678", sa.Uuid(), UUID("12345678123456781234567812345678")),
        ("_Colour.red", sa.Enum(_Colour), "red"),
        ("red", sa.Enum("red", "blue"), "red"),
        ("b'\\x00a'", sa.LargeBinary(), b"\x00a"),
        ("{'a': [1, None]}", sa.JSON(), {"a": [1, None]}),
        ("just text", sa.JSON(), "just text"),
        ("['a', 'b']", sa.ARRAY(sa.String()), ["a", "b"]),
    ],
)
def test_text_is_read_as_what_the_column_holds(value: Any, type_: Any, expected: Any) -> None:
    """What ``str()`` made of a value is turned back."""
    assert read_value(value, type_) == expected


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        ("x", sa.Numeric()),
        ("x", sa.Date()),
        ("x", sa.Uuid()),
        ("_Colour.green", sa.Enum(_Colour)),
        ("x(", sa.LargeBinary()),
    ],
)
def test_what_a_column_cannot_hold_is_refused(value: str, type_: Any) -> None:
    """Nothing is guessed."""
    with pytest.raises((ValueError, ArithmeticError, SyntaxError)):
        read_value(value, type_)
