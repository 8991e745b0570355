"""What differs between the settings that a run was begun with and those of now, in words."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

ABSENT = "default"  # how a message calls a setting that one side does not have, since defaults are left out


def differences(there: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Return a text for each setting in which two sets of settings differ, sections taken apart.

    Args:
        ignored: dotted names of settings that may differ.
    """
    old, new = _flat(there), _flat(now)
    names = [name for name in {**new, **old} if name not in ignored]
    pairs = {name: (old.get(name, ABSENT), new.get(name, ABSENT)) for name in names}
    return [_difference(name, *pair) for name, pair in pairs.items() if pair[0] != pair[1]]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, the keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _difference(key: str, there: Any, now: Any) -> str:
    if isinstance(there, list) and isinstance(now, list):
        if len(there) != len(now):
            return f"{key}: {len(there)} there, {len(now)} now"
        place = next(place for place, pair in enumerate(zip(there, now, strict=True)) if pair[0] != pair[1])
        key, there, now = f"{key}[{place}]", there[place], now[place]
    return f"{key}: {_short(there)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
