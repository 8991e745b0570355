"""Start from weights that were trained for other classes, channels or sizes.

A file of the same shapes is loaded strictly. Otherwise each tensor is taken, resized or new, and the plan lists it:

| part | with another … | becomes |
|---|---|---|
| class table | classes | the rows of the same name if the file has names, and new ones; the null class is taken |
| condition table | none in the file | new, zero: without a change of the prediction |
| condition table | none in the model | its null row is added to all rows of the class table |
| augmentation layer | none in the file | new, zero |
| patch embedding, final layer | number of channels | the shared channels' weights; further channels start at zero |
| position table, rotary tables | latent size | computed for the new size; a learnt table is interpolated |
| norms of queries and keys | `use_qknorm` | new, or left out |

So the model's first prediction of the shared channels is the old model's, whatever the further channels hold.

New rows of the class table start as `train.new_classes` says: as the mean of the table; as the null row, which has seen
every class; or at random, small. `studies/adapter_study.py` compares them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from LightningDiT.checkpoint import CheckpointInfo, check_kinds, inspect, load_into, load_weights
from LightningDiT.data.labels import CONDITION_NAMES, Names, names_of_model
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import Network, NetworkSettings, model_differences, network_name, settings_from_shapes
from LightningDiT.models.lightningdit import LightningDiTSettings
from LightningDiT.models.positions import sincos_table

TAKEN, CHANGED, RESIZED, NEW, LEFT_OUT = "taken", "changed", "resized", "new", "left out"
CHANGEABLE = ("num_classes", "in_channels", "input_size", "learn_sigma", "use_qknorm", "num_conditions", "augmentation")
UNET_CHANGEABLE = ("num_classes", "num_conditions", "augmentation")
CONDITION_TABLE, AUGMENTATION = "c_embedder.embedding_table.weight", "a_embedder.weight"
#: Where new rows of the class table start, by the value of train.new_classes.
STARTS = {
    "null": "start from the null class",
    "mean": "start from the mean of the file's classes",
    "random": "start at random",
}
CLASS_TABLE, PATCHES, POSITIONS = "y_embedder.embedding_table.weight", "x_embedder.proj.weight", "pos_embed"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
ROTARY = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
QK_NORMS = (".attn.q_norm.", ".attn.k_norm.")
NO_TENSOR = "the model has no such tensor"
LEFT_OUT_HOW = {CONDITION_TABLE: "the model has no conditions; the null condition is added to every class"}
LISTED = 6


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor: `kind` is taken, changed, resized, new or left out; `how` explains it."""

    name: str
    kind: str
    how: str = ""


@dataclass(frozen=True)
class Plan:
    """What becomes of every tensor of the model and of the file."""

    path: Path
    changes: tuple[Change, ...]

    def text(self) -> str:
        """Return a line for the tensors that are taken, and one for each group of others."""
        taken = sum(change.kind == TAKEN for change in self.changes)
        lines = [f"weights of {self.path}: {taken} tensors taken as they are"]
        groups: dict[tuple[str, str], list[str]] = {}
        for change in self.changes:
            if change.kind != TAKEN:
                groups.setdefault((change.kind, change.how), []).append(change.name)
        for (kind, how), names in groups.items():
            listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
            lines.append(f"  {kind}: {listed}: {how}")
        return "\n".join(lines)


def class_rows(names: Names | None, there: Names | None) -> list[int | None] | None:
    """Return the file's row of a table of labels for each label of the model, None for one that the file lacks.

    The whole is None where the labels are the same, or either side does not name them.
    """
    if not names or not there or tuple(names) == tuple(there):
        return None
    rows = {name: row for row, name in enumerate(there)}
    return [rows.get(name) for name in names]


def _rows_by_table(
    info: CheckpointInfo, names: Names | None, conditions: Names | None
) -> dict[str, list[int | None] | None]:
    """Return `class_rows` for the tables of classes and of conditions."""
    return {
        CLASS_TABLE: class_rows(names, names_of_model(info.path)),
        CONDITION_TABLE: class_rows(conditions, names_of_model(info.path, CONDITION_NAMES)),
    }


