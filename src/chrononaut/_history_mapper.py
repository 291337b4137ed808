"""Build the mapped history class of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from sqlalchemy import Column, Connection, Table, and_, event, type_coerce
from sqlalchemy.orm import Mapper, class_mapper, column_property
from sqlalchemy.orm.exc import UnmappedColumnError

from chrononaut._history_record import HistoryRecord, NotInHistory
from chrononaut._history_table import (
    BEGAN,
    CHANGE_INFO,
    CHANGED,
    OPERATION,
    VERSION,
    RecordChangesColumn,
    VersionColumn,
    build_child_history_table,
    build_history_table,
    extend_history_table,
    is_tracked,
    moved,
    register_history_table,
    required_table,
    version_column,
)
from chrononaut._mapping import VersionedMapping, VersionedTable, find_mapping, mapped_columns, set_mapping
from chrononaut._options import RESERVED, Options, read_options, reserved_name_error
from chrononaut._suppression import may_delete_history
from chrononaut._types import UTCDateTime, read_type
from chrononaut.exceptions import (
    HiddenAttributeError,
    MappingError,
    ReadOnlyError,
    UntrackedAttributeError,
)


def build_history_mapper(mapper: Mapper[Any]) -> VersionedMapping:
    """Build the history table and class of a model that was just mapped.

    :raises MappingError: if the model cannot be versioned the way it is declared.
    """
    cls = mapper.class_
    options = read_options(cls)
    live = required_table(cls, mapper.local_table)
    parent = _parent(mapper)
    if parent is None:
        _ensure_version_column(mapper, live)
    _refuse_reserved_names(mapper, live)
    hidden = _attributes(mapper, options.hidden, "hidden")
    untracked = _attributes(mapper, options.untracked, "untracked") - hidden
    _refuse_key_columns(mapper, hidden | untracked)
    tables = _tables(mapper, live, parent, options, hidden | untracked)
    mapping = VersionedMapping(
        mapper=mapper,
        history_class=_history_class(mapper, parent, hidden, untracked, options.copy_validators),
        tables=tables,
        tracked=_tracked(mapper) - hidden - untracked,
        hidden=hidden,
        untracked=untracked,
        track_inserts=options.track_inserts,
    )
    _map(mapping, parent)
    set_mapping(cls, mapping)
    return mapping


# --- what may be versioned


def _parent(mapper: Mapper[Any]) -> VersionedMapping | None:
    if mapper.inherits is None or mapper.concrete:
        return None
    parent = find_mapping(mapper.inherits.class_)
    if parent is None:
        base = mapper.base_mapper.class_.__name__
        raise MappingError(
            f"{mapper.class_.__name__} is versioned but inherits from {mapper.inherits.class_.__name__}, "
            f"which is not: half of each record would have no history. Put the Versioned mixin on {base}."
        )
    return parent


def _ensure_version_column(mapper: Mapper[Any], live: Table) -> None:
    """Give an imperatively mapped table its version; a declarative one got it from the mixin."""
    if VERSION in live.c or any(isinstance(column, VersionColumn) for column in live.c):
        return
    column = version_column()
    live.append_column(column)
    mapper.add_property(VERSION, column)


def _refuse_reserved_names(mapper: Mapper[Any], live: Table) -> None:
    for column in live.c:
        if isinstance(column, VersionColumn | RecordChangesColumn):
            continue
        taken = RESERVED & {column.key, column.name, _attribute(mapper, column)}
        if taken:
            raise reserved_name_error(mapper.class_, min(taken))


def _attributes(mapper: Mapper[Any], names: Iterable[str], option: str) -> frozenset[str]:
    return frozenset(_resolve(mapper, name, option) for name in names)


def _resolve(mapper: Mapper[Any], name: str, option: str) -> str:
    """Return the attribute of a column that an option names by attribute or by column name."""
    columns = mapped_columns(mapper)
    if name in columns:
        return name
    for attribute, column in columns.items():
        if name in (column.name, column.key):
            return attribute
    raise MappingError(
        f"{mapper.class_.__name__}.__chrononaut_{option}__ names {name!r}, which is no column of the model. "
        f"It has: {', '.join(sorted(columns))}."
    )


def _refuse_key_columns(mapper: Mapper[Any], left_out: frozenset[str]) -> None:
    needed: list[Any] = [*mapper.primary_key, *required_table(mapper.class_, mapper.local_table).primary_key]
    if isinstance(mapper.polymorphic_on, Column):
        needed.append(mapper.polymorphic_on)
    for column in needed:
        name = _attribute(mapper, column)
        if name in left_out:
            raise MappingError(
                f"{mapper.class_.__name__}.{name} identifies the record, so it cannot be hidden or untracked. "
                "Take it out of the option."
            )
    for column in (column for column in mapper.columns if isinstance(column, VersionColumn | RecordChangesColumn)):
        if _attribute(mapper, column) in left_out:
            raise MappingError(f"{mapper.class_.__name__}.{column.name} is chrononaut's own: it cannot be left out.")


def _mapped_attribute(mapper: Mapper[Any], column: Any) -> str | None:
    try:
        return mapper.get_property_by_column(column).key
    except UnmappedColumnError:
        return None


def _attribute(mapper: Mapper[Any], column: Column[Any]) -> str:
    return _mapped_attribute(mapper, column) or column.key


def _tracked(mapper: Mapper[Any]) -> frozenset[str]:
    return frozenset(name for name, column in mapped_columns(mapper).items() if is_tracked(column))


# --- its tables


def _tables(
    mapper: Mapper[Any],
    live: Table,
    parent: VersionedMapping | None,
    options: Options,
    left_out_attributes: frozenset[str],
) -> tuple[VersionedTable, ...]:
    left_out = [column for column in live.c if _attribute(mapper, column) in left_out_attributes]
    left_out_keys = {column.key for column in left_out}
    arguments = (live, options.tablename, left_out, options.disabled_indexes)
    if parent is None:
        history = build_history_table(*arguments)
        register_history_table(live, history)
        return (VersionedTable(live, history, tuple(live.primary_key), left_out_keys),)
    own = next((table for table in parent.tables if table.live is live), None)
    if own is not None:
        _refuse_late_options(mapper, own, left_out)
        extend_history_table(live, own.history, left_out)
        own.left_out.update(left_out_keys)
        return parent.tables
    history = build_child_history_table(*arguments)
    register_history_table(live, history)
    return (*parent.tables, VersionedTable(live, history, _child_key(mapper, live, parent.tables[-1]), left_out_keys))


def _refuse_late_options(mapper: Mapper[Any], table: VersionedTable, left_out: Iterable[Column[Any]]) -> None:
    for column in left_out:
        if column.key in table.history.c:
            raise MappingError(
                f"{mapper.class_.__name__} hides or does not track {column.name!r}, but the history table "
                f"{table.history.name!r}, which it shares with its base, already holds it. "
                "Name it in the option of the class that declares it."
            )


def _child_key(mapper: Mapper[Any], live: Table, parent: VersionedTable) -> tuple[Column[Any], ...]:
    key: list[Column[Any]] = []
    for column in parent.key:
        mine = next((own for own in live.primary_key if own.references(column)), None)
        if mine is None:
            raise MappingError(
                f"The primary key of {live.name!r} ({mapper.class_.__name__}) does not refer to all of that of "
                f"{parent.live.name!r} by foreign keys, so its history cannot be tied to its parent's."
            )
        key.append(mine)
    return tuple(key)


# --- its class


def _history_class(
    mapper: Mapper[Any],
    parent: VersionedMapping | None,
    hidden: frozenset[str],
    untracked: frozenset[str],
    copy_validators: bool,
) -> type[HistoryRecord[Any]]:
    cls = mapper.class_
    base: type[Any] = HistoryRecord if parent is None else parent.history_class
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": f"{cls.__qualname__}History",
        "__doc__": f"A state of a :class:`{cls.__name__}` that has ended.",
        "__chrononaut_model__": cls,
    }
    if copy_validators:
        validators = cast("Iterable[tuple[Callable[..., Any], Any]]", mapper.validators.values())
        members |= {validator.__name__: validator for validator, _ in validators}
    for name in hidden:
        members[name] = NotInHistory(HiddenAttributeError(cls.__name__, name))
    for name in untracked:
        members[name] = NotInHistory(UntrackedAttributeError(cls.__name__, name))
    return cast("type[HistoryRecord[Any]]", type(f"{cls.__name__}History", (base,), members))


def _map(mapping: VersionedMapping, parent: VersionedMapping | None) -> None:
    mapper, table = mapping.mapper, mapping.tables[-1]
    is_shared = parent is not None and table is parent.tables[-1]
    properties = _properties(mapping, is_shared)
    settings: dict[str, Any] = {}
    if parent is None:
        properties |= _own_properties(table.history)
    else:
        settings["inherits"] = parent.history_class
        if not is_shared:
            settings["inherit_condition"] = _same_state(table, parent.tables[-1])
            properties[VERSION] = [each.history.c[VERSION] for each in reversed(mapping.tables)]
    if mapper.polymorphic_on is not None:
        settings["polymorphic_identity"] = mapper.polymorphic_identity
        settings["polymorphic_abstract"] = mapper.polymorphic_abstract
        if parent is None:
            settings["polymorphic_on"] = _polymorphic_on(mapping)
    history_mapper = mapper.registry.map_imperatively(
        mapping.history_class,
        None if is_shared else table.history,
        properties=properties,
        exclude_properties=_not_mapped(mapping, parent, properties),
        **settings,
    )
    for name in ("before_insert", "before_update"):
        event.listen(history_mapper, name, _refuse_to_write)
    event.listen(history_mapper, "before_delete", _refuse_to_delete)


def _properties(mapping: VersionedMapping, is_shared: bool) -> dict[str, Any]:
    """Map each attribute of the model to the copies of its columns."""
    copies = {live: copy for table in mapping.tables for live, copy in table.copied}
    base = mapping.mapper.inherits if is_shared else None
    inherited = frozenset[Any]() if base is None else frozenset(base.columns)
    properties: dict[str, Any] = {}
    for live in mapping.tables[-1].live.c:
        name = _mapped_attribute(mapping.mapper, live)
        if name is None or live not in copies or live in inherited:
            continue
        columns = mapping.mapper.get_property_by_column(live).columns
        properties[name] = _property(columns, [copies[column] for column in columns if column in copies])
    return properties


def _columns_of(properties: dict[str, Any]) -> Iterator[Column[Any]]:
    for columns in properties.values():
        given = columns  # not narrowed: a checker forgets the type arguments then
        if isinstance(given, list):
            yield from columns


def _not_mapped(
    mapping: VersionedMapping, parent: VersionedMapping | None, properties: dict[str, Any]
) -> set[Column[Any]]:
    """Return the history columns that the mapper must leave alone: siblings', and those that expressions map."""
    mapped = set(_columns_of(properties))
    if parent is not None:
        mapped.update(mapped_columns(class_mapper(parent.history_class, configure=False)).values())
    return {column for table in mapping.tables for column in table.history.c} - mapped


