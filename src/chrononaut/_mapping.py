"""What is versioned of a model: the hand-off between mapping a class and everything that reads or writes history."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import Column, ColumnElement, MetaData, Table
from sqlalchemy.orm import Mapper

from chrononaut._change_info import ChangeInfoHooks
from chrononaut._history_table import CHANGED_ATTRIBUTE, VERSION, LockColumn, VersionColumn, is_tracked
from chrononaut._options import find_mapper
from chrononaut.exceptions import ChrononautException, MappingError

if TYPE_CHECKING:
    from chrononaut._history_record import HistoryRecord

_ATTRIBUTE = "__chrononaut_mapping__"
_INFO_KEY = "chrononaut.mappings"
_MODELS = "chrononaut_models"
Statement = TypeVar("Statement")


@dataclass(frozen=True, eq=False)
class VersionedTable:
    """A live table and its history.

    :param live: the live table.
    :param history: its history table.
    :param key: the live table's primary key, in the order of the base table's.
    :param left_out: keys of the live columns that are hidden or untracked.
    """

    live: Table
    history: Table
    key: tuple[Column[Any], ...]
    left_out: set[str]
    _statements: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any], repr=False)

    def statement(self, build: Callable[..., Statement], *arguments: Hashable) -> Statement:
        """Return ``build(self, *arguments)``, built once for as long as the tables stay as they are."""
        memo = (build, len(self.live.c), *arguments)
        if memo not in self._statements:
            self._refuse_late_columns()
            self._statements[memo] = build(self, *arguments)
        return cast("Statement", self._statements[memo])

    def _refuse_late_columns(self) -> None:
        for column in self.live.c:
            if is_tracked(column) and column.key not in self.history.c and column.key not in self.left_out:
                raise MappingError(
                    f"Column {self.live.name}.{column.name} was added after the class was mapped, so the history table "
                    "does not have it. Declare it in the body of the class."
                )

    @property
    def history_key(self) -> tuple[Column[Any], ...]:
        """The primary key of history, without the version."""
        return tuple(self.history.c[column.key] for column in self.key)

    @cached_property
    def live_version(self) -> Column[int] | None:
        """The live table's version; None for a joined-inheritance child, whose base has it."""
        return next((column for column in self.live.c if isinstance(column, VersionColumn)), None)

    @property
    def copied(self) -> list[tuple[Column[Any], Column[Any]]]:
        """The columns that history copies, the key's included: (live, history)."""
        copies = ((self.live.c.get(column.key), column) for column in self.history.c)
        return [(live, copy) for live, copy in copies if live is not None and is_tracked(live)]


@dataclass(frozen=True, eq=False)
class VersionedMapping:
    """How one model is versioned.

    :param mapper: the live mapper.
    :param history_class: the generated class of its history rows.
    :param tables: its tables, the base's first.
    :param tracked: names of the attributes whose value history holds.
    :param hidden: names of the attributes whose changes are versions but whose values stay in the live row.
    :param untracked: names of the attributes that history ignores.
    :param track_inserts: whether births are recorded.
    """

    mapper: Mapper[Any]
    history_class: type[HistoryRecord[Any]]
    tables: tuple[VersionedTable, ...]
    tracked: frozenset[str]
    hidden: frozenset[str]
    untracked: frozenset[str]
    track_inserts: bool

    @property
    def name(self) -> str:
        """The model's name."""
        return self.mapper.class_.__name__

    @property
    def base(self) -> VersionedTable:
        """The table that holds the version."""
        return self.tables[0]

    @property
    def hooks(self) -> type:
        """The class whose hooks tell the change info."""
        return self.mapper.class_

    @cached_property
    def noticed(self) -> frozenset[str]:
        """Names of the attributes whose changes make a version."""
        names = self.tracked | self.hidden | {VERSION}
        return names | self.untracked if self._is_touched_by_any_update else names

    @cached_property
    def comparisons(self) -> dict[str, Callable[[Any, Any], bool]]:
        """How values of the noticed attributes are compared, as the unit of work does."""
        columns = self.mapper.columns
        return {name: columns[name].type.compare_values for name in self.noticed}

    @cached_property
    def bookkeeping(self) -> tuple[str, ...]:
        """Names of our own attributes that must be known before a version can be made."""
        return (VERSION, CHANGED_ATTRIBUTE) if CHANGED_ATTRIBUTE in self.mapper.columns else (VERSION,)

    @cached_property
    def _is_touched_by_any_update(self) -> bool:
        # A tracked `updated_at` changes whenever anything of the row does, so that is a version then.
        return any(
            live.onupdate is not None or live.server_onupdate is not None
            for table in self.tables
            for live, _ in table.copied
        )

    @cached_property
    def bookkept(self) -> frozenset[str]:
        """The same names, as a set."""
        return frozenset(self.bookkeeping)

    @cached_property
    def has_marks(self) -> bool:
        """Whether the model is ``RecordChanges`` too."""
        return len(self.bookkeeping) > 1

    @cached_property
    def discriminator(self) -> Column[Any] | None:
        """The live column that tells a record's class; None where there is none, or an expression tells it."""
        column = self.mapper.polymorphic_on
        return column if isinstance(column, Column) and column.table is self.base.live else None

    @cached_property
    def lock(self) -> str | None:
        """The name of the attribute that locks a record; None if the model is not ``Lockable``."""
        columns = mapped_columns(self.mapper).items()
        name, column = next(((n, c) for n, c in columns if isinstance(c, LockColumn)), (None, None))
        if column is not None and column.table is not self.base.live:
            raise MappingError(
                f"{self.name} is Lockable but {self.base.live.name!r}, the table that its versions are counted in, "
                "has no lock. Put the Lockable mixin on the base of the hierarchy."
            )
        return name

    @property
    def lock_column(self) -> ColumnElement[bool] | None:
        """The live column that locks a record, even if only another class of the hierarchy has it."""
        return next((column for column in self.base.live.c if isinstance(column, LockColumn)), None)

    @property  # not cached: a subclass may still be declared
    def family(self) -> tuple[VersionedMapping, ...]:
        """The mapping itself and those of the subclasses that share its base table."""
        return tuple(self._family())

    def _family(self) -> Iterator[VersionedMapping]:
        for mapper in self.mapper.self_and_descendants:
            mapping = find_mapping(mapper.class_)
            if mapping is not None and mapping.base is self.base:
                yield mapping

    @property
    def family_tables(self) -> tuple[VersionedTable, ...]:
        """The tables that a row of this model may be spread over, the base's first."""
        return tuple(dict.fromkeys(table for mapping in self.family for table in mapping.tables))

    @cached_property
    def key_attributes(self) -> tuple[str, ...]:
        """Names of the primary key attributes, in the key's order."""
        return tuple(self.mapper.get_property_by_column(column).key for column in self.mapper.primary_key)


