"""Each term of the tokenizer's loss against a closed form, or the same formula written in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LightningDiT.tokenizer.autoencoder import DiagonalGaussian
from LightningDiT.tokenizer.config import TokenizerTrainConfig
from LightningDiT.tokenizer.criterion import Criterion, Pass
from LightningDiT.tokenizer.discriminator import PatchDiscriminator, smallest_side
from LightningDiT.tokenizer.losses import (
    ADAPTIVE_OFFSET,
    adaptive_weight,
    cosine_alignment,
    distance_matrix_alignment,
    high_pass,
    hinge_discriminator_loss,
    hinge_generator_loss,
    negative_log_likelihood,
    texture_distance,
    texture_energies,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def number(value: Tensor) -> float:
    return float(value.detach())


def test_the_likelihood_is_the_published_sum_over_an_image() -> None:
    """`sum((|x - y| + w LPIPS) / exp(s) + s) / N` with LPIPS a number per image that is added to every value."""
    images, copies = random(4, 3, 5, 5).double().numpy(), random(4, 3, 5, 5, seed=1).double().numpy()
    perceptual = np.array([0.1, 0.2, 0.3, 0.4])[:, None, None, None]
    weight, logvar = 0.7, -0.3
    expected = ((np.abs(images - copies) + weight * perceptual) / np.exp(logvar) + logvar).sum() / 4
    distance = torch.tensor(np.abs(images - copies).mean() + weight * perceptual.mean())
    found = negative_log_likelihood(distance, torch.tensor(logvar, dtype=torch.float64), values=75)
    assert math.isclose(float(found), expected, rel_tol=1e-12)


def test_a_scale_of_one_leaves_the_mean_as_it_is() -> None:
    distance = torch.tensor(0.123456789)
    assert float(negative_log_likelihood(distance, torch.tensor(0.0), 1)) == float(distance)


def numpy_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_cosine_term_is_a_mean_over_positions(margin: float) -> None:
    latents, features = random(2, 6, 3, 4), random(2, 6, 3, 4, seed=1)
    terms = [
        max(0.0, 1 - margin - numpy_cosines(latents[n, :, y, x].numpy(), features[n, :, y, x].numpy()))
        for n in range(2)
        for y in range(3)
        for x in range(4)
    ]
    assert math.isclose(float(cosine_alignment(latents, features, margin)), np.mean(terms), rel_tol=1e-5)


def test_the_cosine_term_has_its_closed_form_at_an_angle() -> None:
    """Vectors 60 degrees apart have a cosine of 1/2: `1 - 1/2 = 1/2` without a margin, nothing with one of 1/2."""
    latents = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    features = torch.tensor([0.5, math.sqrt(0.75)]).reshape(1, 2, 1, 1) * 7.0
    assert math.isclose(float(cosine_alignment(latents, features, 0.0)), 0.5, rel_tol=1e-6)
    assert math.isclose(float(cosine_alignment(latents, features, 0.3)), 0.2, rel_tol=1e-5)
    assert float(cosine_alignment(latents, features, 0.51)) == 0.0


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_the_distance_matrices_are_compared_pair_by_pair(margin: float) -> None:
    latents, features = random(2, 6, 2, 3), random(2, 9, 2, 3, seed=1)  # the widths may differ
    flat, known = latents.numpy().reshape(2, 6, 6), features.numpy().reshape(2, 9, 6)
    terms = [
        max(
            0.0,
            abs(numpy_cosines(flat[n, :, i], flat[n, :, j]) - numpy_cosines(known[n, :, i], known[n, :, j])) - margin,
        )
        for n in range(2)
        for i in range(6)
        for j in range(6)
    ]
    assert math.isclose(float(distance_matrix_alignment(latents, features, margin)), np.mean(terms), rel_tol=1e-5)


def test_a_rotation_of_the_features_costs_nothing_in_the_distance_matrix() -> None:
    latents = random(2, 6, 2, 3)
    rotation = torch.linalg.qr(random(6, 6, seed=3))[0]
    turned = torch.einsum("dc,nchw->ndhw", rotation, latents) * 3.0
    assert float(distance_matrix_alignment(latents, turned, 0.0)) < 1e-6
    assert float(cosine_alignment(latents, turned, 0.0)) > 0.1


def test_the_high_pass_has_its_gain() -> None:
    """`1 - cos^2(pi f) cos^2(pi g)`: 0 for flat images, 1 for alternating pixels, 1/2 at a quarter cycle a pixel."""
    time = torch.arange(32, dtype=torch.float64)
    for f, g in ((0.0, 0.0), (0.5, 0.0), (0.25, 0.0), (0.125, 0.25), (0.5, 0.5)):
        wave = torch.cos(2 * math.pi * f * time)[:, None] * torch.cos(2 * math.pi * g * time)
        gain = 1 - math.cos(math.pi * f) ** 2 * math.cos(math.pi * g) ** 2
        passed = high_pass(wave.expand(2, 3, 32, 32))
        inner = (..., slice(1, -1), slice(1, -1))
        torch.testing.assert_close(passed[inner], gain * wave.expand(2, 3, 32, 32)[inner], atol=1e-12, rtol=0)


def test_white_noise_has_a_quarter_of_its_power_in_each_subband() -> None:
    energies = texture_energies(0.2 * random(4, 2, 256, 256)) - 0.25e-4
    assert energies.shape == (8, 3, 62, 62)
    torch.testing.assert_close(energies.mean((0, 2, 3)), torch.full((3,), 0.04 / 4), rtol=0.02, atol=0)


def test_stripes_lie_in_the_subband_of_their_direction() -> None:
    """Rows of 1 and -1 differ by 2 downwards: an energy of 1 in the second subband alone; columns in the first."""
    rows = (1 - 2 * (torch.arange(16) % 2)).float()[:, None].expand(1, 1, 16, 16)
    for images, expected in ((rows, [0.0, 1.0, 0.0]), (rows.mT, [1.0, 0.0, 0.0]), (rows * rows.mT, [0.0, 0.0, 1.0])):
        torch.testing.assert_close(
            texture_energies(images)[0, :, 0, 0] - 0.25e-4, torch.tensor(expected), atol=1e-6, rtol=0
        )


def test_the_texture_term_is_the_log_ratio_of_local_energies() -> None:
    """Speckle that is `s` times as strong costs `|log s^2|`, in other places next to nothing, none at all most."""
    noise = random(2, 1, 64, 64)
    shifted = noise.roll((8, 16), dims=(2, 3))
    assert number(texture_distance(noise, noise)) == 0.0
    for scale in (0.5, 3.0):
        assert math.isclose(number(texture_distance(noise, scale * noise)), abs(math.log(scale**2)), rel_tol=2e-3)
    moved, gone = number(texture_distance(noise, shifted)), number(texture_distance(noise, 0 * noise))
    assert moved < 0.4
    assert math.isclose(gone, float((texture_energies(noise).double() / 0.25e-4).log().mean()), rel_tol=1e-5)
    assert float((noise - shifted).square().mean()) > 1.8 * float(noise.square().mean())  # pixels prefer none
    local = noise.clone()
    local[..., :32] *= 3  # in one half: energies are compared place by place, not on average
    assert number(texture_distance(local, local.flip(3))) > 1.0


def test_hinge_losses_have_their_values() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    assert math.isclose(float(hinge_discriminator_loss(real, fake)), 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3))
    assert math.isclose(float(hinge_generator_loss(fake)), -1 / 3, rel_tol=1e-6)


def test_the_adaptive_weight_is_the_ratio_of_gradients_by_hand() -> None:
    """For a linear layer `y = W x`: `d mean(y^2)/dW = 2 y x^T / n` and `d mean(-y)/dW = -1 x^T / n`."""
    layer = nn.Linear(3, 2, bias=False)
    inputs = random(5, 3)
    outputs = layer(inputs)
    w, x = layer.weight.detach().double().numpy(), inputs.double().numpy()
    of_square = 2 * (x @ w.T).T @ x / 10
    of_mean = -np.ones((5, 2)).T @ x / 10
    expected = np.linalg.norm(of_square) / (np.linalg.norm(of_mean) + ADAPTIVE_OFFSET)
    found = adaptive_weight(outputs.square().mean(), -outputs.mean(), layer.weight, ceiling=1e4)
    assert math.isclose(float(found), expected, rel_tol=1e-5)
    assert not found.requires_grad
    assert float(
        adaptive_weight(outputs.square().mean(), -outputs.mean(), layer.weight, expected / 2)
    ) == pytest.approx(expected / 2)


def test_a_term_without_gradient_has_a_finite_weight() -> None:
    layer = nn.Linear(3, 2, bias=False)
    outputs = layer(random(5, 3))
    (gradient,) = torch.autograd.grad(outputs.mean(), layer.weight, retain_graph=True)
    found = adaptive_weight(outputs.mean(), 0.0 * outputs.sum(), layer.weight, ceiling=1e8)
    assert math.isclose(float(found), float(gradient.norm()) / ADAPTIVE_OFFSET, rel_tol=1e-5)


def test_the_discriminator_has_the_published_names_and_shapes() -> None:
    shapes = {name: tuple(value.shape) for name, value in PatchDiscriminator().state_dict().items() if value.dim()}
    convolutions = {0: (3, 64), 2: (64, 128), 5: (128, 256), 8: (256, 512), 11: (512, 1)}
    expected = {f"main.{index}.weight": (b, a, 4, 4) for index, (a, b) in convolutions.items()}
    expected |= {"main.0.bias": (64,), "main.11.bias": (1,)}
    for index, width in ((3, 128), (6, 256), (9, 512)):
        expected |= {f"main.{index}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    assert shapes == expected


@pytest.mark.parametrize(("layers", "side", "logits"), [(3, 256, 30), (3, 32, 2), (2, 32, 6), (1, 32, 14)])
def test_a_logit_belongs_to_a_patch(layers: int, side: int, logits: int) -> None:
    """Halved `layers` times by 4x4 convolutions with a border of 1, then twice one smaller."""
    with torch.no_grad():
        assert PatchDiscriminator(layers)(torch.zeros(1, 3, side, side)).shape == (1, 1, logits, logits)
    assert logits == side // 2**layers - 2


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_image_has_one_logit(layers: int) -> None:
    network = PatchDiscriminator(layers, width=2).eval()
    side = smallest_side(layers)
    assert network(torch.zeros(1, 3, side, side)).numel() == 1
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, side - 1, side - 1))


def test_discriminator_weights_start_small() -> None:
    torch.manual_seed(0)
    weight = PatchDiscriminator().state_dict()["main.8.weight"]
    assert math.isclose(float(weight.std()), 0.02, rel_tol=0.01)


class Halves(nn.Module):
    """An autoencoder of two 1x1 convolutions, whose gradients follow by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.conv_out = nn.Conv2d(3, 2, 1, bias=False)
        self.decoder.conv_out = nn.Conv2d(2, 3, 1, bias=False)

    def run(self, images: Tensor) -> Pass:
        mean = self.encoder.conv_out(images)
        posterior = DiagonalGaussian(mean, torch.zeros_like(mean))
        return Pass(images, posterior, mean, self.decoder.conv_out(mean))


