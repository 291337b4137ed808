"""Column types that are applied above the columns, so that generated migrations never name them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, cast

from sqlalchemy import JSON, DateTime, Dialect, Enum
from sqlalchemy.dialects.mysql import DATETIME as MYSQL_DATETIME
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator, TypeEngine

from chrononaut.exceptions import NaiveDatetimeError


def instant_type() -> TypeEngine[datetime]:
    """Return the column type of a point in time: UTC with microseconds on every backend."""
    return DateTime(timezone=True).with_variant(MYSQL_DATETIME(fsp=6), "mysql", "mariadb")


def change_info_type() -> TypeEngine[Any]:
    """Return the column type of change info."""
    return JSON().with_variant(JSONB(), "postgresql")


def as_utc(value: datetime, name: str) -> datetime:
    """Return an aware datetime in UTC.

    :param value: an aware datetime.
    :param name: the argument's name, for the error.
    :raises NaiveDatetimeError: if it is naive.
    """
    if value.tzinfo is None or value.utcoffset() is None:
        raise NaiveDatetimeError(name)
    return value.astimezone(timezone.utc)


def assume_utc(value: datetime) -> datetime:
    """Return a datetime that the database gave back, naive where it knows no zones, as aware in UTC."""
    return value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc)


class UTCDateTime(TypeDecorator[datetime]):
    """Aware datetimes in Python, UTC in the database, whether it knows time zones or not."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(instant_type())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        value = as_utc(value, "a point in time")
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else assume_utc(value)


def plain_enum(enum: Enum) -> Enum:
    """Return the same enum as plain text in the database, whatever it is there now."""
    adapt = cast("Any", enum).adapt
    return cast("Enum", adapt(Enum, native_enum=False, create_constraint=False))


class LenientEnum(TypeDecorator[Any]):
    """Members of an enum, read from plain text; a text that is no member any more comes back as it is."""

    impl = Enum
    cache_ok = True

    def __init__(self, enum: Enum) -> None:
        super().__init__()
        self.enum = enum
        self.impl = plain_enum(enum)  # type: ignore[assignment]  # TypeDecorator itself sets an instance here

    def copy(self, **kw: Any) -> LenientEnum:
        return LenientEnum(self.enum)

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        read = super().result_processor(dialect, coltype)
        if read is None:
            return None
        member = cast("Callable[[Any], Any]", read)

        def process(value: Any) -> Any:
            try:
                return member(value)
            except LookupError:
                return value

        return process
