"""Model, tokenizer and transport joined: class labels in, images out."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from LightningDiT.batches import BatchLimit
from LightningDiT.calibrated import CalibratedSolver, find_solver, load_solvers, save_solvers, weights_fingerprint
from LightningDiT.checkpoint import atomic_path, check_shapes, inspect, load_file, save_weights, without_values
from LightningDiT.compiled import compile_forward
from LightningDiT.config import (
    NAMED_SOLVERS,
    Config,
    SampleConfig,
    TokenizerConfig,
    as_dict,
    load_config,
    load_tokenizer_config,
    read_yaml,
    resolved_solver,
    tokenizer_config_path,
    with_points,
)
from LightningDiT.device import HALF_PRECISIONS, best_device, resolve_precision
from LightningDiT.errors import LightningDiTError
from LightningDiT.finite import all_finite, first_not_finite
from LightningDiT.images import to_pil, to_uint8
from LightningDiT.labels import Labels
from LightningDiT.models.lightningdit import (
    LightningDiT,
    LightningDiTSettings,
    differences,
    preset_name,
    preset_settings,
    settings_from_shapes,
)
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings, check_tokenizer_file
from LightningDiT.transport import (
    ODE_METHODS,
    GuidanceSettings,
    GuidedVelocity,
    Sampler,
    SdeSettings,
    Transport,
    Velocity,
    check_method,
    create_transport,
    draw_noise,
    graded_grid,
    integrate_ode,
    jumps_of,
    linear_multistep,
    sde_states,
)

CONFIG_NAME = "config.yaml"
STATS_NAME = "latents_stats.pt"
GUIDE_NAME = "guide.safetensors"
CALIBRATED, FAST, PUBLISHED = "calibrated", "fast", "published"
GRADED = "graded"
SOLVER_NAMES = (*NAMED_SOLVERS, CALIBRATED, *ODE_METHODS)
Callback = Callable[[int, float, Tensor], None]


@dataclass(frozen=True)
class PipelineOutput:
    """What one call of the pipeline made.

    Attributes:
        images: a list of PIL images, uint8 pixels (N, H, W, 3), a float tensor (N, 3, H, W) about [-1, 1], or
            normalised latents (N, C, h, w), as `output_type` asked.
        labels: the class of each image.
        seeds: (seed, index) of each image; noise that was not given as latents depends on nothing else.
        nfe: evaluations of the velocity that each image took.
        seconds: wall clock of sampling and decoding.
        dtype: precision that the transformer computed in; a warning names batches that were made again in float32.
    """

    images: Any
    labels: list[int]
    seeds: list[tuple[int, int]]
    nfe: int
    seconds: float
    dtype: torch.dtype


def model_settings(config: Config) -> LightningDiTSettings:
    """Return the transformer's settings that a configuration describes."""
    model = config.model
    with _as_user_error(f"{config.source}: model"):
        return preset_settings(
            model.model_type,
            input_size=config.data.image_size // config.vae.downsample_ratio,
            in_channels=model.in_chans,
            num_classes=config.data.num_classes,
            learn_sigma=model.learn_sigma,
            use_qknorm=model.use_qknorm,
            use_swiglu=model.use_swiglu,
            use_rope=model.use_rope,
            use_rmsnorm=model.use_rmsnorm,
            wo_shift=model.wo_shift,
            use_checkpoint=model.use_checkpoint or config.train.use_checkpoint,
        )


def build_transport(config: Config) -> Transport:
    """Return the transport that a configuration describes."""
    settings = config.transport
    with _as_user_error(f"{config.source}: transport"):
        return create_transport(
            path_type=settings.path_type,
            prediction=settings.prediction,
            loss_weight=settings.loss_weight,
            train_eps=settings.train_eps,
            sample_eps=settings.sample_eps,
            use_cosine_loss=settings.use_cosine_loss,
            use_lognorm=settings.use_lognorm,
        )


def verify_config(path: str | Path) -> list[str]:
    """Open everything that the configuration at `path` names; see `verify`."""
    return verify(load_config(path))