class Known(nn.Module):
    """A vision model that shows what it is given, three channels wide."""

    width = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.roll(1, dims=1)


def settings(**changes: object) -> TokenizerTrainConfig:
    return TokenizerTrainConfig(**{"l1_weight": 0.0, "l2_weight": 0.0, "kl_weight": 0.0, **changes})


def test_the_small_recipe_is_the_sum_of_its_terms() -> None:
    model, images = Halves(), random(2, 3, 4, 4)
    result = model.run(images)
    criterion = Criterion(TokenizerTrainConfig(l1_weight=2.0, l2_weight=4.0, kl_weight=0.01), 2)
    terms = {name: term.detach() for name, term in criterion.autoencoder_loss(result, model, step=10_000).items()}
    error = (result.reconstructions - images).detach().double().numpy()
    kl = 0.5 * np.square(result.latents.detach().double().numpy()).sum() / 2  # unit variance: the mean alone counts
    assert terms.keys() == {"loss", "l1", "l2", "kl"}
    assert math.isclose(number(terms["l1"]), np.abs(error).mean(), rel_tol=1e-5)
    assert math.isclose(number(terms["l2"]), np.square(error).mean(), rel_tol=1e-5)
    assert math.isclose(number(terms["kl"]), kl, rel_tol=1e-5)
    expected = 2 * np.abs(error).mean() + 4 * np.square(error).mean() + 0.01 * kl
    assert math.isclose(number(terms["loss"]), expected, rel_tol=1e-5)
    assert not list(criterion.own_parameters())


