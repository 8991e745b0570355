"""Which windows of a split a training sees: its latents are of training windows alone, those it validates on of others.

A latent that comes from a test window would make every later verdict too good, and nothing in the numbers of the
training would show it. So the latents say what they are made of, and a training reads that before its first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from LightningDiT.config import Config
from LightningDiT.data.image_files import shown
from LightningDiT.data.labels import CLASS_NAMES, CONDITION_NAMES, LATENTS_MANIFEST
from LightningDiT.data.shards import shard_files
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_json, require_regular
from LightningDiT.radar.level_images import NO_CONDITION, condition_names, open_level_files
from LightningDiT.radar.split import PARTS, Split, load_split

TRAINING, VALIDATION = "training", "validation"
EXTRACT = "python -m LightningDiT.extract_features --config YAML --levels LEVELS --split-file SPLIT --output FOLDER"
LISTED = 5  # people in a note


@dataclass(frozen=True)
class _Origin:
    """What latents say of the split that they are made of.

    Attributes:
        digest, fold, part: of the split; None: the latents know no split.
        windows: (N,) rows of the split; labels: (N,).
        conditions: (N,); None if there are none.
        class_names, condition_names: of the manifest.
    """

    folder: str
    digest: str | None
    fold: int | None
    part: str | None
    windows: Tensor | None
    labels: Tensor
    conditions: Tensor | None
    class_names: Sequence[str]
    condition_names: Sequence[str]

    @property
    def is_known(self) -> bool:
        return self.digest is not None


def check_parts(config: Config) -> list[str]:
    """Return notes about what a training sees of a split.

    Latents that know no split, and a configuration that names none, are passed: nothing is known of them.

    Raises:
        LightningDiTError: latents that are trained on have other windows than those of the part training of the fold
            that `data.split_file` and `data.fold` name (without a file: of their own fold), those of `data.valid_path`
            others than its validation windows; `data.split_file` is set and the latents know no split; or the levels
            of `data.levels_path` are of another split.
    """
    data = config.data
    split = load_split(Path(data.split_file)) if data.split_file else None
    if split:
        split.part(TRAINING, data.fold)  # refuses a fold that is not there
    if not data.data_path:
        return []
    trained = _origin(data.data_path)
    notes = _checked(trained, split, data.fold, TRAINING, config)
    if data.valid_path:
        valid = _origin(data.valid_path)
        notes += _checked(valid, split, data.fold, VALIDATION, config)
        _check_same(trained, valid)
    elif config.train.valid_share and trained.is_known:
        notes.append(
            "train.valid_share holds out windows at random, which share pixels with those that are trained on;"
            " data.valid_path takes whole passes"
        )
    if data.levels_path:
        _check_levels(config, split, trained)
    return notes + _never_trained(trained)


def _checked(origin: _Origin, split: Split | None, fold: int, part: str, config: Config) -> list[str]:
    """Refuse latents of another part, or of another split or fold than the configuration names."""
    key = "data.data_path" if part == TRAINING else "data.valid_path"
    if not shard_files(origin.folder):
        return []  # who opens them says so
    if not origin.is_known:
        if split:
            raise LightningDiTError(
                f"{key} {origin.folder} holds latents that do not say which windows of data.split_file they are of",
                EXTRACT,
            )
        return []
    if origin.part != part:
        raise LightningDiTError(
            f"{key} {origin.folder} holds latents of the part {origin.part}, those of the part {part} are expected",
            f"set {key} to latents of {part} windows",
        )
    if split is None:
        return [f"{key} holds {part} windows of fold {origin.fold} by its own words; data.split_file would check it"]
    if origin.digest != split.digest or origin.fold != fold:
        other = f"fold {origin.fold}" if origin.digest == split.digest else "another split"
        raise LightningDiTError(
            f"{key} {origin.folder} holds latents of {other}; data.split_file {config.data.split_file} and fold {fold}"
            " are set",
            f"set data.fold: {origin.fold}" if origin.digest == split.digest else EXTRACT,
        )
    _check_windows(origin, split, fold, part, key)
    return []


def _check_windows(origin: _Origin, split: Split, fold: int, part: str, key: str) -> None:
    """Compare each latent's row of the split with what that row is."""
    if origin.windows is None:
        raise LightningDiTError(f"{key} {origin.folder} has shards without the rows of the split", EXTRACT)
    numbers = origin.windows.unique().tolist()
    if numbers and not 0 <= numbers[0] <= numbers[-1] < len(split.rows):
        raise LightningDiTError(
            f"{key} {origin.folder} names rows {numbers[0]} to {numbers[-1]} of a split that has {len(split.rows)}",
            EXTRACT,
        )
    rows = [split.rows[number] for number in numbers]
    if part == TRAINING:
        split.refuse_tested([row.name for row in rows], [row.digest for row in rows], fold)
    if odd := [row for row in rows if row.parts[fold] != part]:
        raise LightningDiTError(
            f"{key} {origin.folder} holds {shown(odd[0].name)}, a window of the part {odd[0].parts[fold]}, and"
            f" {len(odd) - 1} more; {part} windows are expected",
            EXTRACT,
        )
    _check_labels(origin, split, key)