def plan(
    model: Network,
    info: CheckpointInfo,
    names: Names | None = None,
    conditions: Names | None = None,
    new_classes: str = "mean",
) -> Plan:
    """Return what becomes of the tensors in a weights file; the model may be on the meta device.

    Args:
        names, conditions: of the model's labels; rows of their tables are taken by name where the file names its own.
        new_classes: a key of `STARTS`.

    Raises:
        LightningDiTError: the file is of another kind, depth, width or structure.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_kinds(model, info.kinds, info.path)
    by_name = {table: rows for table, rows in _rows_by_table(info, names, conditions).items() if rows is not None}
    if wanted == info.shapes and not by_name:
        return Plan(info.path, tuple(Change(name, TAKEN) for name in wanted))
    found = _source_settings(model.settings, info)
    changes = {
        name: _change(name, shape, info.shapes, model.settings, found, STARTS[new_classes])
        for name, shape in wanted.items()
    }
    for table, rows in by_name.items():
        if table in info.shapes and table in wanted:
            changes[table] = Change(table, RESIZED, _taken_by_name(table, rows, STARTS[new_classes]))
    if _is_without_conditions(wanted, info.shapes) and changes[CLASS_TABLE].kind == TAKEN:
        changes[CLASS_TABLE] = Change(CLASS_TABLE, CHANGED, "the null condition is added to each row")
    left_out = [Change(name, LEFT_OUT, LEFT_OUT_HOW.get(name, NO_TENSOR)) for name in info.shapes if name not in wanted]
    return Plan(info.path, (*changes.values(), *left_out))


def _taken_by_name(table: str, rows: Sequence[int | None], starts: str) -> str:
    """Return what becomes of a table of labels in words."""
    kind, new = "classes" if table == CLASS_TABLE else "conditions", sum(row is None for row in rows)
    how = f"the rows of {len(rows) - new} {kind} and the null class are taken by name, those of {new} are new"
    return f"{how}; new rows {starts}" if new else how


def initialise(
    model: Network,
    path: str | Path,
    names: Names | None = None,
    conditions: Names | None = None,
    new_classes: str = "mean",
) -> Plan:
    """Load what fits of the weights file at `path` into `model`, in float32, and return what became of each tensor.

    Args:
        names, conditions, new_classes: as for `plan`.

    Raises:
        LightningDiTError: the file is missing, damaged, or of another structure.
    """
    info = inspect(path)
    made = plan(model, info, names, conditions, new_classes)
    rows = _rows_by_table(info, names, conditions)
    weights = {name: tensor.float() for name, tensor in load_weights(path).items()}
    result = dict(model.state_dict())
    for change in made.changes:
        name = change.name
        if change.kind in (TAKEN, CHANGED):
            result[name] = weights[name]
        elif change.kind == RESIZED and name in rows:
            result[name] = _table(weights[name], result[name], rows[name], new_classes)
        elif change.kind == RESIZED:
            result[name] = _resized(name, weights, result[name], model.settings)
        elif name in (CONDITION_TABLE, AUGMENTATION) and change.kind == NEW:
            result[name] = torch.zeros_like(result[name])
    if _is_without_conditions(result, weights):
        result[CLASS_TABLE] = result[CLASS_TABLE] + weights[CONDITION_TABLE][-1]  # both are summed in the network
    load_into(model, result, path)
    return made


def _is_without_conditions(model: Collection[str], file: Collection[str]) -> bool:
    """Return whether the file's model has conditions and this one has none, by the names of their tensors."""
    return CONDITION_TABLE in file and CONDITION_TABLE not in model


def _source_settings(wanted: NetworkSettings, info: CheckpointInfo) -> NetworkSettings:
    """Return the settings of the file's model, which may differ from the wanted ones in `CHANGEABLE` alone."""
    try:
        found = settings_from_shapes(info.shapes)
    except (ValueError, KeyError, IndexError) as error:
        raise LightningDiTError(f"{info.path}: {error}", "name a transformer's weights in train.weight_init") from error
    if type(found) is not type(wanted):
        raise LightningDiTError(
            f"{info.path} holds {network_name(found)}; the configuration describes {network_name(wanted)}",
            "choose the model_type and switches that belong to the file",
        )
    changeable = CHANGEABLE if isinstance(wanted, LightningDiTSettings) else UNET_CHANGEABLE
    same = replace(found, **{name: getattr(wanted, name) for name in changeable})
    if wrong := model_differences(wanted, same):
        raise LightningDiTError(
            f"{info.path} does not fit: {'; '.join(wrong)}",
            "choose the model_type and switches that belong to the file",
        )
    return found


