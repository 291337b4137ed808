"""Column types that are applied above the columns, so that generated migrations never name them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, Protocol, cast

from sqlalchemy import ARRAY, JSON, Boolean, DateTime, Dialect, Enum, String
from sqlalchemy.dialects.mysql import DATETIME as MYSQL_DATETIME
from sqlalchemy.dialects.postgresql import DOMAIN, JSONB
from sqlalchemy.dialects.postgresql import dialect as postgresql_dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from chrononaut.exceptions import NaiveDatetimeError

#: Wide enough for members that are added later.
_ENUM_LENGTH = 255


def instant_type() -> TypeEngine[datetime]:
    """Return the column type of a point in time: UTC with microseconds on every backend."""
    return DateTime(timezone=True).with_variant(MYSQL_DATETIME(fsp=6), "mysql", "mariadb")


def change_info_type() -> TypeEngine[Any]:
    """Return the column type of change info."""
    jsonb = JSONB()
    # Alembic, generating on another database, would render this default as a name that the migration does not import.
    vars(jsonb)["astext_type"] = None
    return JSON().with_variant(jsonb, "postgresql")


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


class _ResultProcessor(Protocol):
    """Makes a point in time of what a driver returns."""

    def __call__(self, value: Any) -> datetime | None: ...


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

    def result_processor(self, dialect: Dialect, coltype: object) -> _ResultProcessor | None:
        # To read many states is to read many of these: SQLite's text becomes one in one step.
        return _from_text if dialect.name == "sqlite" else super().result_processor(dialect, coltype)


def _from_text(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value + "+00:00")


def stored_type(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type of a history column: it stores the same values, tied to nothing that may change later."""
    given: Any = type_  # not narrowed: a checker forgets the type arguments then
    if isinstance(type_, Enum):
        return String(max(given.length or 0, _ENUM_LENGTH))
    if isinstance(type_, TypeDecorator):
        stored = stored_type(given.impl_instance)
        return type_ if stored is given.impl_instance else stored
    if isinstance(type_, Boolean):
        return Boolean() if type_.create_constraint else type_
    if isinstance(type_, DOMAIN):
        return stored_type(given.data_type)
    if isinstance(type_, ARRAY):
        return _of_items(given, stored_type(given.item_type))
    if isinstance(type_, String) and isinstance(type_.dialect_impl(cast("Any", postgresql_dialect)()), Enum):
        return String(max(type_.length or 0, _ENUM_LENGTH))  # a native enum as a variant
    return type_


def read_type(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type that is applied above a history column, to make the same Python values as the live column's."""
    given: Any = type_
    if isinstance(type_, Enum):
        return LenientEnum(type_)
    if isinstance(type_, TypeDecorator):
        read = read_type(given.impl_instance)
        if read is given.impl_instance:
            return type_
        decorator = given.copy()
        decorator.impl = read
        return cast("TypeEngine[Any]", decorator)
    if isinstance(type_, ARRAY):
        return _of_items(given, read_type(given.item_type))
    return type_


def _of_items(array: Any, items: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return an array type with another type of items; the same where they are the same."""
    adapted: TypeEngine[Any] = array if items is array.item_type else array.adapt(type(array), item_type=items)
    return adapted


def plain_enum(enum: Enum) -> Enum:
    """Return the same enum as plain text in the database, whatever it is there now."""
    adapt = cast("Any", enum).adapt
    plain = adapt(Enum, native_enum=False, create_constraint=False, length=max(enum.length or 0, _ENUM_LENGTH))
    return cast("Enum", plain)


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
