"""``verify_history`` finds what is wrong with the data, and nothing else."""

from typing import Any

import pytest
import sqlalchemy as sa

from chrononaut.verify import verify_history


def _found(
    engine: sa.Engine, base: Any, chunk_size: int = 10_000
) -> list[tuple[str, tuple[Any, ...], int | None, str]]:
    with engine.connect() as connection:
        problems = list(verify_history(connection, base.metadata, chunk_size=chunk_size))
    assert all(str(problem) for problem in problems)
    return [(problem.table, problem.key, problem.version, problem.kind) for problem in problems]


def test_a_whole_history_has_no_problems_whatever_the_size_of_the_chunks(engine: sa.Engine, zoo: Any) -> None:
    """Chains that go over from one chunk to the next are as whole as those that do not."""
    for chunk_size in (1, 2, 3, 7, 10_000):
        assert _found(engine, zoo, chunk_size) == []


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("DELETE FROM animal_history WHERE id = 1 AND version = 1", [("animal", (1,), 2, "gap")]),
        (
            "UPDATE animal_history SET began = '2001-01-01 00:00:00.000000' WHERE id = 1 AND version = 1",
            [("animal", (1,), 1, "interval")],
        ),
        (
            "UPDATE animal_history SET changed = '2001-01-01 00:00:00.000000' WHERE id = 1 AND version = 2",
            [("animal", (1,), 2, "backwards")],
        ),
        (
            "UPDATE animal_history SET operation = 'insert' WHERE id = 1 AND version = 1",
            [("animal", (1,), 1, "birth")],
        ),
        (
            "DELETE FROM keeper WHERE first = 'a' AND last = 'y'",
            [("keeper", ("a", "y"), 2, "vanished")],
        ),
        ("UPDATE animal SET version = 7 WHERE id = 1", [("animal", (1,), 7, "version")]),
        (
            "DELETE FROM keeper_history WHERE first = 'b' AND last = 'y' AND version = 2",
            [("keeper", ("b", "y"), 3, "version")],
        ),
        ("DELETE FROM keeper_history WHERE first = 'b' AND last = 'y'", [("keeper", ("b", "y"), 3, "no-history")]),
        ("DELETE FROM bird_history WHERE version = 1", [("bird", (2,), 1, "child-missing")]),
        (
            "INSERT INTO bird_history (id, wings, version) VALUES (9, 2, 0)",
            [("bird", (9,), 0, "child-orphan")],
        ),
    ],
)
def test_damage_is_found_and_named(engine: sa.Engine, zoo: Any, damage: str, expected: list[Any]) -> None:
    """Each kind of damage is found in the record that has it, and in no other, whatever the size of the chunks."""
    with engine.begin() as connection:
        connection.exec_driver_sql(damage)
    for chunk_size in (1, 2, 10_000):
        assert _found(engine, zoo, chunk_size) == expected


def test_progress_is_told_after_every_chunk(engine: sa.Engine, zoo: Any) -> None:
    """It counts history rows, table by table, and ends with all of them."""
    told: list[tuple[str, int, int]] = []
    with engine.connect() as connection:
        list(verify_history(connection, zoo.metadata, chunk_size=10, progress=lambda *each: told.append(each)))
    assert told == [("animal", 10, 15), ("animal", 15, 15), ("keeper", 10, 16), ("keeper", 16, 16)]
