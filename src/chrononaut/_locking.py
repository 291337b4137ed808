"""Locks that stay: records that nobody may change until they are unlocked."""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast, overload

from sqlalchemy import Boolean, Column, ColumnElement, Select, select, update
from sqlalchemy.orm import Mapped, Session, declared_attr, scoped_session
from sqlalchemy.sql.visitors import iterate

from chrononaut._bulk import are_in
from chrononaut._change_info import append_change_info, rationale
from chrononaut._history_table import LockColumn
from chrononaut._mapping import VersionedMapping, find_mapping, mapping_of, model_of
from chrononaut._run_sync import async_session_in, to_be_awaited
from chrononaut.exceptions import ChrononautException

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session


class Lockable:
    """Let records of a versioned model be locked, so that every change and deletion of them is refused.

    Locking and unlocking are changes themselves: they make versions, whose change info says who and why.
    ``is_locked`` is a column like others, so that queries can use it. E.g.::

        class Invoice(Lockable, Versioned, Base):
            __tablename__ = "invoice"
            id: Mapped[int] = mapped_column(primary_key=True)
            total: Mapped[Decimal]

        invoice.lock("booked")
        session.commit()
        invoice.total = 0
        session.commit()  # RecordLockedError
    """

    if TYPE_CHECKING:
        is_locked: Mapped[bool]
        """Whether the record is locked. Use ``lock()`` and ``unlock()`` to change it."""
    else:

        @declared_attr
        def is_locked(cls):  # documented above
            # "0" is what every database takes for false, and, unlike `false()`, what Alembic finds again on MariaDB.
            return LockColumn("is_locked", Boolean, nullable=False, default=False, server_default="0")

    @to_be_awaited()
    def lock(self, reason: str | None = None) -> None:
        """Lock the record with the next flush. What else is changed before that flush still goes through.

        :param reason: why; it stands under ``extra`` in the change info, as ``rationale``.
        :raises ChrononautException: if the model is not versioned.
        """
        _set_locked(self, True, reason)

    @to_be_awaited()
    def unlock(self, reason: str | None = None) -> None:
        """Unlock the record with the next flush. Flush before anything else of the record is changed.

        :param reason: why; it stands under ``extra`` in the change info, as ``rationale``.
        :raises ChrononautException: if the model is not versioned.
        """
        _set_locked(self, False, reason)


def _set_locked(record: Lockable, is_locked: bool, reason: str | None) -> None:
    mapping_of(type(record))
    if bool(record.is_locked) == is_locked:
        return  # no version is made, so the reason would stay for the next one
    record.is_locked = is_locked
    if reason is not None:
        append_change_info(record, rationale=reason)


@overload
def lock_where(
    session: Session | scoped_session[Any],
    select_or_criteria: Select[Any] | ColumnElement[bool],
    reason: str | None = None,
) -> int: ...


@overload
def lock_where(
    session: AsyncSession | async_scoped_session[Any],
    select_or_criteria: Select[Any] | ColumnElement[bool],
    reason: str | None = None,
) -> Awaitable[int]: ...


def lock_where(session: Any, select_or_criteria: Any, reason: str | None = None) -> Any:
    """Lock many records at once, by one set-based statement, e.g. to close an accounting period.

    Those that are locked already stay as they are. E.g.::

        lock_where(session, Invoice.booked_on < date(2024, 1, 1), "2023 is closed")

    :param session: a versioned session; the locks are part of its transaction. Await the call if it is an
        ``AsyncSession``.
    :param select_or_criteria: a ``select()`` of a ``Lockable`` model, or a condition on its attributes.
    :param reason: why; it stands under ``extra`` in the change info, as ``rationale``.
    :return: how many records were locked.
    :raises ChrononautException: if no single ``Lockable`` model can be told from the argument.
    """
    asynchronous = async_session_in(session)
    if asynchronous is not None:
        return asynchronous.run_sync(_lock_where, select_or_criteria, reason)
    return _lock_where(session, select_or_criteria, reason)


def _lock_where(session: Session, select_or_criteria: Any, reason: str | None) -> int:
    given = select_or_criteria
    if isinstance(select_or_criteria, Select):
        entity = given.column_descriptions[0].get("entity")
        mapping = find_mapping(entity) if isinstance(entity, type) else None
    else:
        models = {model_of(node.table) for node in iterate(given) if isinstance(node, Column)} - {None}
        mapping = models.pop() if len(models) == 1 else None
    if mapping is None or mapping.lock is None:
        raise ChrononautException(
            "lock_where() needs a select() of one model that is Versioned and Lockable, or a condition on it alone."
        )
    lock = mapping.mapper.attrs[mapping.lock].class_attribute
    criteria = _criteria(mapping, given)
    statement = update(mapping.mapper.class_).where(criteria, lock.is_(False)).values({lock: True})
    with nullcontext() if reason is None else rationale(reason):
        result = session.execute(statement, execution_options={"synchronize_session": "fetch"})
    return cast("int", cast("Any", result).rowcount)


def _criteria(mapping: VersionedMapping, given: Any) -> ColumnElement[bool]:
    if not isinstance(given, Select):
        return cast("ColumnElement[bool]", given)
    key = tuple(mapping.mapper.primary_key)
    chosen = given.with_only_columns(*key)
    # A table that is updated cannot be read by name in its own condition on every database.
    inner = chosen.subquery("chosen")
    keys: Any = select(*inner.c)
    return are_in(key, keys)
