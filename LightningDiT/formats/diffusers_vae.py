"""The layout in which diffusers keeps an `AutoencoderKL`: config.json beside weights under names of its own.

diffusers itself is not needed. The network is that of `tokenizer.autoencoder`: names differ, the decoder's levels are
counted from the other end, the products of attention are linear layers instead of 1x1 convolutions, and the latent has
one number of channels inside and outside. Where ours are two numbers, the smaller is filled up by zeros, and
config.json names both under keys that diffusers keeps and does not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME, CLASS_NAME, SUBFOLDER = "config.json", "AutoencoderKL", "vae"
STEM = "diffusion_pytorch_model"
#: Files with the weights, the first that exists is read.
WEIGHTS = (
    f"{STEM}.safetensors",
    f"{STEM}.safetensors.index.json",
    f"{STEM}.bin",
    f"{STEM}.fp16.safetensors",
    f"{STEM}.bf16.safetensors",
)
EMBED_DIM, Z_CHANNELS = "_embed_dim", "_z_channels"  # keys of config.json if the latent was filled up
DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")  # without and with attention
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
#: Defaults of diffusers' constructor, for keys that a file leaves out.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
FIXED = {"act_fn": "silu", "norm_num_groups": 32, "mid_block_add_attention": True}
THEIRS = re.compile(r"(?:encoder|decoder)\.(?:down_blocks|up_blocks|mid_block)\.")
NO_NOISE = -30.0  # log-variance of the channels that fill up
FIX = "name an AutoencoderKL of the kind that this project has"

#: Names of theirs and ours, one pair for each part of a name. `{}` is the number of a block.
PARTS = (
    (r"resnets\.(\d+)", r"block.{}"),
    (r"attentions\.(\d+)", r"attn.{}"),
    (r"downsamplers\.0\.", "downsample."),
    (r"upsamplers\.0\.", "upsample."),
)
#: Ends of names in an attention block: ours, theirs, and theirs before diffusers 0.12.
ATTENTION = (
    ("norm", "group_norm", "group_norm"),
    ("q", "to_q", "query"),
    ("k", "to_k", "key"),
    ("v", "to_v", "value"),
    ("proj_out", "to_out.0", "proj_attn"),
)


def folder_of(path: str | Path) -> Path | None:
    """Return the folder in diffusers' layout that `path` (it, a file in it, or a pipeline's folder) names, else None.

    Raises:
        LightningDiTError: its config.json cannot be read, or is that of another class.
    """
    path = Path(path)
    if path.name == CONFIG_NAME or path.name.startswith(STEM):
        folders = [path.parent]
    elif path.is_dir():
        folders = [path, path / SUBFOLDER]
    else:
        return None
    folder = next((one for one in folders if (one / CONFIG_NAME).is_file()), None)
    if folder is not None:
        read_config(folder)
    return folder


def weights_file(path: str | Path) -> Path:
    """Return `path`, or the weights in the folder of diffusers' layout that it names.

    Raises:
        LightningDiTError: that folder holds no weights.
    """
    folder = folder_of(path) if Path(path).is_dir() or Path(path).name == CONFIG_NAME else None
    if folder is None:
        return Path(path)
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise LightningDiTError(
            f"{folder} holds {CONFIG_NAME} and no weights; {WEIGHTS[0]} is expected", f"put {WEIGHTS[0]} beside it"
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json with diffusers' defaults for what it leaves out; keys with `_` in front may be anything.

    Raises:
        LightningDiTError: it is no JSON, of another class, or has a key that is unknown here.
    """
    file = folder / CONFIG_NAME
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise LightningDiTError(f"{file} is no JSON ({first_line(error)})", "fetch it again") from error
    name = values.get("_class_name") if isinstance(values, dict) else None
    if name != CLASS_NAME:
        raise LightningDiTError(f"{file} is of the class {name}; {CLASS_NAME} is expected", FIX)
    if unknown := [key for key in values if not key.startswith("_") and key not in DEFAULTS]:
        raise LightningDiTError(f"{file}: {unknown[0]} is unknown; {', '.join(DEFAULTS)} are expected", FIX)
    return {**DEFAULTS, **values}


