"""Positions of patches: the fixed sine-cosine table and rotary embedding in two dimensions."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

ROPE_THETA = 10_000.0


def sincos_table(width: int, side: int) -> Tensor:
    """Return the table (1, side * side, width) of ViT: half the width for columns, half for rows.

    Each half holds sines, then cosines, of position times 10000^(-k / (width / 4)) (Vaswani et al.,
    arXiv 1706.03762, in two dimensions as in He et al., arXiv 2111.06377).
    """
    if width % 4:
        raise ValueError(f"hidden size {width} is no multiple of 4, which the position table needs")
    frequencies = ROPE_THETA ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    positions = torch.arange(side, dtype=torch.float64)
    rows, columns = torch.meshgrid(positions, positions, indexing="ij")  # (side, side) each
    halves = []
    for axis in (columns, rows):
        angles = axis.reshape(-1, 1) * frequencies  # (side^2, width / 4)
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float().unsqueeze(0)  # (1, side^2, width)


class RotaryEmbedding2d(nn.Module):
    """Rotates pairs of query and key entries by angles that grow with row and column.

    Half of the entries of a head turn with the row, half with the column (Su et al., arXiv 2104.09864, in
    the two-dimensional form of EVA-02, arXiv 2303.11331). The tables are buffers under the published names.
    """

    def __init__(self, head_width: int, side: int) -> None:
        super().__init__()
        if head_width % 4:
            raise ValueError(f"head width {head_width} is no multiple of 4, which 2-D rotary embedding needs")
        half = head_width // 2
        frequencies = ROPE_THETA ** -(torch.arange(0, half, 2).float() / half)  # (half / 2,)
        angles = torch.outer(torch.arange(side).float(), frequencies)  # (side, half / 2)
        angles = angles.repeat_interleave(2, dim=1)  # (side, half)
        rows = angles[:, None, :].expand(side, side, half)
        columns = angles[None, :, :].expand(side, side, half)
        both = torch.cat([rows, columns], dim=-1).reshape(side * side, head_width)
        self.register_buffer("freqs_cos", both.cos())
        self.register_buffer("freqs_sin", both.sin())

    def signed_sines(self) -> Tensor:
        """Return the sines (tokens, head width), those of the even entries with a minus; all layers share them."""
        even, odd = self.freqs_sin.unflatten(-1, (-1, 2)).unbind(-1)  # (T, width / 2) each
        return torch.stack((-even, odd), dim=-1).flatten(-2)  # (T, width)

    def forward(self, x: Tensor, sines: Tensor) -> Tensor:
        """Return x (N, tokens, ..., head width), rotated; `sines` are the `signed_sines`."""
        flipped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (N, T, ..., width), the entries of a pair swapped
        cos, sin = (table.to(x.dtype) for table in (self.freqs_cos, sines))  # (T, width) each
        shape = (len(cos), *[1] * (x.dim() - 3), cos.shape[-1])
        return torch.addcmul(x * cos.view(shape), flipped, sin.view(shape))  # (N, T, ..., width)


#: What turns queries and keys, and its `signed_sines`.
Rotation: TypeAlias = tuple[RotaryEmbedding2d, Tensor]
