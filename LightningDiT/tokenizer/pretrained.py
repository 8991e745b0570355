"""Networks that others trained: their files in torch.hub's cache, and the models of timm."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from LightningDiT.checkpoint import load_into, load_weights
from LightningDiT.errors import LightningDiTError, first_line, fixed_by


def cached_download(url: str, title: str, fix: str) -> Path:
    """Return the file of `url` in torch.hub's cache, which is downloaded if it is not there.

    Args:
        url: ends in `-HASH.pth`, with the first digits of the file's SHA-256; TORCH_HOME moves the cache.
        title: what the file holds, for messages.
        fix: what to do with a file that was fetched by hand.

    Raises:
        LightningDiTError: the file is not there and cannot be downloaded; names its path and the command.
    """
    name = url.rsplit("/", 1)[1]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.is_file():
        print(f"Downloading {title} to {file}", flush=True)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            digits = file.stem.rsplit("-", 1)[1]
            torch.hub.download_url_to_file(url, str(file), digits, progress=os.isatty(2))
        except (OSError, RuntimeError) as error:  # no network or disk; another hash
            raise LightningDiTError(
                f"{title}: {file} does not exist and cannot be downloaded ({error})",
                f"curl -L -o {name} {url} on a machine with a network, then {fix}",
            ) from error
    return file


def timm_model(
    name: str,
    weights: str | Path | None,
    *,
    classifier: bool,
    fixes: tuple[str, str],
    tensors: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Any:
    """Return timm's model `name` with pretrained weights.

    Args:
        weights: file with timm's names for its tensors; None: those of the hub.
        classifier: keep the classifier, with as many outputs as the weights have; False: a model without one.
        fixes: what to do about an unknown name, and about absent or other weights.
        tensors: the content of `weights`, if it was read before.
        options: of `timm.create_model`; a model that does not know one is created without them.

    Raises:
        LightningDiTError: timm does not know the name, or the weights cannot be had or belong to another model.
    """
    import timm

    if not timm.is_model(name):
        raise LightningDiTError(f"timm {timm.__version__} knows no model {name!r}", fixes[0])

    def create(**chosen: Any) -> Any:
        try:
            return timm.create_model(name, **chosen, **options)
        except TypeError:
            return timm.create_model(name, **chosen)

    if weights is None:
        try:
            return create(pretrained=True, **({} if classifier else {"num_classes": 0}))
        except Exception as error:  # no weights for it, no network, a full disk: timm and the hub have many errors
            raise LightningDiTError(f"weights of {name} cannot be had ({first_line(error)})", fixes[1]) from error
    with fixed_by(fixes[1]):
        tensors = tensors or load_weights(weights)
        known = timm.get_pretrained_cfg(name)
        heads = (known and known.classifier) or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)  # some models have two
        sizes = next((tensors[key].shape for head in heads if (key := f"{head}.weight") in tensors), ())
        model = create(num_classes=sizes[0] if classifier and sizes else 0)
        load_into(model, tensors, weights, () if classifier else tuple(f"{head}." for head in heads))
    return model
