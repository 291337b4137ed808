"""Who is changing things, and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType, TracebackType
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.orm import InstanceState

from chrononaut.exceptions import ChangeInfoError, ChrononautException
from chrononaut.typing import ChangeInfo, ChangeInfoProvider

_extra: ContextVar[Mapping[str, Any]] = ContextVar("chrononaut_extra_change_info", default=MappingProxyType({}))
_APPENDED = "chrononaut_appended_change_info"


@contextmanager
def extra_change_info(**info: Any) -> Generator[None]:
    """Record extra information with every change that is captured until the block ends.

    It stands under ``extra`` in the change info, in this thread or task only. Blocks nest: an inner one
    adds to the outer, and wins for the same name. E.g.::

        with extra_change_info(ticket="SUP-4711"):
            user.email = "new@example.org"
            session.commit()

    :param info: what to record; JSON must be able to hold it.
    """
    token = _extra.set({**_extra.get(), **info})
    try:
        yield
    finally:
        _extra.reset(token)


@contextmanager
def rationale(text: str) -> Generator[None]:
    """Record why things are changed, with every change that is captured until the block ends.

    The same as ``extra_change_info(rationale=text)``.

    :param text: the reason.
    """
    with extra_change_info(rationale=text):
        yield


class append_change_info:  # noqa: N801  # reads as a function, like contextlib's own
    """Record extra information with the next version of one object.

    It stays on the object until its next version is written, then it is spent. Used as a context
    manager, an exception in the block withdraws it. E.g.::

        with append_change_info(user, ticket="SUP-4711"):
            user.email = "new@example.org"
        session.commit()

    :param obj: an instance of a versioned or ``RecordChanges`` model.
    :param info: what to record, under ``extra``; JSON must be able to hold it.
    :raises ChrononautException: if the object is not mapped.
    """

    def __init__(self, obj: object, /, **info: Any) -> None:
        state = inspect(obj, raiseerr=False)
        if not isinstance(state, InstanceState):
            raise ChrononautException(f"append_change_info() needs a mapped object, not {type(obj).__name__}.")
        self._notes: dict[str, Any] = state.info
        self._before: Mapping[str, Any] | None = self._notes.get(_APPENDED)
        self._notes[_APPENDED] = {**(self._before or {}), **info}

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            return
        if self._before is None:
            self._notes.pop(_APPENDED, None)
        else:
            self._notes[_APPENDED] = self._before


def _appended_info(state: InstanceState[Any]) -> Mapping[str, Any] | None:
    """Return what was appended to an object."""
    # Not state.info: it makes a dictionary for each object that has none.
    notes = vars(state).get("info")
    return None if notes is None else notes.get(_APPENDED)


class ChangeInfoHooks:
    """The hooks that a model class may override to say itself who is changing it.

    What an overridden hook returns wins over the session's provider, for the keys that hook gives.
    Override them as class methods where the model is changed by statements too.
    """

    @classmethod
    def _capture_change_info(cls) -> Mapping[str, Any]:
        """Return all of the change info but ``extra`` and ``hidden_cols_changed``."""
        return {}

    @classmethod
    def _fetch_current_user_id(cls) -> str | None:
        """Return the ``user_id``."""
        return None

    @classmethod
    def _fetch_remote_addr(cls) -> str | None:
        """Return the ``remote_addr``."""
        return None

    @classmethod
    def _get_custom_change_info(cls) -> Mapping[str, Any]:
        """Return the application's own keys."""
        return {}


#: The hooks, the most general first.
_HOOKS = tuple(name for name in vars(ChangeInfoHooks) if name.startswith(("_capture", "_fetch", "_get")))
_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False)