def verify(config: Config) -> list[str]:
    """Open everything that a configuration names, without reading the weights.

    Returns:
        A line for each thing that was checked.

    Raises:
        LightningDiTError: something is missing, damaged, or does not fit the rest.
    """
    build_transport(config)
    check_solver(config.sample, config.transport.path_type)
    tokenizer = load_tokenizer_config(tokenizer_config_path(config))
    lines = [f"configuration {config.source}: {config.model.model_type}, {config.data.num_classes} classes"]
    lines += config.notes
    lines.append(check_transformer_file(config, _required(config, "ckpt_path")))
    if guide := config.sample.guide_ckpt:
        lines.append(check_guide_file(config, guide))
    weights = config.vae.ckpt_path or tokenizer.ckpt_path
    if not weights:
        raise LightningDiTError(f"{config.source} names no vae.ckpt_path", "python step3_setup_configs.py")
    lines.append(check_tokenizer_file(tokenizer, weights))
    check_latent_shape(config, tokenizer)
    load_stats(config)
    lines.append(f"latent statistics in {config.data.data_path}: {config.model.in_chans} channels")
    return lines


def check_solver(sample: SampleConfig, path_type: str = "Linear") -> None:
    """Refuse a solver that the mode does not have, or options that do not go with it.

    Raises:
        LightningDiTError: names the value and the known ones.
    """
    with _as_user_error("sample"):
        if sample.mode == "SDE":
            sde_settings(sample)
        elif sample.sampling_method not in SOLVER_NAMES:
            near = difflib.get_close_matches(sample.sampling_method, SOLVER_NAMES, 1, 0.0)
            raise ValueError(
                f"sampling_method {sample.sampling_method!r} is unknown; {', '.join(SOLVER_NAMES)} are expected,"
                f" the nearest is {near[0]}"
            )
        else:
            check_method(sample.sampling_method, path_type, sample.reverse)
            if sample.time_grid == GRADED and sample.timestep_shift:
                raise ValueError("timestep_shift goes with time_grid shifted, not with graded")


def sde_settings(sample: SampleConfig) -> SdeSettings:
    """Return the stochastic sampler's settings.

    Raises:
        ValueError: an unknown name, or an option that only the ODE has.
    """
    if sample.timestep_shift or sample.reverse or sample.time_grid == GRADED:
        raise ValueError("timestep_shift, reverse and time_grid graded go with mode ODE, not with SDE")
    return SdeSettings(
        sampling_method=sample.sampling_method.capitalize(),  # SiT writes Euler and Heun
        diffusion_form=sample.diffusion_form,
        diffusion_norm=sample.diffusion_norm,
        last_step=sample.last_step,
        last_step_size=sample.last_step_size,
        num_steps=sample.num_sampling_steps,
    )


def check_transformer_file(config: Config, path: str | Path) -> str:
    """Compare the transformer's weights file with the configuration and return a line that says so."""
    info = inspect(path)
    wanted = model_settings(config)
    try:
        found = settings_from_shapes(info.shapes)
    except (ValueError, KeyError, IndexError) as error:
        raise LightningDiTError(f"{path}: {error}", "name the transformer's weights in ckpt_path") from error
    if wrong := differences(wanted, found):
        actual = preset_name(found) or f"{found.depth} layers of {found.hidden_size}"
        raise LightningDiTError(
            f"{path} holds {actual} and does not fit {config.source}: {'; '.join(wrong)}",
            "choose the model_type and sizes that belong to the file, or python step3_setup_configs.py",
        )
    with without_values():
        check_shapes(LightningDiT(wanted), info.shapes, path)
    held = f"entry {info.weights_key}" if info.weights_key else "bare weights"
    besides = f", besides it {', '.join(info.extras)}" if info.extras else ""
    return f"transformer {path}: {info.parameters:,} values, {held}{besides}"


def check_guide_file(config: Config, path: str | Path) -> str:
    """Compare the guide's weights file with the configuration, as the model's is, and return a line that says so."""
    try:
        return f"guide {check_transformer_file(config, path).removeprefix('transformer ')}"
    except LightningDiTError as error:
        raise LightningDiTError(
            f"the guide {error.message}", "name weights of the model's own shape in sample.guide_ckpt"
        ) from error


