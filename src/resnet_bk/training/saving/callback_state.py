"""What callbacks remember, in a checkpoint: by the name of their class, so that their order may change."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from resnet_bk.training.callbacks import Callback

_log = logging.getLogger(__name__)


def callback_states(callbacks: Iterable[Callback]) -> dict[str, dict[str, Any]]:
    """Name -> state of every callback that has one, in plain JSON types."""
    return {name: state for name, callback in _named(callbacks) if (state := callback.state_dict())}


def restore_callbacks(callbacks: Iterable[Callback], states: dict[str, dict[str, Any]]) -> None:
    """Give every callback what `callback_states` found; a state whose callback is gone is logged and left."""
    left = dict(states)
    for name, callback in _named(callbacks):
        if name in left:
            callback.load_state_dict(left.pop(name))
    for name in left:
        _log.warning("The checkpoint holds the state of a callback %s, which this run does not have.", name)


def _named(callbacks: Iterable[Callback]) -> list[tuple[str, Callback]]:
    """Each callback with its class's name, numbered from the second of a class on."""
    seen: Counter[str] = Counter()
    named = []
    for callback in callbacks:
        name = type(callback).__name__
        seen[name] += 1
        named.append((name if seen[name] == 1 else f"{name}-{seen[name]}", callback))
    return named
