"""Foreign keys that a flush sets by a second UPDATE (``post_update``), of which no mapper event tells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from sqlalchemy.orm import InstanceState, Mapper, RelationshipDirection, RelationshipProperty, Session, class_mapper
from sqlalchemy.orm.attributes import instance_state

from chrononaut._mapping import find_mapping


def find_post_updates(session: Session) -> dict[InstanceState[Any], frozenset[str]]:
    """Return the versioned records whose foreign keys the coming flush will set so, and the attributes of these."""
    found: dict[InstanceState[Any], frozenset[str]] = defaultdict(frozenset)
    changed: list[object] = [*session.new, *session.dirty, *session.deleted]
    relationships = {cls: _post_updating(class_mapper(cls)) for cls in set(map(type, changed))}
    if not any(relationships.values()):
        return found
    deleted = {instance_state(obj) for obj in session.deleted}
    for obj in changed:
        state = instance_state(obj)
        for relationship in relationships[type(obj)]:
            _add(found, state, relationship, is_deleted=state in deleted)
    return found


def _post_updating(mapper: Mapper[Any]) -> list[RelationshipProperty[Any]]:
    return [each for each in mapper.relationships if each.post_update]


def _add(
    found: dict[InstanceState[Any], frozenset[str]],
    state: InstanceState[Any],
    relationship: RelationshipProperty[Any],
    is_deleted: bool,
) -> None:
    value = state.attrs[relationship.key]
    history = value.load_history() if is_deleted else value.history
    if relationship.direction is RelationshipDirection.MANYTOONE:
        if is_deleted or history.added or history.deleted:
            _add_attributes(found, state, relationship.local_columns)
    else:
        for child in history.sum() if is_deleted else (*history.added, *history.deleted):
            if child is not None:
                _add_attributes(found, instance_state(child), relationship.remote_side)


def _add_attributes(
    found: dict[InstanceState[Any], frozenset[str]], state: InstanceState[Any], columns: Iterable[Any]
) -> None:
    mapping = find_mapping(state.class_)
    if mapping is None or not state.persistent:
        return
    keys = (mapping.mapper.get_property_by_column(column).key for column in columns)
    names = mapping.noticed.intersection(keys) - frozenset(mapping.key_attributes)
    if names:
        found[state] |= names
