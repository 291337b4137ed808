"""The columns that every peer's model has."""

from __future__ import annotations

from sqlalchemy.orm import Mapped, mapped_column


class Columns:
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]
    amount: Mapped[int]
    note: Mapped[str]
