"""The columns that every peer's model has; written so that SQLAlchemy 1.4 reads them too."""

from __future__ import annotations

from sqlalchemy import Column, Integer, String


class Columns:
    id = Column(Integer, primary_key=True)
    name = Column(String, nullable=False)
    email = Column(String, nullable=False)
    amount = Column(Integer, nullable=False)
    note = Column(String, nullable=False)
