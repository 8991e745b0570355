"""torch.compile for the forward of a network; a machine that cannot compile computes on without it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from LightningDiT.errors import first_line, is_out_of_memory, warn_user


def compile_forward(module: nn.Module) -> None:
    """Compile `module.forward` at its first call; the names of its weights stay as they are.

    One compiled code serves every batch size above one, since guidance and the last batch change the size; a batch
    of one has its own. Without a compiler for the device, or with a torch that cannot compile on this system, the
    module warns once and computes as before.
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
            del module.forward  # uncovers the class's own
        return plain(*arguments)

    module.forward = forward


def _warn(error: Exception) -> None:
    warn_user(f"torch.compile does not work here ({first_line(error)}); going on uncompiled")
