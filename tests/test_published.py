"""SiT's published calls: log-likelihoods in closed form, and the published samples."""

import math

import pytest
import torch

from LightningDiT.transport import Sampler, create_transport
from tests.test_sampler import GOLDEN_CASES, MEAN, STD, Gaussian, noise


@pytest.mark.parametrize(("path", "atol"), [("Linear", 1e-5), ("GVP", 1e-5), ("VP", 0.02)])
def test_log_likelihood_of_a_gaussian(path, atol):
    # VP is known to t = 1 - 1e-3 and starts from a mean of 0.0066 MEAN: hence its tolerance.
    x1 = MEAN + STD * noise(5, 3, 2)
    fn = Sampler(create_transport(path)).sample_ode_likelihood(atol=1e-8, rtol=1e-8)
    with torch.no_grad():
        logp, z = fn(x1, Gaussian(path), generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Normal(MEAN, STD).log_prob(x1).sum(dim=(1, 2))
    # The Jacobian of independent Gaussians is diagonal, so Hutchinson's estimate is exact.
    torch.testing.assert_close(logp, expected, rtol=0, atol=6 * atol)
    torch.testing.assert_close(z, (x1 - MEAN) / STD, rtol=0, atol=max(atol, 1e-5) * 3)


def test_log_likelihood_of_correlated_data_is_right_on_average():
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)

    def model(x, t):
        # v = (alpha' alpha C + sigma' sigma I) (alpha^2 C + sigma^2 I)^-1 x on the linear path
        s = t[0]
        return x @ torch.linalg.solve(s**2 * covariance + (1 - s) ** 2 * eye, s * covariance - (1 - s) * eye)

    n = 2000
    x1 = torch.tensor([[0.4, -0.9]], dtype=torch.float64).expand(n, 2)
    fn = Sampler(create_transport()).sample_ode_likelihood(sampling_method="rk4", num_steps=30)
    logp, _ = fn(x1, model, generator=torch.Generator().manual_seed(0))
    exact = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance)
    spread = logp.std().item()
    assert 0.01 < spread < 2  # the probes differ, or the average below would prove nothing
    assert abs(logp.mean() - exact.log_prob(x1[0])).item() < 4 * spread / math.sqrt(n) + 1e-4


def test_log_likelihood_takes_labels_and_works_under_inference_mode():
    layer = torch.nn.Linear(3, 3).double()
    fn = Sampler(create_transport()).sample_ode_likelihood(sampling_method="euler", num_steps=4)
    with torch.inference_mode():
        x = noise(2, 3)
        logp, z = fn(x, lambda x, t, y: layer(x) * t[:, None] + y, y=1.0)
    assert torch.isfinite(logp).all() and z.shape == x.shape and not logp.requires_grad


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (
            "sample_ode",
            {"sampling_method": "dopri-5"},
            "sampling_method='dopri-5'.*nearest is 'dopri5'",
        ),
        ("sample_ode", {"sampling_method": "Euler"}, "nearest is 'euler'"),
        ("sample_ode", {"num_steps": 1}, "num_steps=1 is too small"),
        ("sample_ode", {"timestep_shift": -1.0}, "timestep_shift=-1.0 is invalid"),
        ("sample_ode_likelihood", {"sampling_method": "rk5"}, "nearest is 'rk4'"),
        ("sample_sde", {"sampling_method": "heun"}, "nearest is 'Heun'"),
        ("sample_sde", {"diffusion_form": "sbdm"}, "nearest is 'SBDM'"),
        ("sample_sde", {"diffusion_norm": -1.0}, "diffusion_norm=-1.0 is invalid"),
        ("sample_sde", {"last_step": "mean"}, "last_step='mean'.*nearest is 'Mean'"),
        ("sample_sde", {"last_step_size": 0.0}, "last_step_size=0.0 is out of range"),
        ("sample_sde", {"num_steps": 1}, "num_steps=1 is too small"),
    ],
)
def test_bad_settings_are_named(call, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(Sampler(create_transport()), call)(**options)


def golden_sampler(case):
    return Sampler(create_transport(case["path_type"], case["prediction"])).sample_ode(
        sampling_method=case["method"],
        num_steps=case["num_steps"],
        atol=case["atol"],
        rtol=case["rtol"],
        timestep_shift=case["timestep_shift"],
    )


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_the_published_call_gives_the_published_samples(golden, manifest, unit_model, name):
    case, noise = manifest["sample"][name], golden["sample.noise"]
    with torch.no_grad():
        states = golden_sampler(case)(
            torch.cat([noise, noise]),
            unit_model("default").forward_with_cfg,
            y=torch.tensor([*case["labels"], 10, 10]),
            cfg_scale=case["cfg_scale"],
            cfg_interval=case["cfg_interval"],
            cfg_interval_start=case["cfg_interval_start"],
        )
    torch.testing.assert_close(states[-1][:2], golden[f"sample.{name}"], rtol=0, atol=1e-4)
