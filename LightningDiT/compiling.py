"""torch.compile for the forward of a network, which goes on uncompiled where this machine cannot."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from LightningDiT.device import is_out_of_memory


def compile_forward(module: nn.Module) -> None:
    """Compile `module.forward` when it is first called; the names of its weights stay as they are.

    One code serves every batch of more than one, since guidance and the last batch change its size; a batch of one
    has its own. Where there is no compiler for the device, or this torch cannot compile on this system, a warning
    says so once and the module computes as before.
    """
    plain = module.forward
    try:
        compiled = torch.compile(plain)
    except RuntimeError as error:  # older releases refuse newer Pythons, and Windows
        _warn(error)
        return
    from torch._dynamo import maybe_mark_dynamic  # 1 second and 150 MB, so not at import
    from torch._dynamo.exc import TorchDynamoException

    def forward(*arguments: Tensor) -> Tensor:
        for tensor in arguments:
            maybe_mark_dynamic(tensor, 0)
        try:
            return compiled(*arguments)
        except TorchDynamoException as error:
            if is_out_of_memory(error):
                raise
            _warn(error)
            del module.forward  # what stands below it is the class's own
        return plain(*arguments)

    module.forward = forward


def _warn(error: Exception) -> None:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    warnings.warn(f"torch.compile does not work here ({reason[:160]}); going on uncompiled", stacklevel=3)
