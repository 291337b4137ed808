"""New records: their numbers, after the history that their key may already have, and their births."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstanceState
from sqlalchemy.orm.attributes import set_committed_value

from chrononaut._capture import (
    FIRST_BIRTH,
    Birth,
    Key,
    LastState,
    find_last_states,
    insert_births,
    may_be_used,
    renumber,
)
from chrononaut._change_info import ChangeInfoSource
from chrononaut._dialect import may_read_the_past
from chrononaut._history_table import VERSION
from chrononaut._mapping import VersionedMapping, VersionedTable
from chrononaut._transaction import InstantSource
from chrononaut.typing import ChangeInfo


class NewLife(NamedTuple):
    """A record that a flush has inserted.

    :param is_key_given: whether the application chose its key.
    :param is_suppressed: whether it was inserted without history.
    :param previous_key: the key that it had before, for the change info.
    """

    mapping: VersionedMapping
    state: InstanceState[Any]
    is_key_given: bool
    is_suppressed: bool
    previous_key: ChangeInfo | None

    @property
    def has_birth(self) -> bool:
        """Whether its birth is recorded."""
        return self.mapping.track_inserts and not self.is_suppressed


class Beginning(NamedTuple):
    """How a life of a key begins.

    :param absence: the version of the row that ends the absence before it.
    :param began: when that absence began; None if the key was never used before.
    :param first: the version of its first state.
    """

    absence: int
    began: datetime | None
    first: int


def beginning_after(ended: LastState | None, has_birth: bool) -> Beginning:
    """Return how a life begins after the history that its key already has, if it has any.

    :param has_birth: whether its birth is recorded.
    """
    absence = FIRST_BIRTH if ended is None else ended.version + 1
    return Beginning(absence, None if ended is None else ended.changed, max(absence + has_birth, 0))


def begin_lives(
    connection: Connection,
    table: VersionedTable,
    lives: Sequence[NewLife],
    info: Callable[[], ChangeInfoSource],
    instant: InstantSource,
) -> None:
    """Number new records, and record their births.

    :param table: the base table of them all.
    :param info: who inserts them, and why; asked if there is a birth to record.
    """
    keys = [tuple(life.mapping.mapper.primary_key_from_instance(life.state.obj())) for life in lives]
    used = [key for key, life in zip(keys, lives, strict=True) if may_be_used(connection, table, life.is_key_given)]
    if not (used and may_read_the_past(connection)):
        last = find_last_states(connection, table, used) if used else {}
        _record(connection, table, keys, lives, last, info, instant)
        return
    # To read the present is to lock it, and at REPEATABLE READ the gaps between the keys too, in which others then
    # cannot insert theirs. So number after what a plain read shows; if that is of the past, the number is taken.
    if all(life.has_birth for life in lives):
        try:
            with connection.begin_nested() if len(lives) > 1 else nullcontext():
                last = find_last_states(connection, table, used)
                _record(connection, table, keys, lives, last, info, instant)
            return
        except IntegrityError:
            pass
    last = find_last_states(connection, table, used, lock=True)
    _record(connection, table, keys, lives, last, info, instant)


def _record(
    connection: Connection,
    table: VersionedTable,
    keys: Sequence[Key],
    lives: Sequence[NewLife],
    last: Mapping[Key, LastState],
    info: Callable[[], ChangeInfoSource],
    instant: InstantSource,
) -> None:
    births: dict[VersionedTable, list[Birth]] = defaultdict(list)
    renumbered: dict[Key, int] = {}
    for key, life in zip(keys, lives, strict=True):
        absence, began, first = beginning_after(last.get(key), life.has_birth)
        if life.has_birth:
            text = info().of_object(life.state, previous_key=life.previous_key)
            birth = Birth(key, absence, began, text, _discriminator(life))
            for each in life.mapping.tables:
                births[each].append(birth)
        if first != 0:
            renumbered[key] = first
            set_committed_value(life.state.obj(), VERSION, first)
    if renumbered:
        renumber(connection, table, renumbered)
    for each, rows in births.items():
        insert_births(connection, each, rows, lives[0].mapping.discriminator, instant)


def _discriminator(life: NewLife) -> Any:
    column = life.mapping.discriminator
    if column is None:
        return None
    return getattr(life.state.obj(), life.mapping.mapper.get_property_by_column(column).key)