def check_latent_shape(config: Config, tokenizer: TokenizerConfig) -> None:
    """Refuse a tokenizer whose latents have other channels or another size than the model's."""
    sizes = autoencoder_settings(tokenizer)
    for key, wanted, found in (
        ("model.in_chans", config.model.in_chans, sizes.embed_dim),
        ("vae.downsample_ratio", config.vae.downsample_ratio, sizes.downsample_factor),
    ):
        if wanted != found:
            raise LightningDiTError(
                f"{config.source}: {key} is {wanted}, and {found} in the tokenizer {tokenizer.source}",
                "choose the tokenizer that belongs to the model",
            )


def load_transformer(config: Config, dtype: torch.dtype | None = None) -> LightningDiT:
    """Return the transformer in eval mode with the weights of `config.ckpt_path`.

    The model is made on the meta device after the file was compared with the configuration, so that a wrong
    file costs nothing.
    """
    path = _required(config, "ckpt_path")
    check_transformer_file(config, path)
    with without_values():
        model = LightningDiT(model_settings(config))
    load_file(model, path, dtype or torch.float32)
    if config.sample.compile:
        compile_forward(model)
    return model.eval().requires_grad_(False)


def load_guide(config: Config, dtype: torch.dtype | None = None) -> LightningDiT | None:
    """Return the network of `sample.guide_ckpt` as `load_transformer` does, or None where there is none."""
    if not (path := config.sample.guide_ckpt):
        return None
    check_guide_file(config, path)
    return load_transformer(dataclasses.replace(config, ckpt_path=path), dtype)


def load_stats(config: Config) -> LatentStats:
    """Return the statistics of the latents that the configuration names."""
    channels = config.model.in_chans
    if not config.data.latent_norm:
        return LatentStats.identity(channels)
    folder = Path(_required(config, "data", "data_path"))
    if folder.is_file():
        raise LightningDiTError(
            f"data.data_path {folder} is a file; the folder that holds {STATS_NAME} is expected",
            f"set data_path: {folder.parent} in {config.source}",
        )
    return LatentStats.load(folder / STATS_NAME, channels, config.data.latent_multiplier)


