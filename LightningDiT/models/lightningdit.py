"""LightningDiT (Yao, Yang and Wang, arXiv 2501.01423): the transformer that predicts the velocity of latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .layers import (
    Attention,
    LabelEmbedder,
    Linear,
    Mlp,
    Modulation,
    PatchEmbed,
    SwiGLU,
    TimestepEmbedder,
    block_norm,
    modulate,
)
from .positions import RotaryEmbedding2d, Rotation, sincos_table

INITIAL_STD = 0.02  # of the tables of labels and the layers of the time before training
CFG_CHANNELS = 3  # the published forward_with_cfg guides these channels only
WITHOUT_TENSORS = ("mlp_ratio", "class_dropout_prob", "use_checkpoint", "dropout")  # settings that no tensor shows
CLASS_TABLE = "y_embedder.embedding_table.weight"
CONDITION_TABLE, AUGMENTATION_WEIGHT = "c_embedder.embedding_table.weight", "a_embedder.weight"


@dataclass(frozen=True)
class LightningDiTSettings:
    """Sizes and switches of the transformer; the defaults are the published constructor's."""

    input_size: int = 32  # side of the latent
    patch_size: int = 2
    in_channels: int = 32  # channels of the latent
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = False  # a second half of output channels, which the forward drops
    use_qknorm: bool = False
    use_swiglu: bool = False
    use_rope: bool = False
    use_rmsnorm: bool = False
    wo_shift: bool = False
    use_checkpoint: bool = False  # recompute activations in the backward pass
    num_conditions: int = 0  # values of a second label; 0: there is none
    augmentation: int = 0  # values that tell how a latent was augmented; 0: none
    dropout: float = 0.0  # share of the outputs of attention and MLP that training sets to zero

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden size {self.hidden_size} is no multiple of {self.num_heads} heads")
        if self.input_size % self.patch_size:
            raise ValueError(f"latent side {self.input_size} is no multiple of the patch size {self.patch_size}")

    @property
    def side(self) -> int:
        """Patches in a row."""
        return self.input_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """Channels that the last layer computes."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def tokens(self) -> int:
        """Tokens of one latent."""
        return self.side**2

    @property
    def gflop(self) -> float:
        """10^9 operations of one forward of one state: products of a block with 12 width^2 weights for each token, and
        attention."""
        width = self.hidden_size
        return self.depth * self.tokens * width * (24 * width + 4 * self.tokens) / 1e9


#: Depth, hidden size and heads by name; each comes with patch size 1 and 2. S and XS are ours, the rest published.
PRESETS = {
    "XS": (7, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}


class LightningDiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN-Zero, arXiv 2212.09748).

    A block leaves its last sum, tokens + gate * branch, to the layer behind it. Compiled code of one block then adds
    and normalises in one pass over the tokens, as if all blocks were compiled together.
    """

    def __init__(self, settings: LightningDiTSettings) -> None:
        super().__init__()
        self.wo_shift, self.use_checkpoint, width = settings.wo_shift, settings.use_checkpoint, settings.hidden_size
        self.dropout = settings.dropout
        hidden = int(width * settings.mlp_ratio)
        self.norm1 = block_norm(width, settings.use_rmsnorm)
        self.norm2 = block_norm(width, settings.use_rmsnorm)
        self.attn = Attention(width, settings.num_heads, settings.use_qknorm, settings.use_rmsnorm)
        self.mlp = SwiGLU(width, int(2 / 3 * hidden)) if settings.use_swiglu else Mlp(width, hidden)
        self.adaLN_modulation = Modulation(width, 4 if settings.wo_shift else 6)

    def forward(
        self, x: Tensor, gate: Tensor | None, branch: Tensor | None, active: Tensor, rope: Rotation | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the tokens (N, T, width) after attention, gate (N, width) and output (N, T, width) of the MLP.

        Args:
            x, gate, branch: the same of the layer before; x + gate * branch are the tokens, or x alone without a gate.
            active: the condition's SiLU (N, width).
        """
        if self.recomputes:  # in here, so that compiled code has it too
            return checkpoint(self._summed, x, gate, branch, active, rope, use_reentrant=False), None, None
        return self._computed(x, gate, branch, active, rope)

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self.use_checkpoint and self.training

    def _summed(self, *given: Any) -> Tensor:
        """Return the tokens with the last sum, so that x is all that the next block keeps of this one."""
        return added(*self._computed(*given))

    def _computed(
        self, x: Tensor, gate: Tensor | None, branch: Tensor | None, active: Tensor, rope: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = added(x, gate, branch)  # (N, T, width)
        parts = self.adaLN_modulation(active)  # (N, width) each
        if self.wo_shift:
            scale1, gate1, scale2, gate2 = parts
            shift1 = shift2 = None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
        attended = self._dropped(self.attn(modulate(self.norm1(x), shift1, scale1), rope))  # (N, T, width)
        x = added(x, gate1, attended)  # (N, T, width)
        mixed = self._dropped(self.mlp(modulate(self.norm2(x), shift2, scale2)))  # (N, T, width)
        return x, gate2.contiguous(), mixed  # contiguous as the first block's, so that one code serves all

    def _dropped(self, x: Tensor) -> Tensor:
        """Return x with a share of zeros in training; without dropout no random number is drawn."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


def added(x: Tensor, gate: Tensor | None, branch: Tensor | None) -> Tensor:
    """Return x + gate * branch for tokens x and branch (N, T, width) and a gate (N, width), or x without a gate."""
    return x if gate is None or branch is None else torch.addcmul(x, gate.unsqueeze(1), branch)


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches."""

    def __init__(self, settings: LightningDiTSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.norm_final = block_norm(width, settings.use_rmsnorm)
        self.linear = Linear(width, settings.patch_size**2 * settings.out_channels)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, gate: Tensor | None, branch: Tensor | None, active: Tensor) -> Tensor:
        """Return (N, T, patch^2 * out) from the last block's outputs; see `LightningDiTBlock.forward`."""
        x = added(x, gate, branch)  # (N, T, width)
        shift, scale = self.adaLN_modulation(active)  # (N, width) each
        modulated = modulate(self.norm_final(x), shift, scale)  # (N, T, width)
        return self.linear(modulated.to(self.linear.weight.dtype))  # (N, T, patch^2 * out)


class LightningDiT(nn.Module):
    """The transformer; keyword arguments are the fields of `LightningDiTSettings`."""

    def __init__(self, settings: LightningDiTSettings | None = None, **kwargs: object) -> None:
        super().__init__()
        settings = replace(settings or LightningDiTSettings(), **kwargs)
        self.settings = settings
        width, side = settings.hidden_size, settings.side
        self.x_embedder = PatchEmbed(settings.patch_size, settings.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(settings.num_classes, width, settings.class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_table(width, side), requires_grad=False)
        if settings.use_rope:
            self.feat_rope = RotaryEmbedding2d(width // settings.num_heads, side)
        self.blocks = nn.ModuleList(LightningDiTBlock(settings) for _ in range(settings.depth))
        self.final_layer = FinalLayer(settings)
        self._initialise()
        # made last, so that they leave the random numbers of the tensors above as they are
        if settings.num_conditions:
            self.c_embedder = LabelEmbedder(settings.num_conditions, width, settings.class_dropout_prob)
            nn.init.normal_(self.c_embedder.embedding_table.weight, std=INITIAL_STD)
        if settings.augmentation:
            self.a_embedder = Linear(settings.augmentation, width, bias=False)
            nn.init.zeros_(self.a_embedder.weight)

    def _initialise(self) -> None:
        """Xavier weights, zero output and modulation (adaLN-Zero), so that the model starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.out_channels, -1))
        nn.init.zeros_(projection.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            self.t_embedder.mlp[0].weight,
            self.t_embedder.mlp[2].weight,
        ):
            nn.init.normal_(weight, std=INITIAL_STD)
        for layer in [*(block.adaLN_modulation[1] for block in self.blocks), *self._output_layers()]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _output_layers(self) -> tuple[nn.Linear, nn.Linear]:
        return self.final_layer.adaLN_modulation[1], self.final_layer.linear

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.settings.num_classes

    def null_labels(self, y: Tensor) -> Tensor:
        """Return the labels of no class, and no condition, in the shape of y (N,) or (N, 2)."""
        return null_labels(y, self.settings.num_classes, self.settings.num_conditions)

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """Heads, tokens and width of a head, by which kernels of attention are chosen."""
        settings = self.settings
        return settings.num_heads, settings.tokens, settings.hidden_size // settings.num_heads

    def forward(self, x: Tensor, t: Tensor, y: Tensor, a: Tensor | None = None) -> Tensor:
        """Return the prediction (N, C, H, W) for latents x (N, C, H, W) and labels y.

        Args:
            t: times (N,), or (1,) if all are equal, which is then embedded once; on the CPU or on the device of x.
            y: classes (N,); with a second label (N, 2), column 0 the class and column 1 the condition.
            a: how each latent was augmented (N, augmentation); None: not at all, as all zeros.

        Raises:
            ValueError: y or a does not have the shape that the settings ask for.
        """
        check_labels(y, a, len(x), self.settings.num_conditions, self.settings.augmentation)
        rope = (self.feat_rope, self.feat_rope.signed_sines()) if self.settings.use_rope else None
        branch = self.x_embedder(x)  # (N, T, width)
        tokens = branch + self.pos_embed.float()  # (N, T, width), float32 in every precision
        times = t.to(x.device, non_blocking=True)  # (N,) or (1,)
        classes = y[:, 0] if self.settings.num_conditions else y  # (N,)
        condition = self.t_embedder(times) + self.y_embedder(classes).float()  # (N, width)
        if self.settings.num_conditions:
            condition = condition + self.c_embedder(y[:, 1]).float()  # (N, width)
        if a is not None:
            condition = condition + self.a_embedder(a.to(self.a_embedder.weight.dtype)).float()  # (N, width)
        active = F.silu(condition)  # (N, width), the same for all layers
        # zeros that have a gradient as the other gates do: compiled code of one block then serves the first one, too
        gate, branch = (None, None) if self.blocks[0].recomputes else (0 * active, branch)  # (N, width), (N, T, width)
        active = active.to(self.x_embedder.proj.weight.dtype)
        for block in self.blocks:
            tokens, gate, branch = block(tokens, gate, branch, active, rope)  # (N, T, width), (N, width), (N, T, width)
        patches = self.final_layer(tokens, gate, branch, active)  # (N, T, patch^2 * out)
        return self._unpatchify(patches)[:, : self.settings.in_channels]  # (N, C, H, W)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        side, patch = self.settings.side, self.settings.patch_size
        grid = patches.view(len(patches), side, side, patch, patch, -1)  # (N, rows, cols, p, p, out)
        grid = grid.permute(0, 5, 1, 3, 2, 4)  # (N, out, rows, p, cols, p)
        return grid.reshape(len(patches), -1, side * patch, side * patch)  # (N, out, H, W)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cfg_interval: bool | None = None,
        cfg_interval_start: float | None = None,
    ) -> Tensor:
        """Return the guided prediction under the published signature.

        The batch holds every state twice, first with its label, then with the null class; only the first half
        of `x` is read. Guidance acts on the first three channels and, with the interval on, not before its
        start. New code uses `transport.GuidedVelocity`, which needs no doubled states.
        """
        half = x[: len(x) // 2]  # (N, C, H, W)
        out = self.forward(torch.cat([half, half]), t, y)  # (2N, C, H, W)
        conditional, null = out[:, :CFG_CHANNELS].chunk(2)  # (N, 3, H, W) each
        guided = conditional
        if not (cfg_interval and bool(t[0] < (cfg_interval_start or 0.0))):
            guided = null + cfg_scale * (conditional - null)
        return torch.cat([torch.cat([guided, guided]), out[:, CFG_CHANNELS:]], dim=1)  # (2N, C, H, W)


def null_labels(y: Tensor, num_classes: int, num_conditions: int) -> Tensor:
    """Return the labels of no class, and no condition, in the shape of y (N,) or (N, 2)."""
    if y.dim() == 1:
        return torch.full_like(y, num_classes)
    return torch.stack([torch.full_like(y[:, 0], num_classes), torch.full_like(y[:, 1], num_conditions)], dim=1)


def check_labels(y: Tensor, a: Tensor | None, states: int, num_conditions: int, augmentation: int) -> None:
    """Raise ValueError unless labels y and augmentation a are those of `states` latents of a network."""
    expected = (states, 2) if num_conditions else (states,)
    if tuple(y.shape) != expected:
        meaning = "class and condition of each latent" if num_conditions else "the class of each latent"
        raise ValueError(f"labels have the shape {list(y.shape)}; {list(expected)} is expected, {meaning}")
    if a is not None and (not augmentation or tuple(a.shape) != (states, augmentation)):
        wanted = f"{[states, augmentation]} is" if augmentation else "none is"
        raise ValueError(f"the augmentation has the shape {list(a.shape)}; {wanted} expected")


def preset_settings(name: str, **kwargs: object) -> LightningDiTSettings:
    """Return the settings of a preset such as `LightningDiT-XL/1`, with other fields from `kwargs`.

    Raises:
        ValueError: an unknown name.
    """
    size, _, patch = name.removeprefix("LightningDiT-").partition("/")
    if size not in PRESETS or patch not in ("1", "2"):
        raise ValueError(f"model_type {name!r} is unknown; {', '.join(LightningDiT_models)} are expected")
    depth, width, heads = PRESETS[size]
    sizes = {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": int(patch)}
    return LightningDiTSettings(**{**sizes, **kwargs})


def _build(name: str, **kwargs: object) -> LightningDiT:
    return LightningDiT(preset_settings(name, **kwargs))


#: Published table of constructors: `LightningDiT_models["LightningDiT-XL/1"](input_size=16, ...)`.
LightningDiT_models: dict[str, Callable[..., LightningDiT]] = {
    name: partial(_build, name) for name in (f"LightningDiT-{size}/{patch}" for size in PRESETS for patch in (1, 2))
}


def settings_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> LightningDiTSettings:
    """Return the settings of the model that tensors of these names and shapes belong to.

    Without rotary embedding the number of heads leaves no trace. It is then that of the preset of this width and
    depth, else the width divided by 64.

    Raises:
        ValueError: the names are not those of a LightningDiT.
    """
    needed = (
        "x_embedder.proj.weight",
        CLASS_TABLE,
        "pos_embed",
        "final_layer.linear.weight",
    )
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(f"no LightningDiT: tensors {', '.join(missing)} are missing")
    width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    block = {name.removeprefix("blocks.0."): shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    out = shapes["final_layer.linear.weight"][0] // patch**2
    if "feat_rope.freqs_cos" in shapes:
        heads = width // shapes["feat_rope.freqs_cos"][1]
    else:
        known = {(d, w): h for d, w, h in PRESETS.values()}
        heads = known.get((depth, width), max(1, width // 64))
    return LightningDiTSettings(
        input_size=math.isqrt(shapes["pos_embed"][1]) * patch,
        patch_size=patch,
        in_channels=in_channels,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        num_classes=shapes[CLASS_TABLE][0] - 1,
        learn_sigma=out == 2 * in_channels,
        use_qknorm="attn.q_norm.weight" in block,
        use_swiglu="mlp.w12.weight" in block,
        use_rope="feat_rope.freqs_cos" in shapes,
        use_rmsnorm="norm1.weight" in block,
        wo_shift=block["adaLN_modulation.1.weight"][0] == 4 * width,
        num_conditions=shapes[CONDITION_TABLE][0] - 1 if CONDITION_TABLE in shapes else 0,
        augmentation=shapes[AUGMENTATION_WEIGHT][1] if AUGMENTATION_WEIGHT in shapes else 0,
    )


def preset_name(settings: LightningDiTSettings) -> str | None:
    """Return the preset that has these sizes, or None."""
    sizes = (settings.depth, settings.hidden_size, settings.num_heads)
    name = next((name for name, preset in PRESETS.items() if preset == sizes), None)
    return f"LightningDiT-{name}/{settings.patch_size}" if name else None
