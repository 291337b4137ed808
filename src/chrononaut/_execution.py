"""A statement that a session was told to execute, and where it goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar, cast

from sqlalchemy import Column, Connection, Result, Table, Update, literal
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Mapper, ORMExecuteState, Session
from sqlalchemy.sql.dml import UpdateBase

from chrononaut._bulk import Writer
from chrononaut._change_info import ChangeInfoSource
from chrononaut._history_table import CHANGE_INFO, CHANGED
from chrononaut._mapping import VersionedMapping
from chrononaut._transaction import SessionConfig, TransactionState, transaction_of
from chrononaut.exceptions import UntrackedStatementError

#: How often a statement is tried while others keep making rows match.
_ATTEMPTS = 5
Answer = TypeVar("Answer")


class Disagreement(Exception):
    """Other rows were written than captured."""


class Execution:
    """One statement that a session was told to execute."""

    def __init__(self, state: ORMExecuteState, config: SessionConfig) -> None:
        self.state = state
        self.session: Session = state.session
        self.config = config
        self.statement = cast("UpdateBase", state.statement)

    # --- where it is executed

    @cached_property
    def connection(self) -> Connection:
        """The connection that the statement goes to."""
        return self.session.connection(bind_arguments=dict(self.state.bind_arguments))

    @cached_property
    def transaction(self) -> TransactionState:
        """The session's transaction."""
        connection = self.connection  # begins it
        assert not connection.closed  # noqa: S101
        return transaction_of(self.session, self.config)

    @cached_property
    def writer(self) -> Writer:
        """Writes the history."""
        return Writer(self.connection, self.transaction.instant.source(self.connection))

    @cached_property
    def info(self) -> ChangeInfoSource:
        """Who changes things, and why."""
        return ChangeInfoSource(self.config.change_info, self.config.require_extra_change_info)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters of a statement that is executed once."""
        return cast("Mapping[str, Any]", self.state.parameters or {})

    @property
    def is_of_model(self) -> bool:
        """Whether it is about a mapped class, whose objects SQLAlchemy brings up to date, and not about a table."""
        return self.state.is_orm_statement and self.mapper is not None

    @cached_property
    def mapper(self) -> Mapper[Any] | None:
        """The class that it is about; None if it is about a table."""
        description = cast("Update", self.statement).entity_description
        entity = description.get("entity")
        mapper = getattr(entity, "__mapper__", None)
        return cast("Mapper[Any] | None", mapper)

    def flush(self) -> None:
        """Write what is pending first, as SQLAlchemy does before a statement."""
        if self.session.autoflush and self.state.execution_options.get("autoflush", True):
            try:
                self.session.flush()
            except InvalidRequestError as error:
                if "already flushing" not in str(error):  # executed by a listener of a flush
                    raise

    def run(self, statement: UpdateBase | None = None, parameters: Any = None) -> Result[Any]:
        """Execute it, now that it is captured."""
        with self.transaction.passing():
            result: Result[Any] = self.state.invoke_statement(statement=statement, params=parameters)
            return result

    def until_agreed(self, attempt: Callable[[bool], Answer], refusal: UntrackedStatementError) -> Answer:
        """Return the answer of an attempt to capture and execute it; again, if others have come between.

        :param attempt: told whether it is made again.
        :param refusal: raised if history and rows would not agree in the end, after what was done is undone.
        """
        last: Disagreement | None = None
        for number in range(_ATTEMPTS):
            # SQLite has one writer at a time, so that nothing comes between, and starts no transaction by a savepoint.
            savepoint = None if self.writer.dialect == "sqlite" else self.connection.begin_nested()
            try:
                answer = attempt(number > 0)
            except Disagreement as error:
                last = error
                if savepoint is None:
                    self.session.rollback()
                    break
                savepoint.rollback()
            except BaseException:
                if savepoint is not None and savepoint.is_active:
                    savepoint.rollback()
                raise
            else:
                if savepoint is not None:
                    savepoint.commit()
                return answer
        raise refusal from last

    def marks(self, table: Table, columns: Mapping[str, Column[Any]]) -> dict[Any, Any]:
        """Return what ``RecordChanges`` keeps on the live row, for a model without versions."""
        cls = self.mapper.class_ if self.mapper is not None else _Anything
        info = json.loads(self.info.of_class(cls))
        at = self.transaction.instant.value(self.connection)
        return {
            columns[CHANGE_INFO]: literal(info, columns[CHANGE_INFO].type),
            columns[CHANGED]: literal(at, columns[CHANGED].type),
        }


class _Anything:
    """Stands for the model of a table that has none."""


def mapping_in(mapping: VersionedMapping, mapper: Mapper[Any]) -> VersionedMapping:
    """Return the mapping of the class that a statement names; single-table subclasses share the table."""
    return next((each for each in mapping.family if each.mapper is mapper), mapping)


def kind_of(statement: UpdateBase) -> str:
    """Return what a statement is, e.g. ``UPDATE``."""
    return str(statement.__visit_name__).upper()
