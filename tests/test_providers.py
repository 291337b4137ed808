"""Who asks the change info provider, and when."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from chrononaut import ChrononautException, Versioned, rationale, versioned_session


# In memory there is one connection for all threads.
@pytest.mark.backends("sqlite-file", "postgresql", "mariadb")
def test_providers_of_two_threads_run_at_the_same_time(engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """A provider that takes its time, to ask the database for the user say, does not hold up other threads' flushes."""

    class Page(Versioned, base):
        __tablename__ = "page"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    base.metadata.create_all(engine)
    both = threading.Barrier(2, timeout=60)

    def provider() -> dict[str, Any]:
        both.wait()
        return {"user_id": threading.current_thread().name}

    factory = versioned_session(sessionmaker(engine), change_info=provider)

    def add(number: int) -> str:
        with factory.begin() as session:
            session.add(Page(id=number, text="new"))
        return threading.current_thread().name

    with ThreadPoolExecutor(2) as pool:
        names = list(pool.map(add, (1, 2)))
    with engine.connect() as connection:
        history = base.metadata.tables["page_history"]
        found = connection.execute(sa.select(history.c.change_info["user_id"].as_string()).order_by(history.c.id))
        assert list(found.scalars()) == names


def test_required_extra_info_may_be_decided_at_each_flush(engine: sa.Engine, base: type[DeclarativeBase]) -> None:
    """A callable ``require_extra_change_info`` is asked at each flush."""

    class Page(Versioned, base):
        __tablename__ = "page"
        id: Mapped[int] = mapped_column(primary_key=True)

    base.metadata.create_all(engine)
    required = [False, True, True]
    factory = versioned_session(sessionmaker(engine), require_extra_change_info=lambda: required.pop(0))
    with factory() as session:
        session.add(Page(id=1))
        session.flush()
        session.add(Page(id=2))
        with pytest.raises(ChrononautException, match="requires"):
            session.flush()
        session.rollback()
        with rationale("a reason"):
            session.add(Page(id=2))
            session.flush()
    assert required == []
