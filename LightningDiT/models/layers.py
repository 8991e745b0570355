"""The layers of LightningDiT: embeddings, norms, SwiGLU, attention and modulation.

The table of `LightningDiT.device.resolve_precision` says which part computes in which precision under half-precision
weights. In float32 every conversion below returns its argument.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .onednn import by_onednn, onednn_linear
from .positions import Rotation

TIME_FREQUENCIES = 256
NORM_EPS = 1e-6
SHORT_SEQUENCE = 64  # tokens up to which training on a CPU computes attention without the fused kernel


class Linear(nn.Linear):
    """x W^T + b; by oneDNN in float32 on an x86 processor.

    There torch uses MKL for float32, which reaches half of the rate on AMD's processors (docs/benchmark.md).
    Both sum in float32, in different orders.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not by_onednn(x, self.weight):
            return super().forward(x)  # (..., out)
        return onednn_linear(x, self.weight, self.bias)  # (..., out)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide, weight = x.float(), self.weight.float()  # (..., width), (width,)
        if hasattr(F, "rms_norm"):
            return F.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)  # (..., width)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)  # (..., 1); torch before 2.4
        return (wide * scale * weight).to(x.dtype)  # (..., width)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / deviation * weight + bias, computed in float32 (Ba et al., arXiv 1607.06450)."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if value is None else value.float() for value in (self.weight, self.bias))  # (width,) each
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)  # (..., width)


class PatchEmbed(nn.Module):
    """A latent image to one token per patch."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)  # (N, tokens, width)
        return tokens.contiguous()  # as what the blocks make, so that compiled code of one serves the first one, too


class TimestepEmbedder(nn.Module):
    """Time in [0, 1], unscaled, to a vector: sinusoids (arXiv 1706.03762), then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10_000.0) * steps / half)  # (N, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, 256)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # (N, width)


class LabelEmbedder(nn.Module):
    """A class, or the null class `num_classes`, to a vector; labels are dropped at random in training."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Return (N, width) of labels (N,); `dropped` (N,) bool chooses what becomes the null class."""
        if dropped is None and self.training and self.dropout > 0:
            dropped = torch.rand(len(labels), device=labels.device) < self.dropout
        if dropped is not None:
            labels = torch.where(dropped, self.num_classes, labels)  # (N,)
        return self.embedding_table(labels)  # (N, width)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with a, b = w12(x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x.to(self.w12.weight.dtype)).chunk(2, dim=-1)  # (N, T, hidden) each
        return self.w3(F.silu(gate) * value)  # (N, T, width)


class Mlp(nn.Module):
    """Two layers with GELU between, as in the plain DiT."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x.to(self.fc1.weight.dtype))  # (N, T, hidden)
        return self.fc2(F.gelu(hidden, approximate="tanh"))  # (N, T, width)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(width)) v for (N, heads, T, width) each.

    torch's fused kernels keep q k^T and the softmax in float32 for half inputs. Without a fused kernel, torch writes
    q k^T out and multiplies q and k by width^-1/4 each before the product, so that nothing overflows but a logit that
    is beyond the range itself.
    """
    if q.requires_grad and q.device.type == "cpu" and q.shape[-2] <= SHORT_SEQUENCE:
        # the fused kernel's backward pass takes seven times as long in bf16 at 16 tokens
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, heads, T, T)
        return weights.softmax(-1).to(v.dtype) @ v  # (N, heads, T, width)
    return F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, width)


class Attention(nn.Module):
    """Multi-head self-attention, optionally with normalised and rotated queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool, rms_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        head_width = width // heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        if qk_norm:
            self.q_norm = RMSNorm(head_width) if rms_norm else LayerNorm(head_width)
            self.k_norm = RMSNorm(head_width) if rms_norm else LayerNorm(head_width)

    def forward(self, x: Tensor, rope: Rotation | None) -> Tensor:
        qkv = self.qkv(x.to(self.qkv.weight.dtype)).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, heads, head width)
        joint, v = qkv.split((2, 1), dim=2)  # (N, T, 2, heads, head width), (N, T, 1, heads, head width)
        if hasattr(self, "q_norm"):
            q, k = joint.unbind(2)
            joint = torch.stack((self.q_norm(q), self.k_norm(k)), dim=2)
        if rope is not None:
            rotary, sines = rope
            joint = rotary(joint, sines)
            if joint.requires_grad:
                v = v.contiguous()  # the backward pass needs no more of qkv, and a view would keep all of it
        q, k, v = (part.transpose(1, 2) for part in (*joint.unbind(2), v.squeeze(2)))  # (N, heads, T, head width) each
        out = attend(q, k, v)  # (N, heads, T, head width)
        return self.proj(out.transpose(1, 2).flatten(2))  # (N, T, width)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """Return x (N, T, width) times (1 + scale) plus shift, each (N, width)."""
    if shift is None:
        return x * (1 + scale.unsqueeze(1))
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def block_norm(width: int, rms_norm: bool) -> nn.Module:
    """Return the norm before attention, MLP and output: RMSNorm, or LayerNorm without parameters."""
    return RMSNorm(width) if rms_norm else LayerNorm(width, elementwise_affine=False, eps=NORM_EPS)


class Modulation(nn.Sequential):
    """The condition to shifts, scales and gates, in float32 (adaLN, arXiv 2212.09748).

    The model takes the SiLU of the condition once for all its layers; the linear layer keeps its published name, 1.
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.Identity(), Linear(width, parts * width))
        self.parts = parts

    def forward(self, active: Tensor) -> tuple[Tensor, ...]:
        """Return `parts` tensors (N, width) of the condition's SiLU (N, width)."""
        linear = self[1]
        return linear(active.to(linear.weight.dtype)).float().chunk(self.parts, dim=1)  # (N, width) each