def mapped_columns(mapper: Mapper[Any]) -> dict[str, Column[Any]]:
    """Return the columns that a model maps, by attribute; its SQL expressions are left out."""
    everything = cast("Iterable[tuple[str, Any]]", mapper.columns.items())
    return {name: column for name, column in everything if isinstance(column, Column)}


def set_mapping(cls: type, mapping: VersionedMapping) -> None:
    """Make a mapping the one of a class."""
    setattr(cls, _ATTRIBUTE, mapping)
    table = mapping.tables[-1]
    table.live.metadata.info.setdefault(_INFO_KEY, []).append(mapping)
    models = table.live.metadata.info.setdefault(_MODELS, {})
    # The subclasses of single-table inheritance come after their base, whose table it is.
    models.setdefault(table.live, mapping)
    models.setdefault(table.history, mapping)


def versioned_mappings(metadata: MetaData) -> list[VersionedMapping]:
    """Return how the models whose tables are in a collection are versioned, bases before their subclasses."""
    return list(metadata.info.get(_INFO_KEY, ()))


def target_of(statement: Any) -> Any:
    """Return what an INSERT, UPDATE or DELETE changes: the table itself, where SQLAlchemy has it in a wrapper."""
    target: Any = statement.table
    return target if not isinstance(target, Table) else cast("Any", target).metadata.tables.get(target.key, target)


def model_of(table: object) -> VersionedMapping | None:
    """Return how the model of a live or history table is versioned; None if it is not."""
    models: Mapping[Any, VersionedMapping] = table.metadata.info.get(_MODELS, {}) if isinstance(table, Table) else {}
    return models.get(table)


def find_mapping(cls: type) -> VersionedMapping | None:
    """Return how a class is versioned; None if it is not, or not mapped (yet)."""
    mapping: VersionedMapping | None = vars(cls).get(_ATTRIBUTE)
    return mapping


def mapping_of(cls: type) -> VersionedMapping:
    """Return how a class is versioned.

    :raises ChrononautException: if it is not.
    """
    mapping = find_mapping(cls)
    if mapping is None:
        mapper = find_mapper(cls)
        if mapper is None:
            why = "is not mapped"
        elif not isinstance(mapper.local_table, Table):
            why = "has no table of its own. Its subclasses may have one"
        else:
            why = "does not have the `Versioned` mixin"
        raise ChrononautException(f"{cls.__name__} has no history: it {why}.")
    return mapping


def versioned_models() -> Iterator[VersionedMapping]:
    """Yield how each versioned model of this program is versioned; a base before what inherits from it."""
    seen: set[type] = set()
    classes: list[type] = [ChangeInfoHooks]
    for cls in classes:
        subclasses: list[type] = cls.__subclasses__()
        for subclass in subclasses:
            if subclass not in seen:
                seen.add(subclass)
                classes.append(subclass)
        mapping = find_mapping(cls)
        # A class outlives its registry for a while.
        if mapping is not None and find_mapper(cls) is mapping.mapper:
            yield mapping