def test_the_texture_term_enters_with_its_weight_and_scale() -> None:
    model, images = Halves(), random(2, 3, 16, 16)
    result = model.run(images)
    criterion = Criterion(settings(l1_weight=1.0, texture_weight=0.25, sum_values=True, logvar_init=0.3), 2)
    terms = criterion.autoencoder_loss(result, model, step=0)
    assert terms.keys() == {"loss", "l1", "l2", "kl", "texture"}
    texture = texture_distance(images, result.reconstructions)
    assert torch.equal(terms["texture"], texture)
    distance = number((result.reconstructions - images).abs().mean()) + 0.25 * number(texture)
    assert math.isclose(number(terms["loss"]), 768 * (distance * math.exp(-0.3) + 0.3), rel_tol=1e-5)


def test_networks_of_colours_see_one_channel_three_times() -> None:
    """LPIPS, the discriminator and the vision model."""
    levels, seen = random(2, 1, 32, 32), []
    mean = random(2, 2, 4, 4)
    result = Pass(levels, DiagonalGaussian(mean, torch.zeros_like(mean)), mean, levels + 1)

    class Sees(nn.Module):
        width = 3

        def forward(self, *images: Tensor) -> Tensor:
            seen.extend(images)
            return images[0]

    options = {"lpips_weight": 1.0, "vf_weight": 1.0, "adaptive_vf": False, "disc_weight": 1.0, "disc_layers": 1}
    criterion = Criterion(settings(**options), 2, vision=Sees(), perceptual=Sees())
    criterion.loss.discriminator = Sees()
    criterion._distances(result)
    criterion._frozen["vision"](result.coloured()[0])
    criterion.discriminator_loss(result)
    expected = [levels, levels + 1, levels, levels, levels + 1]
    assert len(seen) == 5
    assert all(torch.equal(one, two.repeat(1, 3, 1, 1)) for one, two in zip(seen, expected, strict=True))