def _property(live: Sequence[Any], copies: list[Column[Any]]) -> Any:
    type_ = read_type(live[0].type)
    if type_ is not live[0].type and len(copies) == 1 and not copies[0].primary_key:
        return column_property(type_coerce(copies[0], type_))
    return copies


def _own_properties(history: Table) -> dict[str, Any]:
    return {
        BEGAN: column_property(type_coerce(history.c[BEGAN], UTCDateTime())),
        CHANGED: column_property(type_coerce(history.c[CHANGED], UTCDateTime())),
        CHANGE_INFO: [history.c[CHANGE_INFO]],
        OPERATION: [history.c[OPERATION]],
        VERSION: [history.c[VERSION]],
    }


def _same_state(child: VersionedTable, parent: VersionedTable) -> Any:
    keys = zip(child.history_key, parent.history_key, strict=True)
    return and_(child.history.c[VERSION] == parent.history.c[VERSION], *(mine == theirs for mine, theirs in keys))


def _polymorphic_on(mapping: VersionedMapping) -> Any:
    live = mapping.mapper.polymorphic_on
    name = _mapped_attribute(mapping.mapper, live)
    return name if name in mapping.tracked else moved(live, mapping.base.live, mapping.base.history)


def _refuse_to_write(mapper: Mapper[Any], connection: Connection, target: object) -> None:
    """Fire before a history row is written through any session's unit of work."""
    raise ReadOnlyError(
        f"{target!r} is history, and history is read-only. To go back to an earlier state use `revert_to`; "
        "to erase history use `suppress_versioning(allow_deleting_history=True)`."
    )


def _refuse_to_delete(mapper: Mapper[Any], connection: Connection, target: object) -> None:
    """Fire before a history row is deleted through any session's unit of work."""
    if not may_delete_history():
        _refuse_to_write(mapper, connection, target)
