"""Measure chrononaut against unversioned SQLAlchemy and its peers: ``hatch run bench``."""