def test_the_alignment_enters_with_its_adaptive_weight() -> None:
    """`loss = nll + vf_weight * a * (cos_weight * cos + distmat_weight * distmat)`, `a` by autograd on its own."""
    model, images = Halves(), random(2, 3, 4, 4)
    options = {"vf_weight": 0.3, "cos_weight": 2.0, "distmat_weight": 0.5, "cos_margin": 0.1}
    criterion = Criterion(settings(l1_weight=1.0, sum_values=True, **options), 2, vision=Known())
    terms = criterion.autoencoder_loss(model.run(images), model, step=0)
    result = model.run(images)
    likelihood = 48 * (result.reconstructions - images).abs().mean()
    projected = F.conv2d(result.latents, criterion.linear_proj.weight)
    cos = cosine_alignment(projected, images.roll(1, dims=1), 0.1)
    distmat = distance_matrix_alignment(projected, images.roll(1, dims=1), 0.0)
    layer = model.encoder.conv_out.weight
    wanted, own = (
        torch.autograd.grad(value, layer, retain_graph=True)[0].norm()
        for value in (likelihood, 2 * cos + 0.5 * distmat)
    )
    assert math.isclose(number(terms["vf_adaptive"]), number(wanted / (own + 1e-4)), rel_tol=1e-4)
    expected = likelihood + 0.3 * wanted / (own + 1e-4) * (2 * cos + 0.5 * distmat)
    assert math.isclose(number(terms["loss"]), number(expected), rel_tol=1e-4)
    assert criterion.linear_proj.weight.shape == (3, 2, 1, 1)
    assert list(criterion.state_dict()) == ["loss.logvar", "linear_proj.weight"]


