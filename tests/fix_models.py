"""What a test builds its models and sessions from."""

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker


class Clock:
    """A clock that stands still until told to go on; fits ``versioned_session(clock=...)``."""

    def __init__(self) -> None:
        self.now = datetime(2024, 1, 1, 12, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float = 1) -> datetime:
        """Go on by some seconds (back, if negative) and return the new time."""
        self.now += timedelta(seconds=seconds)
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def base() -> Iterator[type[DeclarativeBase]]:
    """A declarative base of the test's own, so that its models do not outlive it."""

    class Base(DeclarativeBase):
        # MariaDB has no text without a length.
        type_annotation_map = {str: sa.String(100)}

    yield Base
    Base.registry.dispose()


@pytest.fixture
def session_factory(engine: sa.Engine) -> sessionmaker[Session]:
    """A versioned ``sessionmaker`` with nothing else configured."""
    from chrononaut import versioned_session

    return versioned_session(sessionmaker(engine))


@pytest.fixture
def session(session_factory: sessionmaker[Session]) -> Iterator[Session]:
    """A versioned session, closed after the test."""
    with session_factory() as session:
        yield session
