"""Train the tokenizer: `python -m LightningDiT.train_tokenizer --config tokenizer.yaml --data-root FOLDER`.

The loss is L1 + L2 per value and the KL of the posterior; the weights stand in the YAML's `train` section.
A run that was stopped goes on from its newest checkpoint when the command is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from LightningDiT import training
from LightningDiT.config import TokenizerTrainConfig, load_tokenizer_config
from LightningDiT.console import run_main
from LightningDiT.data.images import fashion_mnist, pad_to_32
from LightningDiT.device import autocast, best_device, training_dtype
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.vavae import autoencoder_settings
from LightningDiT.training import BatchOrder, Ema, RunFolder, Schedule, learning_rate, require_finite


def reconstruction_loss(
    model: AutoencoderKL, images: Tensor, config: TokenizerTrainConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the loss and its terms for `images` (N, 3, H, W) in [-1, 1].

    `l1` and `l2` are means over all values; `kl` is the mean over images of the KL in nats.
    """
    posterior = model.encode(images)
    error = model.decode(posterior.sample(generator)).float() - images  # (N, 3, H, W)
    terms = {"l1": error.abs().mean(), "l2": error.square().mean(), "kl": posterior.kl().mean()}
    weights = {"l1": config.l1_weight, "l2": config.l2_weight, "kl": config.kl_weight}
    return {"loss": sum(weights[name] * term for name, term in terms.items()), **terms}


class TokenizerTrainer:
    """Model, average, optimizer and data of one run; `step` is one optimizer step."""

    def __init__(self, config: TokenizerTrainConfig, model: AutoencoderKL, images: Tensor) -> None:
        self.config = config
        self.device = best_device()
        self.dtype = training_dtype(self.device)
        self.model = model.to(self.device)
        self.images = images
        self.settings = {
            "autoencoder": repr(model.settings),
            "batch": config.batch_size,
            "seed": config.seed,
            "images": len(images),
        }
        self.order = BatchOrder(len(images), config.batch_size, config.seed)
        self.ema = Ema(self.model, config.ema_decay)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, step: int) -> Mapping[str, Tensor]:
        """Take one optimizer step and return the loss terms."""
        config = self.config
        batch = pad_to_32(self.images[self.order.indices(step)]).to(self.device)  # (B, 3, 32, 32)
        decay = config.max_steps - config.warmup_steps
        rate = learning_rate(step, config.lr, config.warmup_steps, decay, config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(self.device, self.dtype):
            terms = reconstruction_loss(self.model, batch, config, generator_for(config.seed, 1, step))
        self.optimizer.zero_grad(set_to_none=True)
        require_finite("loss", terms["loss"], step)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        require_finite("gradient", norm, step)
        self.optimizer.step()
        self.ema.update(self.model)
        return terms

    def state_dict(self) -> dict[str, object]:
        """Return everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.ema.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["average"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.train_tokenizer", description=__doc__)
    parser.add_argument("--config", required=True, help="tokenizer YAML (model.params and train)")
    parser.add_argument("--data-root", default="data/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--output", default="output/tokenizer", help="folder of checkpoints and log")
    parser.add_argument("--max-steps", type=int, help="stop earlier than the YAML says")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    tokenizer = load_tokenizer_config(args.config)
    config = tokenizer.train
    print(f"settings: {autoencoder_settings(tokenizer)}\n          {config}")
    if args.dry_run:
        return 0
    torch.manual_seed(config.seed)  # initial weights
    images, _ = fashion_mnist(args.data_root, train=True)
    trainer = TokenizerTrainer(config, AutoencoderKL(autoencoder_settings(tokenizer)), images)
    schedule = Schedule(
        min(args.max_steps or config.max_steps, config.max_steps),
        config.batch_size,
        config.log_every,
        config.ckpt_every,
    )
    weights = training.train(trainer, RunFolder(args.output), schedule, "tokenizer.safetensors")
    print(f"wrote {weights}\nNext: python -m LightningDiT.extract_features --help")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