def test_only_the_latents_side_of_the_alignment_has_gradients() -> None:
    model, images = Halves(), random(2, 3, 4, 4).requires_grad_()
    for reverse in (True, False):
        criterion = Criterion(settings(vf_weight=1.0, adaptive_vf=False), 2, vision=FrozenKnown(), reverse_proj=reverse)
        terms = criterion.autoencoder_loss(model.run(images), model, step=0)
        assert "vf_adaptive" not in terms
        terms["loss"].backward()
        assert float(model.encoder.conv_out.weight.grad.norm()) > 0
        assert float(criterion.linear_proj.weight.grad.norm()) > 0
        assert not any(name.startswith("vision") for name in criterion.state_dict())
    assert criterion.linear_proj.weight.shape == (2, 3, 1, 1)  # features to the latents' width


class FrozenKnown(Known):
    """As the real one: without gradients."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


def test_the_discriminator_takes_part_from_its_step_on() -> None:
    criterion = Criterion(settings(l1_weight=1.0, disc_weight=0.5, disc_start=5001, disc_layers=1), 2)
    assert [criterion.is_adversarial(step) for step in (0, 4999, 5000, 5001)] == [False, False, True, True]
    assert Criterion(settings(disc_weight=0.5, disc_start=1), 2).is_adversarial(0)
    assert not Criterion(settings(disc_weight=0.0, disc_start=1), 2).is_adversarial(0)


def test_the_adversarial_term_enters_with_its_adaptive_weight() -> None:
    torch.manual_seed(0)
    model, images = Halves(), random(2, 3, 16, 16)
    criterion = Criterion(settings(l1_weight=1.0, disc_weight=0.5, disc_layers=1), 2).eval()  # norms as they stand
    terms = criterion.autoencoder_loss(model.run(images), model, step=0)
    result = model.run(images)
    likelihood = (result.reconstructions - images).abs().mean()
    gan = -criterion.discriminator(result.reconstructions).mean()
    layer = model.decoder.conv_out.weight
    wanted, own = (torch.autograd.grad(value, layer, retain_graph=True)[0].norm() for value in (likelihood, gan))
    expected = likelihood + 0.5 * wanted / (own + 1e-4) * gan
    assert math.isclose(number(terms["loss"]), number(expected), rel_tol=1e-4)
    terms = criterion.discriminator_loss(result)
    real, fake = criterion.discriminator(images), criterion.discriminator(result.reconstructions)
    assert math.isclose(
        number(terms["disc"]), number(0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())), rel_tol=1e-5
    )
    terms["disc"].backward()
    assert model.decoder.conv_out.weight.grad is None  # the reconstructions are data to the discriminator


def test_the_scale_is_learnt_where_it_is_asked_for() -> None:
    """The derivative of `n (d exp(-s) + s)` by s is `n (1 - d exp(-s))`."""
    model, images = Halves(), random(2, 3, 4, 4)
    criterion = Criterion(settings(l1_weight=1.0, sum_values=True, logvar_init=0.2, learn_logvar=True), 2)
    terms = criterion.autoencoder_loss(model.run(images), model, step=0)
    terms["loss"].backward()
    expected = 48 * (1 - number(terms["l1"]) * math.exp(-0.2))
    assert math.isclose(float(criterion.loss.logvar.grad), expected, rel_tol=1e-5)
    assert criterion.own_parameters() == [criterion.loss.logvar]