def read_sizes(folder: Path) -> dict[str, Any]:
    """Return the fields of `AutoencoderSettings` that a folder describes, by name.

    Raises:
        LightningDiTError: a value is impossible, or of a network that this project does not have.
    """
    config, file = read_config(folder), folder / CONFIG_NAME
    for key, only in FIXED.items():
        if config[key] != only or isinstance(config[key], bool) != isinstance(only, bool):
            raise LightningDiTError(f"{file}: {key} is {config[key]!r}; {only!r} is expected", FIX)
    widths = _whole_numbers(config["block_out_channels"], "block_out_channels", file)
    downs = _with_attention(config["down_block_types"], DOWN_BLOCKS, "down_block_types", len(widths), file)
    ups = _with_attention(config["up_block_types"], UP_BLOCKS, "up_block_types", len(widths), file)
    if downs != ups[::-1]:
        raise LightningDiTError(f"{file}: encoder and decoder have attention at different levels", FIX)
    if odd := [width for width in widths if width % widths[0]]:
        raise LightningDiTError(
            f"{file}: block_out_channels has {odd[0]}; a multiple of its first, {widths[0]}, is expected", FIX
        )
    side = config["sample_size"]
    resolution = _whole_numbers(side if isinstance(side, list) else [side], "sample_size", file)[0]
    latent = _whole_numbers([config["latent_channels"]], "latent_channels", file)[0]
    embed, inside = _channels(config) or (latent, latent)
    return {
        "embed_dim": embed,
        "z_channels": inside,
        "resolution": resolution,
        "in_channels": _whole_numbers([config["in_channels"]], "in_channels", file)[0],
        "out_ch": _whole_numbers([config["out_channels"]], "out_channels", file)[0],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": _whole_numbers([config["layers_per_block"]], "layers_per_block", file)[0],
        "attn_resolutions": [resolution >> level for level, has_attention in enumerate(downs) if has_attention],
    }


def _whole_numbers(values: Any, key: str, file: Path) -> list[int]:
    good = isinstance(values, list) and values
    if not good or not all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values):
        raise LightningDiTError(f"{file}: {key} is {str(values)[:80]}; positive whole numbers are expected", FIX)
    return values


def _with_attention(names: Any, known: tuple[str, str], key: str, levels: int, file: Path) -> list[bool]:
    """Return for each level whether its blocks have attention."""
    if not isinstance(names, list) or len(names) != levels or not all(name in known for name in names):
        raise LightningDiTError(
            f"{file}: {key} is {str(names)[:120]}; {levels} of {' or '.join(known)} are expected", FIX
        )
    return [name == known[1] for name in names]