def _check_labels(origin: _Origin, split: Split, key: str) -> None:
    """Compare names, classes and conditions of the latents with those of the split's rows."""
    conditions = condition_names(split) or ()
    people = [row.person for row in split.rows]
    of_rows = [row.condition or NO_CONDITION for row in split.rows]
    for kind, owner, names, told, found, owned in (
        ("class", "person", split.people, origin.class_names, origin.labels, people),
        ("condition", "condition", conditions, origin.condition_names, origin.conditions, of_rows),
    ):
        _check_names(origin, key, kind, told, names)
        if found is None or not names:
            continue
        numbers = {name: number for number, name in enumerate(names)}
        expected = torch.tensor([numbers[name] for name in owned])[origin.windows]
        if wrong := (expected != found).nonzero().flatten().tolist():
            name = split.rows[int(origin.windows[wrong[0]])].name
            raise LightningDiTError(
                f"{key} {origin.folder}: {shown(name)} has the {kind} {int(found[wrong[0]])}, and its {owner} is"
                f" number {int(expected[wrong[0]])}",
                EXTRACT,
            )


def _check_names(origin: _Origin, key: str, kind: str, told: Sequence[str], names: Sequence[str]) -> None:
    """Refuse names that a manifest tells in another order or number than the split, unless one of both has none."""
    for at, (here, there) in enumerate(zip_longest(told, names)) if told and names else ():
        if here != there:
            words = [shown(name) if name is not None else "missing" for name in (here, there)]
            raise LightningDiTError(
                f"{key} {origin.folder}: {kind} {at} is {words[0]} by its {LATENTS_MANIFEST}, and {words[1]} by the"
                " split",
                EXTRACT,
            )


def _check_same(trained: _Origin, valid: _Origin) -> None:
    if shard_files(valid.folder) and (trained.digest, trained.fold) != (valid.digest, valid.fold):
        raise LightningDiTError(
            f"data.data_path {trained.folder} is of {_named(trained)}, data.valid_path {valid.folder} of"
            f" {_named(valid)}",
            "extract both from the same split and fold",
        )


def _named(origin: _Origin) -> str:
    return f"fold {origin.fold} of split {str(origin.digest)[:8]}" if origin.is_known else "no split"


def _check_levels(config: Config, split: Split | None, trained: _Origin) -> None:
    """Refuse levels of another split than that of `data.split_file` and the latents."""
    if split is None:
        raise LightningDiTError(
            f"data.levels_path is {config.data.levels_path}, and data.split_file is not set",
            f"set data.split_file in {config.source}",
        )
    open_level_files(Path(str(config.data.levels_path)), Path(str(config.data.split_file)))


def _never_trained(trained: _Origin) -> list[str]:
    """Return a note for classes that have a name and no latent, and one for such conditions."""
    notes = []
    for kind, numbers, names in (
        ("classes", trained.labels, trained.class_names),
        ("conditions", trained.conditions, trained.condition_names),
    ):
        there = set() if numbers is None else set(numbers.unique().tolist())
        if lacking := [name for number, name in enumerate(names) if number not in there]:
            more = f" and {len(lacking) - LISTED} more" if len(lacking) > LISTED else ""
            listed = ", ".join(map(shown, lacking[:LISTED]))
            notes.append(f"{kind} without a latent in {trained.folder}, which are never trained: {listed}{more}")
    return notes


# ---- what latents say


def _origin(folder: str) -> _Origin:
    """Return what the manifest and the shards in a folder say; raises LightningDiTError for a damaged manifest."""
    content, rows = _manifest(Path(folder)), _rows(Path(folder))
    labels = rows["labels"] if rows["labels"] is not None else torch.zeros(0, dtype=torch.long)
    about = (
        rows["windows"],
        labels,
        rows["conditions"],
        _names(content, CLASS_NAMES),
        _names(content, CONDITION_NAMES),
    )
    told = content.get("split")
    if told is None:
        return _Origin(folder, None, None, None, *about)
    try:
        digest, fold, part = str(told["digest"]), int(told["fold"]), str(told["part"])
        if part not in PARTS:
            raise ValueError(f"there is no part {part!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise LightningDiTError(
            f"{Path(folder) / LATENTS_MANIFEST} does not say which split the latents are of ({first_line(error)})",
            EXTRACT,
        ) from error
    return _Origin(folder, digest, fold, part, *about)


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / LATENTS_MANIFEST
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise LightningDiTError(
            f"the manifest {file} cannot be read ({first_line(error)})", "extract the latents again, or move it away"
        ) from error
    return content if isinstance(content, dict) else {}


def _names(content: Mapping[str, Any], key: str) -> list[str]:
    """Return names of a manifest; those of another kind are named by who reads them for use."""
    names = content.get(key)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _rows(folder: Path) -> dict[str, Tensor | None]:
    """Return labels, windows and conditions (N,) of the shards, None for what some shard has not.

    Damaged shards are passed over: `LatentShards`, which a training opens next, names them.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, list[Tensor | None]] = {"labels": [], "windows": [], "conditions": []}
    for path in shard_files(folder):
        try:
            require_regular(path)
            with safe_open(path, framework="pt") as opened:
                there = {*opened.keys()}
                rows = {name: opened.get_tensor(name).long() if name in there else None for name in found}
        except (SafetensorError, OSError, LightningDiTError):
            continue
        for name, tensor in rows.items():
            found[name].append(tensor)
    return {
        name: torch.cat(tensors) if tensors and all(one is not None for one in tensors) else None
        for name, tensors in found.items()
    }