class ChangeInfoSource:
    """Compose the change info of one flush or statement; asks the provider once.

    :param provider: the session's provider.
    :param require_extra: refuse changes without extra info; a callable decides it now.
    """

    def __init__(self, provider: ChangeInfoProvider | None, require_extra: bool | Callable[[], bool]) -> None:
        self._require_extra = require_extra() if callable(require_extra) else require_extra
        self._extra = dict(_extra.get())
        self._provided: ChangeInfo = {"user_id": None, "remote_addr": None, **(provider() if provider else {})}
        self._texts: dict[tuple[type, frozenset[str]], str] = {}
        self._hooks: dict[type, tuple[str, ...]] = {}
        self._appended_to: set[InstanceState[Any]] = set()

    def of_object(
        self,
        state: InstanceState[Any],
        hidden: frozenset[str] = frozenset(),
        previous_key: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the change info of a change to an object, as JSON text.

        :param hidden: names of the hidden columns that change.
        :param previous_key: the key that the record had before this birth, if that is why it was born.
        """
        cls = state.class_
        appended = _appended_info(state) if "info" in vars(state) else None
        if appended is None and previous_key is None:
            text = self._texts.get((cls, hidden))
            if text is not None:
                return text
        else:
            self._appended_to.add(state)
        text = self._text(state.obj(), cls, appended, hidden, previous_key)
        if appended is None and previous_key is None and not self._hooks_of(cls):
            self._texts[cls, hidden] = text
        return text

    def check(self, state: InstanceState[Any]) -> bool:
        """Refuse the change of an object if its change info will be refused.

        :return: whether that settles it for all objects of the class, but for those with appended info.
        :raises ChangeInfoError: if it is required but missing, or JSON cannot hold it.
        """
        self.of_object(state)
        return _appended_info(state) is None and not self._hooks_of(state.class_)

    def spend_appended(self) -> None:
        """Forget what was appended to objects, now that their versions are written."""
        for state in self._appended_to:
            state.info.pop(_APPENDED, None)

    def of_class(self, cls: type, hidden: Iterable[str] = ()) -> str:
        """Return the change info of a statement that changes records of a class, as JSON text."""
        return self._text(cls, cls, None, frozenset(hidden), None)

    def _text(
        self,
        target: Any,
        cls: type,
        appended: Mapping[str, Any] | None,
        hidden: frozenset[str],
        previous_key: Mapping[str, Any] | None,
    ) -> str:
        info = {**self._provided, **self._from_hooks(target, cls)}
        extra = {**info.get("extra", {}), **self._extra, **(appended or {})}
        if self._require_extra and not extra:
            raise ChangeInfoError(
                f"A change to {cls.__name__} has no extra change info, which this session requires. "
                "Make it inside `with rationale(...)` or `with extra_change_info(...)`."
            )
        if extra:
            info["extra"] = extra
        if hidden:
            info["hidden_cols_changed"] = sorted(hidden)
        if previous_key is not None:
            info["previous_key"] = previous_key
        return _as_json(info, cls)

    def _from_hooks(self, target: Any, cls: type) -> ChangeInfo:
        info: ChangeInfo = {}
        for hook in self._hooks_of(cls):
            method = getattr(target, hook)
            # A hook that is an ordinary method can still speak for a statement: there is no instance then.
            given = method() if getattr(method, "__self__", None) is not None else method(target)
            if hook == "_fetch_current_user_id":
                info["user_id"] = given
            elif hook == "_fetch_remote_addr":
                info["remote_addr"] = given
            else:
                info |= given
        return info

    def _hooks_of(self, cls: type) -> tuple[str, ...]:
        """Return the hooks that a class overrides, the most general first."""
        if cls not in self._hooks:
            self._hooks[cls] = tuple(name for name in _HOOKS if _is_overridden(cls, name))
        return self._hooks[cls]


def _is_overridden(cls: type, hook: str) -> bool:
    for base in cls.__mro__:
        if hook in vars(base):
            return base is not ChangeInfoHooks
    return False


def _as_json(info: ChangeInfo, cls: type) -> str:
    try:
        text = _ENCODER.encode(info)
        text.encode()
    except (TypeError, ValueError) as error:
        raise ChangeInfoError(
            f"The change info of a change to {cls.__name__} holds what JSON cannot hold ({error}). "
            "Pass text, numbers, booleans, None, lists and dicts with text keys."
        ) from error
    return text
