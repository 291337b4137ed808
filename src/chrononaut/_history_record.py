"""The Python face of a history row."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, TypeVar, cast

from sqlalchemy import inspect

from chrononaut._run_sync import run_sync, to_be_awaited
from chrononaut.exceptions import HiddenAttributeError, UntrackedAttributeError

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapped

    from chrononaut.typing import ChangeInfo, Operation

    class _HistoryMeta(type):
        # The columns of the model are class attributes of the generated history class.
        def __getattr__(cls, name: str) -> Any: ...
else:
    _HistoryMeta = type

Model = TypeVar("Model", covariant=True)


class HistoryRecord(Generic[Model], metaclass=_HistoryMeta):
    """One state of a record that has ended: its values, from when to when it lived, and who ended it.

    Base of the classes that are generated for each versioned model (``User`` has
    ``UserHistory``, see :func:`chrononaut.history_class`). Besides the attributes below an instance
    has the tracked attributes of its model, under their own names. Rows are read-only. E.g.::

        for row in user.versions():
            print(row.version, row.email, row.changed, row.change_info["user_id"])
    """

    __chrononaut_model__: ClassVar[type[Any]]

    if TYPE_CHECKING:
        version: Mapped[int]
        """The version that this state had; the first live state of a record is version 0."""
        began: Mapped[datetime | None]
        """When this state began (inclusive), UTC; ``None`` where the row is older than its versioning."""
        changed: Mapped[datetime]
        """When this state ended (exclusive), UTC."""
        change_info: Mapped[ChangeInfo]
        """Who ended it and why."""
        operation: Mapped[Operation]
        """What ended it."""

        def __getattr__(self, name: str) -> Any: ...

    @property
    def awaitable_history(self) -> AwaitableRow[Model]:
        """What the row does, for programs that await: ``await row.awaitable_history.restore()``."""
        return AwaitableRow(self)

    @to_be_awaited("await row.awaitable_history.{}(...)")
    def restore(self, **values: Any) -> Model:
        """Bring a deleted record back under its key, in this state, and add it to this row's session.

        It is an ordinary insert of the next flush, and continues the record's history. Relationships are left to the
        caller. Database errors, e.g. for a value that has become somebody else's, come from the flush. E.g.::

            row = session.scalars(select(history_class(User)).where(history_class(User).operation == "delete")).one()
            user = row.restore(password=make_password())

        :param values: what history does not hold (hidden and untracked attributes), or should not be as it was.
        :return: the record, pending.
        :raises ChrononautException: if the record exists, if the row is in no session, if a value is missing that
            neither history nor the database supplies, or for a value that is no attribute or part of the key.
        """
        return cast("Model", self.__chrononaut_model__.__chrononaut_restore__(self, values))

    def __repr__(self) -> str:
        state = cast("InstanceState[Any]", inspect(self))
        key = ", ".join(repr(part) for part in state.identity or ())
        return f"<{type(self).__name__} {key}>"


class AwaitableRow(Generic[Model]):
    """What :attr:`HistoryRecord.awaitable_history` gives."""

    __slots__ = ("_row",)

    def __init__(self, row: HistoryRecord[Model]) -> None:
        self._row = row

    async def restore(self, **values: Any) -> Model:
        """Bring a deleted record back: see :meth:`HistoryRecord.restore`."""
        return await run_sync(self._row, lambda: self._row.restore(**values))


class NotInHistory:
    """A hidden or untracked attribute of a history class: raises its own error."""

    def __init__(self, error: HiddenAttributeError | UntrackedAttributeError) -> None:
        self._error = error

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise type(self._error)(self._error.model, self._error.attribute)
