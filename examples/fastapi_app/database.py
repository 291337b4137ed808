"""The model, its sessions, and who is acting."""

import os
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

from sqlalchemy import String
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from chrononaut import Versioned, versioned_session

engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///documents.db"))


class Base(DeclarativeBase):
    pass


class Document(Versioned, Base):
    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(200))
    text: Mapped[str] = mapped_column(String(2000))


# Each request is a task of its own, and so has a value of its own.
request_info: ContextVar[dict[str, Any]] = ContextVar("request_info")


def who_is_acting() -> dict[str, Any]:
    """Tell chrononaut who makes a change; outside of requests nobody does."""
    return request_info.get({})


Session = versioned_session(async_sessionmaker(engine, expire_on_commit=False), change_info=who_is_acting)


async def get_session() -> AsyncIterator[AsyncSession]:
    async with Session() as session:
        yield session