def _change(
    name: str,
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: NetworkSettings,
    found: NetworkSettings,
    starts: str,
) -> Change:
    if shapes.get(name) == shape:
        return Change(name, TAKEN)
    if name == CLASS_TABLE:
        how = f"{wanted.num_classes} classes in place of {found.num_classes}; the rows are new, the null class is taken"
        return Change(name, RESIZED, f"{how}; new rows {starts}")
    if name == CONDITION_TABLE and name in shapes:
        how = f"{wanted.num_conditions} conditions in place of {found.num_conditions}; the rows are new, the null"
        return Change(name, RESIZED, f"{how} condition is taken; new rows {starts}")
    if name in (CONDITION_TABLE, AUGMENTATION):
        return Change(name, NEW, "zero, so that it changes no prediction yet")
    if name == PATCHES or name in OUTPUT:
        shared = min(wanted.in_channels, found.in_channels)
        how = f"{wanted.in_channels} channels in place of {found.in_channels}; {shared} taken, further ones zero"
        if wanted.learn_sigma != found.learn_sigma and name in OUTPUT:
            how += f"; learn_sigma is {str(wanted.learn_sigma).lower()} here"
        return Change(name, RESIZED, how)
    if name == POSITIONS:
        how = f"{wanted.side} x {wanted.side} patches in place of {found.side} x {found.side}"
        return Change(name, RESIZED, how)
    if name in ROTARY:
        return Change(name, NEW, f"computed for {wanted.side} x {wanted.side} patches")
    if any(part in name for part in QK_NORMS):
        return Change(name, NEW, "the file's model does not normalise queries and keys")
    raise LightningDiTError(
        f"tensor {name} is {list(shapes.get(name, ()))} in the file and {list(shape)} in the model",
        "choose the configuration that belongs to this file",
    )


def _table(old: Tensor, own: Tensor, rows: Sequence[int | None] | None, start: str) -> Tensor:
    """Return the table (labels + 1, width) of classes or conditions from the file's.

    Args:
        own: the model's initial one.
        rows: the file's row of each label, None for a new one; as a whole None: all are new.
        start: a key of `STARTS`.
    """
    starts = {"null": old[-1:], "mean": old[:-1].mean(0, keepdim=True), "random": own[:-1]}
    table = torch.cat([starts[start].expand(len(own) - 1, -1), old[-1:]])  # a copy
    for index, row in enumerate(rows or ()):
        if row is not None:
            table[index] = old[row]
    return table


def _resized(name: str, weights: Mapping[str, Tensor], new: Tensor, settings: LightningDiTSettings) -> Tensor:
    """Return the tensor `name` of the file for the model of `settings`, whose own initial one is `new`."""
    old = weights[name]
    if name == PATCHES:
        return _with_channels(old, new.shape[1], 1)
    if name == POSITIONS:
        return _positions(old, settings)
    return _output(old, settings, min(settings.in_channels, weights[PATCHES].shape[1]))


def _with_channels(old: Tensor, count: int, dim: int) -> Tensor:
    """Return `old` with `count` entries along `dim`: the first ones, then zeros."""
    shared = old.narrow(dim, 0, min(count, old.shape[dim]))
    shape = list(old.shape)
    shape[dim] = count - shared.shape[dim]
    return torch.cat([shared, old.new_zeros(shape)], dim)


def _output(old: Tensor, settings: LightningDiTSettings, channels: int) -> Tensor:
    """Return the final layer's rows (patch^2 * out, ...) for other channels, of which `channels` are shared.

    The rows are ordered by pixel of the patch, then by channel: those of the prediction, and with learn_sigma as many
    of the variance, which training does not use and which start at zero.
    """
    pixels = old.reshape(settings.patch_size**2, -1, *old.shape[1:])  # (p^2, out, ...)
    return _with_channels(pixels[:, :channels], settings.out_channels, 1).flatten(0, 1)


def _positions(old: Tensor, settings: LightningDiTSettings) -> Tensor:
    """Return the table (1, side^2, width): computed if the old one was, else interpolated."""
    side, width = math.isqrt(old.shape[1]), old.shape[2]
    if torch.allclose(old, sincos_table(width, side), atol=2e-3):  # half precision keeps three digits
        return sincos_table(width, settings.side)
    grid = old.view(1, side, side, width).permute(0, 3, 1, 2)  # (1, width, side, side)
    grid = F.interpolate(grid, size=(settings.side, settings.side), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).contiguous()
