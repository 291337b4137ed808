"""What an import did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What an import did.

    :param records: how many records were given a history.
    :param rows: how many history rows were written (or brought up to date).
    :param notes: what was left where it was, and why.
    """

    records: int
    rows: int
    notes: tuple[str, ...] = ()
