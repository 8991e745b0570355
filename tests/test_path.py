"""Paths against their closed forms."""

import math

import pytest
import torch

from LightningDiT.transport.path import DIFFUSION_FORMS, PATHS, check_choice

TIMES = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
ALL_PATHS = pytest.mark.parametrize("path", PATHS.values(), ids=list(PATHS))


@ALL_PATHS
def test_path_runs_from_noise_to_data(path):
    start, end = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert abs(path.alpha(start).item()) < 0.007  # VP keeps exp(-5.025) of the data
    assert abs(path.sigma(start).item() - 1) < 1e-4
    assert abs(path.alpha(end).item() - 1) < 1e-12
    assert abs(path.sigma(end).item()) < 1e-12


@ALL_PATHS
def test_derivatives_match_central_differences(path):
    h = 1e-6
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        numeric = (value(TIMES + h) - value(TIMES - h)) / (2 * h)
        torch.testing.assert_close(slope(TIMES), numeric, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["GVP", "VP"])
def test_variance_is_preserved(name):
    path = PATHS[name]
    ones = torch.ones_like(TIMES)
    torch.testing.assert_close(path.alpha(TIMES) ** 2 + path.sigma(TIMES) ** 2, ones)


def test_vp_schedule_at_the_noise_end():
    # alpha(0)^2 is the product of the DDPM schedule: exp(-(20 + 0.1) / 2).
    alpha = PATHS["VP"].alpha(torch.zeros(1, dtype=torch.float64)).item()
    assert alpha**2 == pytest.approx(math.exp(-10.05), rel=1e-12)


def test_vp_sigma_keeps_its_digits_near_the_data():
    path, t = PATHS["VP"], torch.tensor([1 - 1e-4])
    exact = path.sigma(t.double())
    torch.testing.assert_close(path.sigma(t).double(), exact, rtol=1e-3, atol=0)


def test_linear_plan_is_the_straight_line():
    x0, x1 = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t, u_t = PATHS["Linear"].plan(torch.tensor([0.25, 1.0]), x0, x1)
    torch.testing.assert_close(x_t[0], 0.25 * x1[0] + 0.75 * x0[0])
    torch.testing.assert_close(x_t[1], x1[1])
    torch.testing.assert_close(u_t, x1 - x0)


@ALL_PATHS
def test_conversions_recover_what_made_the_state(path):
    generator = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(2, len(TIMES), 5, dtype=torch.float64, generator=generator)
    x_t, u_t = path.plan(TIMES, x0, x1)
    noise = path.noise_from_velocity(u_t, x_t, TIMES)
    score = path.score_from_velocity(u_t, x_t, TIMES)
    torch.testing.assert_close(noise, x0)
    torch.testing.assert_close(score, -x0 / path.sigma(TIMES)[:, None])
    torch.testing.assert_close(path.score_from_noise(x0, TIMES), score)
    torch.testing.assert_close(path.velocity_from_score(score, x_t, TIMES), u_t)
    torch.testing.assert_close(path.velocity_from_noise(x0, x_t, TIMES), u_t)


def test_velocity_gives_noise_at_both_ends():
    ends = torch.tensor([0.0, 1.0])
    x0, x1 = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(2))
    for name in ("Linear", "GVP"):
        path = PATHS[name]
        x_t, u_t = path.plan(ends, x0, x1)
        torch.testing.assert_close(path.noise_from_velocity(u_t, x_t, ends), x0)


def test_diffusion_forms():
    path, t, norm = PATHS["Linear"], torch.tensor([0.25], dtype=torch.float64), 2.0
    expected = {
        "constant": 2.0,
        "SBDM": 2 * 0.75 / 0.25,  # (1 - t) / t on the straight path
        "sigma": 1.5,
        "linear": 1.5,
        "decreasing": 0.25 * (2 * math.sqrt(0.5) + 1) ** 2,
        "increasing-decreasing": 1.0,
        "inccreasing-decreasing": 1.0,
    }
    assert {name: form(path, t, norm).item() for name, form in DIFFUSION_FORMS.items()} == (pytest.approx(expected))


def test_vp_score_weight_is_half_its_rate():
    # The VP diffusion has g^2 = beta(t), of which the probability flow takes half.
    beta = 0.1 + (1 - TIMES) * 19.9
    torch.testing.assert_close(PATHS["VP"].score_weight(TIMES), beta / 2)


def test_an_unknown_choice_names_the_nearest():
    with pytest.raises(ValueError, match="path_type='linaer' is unknown.*Linear, GVP, VP; nearest"):
        check_choice("path_type", "linaer", PATHS)
    check_choice("path_type", "VP", PATHS)
