"""The published training step, written anew after its description, to compare ours with.

It makes the choices of the released loop wherever they cost time: RMSNorm in plain operations, linear layers of torch,
the condition's SiLU in every layer, AdamW with its defaults, an average by a Python loop over the parameters, and the
loss fetched after every step. Tensors have the published names, so that our weights fit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LightningDiT.device import autocast
from LightningDiT.models.lightningdit import LightningDiTSettings
from LightningDiT.training.latent_batches import LatentBatch
from LightningDiT.training.transformer_training import Trainer

EPS = 1e-6  # of the norms
FREQUENCIES = 256
DECAY = 0.9999  # of the average

Block = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class PlainRMSNorm(nn.Module):
    """x / rms(x) * weight by four operations, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return normalised.type_as(x) * self.weight


class PlainSwiGLU(nn.Module):
    """w3(silu(a) * b) with a, b = w12(x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (N, heads, T, width) rotated pair by pair, each product and the sum in its own operation."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).reshape(x.shape)
    return x * cos + turned * sin


class PlainAttention(nn.Module):
    """Self-attention in the form of timm's vision transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        images, tokens, width = x.shape
        parts = self.qkv(x).reshape(images, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]  # (N, heads, T, head width) each
        out = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v)
        return self.proj(out.transpose(1, 2).reshape(images, tokens, width))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (N, T, width) times (1 + scale), plus shift."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainBlock(nn.Module):
    """Attention and MLP under adaLN-Zero, each block with its own SiLU of the condition."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = PlainRMSNorm(width), PlainRMSNorm(width)
        self.attn = PlainAttention(width, heads)
        self.mlp = PlainSwiGLU(width, int(2 / 3 * hidden))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulated(self.norm1(x), shift1, scale1), cos, sin)
        return x + gate2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), shift2, scale2))


class PlainFinalLayer(nn.Module):
    """Tokens to the values of their patches."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm_final = PlainRMSNorm(width)
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulated(self.norm_final(x), shift, scale))


class PlainTransformer(nn.Module):
    """LightningDiT under the released flags: SwiGLU, 2-D RoPE, RMSNorm, adaLN with shift, no QK-norm.

    Weights and tables are unset until `load_state_dict` takes them from our model.
    """

    def __init__(self, settings: LightningDiTSettings) -> None:
        super().__init__()
        width, patch = settings.hidden_size, settings.patch_size
        self.settings = settings
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(settings.in_channels, width, patch, patch)})
        time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": time})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(settings.num_classes + 1, width)})
        self.pos_embed = nn.Parameter(torch.empty(1, settings.side**2, width), requires_grad=False)
        self.feat_rope = nn.Module()
        for name in ("freqs_cos", "freqs_sin"):
            self.feat_rope.register_buffer(name, torch.empty(settings.side**2, width // settings.num_heads))
        hidden = int(width * settings.mlp_ratio)
        self.blocks = nn.ModuleList(PlainBlock(width, settings.num_heads, hidden) for _ in range(settings.depth))
        self.final_layer = PlainFinalLayer(width, patch**2 * settings.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, blocks: Sequence[Block] | None = None) -> Tensor:
        """Return the prediction (N, C, H, W); `blocks` are the compiled layers, if any."""
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (N, T, width)
        condition = self.t_embedder["mlp"](sinusoids(t)) + self.y_embedder["embedding_table"](y)  # (N, width)
        for block in blocks or self.blocks:
            tokens = block(tokens, condition, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        side, patch = self.settings.side, self.settings.patch_size
        patches = self.final_layer(tokens, condition).reshape(len(x), side, side, patch, patch, -1)
        image = torch.einsum("nhwpqc->nchpwq", patches)  # (N, C, rows, patch, columns, patch)
        return image.reshape(len(x), -1, side * patch, side * patch)


def sinusoids(t: Tensor) -> Tensor:
    """Return cosines, then sines (N, 256) of the times t (N,), unscaled."""
    half = FREQUENCIES // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10_000.0) / half))
    angles = t[:, None].float() * rates[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def velocity_loss(network: Callable[[Tensor, Tensor], Tensor], batch: LatentBatch) -> Tensor:
    """Return the mean squared error of the velocity plus 1 - the cosine over channels, both means over the batch."""
    t = batch.times.view(-1, 1, 1, 1)
    state = t * batch.latents + (1 - t) * batch.noise
    velocity = batch.latents - batch.noise
    prediction = network(state, batch.times)
    error = ((prediction - velocity) ** 2).flatten(1).mean(dim=1)  # (N,)
    cosine = (1 - F.cosine_similarity(prediction, velocity, dim=1)).flatten(1).mean(dim=1)  # (N,)
    return cosine.mean() + error.mean()


class PublishedLoop:
    """Model, average and optimizer of the published loop.

    Args:
        trainer: whose weights are copied and whose settings are taken; the released flags are expected.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.device, self.dtype, optimizer = trainer.device, trainer.dtype, trainer.config.optimizer
        self.max_norm = optimizer.max_grad_norm
        self.model = PlainTransformer(trainer.model.settings)
        self.model.load_state_dict(trainer.model.state_dict())
        self.model.to(self.device).train()
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=optimizer.lr, betas=(0.9, optimizer.beta2), weight_decay=0.0
        )

    def compiled_blocks(self) -> list[Block]:
        """Return the layers through torch.compile, as in the release; the first call compiles them."""
        return [torch.compile(block) for block in self.model.blocks]

    def step(self, batch: LatentBatch, blocks: Sequence[Block] | None = None) -> float:
        """Take one optimizer step on `batch` and return the loss before it."""
        rows = batch.to(self.device)
        loss = velocity_loss(lambda x, t: self._prediction(x, t, rows.labels, blocks), rows)
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self._update_average()
        return loss.item()

    def _prediction(self, x: Tensor, t: Tensor, y: Tensor, blocks: Sequence[Block] | None) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.model(x, t, y, blocks).float()

    @torch.no_grad()
    def _update_average(self) -> None:
        current = dict(self.model.named_parameters())
        for name, value in self.average.named_parameters():
            value.mul_(DECAY).add_(current[name].data, alpha=1 - DECAY)
