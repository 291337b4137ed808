"""Bring history here from where it was kept before: what ``chrononaut import`` does."""

from __future__ import annotations

from chrononaut.importers._activity import import_activity
from chrononaut.importers._continuum import import_continuum
from chrononaut.importers._history_tables import upgrade_history_table, upgrade_history_tables
from chrononaut.importers._result import ImportResult

__all__ = [
    "ImportResult",
    "import_activity",
    "import_continuum",
    "upgrade_history_table",
    "upgrade_history_tables",
]
