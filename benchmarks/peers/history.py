"""sqlalchemy-history."""

from __future__ import annotations

from sqlalchemy_history import make_versioned, version_class

from ._transactions import make_peer

peer = make_peer(make_versioned, version_class)