class LightningDiTPipeline:
    """A LightningDiT, the tokenizer of its latents, the sampling settings of a configuration, and for autoguidance a
    guide: a weaker LightningDiT of the same shape."""

    def __init__(
        self,
        transformer: LightningDiT,
        tokenizer: VA_VAE,
        transport: Transport,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        guide: LightningDiT | None = None,
    ) -> None:
        self.transformer = transformer
        self.guide = guide
        self.tokenizer = tokenizer
        self.transport = transport
        self.config = config
        self.labels = Labels.of(config)
        self.batch_limit = BatchLimit()
        self.to(device, dtype)

    @classmethod
    def from_config(cls, config: str | Path | Config, device: torch.device | str | None = None) -> LightningDiTPipeline:
        """Return the pipeline that a YAML file (or settings read from one) describes.

        Args:
            device: where to compute; the GPU that works, else the CPU, where left out.

        Raises:
            LightningDiTError: a file is missing, damaged or does not fit the others.
        """
        settings = config if isinstance(config, Config) else load_config(config)
        check_solver(settings.sample, settings.transport.path_type)
        place = torch.device(device) if device else best_device()
        dtype = resolve_precision(settings.sample.precision, place)
        stats = load_stats(settings)
        tokenizer = VA_VAE(
            tokenizer_config_path(settings), settings.data.image_size, settings.vae.ckpt_path, stats, place
        )
        check_latent_shape(settings, tokenizer.config)
        transformer, guide = load_transformer(settings, dtype), load_guide(settings, dtype)
        return cls(transformer, tokenizer, build_transport(settings), settings, place, dtype, guide)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str | None = None) -> LightningDiTPipeline:
        """Return the pipeline that `save_pretrained` wrote into `folder`."""
        place = Path(folder)
        if not (place / CONFIG_NAME).is_file():
            raise LightningDiTError(f"{place} holds no {CONFIG_NAME}", "name a folder that save_pretrained wrote")
        return cls.from_config(place / CONFIG_NAME, device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration, weights (as they are in memory) and statistics into `folder`."""
        from omegaconf import OmegaConf

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        stats = self.tokenizer.stats
        save_weights(self.transformer.state_dict(), place / "transformer.safetensors")
        metadata = stats.as_metadata() if stats else {}
        save_weights(self.tokenizer.model.state_dict(), place / "tokenizer.safetensors", metadata)
        data = dataclasses.replace(self.config.data, data_path=".")
        vae = dataclasses.replace(self.config.vae, model_name="tokenizer.yaml", ckpt_path=None)
        config = dataclasses.replace(self.config, ckpt_path="transformer.safetensors", data=data, vae=vae)
        if solver_file := self.config.sample.solver_file:
            save_solvers(load_solvers(solver_file), place / "solvers.yaml")
            config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, solver_file="solvers.yaml"))
        if self.guide is not None:
            save_weights(self.guide.state_dict(), place / GUIDE_NAME)
            config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, guide_ckpt=GUIDE_NAME))
        if self.config.data.latent_norm and stats:
            stats.save(place / STATS_NAME)
        tokenizer = read_yaml(self.tokenizer.config.source) | {"ckpt_path": "tokenizer.safetensors"}
        for name, values in (("tokenizer.yaml", tokenizer), (CONFIG_NAME, as_dict(config))):
            with atomic_path(place / name) as temporary:
                OmegaConf.save(OmegaConf.create(values), temporary)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LightningDiTPipeline:
        """Move to `device`; `dtype` is the precision of transformer and guide, the tokenizer stays float32."""
        self.device = torch.device(device)
        self.transformer = self.transformer.to(device=self.device, dtype=dtype)
        if self.guide is not None:
            self.guide = self.guide.to(device=self.device, dtype=dtype)
        self.dtype = next(self.transformer.parameters()).dtype
        self.tokenizer.to(self.device)
        return self

    @torch.inference_mode()
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
        callback: Callback | None = None,
    ) -> PipelineOutput:
        """Return one image per class label.

        Args:
            class_labels: numbers or names.
            guidance_scale: 1 is off; the configuration's where left out.
            num_inference_steps: points of the time grid; the configuration's where left out.
            seed, indices: image k starts from the noise of (seed, indices[k]), or of (seed, k), whatever the batch.
            latents: noise (N, C, h, w) to start from instead.
            output_type: `pil`, `np`, `pt` or `latent`, see `PipelineOutput.images`.
            batch_size: images sampled at once, the configuration's where left out; where memory runs out fewer are,
                which changes no noise and no label.
            callback: called as callback(step, t, state) after each solver step of each batch; step is 0 again where
                a batch starts, or starts again in halves or in float32.

        Raises:
            LightningDiTError: a label, a setting or the shape of `latents` is wrong, or one image is too much for
                the memory.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise LightningDiTError(f"output_type {output_type!r} is unknown; pil, np, pt, latent are", "choose one")
        listed = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        if not listed:
            raise LightningDiTError("class_labels is empty; at least one class is expected", "name a class")
        labels = self.labels.numbers(listed)
        sample = self._sample_settings(guidance_scale, num_inference_steps)
        self._check_latents(latents, len(labels))
        seeds = [(seed, index) for index in (range(len(labels)) if indices is None else indices)]
        size = batch_size or sample.per_proc_batch_size
        started, counts, made = time.perf_counter(), [], []
        start = 0
        while start < len(labels):
            part = slice(start, start + self.batch_limit.of(size))
            noise = None if latents is None else latents[part]
            batch = partial(self._batch, labels[part], seeds[part], noise, sample, callback, output_type)
            if (result := self.batch_limit.attempt(batch, len(labels[part]))) is None:
                continue
            made.append(result[0])
            counts.append(result[1])
            start = part.stop
        images = self._join(made, output_type)
        seconds = time.perf_counter() - started
        return PipelineOutput(images, labels, seeds, max(counts, default=0), seconds, self.dtype)

    def _batch(
        self,
        labels: list[int],
        seeds: list[tuple[int, int]],
        noise: Tensor | None,
        sample: SampleConfig,
        callback: Callback | None,
        output_type: str,
    ) -> tuple[Any, int]:
        """Return the images of one batch and the evaluations that each of them took."""
        with _as_user_error(self.config.source):
            state, nfe = self._finite(partial(self._sample, labels, seeds, noise, sample), callback)
        return self._decode(state, output_type), nfe

    def _finite(
        self, run: Callable[[Callback | None], tuple[Tensor, int]], callback: Callback | None
    ) -> tuple[Tensor, int]:
        """Return states (N, C, h, w) and evaluations that `run` gives.

        Where half precision gives what is not finite, the batch is made again in float32. Images that were finite
        stay as they were, so that none depends on its batch.

        Raises:
            LightningDiTError: a state is not finite in float32 either; names the first layer.
        """
        state = None
        try:
            state, nfe = run(callback)
            if all_finite(state):
                return state, nfe
        except FloatingPointError:  # an adaptive solver finds no step; where all is finite, the replay says so again
            pass
        networks = {"": self.transformer} | ({"guide.": self.guide} if self.guide is not None else {})
        place = first_not_finite(networks, partial(run, None)) or "the state after the last evaluation"
        message = f"sampling in {self.dtype} gave values that are not finite, first {place}"
        if self.dtype not in HALF_PRECISIONS:
            raise LightningDiTError(message, "lower --guidance-scale, or python step2_download_models.py --verify")
        # six frames up is who called the pipeline
        warnings.warn(f"{message}; this batch is made again in float32", stacklevel=6)
        with self._in_float32():
            again, nfe = self._finite(run, callback)
        if state is None:
            return again, nfe
        finite = state.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)  # (N, 1, 1, 1)
        return torch.where(finite, state, again), nfe

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

    def _sample_settings(self, guidance_scale: float | None, steps: int | None) -> SampleConfig:
        sample = self.config.sample
        if guidance_scale is not None:
            sample = dataclasses.replace(sample, cfg_scale=guidance_scale)
        if steps is not None:
            if steps < 2:
                raise LightningDiTError(f"num_inference_steps is {steps}; 2 or more are expected", "ask for more steps")
            sample = with_points(sample, steps)
        return sample

    def steps_of(self, sample: SampleConfig) -> int:
        """Return the steps that a batch takes; those of an adaptive solver, unknown before, count as its grid's."""
        if sample.mode == "SDE":
            return sample.num_sampling_steps
        solver = self.calibrated_solver(sample)
        return solver.evaluations if solver else resolved_solver(sample).num_sampling_steps - 1

    def _check_latents(self, latents: Tensor | None, count: int) -> None:
        if latents is not None and tuple(latents.shape) != (count, *self.latent_shape):
            raise LightningDiTError(
                f"latents have the shape {list(latents.shape)}; {[count, *self.latent_shape]} is expected",
                "give one latent per class label",
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        settings = self.transformer.settings
        return settings.in_channels, settings.input_size, settings.input_size

    def _sample(
        self,
        labels: list[int],
        seeds: list[tuple[int, int]],
        noise: Tensor | None,
        sample: SampleConfig,
        callback: Callback | None,
    ) -> tuple[Tensor, int]:
        """Return the final state (N, C, h, w) of one batch and the evaluations that it took."""
        generators = [generator_for(*pair) for pair in seeds]
        if noise is None:
            noise = draw_noise((len(labels), *self.latent_shape), generators)
        state = noise.to(self.device, torch.float32)
        guided = self.guided(labels, sample)
        counter = _CountedModel(guided)
        if sample.mode == "SDE":
            settings = sde_settings(sample)
            states = sde_states(self.transport, counter, state, settings, generators)
            for step, state in enumerate(states):
                if callback is not None:
                    callback(step, (step + 1) / settings.num_steps, state)
            return state, counter.calls

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.transport.velocity(counter, x, t)

        return self._integrate(velocity, state, sample, guided.settings, callback), counter.calls

    def guided(self, labels: Sequence[int], sample: SampleConfig) -> GuidedVelocity:
        """Return the guided model for images of these classes, a function of state and time."""
        channels = None if sample.guided_channels == "all" else int(sample.guided_channels)
        guidance = GuidanceSettings(sample.cfg_scale, sample.cfg_interval_start, sample.cfg_interval_end, channels)
        y = torch.tensor(labels, device=self.device)
        null = torch.full_like(y, self.transformer.null_class)
        guide = None if self.guide is None else partial(self._predict, network=self.guide)
        return GuidedVelocity(self._predict, y, null, guidance, guide)

    def _integrate(
        self,
        velocity: Velocity,
        state: Tensor,
        sample: SampleConfig,
        guidance: GuidanceSettings,
        callback: Callback | None,
    ) -> Tensor:
        """Return the final state (N, C, h, w) by the method of the ODE that the settings name."""
        jumps, spelt = jumps_of(guidance), resolved_solver(sample)
        if solver := self.calibrated_solver(sample):
            times, coefficients = (tensor.to(state.device) for tensor in solver.tensors())
            return linear_multistep(velocity, state, times, coefficients, callback)
        times = Sampler(self.transport).times(spelt.num_sampling_steps, spelt.timestep_shift, spelt.reverse)
        if spelt.time_grid == GRADED:
            low, high = sorted((float(times[0]), float(times[-1])))
            times = graded_grid(spelt.num_sampling_steps, jumps)[0].clamp(low, high)
            times = times.flip(0) if spelt.reverse else times
        return integrate_ode(velocity, state, times, spelt.sampling_method, spelt.atol, spelt.rtol, callback, jumps)

    def calibrated_solver(self, sample: SampleConfig) -> CalibratedSolver | None:
        """Return the calibrated solver that sampling settings ask for.

        `calibrated` takes the most evaluations that `num_sampling_steps` points allow; `fast` the most that there
        are, and None, with a warning, where the file has none that fits.

        Raises:
            LightningDiTError: `calibrated`, and the file has none that fits.
        """
        find = partial(find_solver, sample, self.transport.path_type)
        if sample.sampling_method == CALIBRATED:
            return find(self._weights_fingerprint, sample.num_sampling_steps - 1)
        if sample.sampling_method != FAST or not sample.solver_file:
            return None
        try:
            return find(self._weights_fingerprint)
        except LightningDiTError as error:
            method, points, _ = NAMED_SOLVERS[FAST]
            reason = error.message.partition(";")[0]  # without the list of what the file has
            warnings.warn(f"{reason}; {method} with {points} points takes its place", stacklevel=2)
            return None

    @cached_property
    def _weights_fingerprint(self) -> str:
        return weights_fingerprint(_required(self.config, "ckpt_path"))

    def _predict(self, x: Tensor, t: Tensor, y: Tensor, network: LightningDiT | None = None) -> Tensor:
        """The transformer, or another network, in its precision, between a float32 state and a float32 prediction."""
        return (network or self.transformer)(x, t[:1], y).float()  # all times of a batch are equal

    def _decode(self, state: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return state.cpu()
        images = self.tokenizer.decode(state)
        if output_type == "pt":
            return images.cpu()
        pixels = to_uint8(images).cpu().numpy()
        return to_pil(pixels) if output_type == "pil" else pixels

    @staticmethod
    def _join(parts: list[Any], output_type: str) -> Any:
        if output_type == "pil":
            return [image for part in parts for image in part]
        if output_type == "np":
            import numpy as np

            return np.concatenate(parts)
        return torch.cat(parts)


class _CountedModel:
    """Calls a guided model and counts the calls: the number of function evaluations."""

    def __init__(self, guided: GuidedVelocity) -> None:
        self.guided = guided
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.guided(x, t)


def _required(config: Config, *keys: str) -> str:
    value: Any = config
    for key in keys:
        value = getattr(value, key)
    if not value:
        raise LightningDiTError(f"{config.source} names no {'.'.join(keys)}", "python step3_setup_configs.py")
    return value


@contextlib.contextmanager
def _as_user_error(where: str) -> Iterator[None]:
    """Turn the plain errors of the lower layers into the one that entry points print."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raise LightningDiTError(f"{where}: {error}", "edit that value, or choose another option") from error
