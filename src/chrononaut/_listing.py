"""Capture an UPDATE of records that are listed by primary key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.sql import ClauseElement

from chrononaut._bulk import Writer
from chrononaut._capture import CurrentRow, Key, copy_states, read_current
from chrononaut._change_info import ChangeInfoSource
from chrononaut._history_table import CHANGE_INFO, CHANGED_ATTRIBUTE, VERSION
from chrononaut._mapping import VersionedMapping
from chrononaut._transaction import Instant
from chrononaut._types import assume_utc
from chrononaut._wanted import WantedRecord
from chrononaut.exceptions import RecordLockedError, UntrackedStatementError


class Listing:
    """Records of a model with their new values, by attribute.

    :param mapping: the model.
    :param given: for each record its key and what it is set to.
    :raises UntrackedStatementError: if a record is listed twice, or a bookkeeping attribute is set.
    """

    def __init__(self, mapping: VersionedMapping, given: Sequence[Mapping[str, Any]]) -> None:
        self.mapping = mapping
        self.given = given
        self.found: dict[Key, int] = {}
        self._keys = [tuple(each.get(name) for name in mapping.key_attributes) for each in given]
        own = {VERSION, CHANGE_INFO, CHANGED_ATTRIBUTE} & set(mapping.mapper.columns.keys())
        names = {name for each in given for name in each}
        if own & names:
            raise UntrackedStatementError(
                f"{mapping.name}.{min(own & names)} is chrononaut's own: a statement cannot set it."
            )
        if len(set(self._keys)) < len(self._keys):
            raise UntrackedStatementError(f"An UPDATE that lists a {mapping.name} twice cannot be captured.")
        self._noticed = sorted(names & (mapping.tracked | mapping.hidden) - set(mapping.key_attributes))
        self._is_touching = mapping.noticed > mapping.tracked | mapping.hidden | {VERSION}

    def capture(self, writer: Writer, info: ChangeInfoSource, instant: Instant) -> list[dict[str, Any]]:
        """Copy the records that really change; return what must be set besides, for each.

        :raises RecordLockedError: if one of them is locked.
        """
        mapping = self.mapping
        names = [*self._noticed]
        names += [name for name in (mapping.lock, *mapping.bookkeeping) if name is not None and name != VERSION]
        columns = [mapping.mapper.columns[name] for name in names]
        # In the key's order, so that two of them cannot wait for each other.
        rows = {row.key: row for row in read_current(writer.connection, mapping.tables, self._keys, columns)}
        self.found = {key: row.version for key, row in rows.items()}
        wanted: list[WantedRecord] = []
        besides: list[dict[str, Any]] = []
        for key, each in zip(self._keys, self.given, strict=True):
            row = rows.get(key)
            changed = set[str]() if row is None else self._changed(dict(zip(names, row.values, strict=True)), each, key)
            if row is None or not (changed or self._is_touching):
                besides.append({})
                continue
            text = info.of_class(mapping.mapper.class_, changed & mapping.hidden)
            wanted.append((key, row.version, text))
            besides.append({VERSION: row.version + 1} | self._marks(row, names, text, instant, writer))
        for table in mapping.family_tables if wanted else ():
            copied = copy_states(writer.connection, table, wanted, "update", writer.instant)
            if table is mapping.base and copied != len(wanted):
                raise UntrackedStatementError(f"Not all rows of {table.live.name} could be copied to history.")
        return besides

    def _changed(self, current: Mapping[str, Any], given: Mapping[str, Any], key: Key) -> set[str]:
        mapping = self.mapping
        changed = {
            name
            for name in self._noticed
            if name in given
            and (
                isinstance(given[name], ClauseElement)
                or mapping.comparisons[name](current[name], given[name]) is not True
            )
        }
        lock = mapping.lock
        if lock is not None and current[lock] and given.keys() - {lock, *mapping.key_attributes}:
            raise RecordLockedError(mapping.name, key)
        return changed

    def _marks(
        self, row: CurrentRow, names: Sequence[str], text: str, instant: Instant, writer: Writer
    ) -> dict[str, Any]:
        if not self.mapping.has_marks:
            return {}
        at, last = instant.value(writer.connection), dict(zip(names, row.values, strict=True))[CHANGED_ATTRIBUTE]
        return {
            CHANGE_INFO: json.loads(text),
            CHANGED_ATTRIBUTE: at if last is None else max(at, assume_utc(last)),
        }
