"""The page docs/config.md and the listing on the screen: every key with type, default, meaning and readers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from LightningDiT.config import PRESET_WORDS
from LightningDiT.reference.keys import TOKENIZER, TRANSFORMER, Key, all_keys

TITLES = {
    TRANSFORMER: "Keys of a configuration",
    TOKENIZER: "Keys of a tokenizer's YAML",
}
COMMAND = "lightningdit config --write-reference"
INTRODUCTION = f"""# Every key of the YAML files

This page is written by `{COMMAND}` (or `python -m LightningDiT.command.config --write-reference`) from
the code: type and default come from the dataclasses in `LightningDiT/config.py`, `LightningDiT/tokenizer/config.py` and
`LightningDiT/tokenizer/autoencoder.py`, the meaning from the comment on the field's line, the readers from the modules
that take the value from its section. Edit it there. A key that no row names is an error, with the nearest known one.

```
lightningdit config                            # all keys, one a line
lightningdit config sample.cfg_scale           # one of them; `cfg_scale` alone finds it too, `sample` the section
python -m LightningDiT.train --help-config lr  # every entry point has the option
```

Paths in a file are relative to the folder that the file lies in; `none` is no value. "Read by" names the parts of
`LightningDiT/` that act on the value; `lightningdit config KEY` names the modules."""


def page() -> str:
    """Return the text of docs/config.md."""
    parts = [INTRODUCTION, *_presets()]
    for file, title in TITLES.items():
        keys = [key for key in all_keys() if key.file == file]
        parts += [f"## {title}", *_sections(keys)]
    return "\n\n".join(parts) + "\n"


def _presets() -> list[str]:
    rows = [f"| `{name}` | {words} |" for name, words in PRESET_WORDS.items()]
    words = (
        "`--preset NAME` of the sampling commands and of step 3 sets solver and guidance together; other options win:"
    )
    return ["## Presets of sampling", words, "\n".join(["| preset | what it sets |", "|---|---|", *rows])]


def _sections(keys: Sequence[Key]) -> list[str]:
    """Return a heading and a table for each section, in the order of the keys."""
    parts = []
    for section, group in itertools.groupby(keys, key=lambda key: key.name.rpartition(".")[0]):
        header = ["| key | type | default | meaning | read by |", "|---|---|---|---|---|"]
        parts += [f"### {f'`{section}`' if section else 'At the top'}", "\n".join([*header, *map(_row, group)])]
    return parts


def _row(key: Key) -> str:
    parts = dict.fromkeys(module.partition("/")[0].removesuffix(".py") for module in key.readers)
    readers = ", ".join(f"`{name}`" for name in parts)
    name, default = key.name.rpartition(".")[2], key.default
    cells = (f"`{name}`", key.type, f"`{default}`", key.meaning.replace("|", "\\|"), readers or "nothing")
    return f"| {' | '.join(cells)} |"


def listing() -> str:
    """Return every key with type, default and meaning, one a line."""
    keys = all_keys()
    width = max(len(key.name) for key in keys)
    lines = []
    for file, title in TITLES.items():
        lines += ["", title]
        lines += [f"  {key.name:{width}}  {key.default}: {key.meaning}" for key in keys if key.file == file]
    return "\n".join(lines[1:])
