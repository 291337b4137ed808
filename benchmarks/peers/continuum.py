"""SQLAlchemy-Continuum."""

from __future__ import annotations

from sqlalchemy_continuum import make_versioned, version_class

from ._transactions import make_peer

peer = make_peer(make_versioned, version_class)
