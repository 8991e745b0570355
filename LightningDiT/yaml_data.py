"""YAML as data: text stays text (no interpolation, no environment, no objects), and a small file stays small."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from LightningDiT.files import read_text

MOST_BYTES = 2**20
MOST_LEVELS = 100  # of brackets
MOST_NODES = 100_000  # of a document with its aliases written out
FLOAT, TIMESTAMP, MERGE = (f"tag:yaml.org,2002:{name}" for name in ("float", "timestamp", "merge"))
#: Numbers that YAML 1.1 takes for text, because the point or the sign of the exponent is missing: 1e-4, 1.5e3.
EXPONENT = re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Plain values alone; a key that is there twice is an error."""

    def fetch_flow_collection_start(self, token: type) -> None:
        if self.flow_level > MOST_LEVELS:  # found by the reader of nested brackets only after a minute
            raise ValueError("nested too deeply")
        super().fetch_flow_collection_start(token)

    def construct_document(self, node: yaml.Node) -> Any:
        _written_out(node, {}, ())
        return super().construct_document(node)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(FLOAT, EXPONENT, list("-+0123456789"))
    _kind.yaml_implicit_resolvers = {
        start: [pair for pair in pairs if pair[0] != TIMESTAMP]
        for start, pairs in _kind.yaml_implicit_resolvers.items()
    }


def _written_out(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Return how many nodes a node is with its aliases written out; raises for too many and for one within itself."""
    if id(node) in above:
        raise _error("an alias stands within itself", node)
    if id(node) not in known:
        if isinstance(node, yaml.MappingNode):
            _refuse_doubles(node)
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
        count = 1 + sum(_written_out(part, known, (*above, id(node))) for part in parts)
        if count > MOST_NODES:
            raise _error(f"more than {MOST_NODES} values", node)
        known[id(node)] = count
    return known[id(node)]


def _refuse_doubles(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            if key.value in seen:
                raise _error(f"the key {key.value!r} is there twice", key)
            seen.add(key.value)


def _error(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def read(path: str | Path) -> Any:
    """Return the values in a YAML file; {} for an empty one.

    Raises:
        OSError, ValueError, yaml.YAMLError: it cannot be read, or is no such file.
    """
    try:
        found = yaml.load(read_text(path, MOST_BYTES, "utf-8-sig"), _Loader)  # a subclass of SafeLoader
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return {} if found is None else found


def dump(values: Any) -> str:
    """Return plain values as YAML, the keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
