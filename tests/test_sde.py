"""The SDE on Gaussian data, whose velocity and score are known in closed form."""

import itertools
import math

import pytest
import torch

from LightningDiT.transport import PATHS, Sampler, create_transport, draw_noise, integrate_ode, time_grid
from LightningDiT.transport.path import DIFFUSION_FORMS
from tests.test_sampler import MEAN, STD, Gaussian, noise

# The SDE keeps the marginals of the path for any diffusion. Its Euler-Maruyama steps add an
# error of first order in the step, which 250 steps bring below the bounds of 4000 samples.
SDE_CASES = [
    *itertools.product(["Linear"], ["velocity"], DIFFUSION_FORMS, ["Euler"], ["Mean"]),
    *itertools.product(["Linear"], ["velocity"], ["sigma"], ["Euler", "Heun"], [None, "Tweedie"]),
    *itertools.product(["GVP"], ["score"], ["SBDM", "linear"], ["Heun"], ["Mean", "Euler"]),
    *itertools.product(["VP"], ["velocity", "noise"], ["SBDM", "constant"], ["Euler"], ["Mean"]),
]


@pytest.mark.parametrize(("path", "prediction", "form", "method", "last"), SDE_CASES)
def test_sde_has_the_mean_and_the_spread_of_the_data(path, prediction, form, method, last):
    transport, n = create_transport(path, prediction), 4000
    fn = Sampler(transport).sample_sde(sampling_method=method, diffusion_form=form, last_step=last, last_step_size=0.01)
    generator = torch.Generator().manual_seed(3)
    states = fn(noise(n, 1), Gaussian(path, prediction), generator=generator)
    x = states[-1]
    assert len(states) == 250 and torch.isfinite(x).all()
    # 4 standard errors of a mean and of a standard deviation, and 0.01 for the step size.
    assert abs(x.mean().item() - MEAN) < 4 * STD / math.sqrt(n) + 0.01
    assert abs(x.std().item() - STD) < 4 * STD / math.sqrt(2 * n) + 0.01


def test_the_published_defaults_work_where_the_published_code_divides_by_zero():
    x = Sampler(create_transport()).sample_sde()(
        noise(4000, 1), Gaussian("Linear"), generator=torch.Generator().manual_seed(0)
    )[-1]
    # The last step of 0.04 is noiseless, which narrows the data a little (by about 0.03 here).
    assert abs(x.mean().item() - MEAN) < 0.05
    assert abs(x.std().item() - STD) < 0.06


@pytest.mark.parametrize(("sde_method", "ode_method"), [("Euler", "euler"), ("Heun", "heun2")])
def test_without_diffusion_the_sde_is_the_ode(sde_method, ode_method):
    x0, model = noise(3, 4), Gaussian("Linear")
    fn = Sampler(create_transport()).sample_sde(
        sampling_method=sde_method,
        diffusion_form="constant",
        diffusion_norm=0.0,
        last_step="Euler",
        num_steps=25,
    )
    states = fn(x0, model)
    before_last = integrate_ode(model, x0, time_grid(25, 0, 0.96, dtype=torch.float64), ode_method)
    torch.testing.assert_close(states[-2], before_last, rtol=0, atol=1e-9)
    last = integrate_ode(model, before_last, torch.tensor([0.96, 1.0]).double(), "euler")
    torch.testing.assert_close(states[-1], last, rtol=0, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_tweedie_step_is_the_mean_of_the_data_given_the_state(path):
    fn = Sampler(create_transport(path)).sample_sde(
        diffusion_form="sigma", last_step="Tweedie", last_step_size=0.3, num_steps=20
    )
    *_, x, mean = fn(noise(3, 4), Gaussian(path), generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0.7, dtype=torch.float64)
    a, s = PATHS[path].alpha(t), PATHS[path].sigma(t)
    posterior = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
    torch.testing.assert_close(mean, posterior)


def test_an_image_depends_on_its_own_generator_only():
    fn = Sampler(create_transport()).sample_sde(num_steps=5, diffusion_form="sigma")

    def sample(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x0 = draw_noise((len(seeds), 2, 2), generators)
        return fn(x0, Gaussian("Linear"), generator=generators)[-1]

    together, alone = sample([7, 8, 9]), sample([8])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
