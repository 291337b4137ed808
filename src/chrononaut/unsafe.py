"""What gives up the promise that history is complete. Import it by name, so that a search finds every use."""

from __future__ import annotations

from chrononaut._suppression import suppress_versioning

__all__ = ["suppress_versioning"]