def _channels(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return embed_dim and z_channels of a latent that was filled up, else None."""
    found, most = (config.get(EMBED_DIM), config.get(Z_CHANNELS)), config["latent_channels"]
    good = all(isinstance(value, int) and value > 0 for value in found) and max(found) == most
    return found if good else None


def filled_channels(weights: Path) -> tuple[int, int] | None:
    """Return embed_dim and z_channels of the latent that was filled up in a file of weights, else None."""
    if not (weights.parent / CONFIG_NAME).is_file() or folder_of(weights) is None:
        return None
    return _channels(read_config(weights.parent))


def read_statistics(folder: Path) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation of each latent channel that config.json tells; None if it tells none.

    They are latents_mean and latents_std. A file without them may tell shift_factor and scaling_factor, one number for
    all channels.

    Raises:
        LightningDiTError: they are no lists of numbers.
    """
    config, file, channels = read_config(folder), folder / CONFIG_NAME, read_sizes(folder)["embed_dim"]
    mean, std = config["latents_mean"], config["latents_std"]
    if mean is None and std is None:
        shift, scale = config["shift_factor"] or 0.0, config["scaling_factor"]
        if not _are_numbers([shift, scale], 2) or not scale:
            raise LightningDiTError(f"{file}: scaling_factor is {scale!r}; a number that is not 0 is expected", FIX)
        return None if (shift, scale) == (0.0, 1.0) else ([float(shift)] * channels, [1.0 / scale] * channels)
    for key, values in (("latents_mean", mean), ("latents_std", std)):
        if not _are_numbers(values, config["latent_channels"]):
            raise LightningDiTError(
                f"{file}: {key} is {str(values)[:80]}; {config['latent_channels']} numbers are expected", FIX
            )
    return [float(value) for value in mean[:channels]], [float(value) for value in std[:channels]]


def _are_numbers(values: Any, count: int) -> bool:
    good = isinstance(values, list) and len(values) == count
    return good and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


# ---- tensors


def is_theirs(names: Sequence[str]) -> bool:
    """Return whether tensors have diffusers' names of an autoencoder."""
    return any(THEIRS.match(name) for name in names)


def ours(tensors: Mapping[str, Tensor], filled: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Return an autoencoder's tensors under our names, as our network needs them.

    A file without quant_conv or post_quant_conv has none in its network, and gets the identity. A name that is unknown
    stays as it is, so that the match with the network names it.

    Args:
        filled: see `filled_channels`.
    """
    levels = 1 + max((int(number) for name in tensors for number in re.findall(r"up_blocks\.(\d+)", name)), default=0)
    found = {_our_name(name, levels): tensor for name, tensor in tensors.items()}
    for name, tensor in found.items():
        if tensor.dim() == 2 and re.search(r"\.attn(?:_1|\.\d+)\.(?:q|k|v|proj_out)\.weight$", name):
            found[name] = tensor[:, :, None, None]
    for name, like, axis in (("quant_conv", "encoder.conv_out", 0), ("post_quant_conv", "decoder.conv_in", 1)):
        inner = found.get(f"{like}.weight")
        if f"{name}.weight" not in found and inner is not None and inner.dim() == 4:
            found |= _identity(name, inner, axis)
    return without_filling(found, *filled) if filled else found


def _our_name(name: str, levels: int) -> str:
    match = re.fullmatch(r"(encoder|decoder)\.(down_blocks|up_blocks)\.(\d+)\.(.+)", name)
    if match:
        level = int(match[3]) if match[2] == "down_blocks" else levels - 1 - int(match[3])
        name = f"{match[1]}.{'down' if match[2] == 'down_blocks' else 'up'}.{level}.{match[4]}"
        for theirs_part, our_part in PARTS:
            name = re.sub(theirs_part, lambda found, text=our_part: text.format(*found.groups()), name)
    name = re.sub(r"\.mid_block\.resnets\.([01])\.", lambda found: f".mid.block_{int(found[1]) + 1}.", name)
    name = name.replace(".mid_block.attentions.0.", ".mid.attn_1.").replace(".conv_shortcut.", ".nin_shortcut.")
    name = re.sub(r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out.", name)
    if re.search(r"\.attn(?:_1|\.\d+)\.", name):
        for our_end, theirs_end, old_end in ATTENTION:
            name = re.sub(rf"\.(?:{re.escape(theirs_end)}|{old_end})\.(weight|bias)$", rf".{our_end}.\1", name)
    return name


def _identity(name: str, inner: Tensor, axis: int) -> dict[str, Tensor]:
    """Return weight and bias of a 1x1 convolution that changes nothing, for the channels of a kernel's axis."""
    import torch

    size = inner.shape[axis]
    weight = torch.eye(size, dtype=inner.dtype, device=inner.device)[:, :, None, None]
    return {f"{name}.weight": weight, f"{name}.bias": weight.new_zeros(size)}


def theirs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return our autoencoder's tensors under diffusers' names, and what they say for config.json.

    Args:
        tensors: of our network alone.
    """
    embed, inside = tensors["quant_conv.weight"].shape[0] // 2, tensors["decoder.conv_in.weight"].shape[1]
    levels = 1 + max(int(number) for name in tensors for number in re.findall(r"^decoder\.up\.(\d+)", name))
    told: dict[str, Any] = {"latent_channels": max(embed, inside)}
    if embed != inside:
        tensors, told = _filled_up(tensors), told | {EMBED_DIM: embed, Z_CHANNELS: inside}
    left_out: list[str] = []
    for name in ("quant_conv", "post_quant_conv"):
        told[f"use_{name}"] = not _is_identity(tensors, name)
        left_out += [] if told[f"use_{name}"] else [f"{name}.weight", f"{name}.bias"]
    named = {_their_name(name, levels): tensor for name, tensor in tensors.items() if name not in left_out}
    for name, tensor in named.items():
        if "attentions." in name and tensor.dim() == 4:
            named[name] = tensor.flatten(1)
    return named, told


def _is_identity(tensors: Mapping[str, Tensor], name: str) -> bool:
    same = _identity(name, tensors[f"{name}.weight"], 0)
    return all(value.shape == tensors[key].shape and value.equal(tensors[key]) for key, value in same.items())


def _their_name(name: str, levels: int) -> str:
    match = re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(.+)", name)
    if match:
        level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
        name = f"{match[1]}.{match[2]}_blocks.{level}.{match[4]}"
        name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
        name = re.sub(r"\.attn\.(\d+)\.", r".attentions.\1.", name)
        name = name.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    name = re.sub(r"\.mid\.block_([12])\.", lambda found: f".mid_block.resnets.{int(found[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.").replace(".nin_shortcut.", ".conv_shortcut.")
    name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
    if ".attentions." in name:
        for our_end, theirs_end, _ in ATTENTION:
            name = re.sub(rf"\.{our_end}\.(weight|bias)$", rf".{theirs_end}.\1", name)
    return name


def _filled_up(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with one number of channels, max(embed_dim, z_channels), at both sides of the latent."""
    import torch
    from torch.nn.functional import pad

    embed, inside = tensors["quant_conv.weight"].shape[0] // 2, tensors["decoder.conv_in.weight"].shape[1]
    size = max(embed, inside)
    more, outer = size - inside, size - embed
    matrix, bias = tensors["quant_conv.weight"], tensors["quant_conv.bias"]
    halves = [pad(half, (0, 0, 0, 0, 0, 2 * more, 0, outer)) for half in matrix.chunk(2)]
    biases = [pad(half, (0, outer), value=fill) for half, fill in zip(bias.chunk(2), (0.0, NO_NOISE), strict=True)]
    return dict(tensors) | {
        "encoder.conv_out.weight": pad(tensors["encoder.conv_out.weight"], (0, 0, 0, 0, 0, 0, 0, 2 * more)),
        "encoder.conv_out.bias": pad(tensors["encoder.conv_out.bias"], (0, 2 * more)),
        "quant_conv.weight": torch.cat(halves),
        "quant_conv.bias": torch.cat(biases),
        "post_quant_conv.weight": pad(tensors["post_quant_conv.weight"], (0, 0, 0, 0, 0, outer, 0, more)),
        "post_quant_conv.bias": pad(tensors["post_quant_conv.bias"], (0, more)),
        "decoder.conv_in.weight": pad(tensors["decoder.conv_in.weight"], (0, 0, 0, 0, 0, more)),
    }


def without_filling(tensors: Mapping[str, Tensor], embed: int, inside: int) -> dict[str, Tensor]:
    """Return tensors of ours without the zeros of `theirs`, for a latent of `embed` channels and `inside` before it."""
    import torch

    found = dict(tensors)
    for name, columns in (("quant_conv.weight", 2 * inside), ("quant_conv.bias", None)):
        if name in found and found[name].dim():
            mean, logvar = found[name].tensor_split(2)
            found[name] = _cut(torch.cat([mean[:embed], logvar[:embed]]), None, columns)
    for name, rows, columns in (
        ("encoder.conv_out.weight", 2 * inside, None),
        ("encoder.conv_out.bias", 2 * inside, None),
        ("post_quant_conv.weight", inside, embed),
        ("post_quant_conv.bias", inside, None),
        ("decoder.conv_in.weight", None, inside),
    ):
        if name in found:
            found[name] = _cut(found[name], rows, columns)
    return found


def _cut(tensor: Tensor, rows: int | None, columns: int | None) -> Tensor:
    """Return the first rows and columns; a tensor of too few axes stays whole, and its shape is refused later."""
    part = tensor[:rows] if tensor.dim() > 0 else tensor
    return part[:, :columns] if columns is not None and part.dim() > 1 else part
