"""The mixin that keeps on the live row who changed it last, and when."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, event, type_coerce
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import InstanceState, Mapped, Mapper, declared_attr

from chrononaut._change_info import ChangeInfoHooks
from chrononaut._flush import flush_of
from chrononaut._history_table import CHANGE_INFO, CHANGED, CHANGED_ATTRIBUTE, RecordChangesColumn, declared_column
from chrononaut._mapping import find_mapping
from chrononaut._options import after_mapping
from chrononaut._types import UTCDateTime, assume_utc, change_info_type, instant_type
from chrononaut.typing import ChangeInfo


class RecordChanges(ChangeInfoHooks):
    """Keep on each row who changed it last and when, in the columns ``change_info`` and ``changed``.

    Alone, they are set at every insert and update. On a model that is ``Versioned`` too, they are set whenever a
    version is made, and live ``changed`` is what history calls ``began``. E.g.::

        class Page(RecordChanges, Base):
            __tablename__ = "page"
            id: Mapped[int] = mapped_column(primary_key=True)
            text: Mapped[str]

        session.scalars(select(Page).where(Page.changed >= yesterday))
    """

    if TYPE_CHECKING:
        change_info: Mapped[ChangeInfo | None]
        """Who changed the row last, and why; None if it was not changed since it has this column."""
        changed: Mapped[datetime | None]
        """When the row was changed last: UTC, aware; None if it was not changed since it has this column."""
    else:

        @declared_attr
        def change_info(cls):  # documented above
            return declared_column(cls, RecordChangesColumn(CHANGE_INFO, change_info_type()))

        @declared_attr
        def _chrononaut_changed(cls):
            return declared_column(cls, RecordChangesColumn(CHANGED, instant_type(), key=CHANGED))

        @hybrid_property
        def changed(self) -> datetime | None:  # documented above
            value = getattr(self, CHANGED_ATTRIBUTE)
            return None if value is None else assume_utc(value)

        @changed.inplace.expression
        @classmethod
        def _changed_expression(cls) -> ColumnElement[datetime | None]:
            return type_coerce(getattr(cls, CHANGED_ATTRIBUTE), UTCDateTime())

    def __init_subclass__(cls, **kw: Any) -> None:
        super().__init_subclass__(**kw)
        after_mapping(cls, _after_mapper_constructed)


def _after_mapper_constructed(mapper: Mapper[Any], cls: type) -> None:
    """Fire when the mapper of a class was made, before its relationships are resolved."""
    event.listen(mapper, "mapper_configured", _mapper_configured)


def _mapper_configured(mapper: Mapper[Any], cls: type) -> None:
    """Fire once, before the first use of the class."""
    if find_mapping(cls) is None:  # a versioned class has its marks set with its versions
        event.listen(mapper, "before_insert", _before_write, raw=True)
        event.listen(mapper, "before_update", _before_write, raw=True)


def _before_write(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    """Fire before a record is inserted, or updated, or only looked at because something about it was touched."""
    flush = flush_of(state)
    if flush is not None:
        flush.collect_marks(connection, state)
