"""Read back what chrononaut 0.3 to 0.5 wrote as JSON."""

from __future__ import annotations

import ast
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, JSON, DateTime, Enum, Interval, LargeBinary, Uuid
from sqlalchemy.types import TypeDecorator, TypeEngine

_FROM_TEXT: dict[type, Callable[[str], Any]] = {
    date: date.fromisoformat,
    time: time.fromisoformat,
    Decimal: Decimal,
    float: float,
    int: int,
    UUID: UUID,
}


def read_value(value: Any, type_: TypeEngine[Any]) -> Any:
    """Return a recorded value as the Python value that a history column of a live type takes.

    Numbers, booleans and text were written as they are, datetimes as ISO text in UTC, and everything else as what
    ``str()`` made of it.

    :raises ValueError: if it cannot be; or SyntaxError, or ArithmeticError.
    """
    if isinstance(type_, Interval) and isinstance(value, str):
        return _interval(value)
    if isinstance(type_, TypeDecorator):
        type_ = type_.impl_instance
    if value is None:
        return None
    if isinstance(type_, Enum):
        return _enum_text(value, type_)
    if not isinstance(value, str):
        return Decimal(str(value)) if _python_type(type_) is Decimal else value
    if isinstance(type_, DateTime):
        instant = datetime.fromisoformat(value)
        return instant if type_.timezone else instant.replace(tzinfo=None)
    if isinstance(type_, LargeBinary | JSON | ARRAY):
        return ast.literal_eval(value) if not isinstance(type_, JSON) else _literal(value)
    if isinstance(type_, Uuid):
        return UUID(value) if type_.as_uuid else value
    read = _FROM_TEXT.get(_python_type(type_) or str)
    return value if read is None else read(value)


def _python_type(type_: TypeEngine[Any]) -> type | None:
    try:
        return type_.python_type
    except NotImplementedError:
        return None


def _enum_text(value: Any, type_: Enum) -> Any:
    """Return the text that the database holds for a member, which was written as ``Class.member``."""
    if type_.enum_class is None or not isinstance(value, str):
        return value
    name = value.rpartition(".")[2]
    for text, member in zip(type_.enums, type_.enum_class, strict=False):
        if value == str(member) or name == member.name:
            return text
    raise ValueError(value)


def _literal(value: str) -> Any:
    """Return the list or dictionary that ``str()`` wrote; a JSON text was written as it is."""
    if value[:1] not in "[{":
        return value
    return ast.literal_eval(value)


def _interval(value: str) -> timedelta:
    days, _, clock = value.rpartition(" ")
    hours, minutes, seconds = clock.split(":")
    return timedelta(
        days=int(days.split()[0]) if days else 0, hours=int(hours), minutes=int(minutes), seconds=float(seconds)
    )
