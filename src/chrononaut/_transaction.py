"""What a session knows: how it is configured, and the one instant of its transaction."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, NamedTuple, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    DateTime,
    Text,
    bindparam,
    case,
    func,
    literal_column,
    select,
    type_coerce,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import InstanceState, Session, SessionTransaction
from sqlalchemy.sql.dml import UpdateBase

from chrononaut._dialect import is_mariadb
from chrononaut._hearing import Hearer, stop_hearing
from chrononaut._types import UTCDateTime, as_utc
from chrononaut.exceptions import UnattachedSessionError
from chrononaut.typing import ChangeInfoProvider, Clock

_CONFIG = "_chrononaut_config"
_TRANSACTION = "_chrononaut_transaction"
#: The key of what belongs to the past: the execution option of the statements that read it, for one.
PAST = "chrononaut_past"
#: The execution option of our own statements, which must not be captured in turn.
OWN = {"chrononaut_own": True}
_SETTING = "chrononaut.at"


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What ``versioned_session`` was told."""

    change_info: ChangeInfoProvider | None = None
    require_extra_change_info: bool | Callable[[], bool] = False
    clock: Clock | None = None


def configure(target: Session | type[Session], config: SessionConfig) -> None:
    """Remember a configuration: an instance's own wins over its class's."""
    if isinstance(target, type):
        setattr(target, _CONFIG, config)
    else:
        target.info[_CONFIG] = config


def configured(target: Session | type[Session]) -> SessionConfig | None:
    """Return how a session or a class of sessions is configured; None if it was never attached."""
    if isinstance(target, type):
        return cast("SessionConfig | None", getattr(target, _CONFIG, None))
    return target.info.get(_CONFIG) or configured(type(target))


def find_config(session: Session | None) -> SessionConfig | None:
    """Return how the session of something is configured; None if there is none, or it was never attached."""
    return None if session is None else configured(session)


def config_of(session: Session | None, model: type) -> SessionConfig:
    """Return how a session is configured.

    :raises UnattachedSessionError: if it was never attached.
    """
    config = find_config(session)
    if config is None:
        raise UnattachedSessionError(model.__name__)
    return config


InstantKind = Literal["value", "setting"]


class InstantSource(NamedTuple):
    """How a statement learns the instant: the kind of its expression, and the parameters of that."""

    kind: InstantKind
    parameters: dict[str, Any]


@dataclass(slots=True)
class Instant:
    """The point in time of everything that one transaction changes; taken at its first versioned write.

    On a server database it is the database's clock. MariaDB is asked once for each transaction. PostgreSQL takes it
    inside the statement that needs it, without a round trip, and keeps it in a setting that ends with the transaction.
    The setting is tagged, so that sessions that work one after the other inside one outer transaction each have their
    own.
    """

    _clock: Clock | None
    _tag: str = field(default_factory=lambda: secrets.token_hex(8))
    _value: datetime | None = None
    _kept_by: Connection | None = None

    def source(self, connection: Connection) -> InstantSource:
        """Return the instant for use in a statement."""
        if self._value is None and self._kept_by not in (None, connection):
            self.value(self._kept_by)  # a transaction on several databases has one instant too
        if self._value is None and (self._clock is not None or connection.dialect.name != "postgresql"):
            self._value = self._now(connection)
        if self._value is not None:
            return InstantSource("value", {"chrononaut_instant": self._value})
        self._kept_by = connection
        return InstantSource("setting", {"chrononaut_tag": self._tag})

    def value(self, connection: Connection) -> datetime:
        """Return the instant itself; costs a round trip where only the database has it."""
        source = self.source(connection)
        if self._value is None:
            statement = select(type_coerce(instant_expression(source.kind), UTCDateTime()))
            self._value = connection.execute(statement, source.parameters).scalar_one()
        return self._value

    def _now(self, connection: Connection) -> datetime:
        if self._clock is not None:
            return as_utc(self._clock(), "what the session's clock returned")
        if is_mariadb(connection.dialect.name):
            return connection.execute(select(literal_column("UTC_TIMESTAMP(6)", UTCDateTime()))).scalar_one()
        return datetime.now(timezone.utc)


def instant_expression(kind: InstantKind) -> ColumnElement[datetime]:
    """Return the expression of the instant, for the parameters of its source."""
    if kind == "value":
        return bindparam("chrononaut_instant", type_=UTCDateTime())
    # PostgreSQL: the setting if this transaction has made it, else the clock's time, kept in the setting.
    tag = bindparam("chrononaut_tag", type_=Text()).concat("|")
    setting = func.current_setting(_SETTING, True, type_=Text())
    taken = func.set_config(_SETTING, tag.concat(sql_cast(func.clock_timestamp(), Text)), True, type_=Text())
    text = case((func.starts_with(setting, tag), setting), else_=taken)
    return select(sql_cast(func.split_part(text, "|", 2), DateTime(timezone=True))).scalar_subquery()


@dataclass(slots=True)
class TransactionState:
    """What a session knows about its current transaction.

    :param root: the transaction.
    :param instant: when everything that it changes happens.
    :param hearers: who hears what is executed on its connections.
    :param rewrite: what makes the next statement write the version too.
    :param listed: the objects that an UPDATE by primary key gave new values, which a savepoint's rollback takes back.
    """

    root: SessionTransaction | None
    instant: Instant
    hearers: dict[Connection, tuple[Hearer, ...]] = field(default_factory=dict[Connection, tuple[Hearer, ...]])
    rewrite: Callable[[UpdateBase], UpdateBase] | None = None
    listed: list[InstanceState[Any]] = field(default_factory=list["InstanceState[Any]"])
    _passing: int = 0

    @property
    def lets_pass(self) -> bool:
        """Whether what is being executed is our own, or captured already."""
        return self._passing > 0

    @contextmanager
    def passing(self) -> Generator[None]:
        """Let all statements pass until the block ends."""
        self._passing += 1
        try:
            yield
        finally:
            self._passing -= 1


def is_own(options: Mapping[str, Any]) -> bool:
    """Tell by the execution options of a statement whether it is one of ours."""
    return not OWN.keys().isdisjoint(options)


def transaction_of(session: Session, config: SessionConfig) -> TransactionState:
    """Return the state of a session's current transaction; it ends with the transaction."""
    root = session.get_transaction()
    state = cast("TransactionState | None", session.info.get(_TRANSACTION))
    if state is None or state.root is not root:
        state = session.info[_TRANSACTION] = TransactionState(root, Instant(config.clock))
    return state


def expire_listed(session: Session) -> None:
    """Expire the objects that an UPDATE by primary key gave new values: SQLAlchemy leaves them as they are."""
    state = cast("TransactionState | None", session.info.get(_TRANSACTION))
    for each in state.listed if state is not None else ():
        target = each.obj()
        if target is not None and target in session:
            session.expire(target)


def forget_transaction(session: Session) -> None:
    """Forget a transaction that has ended, and stop hearing its connections."""
    state = cast("TransactionState | None", session.info.pop(_TRANSACTION, None))
    if state is None:
        return
    for connection, hearers in state.hearers.items():
        if not connection.closed:
            stop_hearing(connection, hearers)
    state.hearers.clear()  # or a closed connection, its hearers and this would hold one another
