"""Model, tokenizer and transport joined: class labels in, images out."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.compiling import PLAIN, WHOLE, Plan
from LightningDiT.config import (
    CPU_BATCH,
    Config,
    SampleConfig,
    as_dict,
    as_yaml,
    check_sample,
    describe_guidance,
    load_config,
    with_overrides,
)
from LightningDiT.data.labels import CLASS_NAMES, CONDITION_NAMES, NULL_TRAINED, Labels, listed
from LightningDiT.device import (
    HALF_PRECISIONS,
    Precision,
    best_device,
    gpu_count,
    gpu_free_bytes,
    release_memory,
    resolve_precision,
    usable_device,
    without_autocast,
)
from LightningDiT.errors import LightningDiTError, first_line, is_out_of_memory, warn_user
from LightningDiT.files import read_text, remove_leftovers, write_text
from LightningDiT.hub.bundled import PLACES
from LightningDiT.hub.card import CARD_NAME, KNOWN, PICTURE_NAME, Facts, Subject, is_own_card, model_card
from LightningDiT.hub.registry import DIT, usable_names
from LightningDiT.hub.repository import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    TOKENIZER_PATHS,
    WINDOWS_NAME,
    Repository,
    pretrained_config,
    without_files,
)
from LightningDiT.images import image_grid, save_png, to_pil, to_uint8
from LightningDiT.loading import (
    STATS_NAME,
    Network,
    as_user_error,
    build_transport,
    check_latent_shape,
    guidance_of,
    load_guide,
    load_stats,
    load_transformer,
    network_metadata,
    network_name,
    required,
)
from LightningDiT.radar.split import load_split
from LightningDiT.sampling.arguments import checked_noise, seeds_of
from LightningDiT.sampling.calibrated import (
    ADAPTER,
    adapter_digest,
    guide_fingerprint,
    load_solvers,
    save_solvers,
    weights_fingerprint,
)
from LightningDiT.sampling.conditions import Conditions, numbers_of_conditions
from LightningDiT.sampling.memory_limit import BatchLimit
from LightningDiT.sampling.memory_model import FLOAT32, GPU_SHARE, HALF, LARGEST_GPU_BATCH, working_need
from LightningDiT.sampling.moving_line import moving_line
from LightningDiT.sampling.networks import Networks, note_code, objection_to, padded, plan_of
from LightningDiT.sampling.non_finite import all_finite, first_not_finite
from LightningDiT.sampling.null_row import check_guidance, null_failure, trained_nulls
from LightningDiT.sampling.solver_choice import Solver, check_solver
from LightningDiT.sampling.views import views
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.config import tokenizer_config_path, tokenizer_values
from LightningDiT.tokenizer.latent_space import check_tokenizer_of_latents
from LightningDiT.tokenizer.vavae import VA_VAE
from LightningDiT.transport import GuidedVelocity, StepCallback, Transport, draw_noise

GUIDE_NAME = "guide.safetensors"
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SHOWN, SHOWN_PARAMETERS = 8, 10_000_000  # images of a model card; the largest network that a CPU samples them with
#: What `LightningDiTPipeline.__call__` calls the settings that it can override.
ARGUMENTS = {
    "cfg_scale": "guidance_scale",
    "num_sampling_steps": "num_inference_steps",
    "per_proc_batch_size": "batch_size",
}


@dataclass(frozen=True)
class PipelineOutput:
    """The result of one call of the pipeline.

    Attributes:
        images: a list of PIL images, uint8 pixels (N, H, W, 3), a float tensor (N, 3, H, W) about [-1, 1], or
            normalised latents (N, C, h, w), as `output_type` asked. A model of levels has one channel in place of 3.
        labels: the class of each image.
        seeds: (seed, index) of each image; noise that was not given as latents depends on nothing else.
        nfe: evaluations of the velocity that each image took.
        seconds: wall clock of sampling and decoding.
        dtype: precision that the transformer computed in; a warning names batches that were made again in float32.
        conditions: the second label of each image, None for none; None for a model without a second label.
    """

    images: Any
    labels: list[int]
    seeds: list[tuple[int, int]]
    nfe: int
    seconds: float
    dtype: torch.dtype
    conditions: list[int | None] | None = None


class LightningDiTPipeline:
    """A LightningDiT (or a U-Net), the tokenizer of its latents, the sampling settings of a configuration, and for
    autoguidance a guide: a weaker network of the same shape.

    Attributes:
        labels, conditions: names and numbers of the classes, and of the second label; None without one.
        null_failure: why the null labels of the network mean nothing; empty if they were trained or nothing tells.
            `from_config` finds out.
    """

    def __init__(
        self,
        transformer: Network,
        tokenizer: VA_VAE,
        transport: Transport,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        guide: Network | None = None,
    ) -> None:
        if (guide is None) != (config.sample.guide_ckpt is None):
            raise LightningDiTError(
                f"{'no' if guide is None else 'a'} guide is given, and sample.guide_ckpt is {config.sample.guide_ckpt}",
                "give the guide that the settings name: LightningDiTPipeline.from_config does",
            )
        self.transformer = transformer
        self.guide = guide
        self.tokenizer = tokenizer
        self.transport = transport
        self.config = config
        self.labels, self.conditions = Labels.of(config), Labels.conditions_of(config)
        self.null_failure = ""
        self.batch_limit = BatchLimit()
        self._networks = Networks()
        self._settled: Plan | None = None
        self._batch: int | None = None  # images that the memory of the device holds, once asked
        self._solvers: dict[SampleConfig, Solver] = {}
        self._not_finite: str | None = None  # where half precision first failed
        self._said_null = False  # that images have no condition
        self.to(device, dtype)

    @classmethod
    def from_config(cls, config: str | Path | Config, device: torch.device | str | None = None) -> LightningDiTPipeline:
        """Return the pipeline that a YAML file (or settings read from one) describes.

        Args:
            device: where to compute; by default the GPU if it works, else the CPU.

        Raises:
            LightningDiTError: a file is missing, damaged or does not fit the others.
        """
        settings = config if isinstance(config, Config) else load_config(config)
        check_solver(settings.sample, settings.transport.path_type)
        device = usable_device(device) if device else best_device()
        precision = resolve_precision(settings.sample.precision, device)
        if precision.note:
            warn_user(precision.note)
        dtype = precision.dtype
        check_tokenizer_of_latents(settings)
        stats = load_stats(settings)
        tokenizer = VA_VAE(
            tokenizer_config_path(settings), settings.data.image_size, settings.vae.ckpt_path, stats, device
        )
        check_latent_shape(settings, tokenizer.config)
        transformer, guide = load_transformer(settings, dtype), load_guide(settings, dtype)
        failure = null_failure(settings, transformer.state_dict())
        pipe = cls(transformer, tokenizer, build_transport(settings), settings, device, dtype, guide)
        pipe.null_failure = failure
        return pipe

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> LightningDiTPipeline:
        """Return the pipeline of a folder that `save_pretrained` wrote, or of a repository on the hub (docs/hub.md).

        Args:
            source: a folder, which wins, or owner/name: in the layout of `save_pretrained`, or a published transformer.
            device: see `from_config`.
            revision: branch, tag or commit of the repository.
            token: of an account on the hub; by default the one that `hf auth login` stored.
            cache_dir: folder of the downloads; by default the cache of huggingface_hub.

        Raises:
            LightningDiTError: nothing has the name, the hub does not give its files, or they do not fit together.
        """
        return cls.from_config(pretrained_config(source, revision, token, cache_dir), device)

    def save_pretrained(
        self, folder: str | Path, facts: Facts | None = None, picture: bool | None = None, name: str | None = None
    ) -> None:
        """Write configuration, weights (as they are in memory, an adapter among them), statistics and a model card into
        `folder`, which names no file outside of it.

        Args:
            facts: what the card says of data, licence and figures; default: what is known of a bundled or published
                model whose weights these are.
            picture: sample one image each of up to `SHOWN` classes for the card; default: on a GPU and for small
                networks.
            name: what the card tells `from_pretrained`; default: the name of the folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self._write_windows(folder)
        stats, sample = self.tokenizer.stats, self.config.sample
        save_weights(self.transformer.state_dict(), folder / "transformer.safetensors", self.metadata())
        metadata = stats.as_metadata() if stats else {}
        save_weights(self.tokenizer.model.state_dict(), folder / "tokenizer.safetensors", metadata)
        if self.guide is not None:
            save_weights(self.guide.state_dict(), folder / GUIDE_NAME)
            sample = dataclasses.replace(sample, guide_ckpt=GUIDE_NAME)
        if sample.solver_file:
            saved = {self._weights_fingerprint: weights_fingerprint(folder / "transformer.safetensors")}
            if own := guide_fingerprint(self.config.sample):
                saved[own] = weights_fingerprint(folder / GUIDE_NAME)
            save_solvers(load_solvers(sample.solver_file).renamed(saved), folder / "solvers.yaml")
            sample = dataclasses.replace(sample, solver_file="solvers.yaml")
        if self.config.data.latent_norm and stats:
            stats.save(folder / STATS_NAME)
        config = without_files(self.config)
        data = dataclasses.replace(config.data, data_path=".")
        vae = dataclasses.replace(config.vae, model_name=TOKENIZER_NAME)
        config = dataclasses.replace(config, ckpt_path="transformer.safetensors", data=data, vae=vae, sample=sample)
        tokenizer = tokenizer_values(self.tokenizer.config) | {"ckpt_path": "tokenizer.safetensors"}
        if isinstance(train := tokenizer.get("train"), dict):
            tokenizer["train"] = {key: value for key, value in train.items() if f"train.{key}" not in TOKENIZER_PATHS}
        for file, values in ((TOKENIZER_NAME, tokenizer), (CONFIG_NAME, as_dict(config))):
            write_text(folder / file, as_yaml(values))
        self._write_card(folder, facts, picture, name or folder.resolve().name)

    def push_to_hub(
        self,
        repository: str,
        private: bool | None = None,
        token: str | bool | None = None,
        message: str = "A pipeline of LightningDiT",
        facts: Facts | None = None,
        picture: bool | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub, and return the address of the commit.

        Args:
            repository: owner/name; it is made if it does not exist.
            private: of a new repository; by default as the account is set.
            token: of an account that may write; by default the one that `hf auth login` stored.
            message: of the commit.
            facts, picture: see `save_pretrained`.

        Raises:
            LightningDiTError: the hub refuses or is out of reach.
        """
        place = Repository.named(repository, token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, facts, picture, repository)
            return place.push(Path(folder), private, message)

    def _write_windows(self, folder: Path) -> None:
        """Write what the axes of spectrograms need, of the split of their training or of the file that the
        configuration has beside it."""
        split, beside = self.config.data.split_file, Path(self.config.source).with_name(WINDOWS_NAME)
        if split and Path(split).is_file():
            known = load_split(Path(split)).settings
            found = {key: known[key] for key in ("native_columns", "colour_maps") if key in known}
            write_text(folder / WINDOWS_NAME, json.dumps(found) + "\n")
        elif beside.is_file():
            write_text(folder / WINDOWS_NAME, read_text(beside))

    def _write_card(self, folder: Path, facts: Facts | None, picture: bool | None, name: str) -> None:
        """Write the model card and its picture into `folder`; a card that somebody wrote there stays."""
        if (folder / CARD_NAME).is_file() and not is_own_card(folder / CARD_NAME):
            warn_user(f"this program did not write {folder / CARD_NAME}; it stays")
            return
        if picture is None:
            small = _parameters(self.transformer) <= SHOWN_PARAMETERS
            picture = not self.config.sample.reverse and (small or self.device.type != "cpu")
        subject = self._subject(name, self._picture(folder) if picture else [])
        write_text(folder / CARD_NAME, model_card(subject, facts or self._known_facts()))

    def _picture(self, folder: Path) -> list[int]:
        """Write the picture of the model card and return its labels, none if the settings do not allow to sample."""
        count = self.labels.count
        labels = [index * count // min(SHOWN, count) for index in range(min(SHOWN, count))]
        conditions = self._shown_conditions(labels)
        try:
            images = self(labels, seed=0, output_type="pt", conditions=conditions).images
            grid = image_grid(views(images), captions_of(self, labels, conditions))
        except LightningDiTError as error:
            warn_user(f"the model card has no picture: {error.message}")
            return []
        save_png(grid, folder / PICTURE_NAME)
        return labels

    def _shown_conditions(self, labels: Sequence[int]) -> list[int] | None:
        """Return a condition for each image of the picture, all in turn; None for a model without them."""
        return [index % self.conditions.count for index in range(len(labels))] if self.conditions else None

    def _subject(self, name: str, shown: Sequence[int]) -> Subject:
        """Return what the model card says of this pipeline."""
        settings, side, channels = self.transformer.settings, self.config.data.image_size, self.channels
        latent = f"{settings.input_size}x{settings.input_size} latents of {settings.in_channels} channels"
        others = self.conditions
        return Subject(
            source=name,
            network=network_name(settings),
            parameters=_parameters(self.transformer),
            tokenizer=f"KL autoencoder, {side}x{side}x{channels} to {latent}",
            side=side,
            channels=channels,
            classes=[self.labels.caption(label) for label in range(self.labels.count)],
            conditions=[others.caption(number) for number in range(others.count)] if others else (),
            solver=self.solver(self.config.sample).describe(),
            guidance=describe_guidance(self.config.sample) + (" by a guide" if self.guide is not None else ""),
            shown=shown,
            shown_conditions=self._shown_conditions(shown) or (),
        )

    def _known_facts(self) -> Facts:
        """Return what is known of a bundled or published model, if the weights in memory are those of its file."""
        path = Path(self.config.ckpt_path or "")
        known = {name: model for model, file in DIT.items() for name in usable_names(file)}
        known |= {"transformer.safetensors": path.parent.name} if path.parent in PLACES else {}
        model = known.get(path.name, "")
        if model not in KNOWN or self.config.adapter_path or not path.is_file():
            return Facts()
        ours, theirs = self.transformer.state_dict(), load_weights(path)
        same = all(name in theirs and torch.equal(theirs[name].to(x.dtype), x.cpu()) for name, x in ours.items())
        return KNOWN[model] if same else Facts()

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the network's weights: names of its labels, whether the null ones were trained, and
        which adapter they hold."""
        names = {CLASS_NAMES: self.labels.identity, CONDITION_NAMES: self.conditions and self.conditions.identity}
        found = {key: json.dumps(value) for key, value in names.items() if value}
        told = trained_nulls(self.config)
        if self.null_failure or told is not None:
            found[NULL_TRAINED] = json.dumps(not self.null_failure and told)
        if self.config.adapter_path:
            found[ADAPTER] = adapter_digest(self.config.adapter_path)
        return found | network_metadata(self.transformer.settings)

    def with_sample(self, sample: SampleConfig) -> LightningDiTPipeline:
        """Return a pipeline of the same networks with other sampling settings; another guide is loaded."""
        check_sample(sample)
        config = dataclasses.replace(self.config, sample=sample)
        same = sample.guide_ckpt == self.config.sample.guide_ckpt
        guide = self.guide if same else load_guide(config, self.dtype)
        other = LightningDiTPipeline(
            self.transformer, self.tokenizer, self.transport, config, self.device, self.dtype, guide
        )
        other._networks = self._networks  # one lock and one set of recordings for the same weights
        other.null_failure, other._said_null = self.null_failure, self._said_null
        return other

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LightningDiTPipeline:
        """Move to `device`; `dtype` is the precision of transformer and guide, the tokenizer's weights stay float32.

        Raises:
            LightningDiTError: this torch cannot use the device; the pipeline stays where it is.
        """
        with self._networks.lock:
            self.device = usable_device(device)
            self._networks.drop()
            self._batch = None
            self.transformer = self.transformer.to(device=self.device, dtype=dtype)
            if self.guide is not None:
                self.guide = self.guide.to(device=self.device, dtype=dtype)
            self.dtype = next(self.transformer.parameters()).dtype
            self.tokenizer.to(self.device)
        return self

    @property
    def precision(self) -> Precision:
        """What sampling computes in, here and with the weights as they are."""
        return resolve_precision(self.config.sample.precision, self.device).for_weights(self.dtype)

    def batch_size(self, sample: SampleConfig, processes: int = 1) -> int:
        """Return how many images are sampled at once: as sampling settings say, else `CPU_BATCH`, and on a GPU as many
        as its free memory holds (docs/memory.md).

        Args:
            processes: of the run, which share this machine's GPUs.
        """
        if not self.batch_follows_memory(sample):
            return sample.per_proc_batch_size or CPU_BATCH
        free = gpu_free_bytes(self.device)
        if self._batch is None and free is not None:
            size = FLOAT32 if self.dtype == torch.float32 else HALF
            decoder, side = self.tokenizer.model.settings, self.config.data.image_size
            need = working_need(self.transformer.settings, decoder, side, True, size)
            memory = GPU_SHARE * free / math.ceil(processes / max(1, gpu_count()))
            self._batch = need.largest_batch(memory, LARGEST_GPU_BATCH)
        return self._batch or CPU_BATCH

    def batch_follows_memory(self, sample: SampleConfig) -> bool:
        """Return whether the memory of a GPU decides how many images are sampled at once.

        The bits of a deterministic run depend on that number, so the memory does not.
        """
        return sample.per_proc_batch_size is None and self.device.type != "cpu" and not sample.deterministic

    def plan(self, images: int, batch: int) -> Plan:
        """Return how a run of `images` images in this process, `batch` of them at once, is to be computed."""
        return plan_of(self.solver(self.config.sample), self.transformer, self.precision, images, batch)

    @contextlib.contextmanager
    def settled(self, plan: Plan, where: str) -> Iterator[None]:
        """Compute by a plan within the block; by default each call makes its own.

        Args:
            where: whose plan it is, for the message.

        Raises:
            LightningDiTError: this machine cannot compute so, or `compile` of the settings says otherwise.
        """
        if objection := objection_to(plan, self.transformer, self.config.sample.compile):
            raise LightningDiTError(f"{where} {objection}", "choose another --output")
        self._settled, before = plan, self._settled
        try:
            yield
        finally:
            self._settled = before

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        settings = self.transformer.settings
        return settings.in_channels, settings.input_size, settings.input_size

    @property
    def channels(self) -> int:
        """Channels of the images: 3, or 1 for levels."""
        return self.tokenizer.model.settings.out_ch

    @cached_property
    def _weights_fingerprint(self) -> str:
        return weights_fingerprint(required(self.config, "ckpt_path"), self.config.adapter_path)

    def solver(self, sample: SampleConfig) -> Solver:
        """Return the solver of sampling settings; each solver file is read once.

        Raises:
            LightningDiTError: no such solver, none that fits, or a grid of too few points.
        """
        if sample not in self._solvers:
            with as_user_error(f"{self.config.source}: sample"):
                self._solvers[sample] = Solver.of(sample, self.transport, lambda: self._weights_fingerprint)
        return self._solvers[sample]

    def guided(self, labels: Sequence[int] | Tensor, sample: SampleConfig, plan: Plan = PLAIN) -> GuidedVelocity:
        """Return the guided model for images of these classes, a function of state and time that computes by a plan.

        Args:
            labels: classes, without a condition; or labels (N,) or (N, 2) as the network takes them.

        Raises:
            LightningDiTError: null labels that were never trained are needed.
        """
        check_guidance(sample, self.null_failure)
        if not isinstance(labels, Tensor):
            labels = self.label_tensor(labels, self.condition_numbers(None, len(labels)))
        y = labels.to(self.device)
        model, *guide = [partial(self._networks.predict, network, plan, len(y)) for network in self._both]
        return GuidedVelocity(model, y, self.transformer.null_labels(y), guidance_of(sample), *guide)

    def label_tensor(self, labels: Sequence[int], conditions: Sequence[int | None] | None = None) -> Tensor:
        """Return labels (N,), or with a second label (N, 2), of classes and conditions; None is the null condition."""
        classes = torch.tensor(labels)  # (N,)
        if self.conditions is None:
            return classes
        null = self.conditions.count
        found = [null if condition is None else condition for condition in conditions or [None] * len(labels)]
        return torch.stack([classes, torch.tensor(found)], dim=1)

    @property
    def _both(self) -> list[Network]:
        """The transformer, and the guide if there is one."""
        return [self.transformer] if self.guide is None else [self.transformer, self.guide]

    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        callback: StepCallback | None = None,
        conditions: Conditions = None,
    ) -> PipelineOutput:
        """Return one image per class label.

        Args:
            class_labels: numbers or names.
            guidance_scale: 1 is no guidance; by default the configuration's.
            num_inference_steps: points of the time grid; by default the configuration's.
            seed, indices: image k starts from the noise of (seed, indices[k]), by default (seed, k), in any batch;
                whole numbers from 0 to below 2^32.
            latents: noise (N, C, h, w) to start from instead.
            output_type: `pil`, `np`, `pt` or `latent`, see `PipelineOutput.images`.
            batch_size: images sampled at once, by default the configuration's; fewer if the memory does not hold
                them, which changes no noise and no label.
            callback: called as callback(step, t, state) after each solver step of each batch; step is 0 when a batch
                starts, or starts again in halves or in float32.
            conditions: numbers or names of the second label, one per image or one for all; None is no condition.

        Raises:
            LightningDiTError: an argument is wrong, null labels are needed and were never trained, or one image is too
                much for the memory.
        """
        if output_type not in OUTPUT_TYPES:
            known = ", ".join(OUTPUT_TYPES)
            raise LightningDiTError(f"output_type {output_type!r} is unknown; {known} are expected", "choose one")
        labels = self._numbers_of(class_labels)
        chosen = self.condition_numbers(conditions, len(labels))
        given = {"cfg_scale": guidance_scale, "num_sampling_steps": num_inference_steps}
        sample = with_overrides(self.config.sample, ARGUMENTS, **given, per_proc_batch_size=batch_size)
        check_guidance(sample, self.null_failure)
        solver = self.solver(sample)
        noise = checked_noise(latents, (len(labels), *self.latent_shape), sample.reverse)
        seeds = seeds_of(seed, indices, len(labels))
        started = time.perf_counter()
        shown = moving_line(len(labels), solver.steps, callback, in_run=self._settled is not None)
        with self._networks.lock, shown as watch, torch.inference_mode(), without_autocast(self.device):
            parts, nfe = self._sample(solver, self.label_tensor(labels, chosen), seeds, noise, output_type, watch)
        images = _joined(parts, output_type)  # here, so that tensors serve autograd too
        return PipelineOutput(images, labels, seeds, nfe, time.perf_counter() - started, self.dtype, chosen)

    def _numbers_of(self, class_labels: Sequence[int | str] | int | str) -> list[int]:
        classes = listed(class_labels, "class_labels")
        if not classes:
            raise LightningDiTError("class_labels is empty; at least one class is expected", "name a class")
        return self.labels.numbers(classes)

    def condition_numbers(self, conditions: Conditions, count: int) -> list[int | None] | None:
        """Return the number of the condition of each of `count` images, None for a model without a second label.

        Args:
            conditions: numbers or names, one for each image or one for all; None: no condition, which is said once.

        Raises:
            LightningDiTError: a condition is unknown, their number is wrong, the model has none, or an image is to have
                none and the null condition was never trained.
        """
        if conditions is None and self.conditions:
            self._say_null(self.conditions)
        return numbers_of_conditions(self.conditions, conditions, count, self.null_failure)

    def _say_null(self, conditions: Labels) -> None:
        """Say once that images have no condition."""
        if not self._said_null:
            self._said_null = True
            warn_user(f"no conditions are given, so images have none of {conditions.listing(range(conditions.count))}")

    def _sample(
        self,
        solver: Solver,
        labels: Tensor,
        seeds: list[tuple[int, int]],
        noise: Tensor | None,
        output_type: str,
        callback: StepCallback | None,
    ) -> tuple[list[Any], int]:
        """Return the images of each batch for labels (N,) or (N, 2), and the evaluations of each image.

        A batch that memory does not hold is sampled in halves. A batch that half precision does not hold is sampled
        again in float32; images that were finite stay as they were, so that none depends on its batch.
        """
        size = self.batch_size(solver.sample)
        whole = self._settled or plan_of(solver, self.transformer, self.precision, len(labels), size)
        size = min(size, whole.batch or size)
        if solver.is_adaptive:  # the steps that suit a batch would depend on its other images
            size, whole = 1, whole.plainly()
        start, nfe, parts = 0, 0, []
        while start < len(labels):
            batch = slice(start, min(start + self.batch_limit.of(size), len(labels)))
            plan = whole.of_batch(batch.stop - start, self.batch_limit.of(whole.batch or size))
            solve = partial(self._solve, solver, labels[batch], seeds[batch], None if noise is None else noise[batch])
            try:
                state, evaluations = solve(callback, plan)
                if not all_finite(state):
                    self._report_not_finite(solve)
                    with self._in_float32():
                        repeated, evaluations = solve(callback, plan.plainly())
                        if not all_finite(repeated):
                            self._report_not_finite(solve)
                    finite = state.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)  # (N, 1, 1, 1)
                    state = torch.where(finite, state, repeated)
                parts.append(self._decode(state, output_type, plan))
                note_code(plan, solver, self.transformer)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if whole.deterministic:
                    raise _too_large(whole.rows(1), error) from error
                self.batch_limit.halve(batch.stop - start, error)
            else:
                self.batch_limit.count_success()
                start, nfe = batch.stop, max(nfe, evaluations)
                continue
            self._networks.drop()
            gc.collect()  # here, since the error above held the frames that hold the tensors
            release_memory()
        return parts, nfe

    def _solve(
        self,
        solver: Solver,
        labels: Tensor,
        seeds: list[tuple[int, int]],
        noise: Tensor | None,
        callback: StepCallback | None,
        plan: Plan,
        strict: bool = False,
    ) -> tuple[Tensor, int]:
        """Return the final states (N, C, h, w) of one batch, computed by a plan, and the evaluations that they took.

        Raises:
            FloatingPointError: `strict`, and an adaptive solver finds no step; otherwise its states are then NaN.
        """
        with as_user_error(self.config.source):
            generators = [generator_for(*pair) for pair in seeds]
            if noise is None:
                noise = draw_noise((len(labels), *self.latent_shape), generators)
            x = noise.to(self.device, torch.float32)
            velocity = self.guided(labels, solver.sample, plan)
            try:
                with self._networks.under(plan, self._both):
                    return solver.integrate(velocity, x, generators, callback)
            except FloatingPointError:
                if strict:
                    raise
                return torch.full_like(x, torch.nan), 0

    def _report_not_finite(self, solve: Callable[..., object]) -> None:
        """Warn in half precision, and raise in float32, with the first layer whose values are not finite."""
        is_half = self.dtype in HALF_PRECISIONS
        if self._not_finite is None or not is_half:  # later batches are not replayed for it
            networks = {"": self.transformer} | ({"guide.": self.guide} if self.guide is not None else {})
            replay = partial(solve, None, PLAIN, strict=True)
            self._not_finite = first_not_finite(networks, replay) or "the state after the last evaluation"
        message = f"sampling in {self.dtype} gave values that are not finite, first {self._not_finite}"
        if not is_half:
            raise LightningDiTError(message, "lower --guidance-scale, or python step2_download_models.py --verify")
        warn_user(f"{message}; this batch is made again in float32")

    @contextlib.contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Compute in float32 for a while; from half precision to float32 and back no weight changes."""
        dtype = self.dtype
        try:
            with torch.inference_mode(False):  # else the weights become tensors that serve inference alone
                self.to(self.device, torch.float32)
            yield
        finally:
            with torch.inference_mode(False):
                self.to(self.device, dtype)

    def _decode(self, state: Tensor, output_type: str, plan: Plan) -> Any:
        if output_type == "latent":
            return state.cpu()
        compiled = WHOLE if plan.compiled and plan.half_decoder else ""
        rows = plan.rows(len(state)) if plan.deterministic or compiled else len(state)
        with self._networks.under(dataclasses.replace(plan, compiled=compiled), [self.tokenizer.model.decoder]):
            images = self.tokenizer.decode(padded(state, rows), plan.half_decoder, plan.tf32)[: len(state)]
        if output_type == "pt":
            return images.cpu()
        pixels = to_uint8(images).cpu().numpy()
        return to_pil(pixels) if output_type == "pil" else pixels


def captions_of(
    pipe: LightningDiTPipeline, labels: Sequence[int], conditions: Sequence[int | None] | None
) -> list[str]:
    """Return what stands below each image: its class and, if it has one, its condition."""
    captions = [pipe.labels.caption(label) for label in labels]
    if pipe.conditions is None or conditions is None:
        return captions
    return [
        caption if number is None else f"{caption}, {pipe.conditions.caption(number)}"
        for caption, number in zip(captions, conditions, strict=True)
    ]


def _parameters(network: Network) -> int:
    return sum(value.numel() for value in network.parameters())


def _too_large(images: int, error: BaseException) -> LightningDiTError:
    return LightningDiTError(
        f"the memory does not hold {images} images at once, which --deterministic keeps to ({first_line(error)})",
        "choose a smaller --batch-size and another --output",
    )


def _joined(parts: list[Any], output_type: str) -> Any:
    """Return the images of all batches as one list, array or tensor."""
    if output_type == "pil":
        return [image for part in parts for image in part]
    return np.concatenate(parts) if output_type == "np" else torch.cat(parts)
