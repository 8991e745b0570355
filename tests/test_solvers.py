"""Multistep solvers and Heun: orders, exactness on polynomials, nodes where the velocity jumps."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from LightningDiT.config import SampleConfig, with_preset
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import guidance_of
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.solver_choice import Solver, check_solver
from LightningDiT.seeds import generator_for
from LightningDiT.transport import (
    OWN_METHODS,
    GuidanceSettings,
    GuidedVelocity,
    Sampler,
    SdeSettings,
    create_transport,
    draw_noise,
    graded_grid,
    integrate_ode,
    jumps_of,
    linear_multistep,
    sde_states,
    time_grid,
)
from LightningDiT.transport.solvers import (
    MULTISTEP_METHODS,
    check_method,
    kumaraswamy_grid,
    solve,
    step_weights,
    velocity_coefficients,
    with_nodes,
)
from tests.test_sampler import MEAN, STD, Gaussian, noise

#: Method, path, power of the grid, order of the global error. The first step is of first order, which costs h^2 once;
#: short first steps (a power above 1) hide that behind a higher order.
ORDERS = [
    ("heun", "Linear", 1, 2),
    ("ab2", "GVP", 1, 2),
    ("ab3", "GVP", 2, 3),
    ("ab4", "GVP", 2, 4),
    ("dpmpp2m", "Linear", 1, 2),
    ("dpmpp3m", "Linear", 2, 3),
    ("unipc2", "Linear", 1, 2),  # the last step, to sigma = 0, has no corrector
    ("unipc3", "Linear", 1, 3),
    ("extrapolated", "Linear", 1, 1),
]


@pytest.mark.parametrize(("method", "path", "power", "order"), ORDERS)
def test_error_falls_with_the_order(method, path, power, order):
    x0, errors = noise(2, 3), []
    for steps in (512, 1024):
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** power
        errors.append((solve(Gaussian(path), x0, times, method) - (MEAN + STD * x0)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_a_corrector_raises_the_order_before_the_last_step():
    x0, errors = noise(2, 3), []
    for steps in (256, 512):
        times = 0.9 * torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        exact = 0.9 * MEAN + math.hypot(0.9 * STD, 0.1) * x0
        errors.append((solve(Gaussian("Linear"), x0, times, "unipc2") - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize(
    ("quantity", "s", "t"),
    [
        *itertools.product(["velocity", "data"], [0.0, 0.4], [0.5, 0.7]),
        *itertools.product(["velocity", "data"], [0.8], [1.0]),
        ("velocity", 0.7, 0.4),
    ],
)
def test_steps_are_exact_for_polynomials(quantity, s, t):
    nodes = [s, s - 0.2, s - 0.35]
    a, weights = step_weights(quantity, nodes, s, t)
    points, shares = np.polynomial.legendre.leggauss(200)
    for degree in range(len(nodes)):
        if quantity == "velocity":
            expected = (t ** (degree + 1) - s ** (degree + 1)) / (degree + 1)
        else:  # y = sigma_t / sigma_u turns sigma_t / sigma_u^2 du into dy
            y = a + (1 - a) * (points + 1) / 2
            expected = (1 - a) / 2 * (shares * (1 - (1 - t) / y) ** degree).sum()
        assert weights @ np.power(nodes, degree) == pytest.approx(expected, abs=1e-12)
    assert a == (1.0 if quantity == "velocity" else pytest.approx((1 - t) / (1 - s)))


@pytest.mark.parametrize("method", OWN_METHODS)
def test_evaluations_are_one_a_step_and_two_for_heun(method):
    model = Gaussian("Linear")
    solve(model, noise(2, 3), time_grid(9, dtype=torch.float64), method)
    assert model.calls == (16 if method == "heun" else 8)


@pytest.mark.parametrize("method", [method for method in OWN_METHODS if method != "extrapolated"])
def test_a_jump_of_the_velocity_costs_nothing_at_a_node(method):
    def velocity(x, t):
        return torch.where(t < 0.3, -2.0, 5.0)[:, None].expand_as(x)

    exact = -2 * 0.3 + 5 * 0.7
    x0, times = torch.zeros(1, 2, dtype=torch.float64), time_grid(12, dtype=torch.float64)
    # With the data prediction x + (1 - t) v the path is curved, and only the pieces behind a fresh start are compared.
    if method in MULTISTEP_METHODS and MULTISTEP_METHODS[method].quantity == "data":
        before = solve(velocity, x0, torch.tensor([0, 0.3], dtype=torch.float64), method)
        assert before.mean().item() == pytest.approx(-0.6, abs=1e-12)
        grid, nodes = with_nodes(times, [0.3])
        (node,) = nodes
        whole = solve(velocity, x0, times, method, [0.3])
        first = solve(velocity, x0, torch.cat([grid[:node], grid[node : node + 1] - 1e-13]), method)
        torch.testing.assert_close(whole, solve(velocity, first, grid[node:], method), rtol=0, atol=1e-9)
        return
    assert solve(velocity, x0, times, method, [0.3]).mean().item() == pytest.approx(exact, abs=1e-12)
    assert abs(solve(velocity, x0, times, method).mean().item() - exact) > 1e-2


@pytest.mark.parametrize("falling", [False, True])
def test_nodes_move_the_nearest_points_and_keep_their_number(falling):
    times = time_grid(11)
    times = times.flip(0) if falling else times
    grid, nodes = with_nodes(times, [0.13, 0.17, 1.0, 0.0, 1.5])
    assert len(grid) == 11 and {round(float(grid[node]), 6) for node in nodes} == {0.13, 0.17}
    steps = grid.diff()
    assert bool((steps < 0).all() if falling else (steps > 0).all())
    assert grid[0] == times[0] and grid[-1] == times[-1]
    assert torch.equal(with_nodes(times, [])[0], times)
    near, both = with_nodes(time_grid(4), [0.3, 0.32])  # one third is the nearest point of both
    assert near.tolist() == pytest.approx([0, 0.3, 0.32, 1]) and both == {1, 2}
    few, kept = with_nodes(time_grid(3), [0.2, 0.7])
    assert few.tolist() == pytest.approx([0, 0.2, 1]) and kept == {1}
    assert with_nodes(time_grid(2), [0.2])[1] == frozenset()


@pytest.mark.parametrize("jumps", [(), (0.125,), (0.7, 0.1), (0.0, 1.0), (0.01, 0.02), (0.98, 0.99)])
@pytest.mark.parametrize("points", [4, 16, 161])
def test_graded_grids_have_every_jump_and_rise(points, jumps):
    grid, nodes = graded_grid(points, jumps)
    inner = sorted(jump for jump in jumps if 0 < jump < 1)
    assert len(grid) == points and grid[0] == 0 and grid[-1] == 1 and bool((grid.diff() > 0).all())
    assert [grid[node] for node in sorted(nodes)] == [torch.tensor(jump) for jump in inner]


def test_graded_grids_are_powers_between_jumps():
    torch.testing.assert_close(graded_grid(5, power=2.0)[0], torch.tensor([0, 1, 4, 9, 16]) / 16)
    grid, nodes = graded_grid(9, (0.1,), power=2.0)  # sqrt(0.1) : sqrt(0.9) = 1 : 3, so 2 and 6 of 8 steps
    assert nodes == {2}
    expected = [0, 0.025, 0.1, *(0.1 + 0.9 * (k / 6) ** 2 for k in range(1, 7))]
    torch.testing.assert_close(grid, torch.tensor(expected))
    with pytest.raises(ValueError, match=r"num_sampling_steps \(--steps\) is 2, expected at least 3"):
        graded_grid(2, (0.1,))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_coefficients_of_adams_bashforth_give_its_steps(order):
    times = graded_grid(10, (0.2,))[0].double()
    nodes = frozenset([int((times - 0.2).abs().argmin())])
    x0, model = noise(2, 3), Gaussian("Linear")
    by_matrix = linear_multistep(model, x0, times, velocity_coefficients(times, order, nodes))
    if order == 1:
        expected = integrate_ode(model, x0, times, "euler")
    else:
        expected = integrate_ode(model, x0, times, f"ab{order}", jumps=[float(times[min(nodes)])])
    torch.testing.assert_close(by_matrix, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", OWN_METHODS)
def test_both_calls_agree_and_callbacks_see_every_step(method):
    x0, model, seen = noise(2, 3, dtype=torch.float32), Gaussian("Linear"), []
    fn = Sampler(create_transport()).sample_ode(sampling_method=method, num_steps=9, timestep_shift=0.5)
    states = fn(x0, model)
    times = time_grid(9, timestep_shift=0.5)
    last = integrate_ode(model, x0, times, method, callback=lambda i, t, x: seen.append((i, t, x.clone())))
    assert [i for i, _, _ in seen] == list(range(8)) and states.shape == (9, 2, 3)
    assert [t for _, t, _ in seen] == times[1:].tolist()
    assert torch.equal(states[-1], last) and torch.equal(states[0], x0)
    # A corrector redoes steps after they were reported; the last one it leaves alone.
    torch.testing.assert_close(torch.stack([x for _, _, x in seen]), states[1:], rtol=0, atol=0)
    integrate_ode(model, x0, times, method, callback=lambda i, t, x: seen.append((i, t, x)), jumps=[0.1])
    expected = times if method == "extrapolated" else with_nodes(times, [0.1])[0]  # UCGM's grid knows no guidance
    assert [t for _, t, _ in seen[8:]] == expected[1:].tolist()


@pytest.mark.parametrize("method", ["heun", "ab2", "ab3"])
def test_reverse_then_forward_returns(method):
    sampler, model = Sampler(create_transport()), Gaussian("Linear")
    settings = {"sampling_method": method, "num_steps": 401}
    x1 = MEAN + STD * noise(2, 3)
    encoded = sampler.sample_ode(**settings, reverse=True)(x1, model)[-1]
    torch.testing.assert_close(encoded, noise(2, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(sampler.sample_ode(**settings)(encoded, model)[-1], x1, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", OWN_METHODS)
@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_every_method_reaches_the_data(method, prediction):
    transport = create_transport("Linear", prediction)
    fn = Sampler(transport).sample_ode(sampling_method=method, num_steps=101)
    x0 = noise(2, 3)
    # A noise prediction keeps 0.001 from both ends, which costs about as much.
    tolerance = 2e-2 if method == "extrapolated" else 2e-3 if prediction == "velocity" else 5e-3
    torch.testing.assert_close(fn(x0, Gaussian("Linear", prediction))[-1], MEAN + STD * x0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", OWN_METHODS)
def test_results_do_not_depend_on_the_batch(method):
    x0, model = noise(5, 3), Gaussian("Linear")
    together = integrate_ode(model, x0, time_grid(8, dtype=torch.float64), method)
    alone = [integrate_ode(model, x[None], time_grid(8, dtype=torch.float64), method) for x in x0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-13)


def test_guidance_is_asked_on_the_right_side_of_its_bounds():
    settings = GuidanceSettings(2.0, 0.1, 0.8, "all")
    assert jumps_of(settings) == (0.1, 0.8)
    assert jumps_of(GuidanceSettings(1.0, 0.1, 0.8)) == () and jumps_of(GuidanceSettings(2.0)) == ()
    sizes = []

    def model(x, t, y):
        sizes.append((float(t[0]), len(x)))
        return torch.zeros_like(x)

    y = torch.zeros(1, dtype=torch.long)
    guided = GuidedVelocity(model, y, y + 1, settings)
    grid, nodes = with_nodes(time_grid(11), jumps_of(settings))
    integrate_ode(guided, torch.zeros(1, 1, 2, 2), time_grid(11), "heun", jumps=jumps_of(settings))
    assert sorted(nodes) == [1, 8]
    for (s, t), (first, second) in zip(
        itertools.pairwise(grid.tolist()), zip(sizes[::2], sizes[1::2], strict=True), strict=True
    ):
        inside = 0.1 < (s + t) / 2 < 0.8
        assert first[1] == second[1] == (2 if inside else 1)
        assert first[0] == pytest.approx(s, abs=1e-6) and second[0] == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "path", "reverse", "message"),
    [
        ("unipc2", "GVP", False, "sampling_method='unipc2' needs path_type Linear, not GVP"),
        ("dpmpp2m", "VP", False, "needs path_type Linear, not VP"),
        ("dpmpp3m", "Linear", True, "runs from noise to data only"),
    ],
)
def test_data_prediction_is_refused_where_it_does_not_hold(method, path, reverse, message):
    with pytest.raises(ValueError, match=message):
        check_method(method, path, reverse)
    with pytest.raises(ValueError, match=message):
        Sampler(create_transport(path)).sample_ode(sampling_method=method, reverse=reverse)


def test_other_methods_are_refused_nowhere():
    for method, path, reverse in itertools.product(("heun", "ab3", "euler"), ("Linear", "GVP", "VP"), (False, True)):
        check_method(method, path, reverse)
        assert callable(Sampler(create_transport(path)).sample_ode(sampling_method=method, reverse=reverse))


@pytest.mark.parametrize(("method", "evaluations"), [("ab3", 7), ("unipc2", 7), ("heun", 14)])
def test_the_pipeline_samples_with_a_node_at_the_guidance_bound(tiny_folder, method, evaluations):
    pipe = LightningDiTPipeline.from_pretrained(tiny_folder)
    change = {"sampling_method": method, "num_sampling_steps": 8, "cfg_interval_start": 0.3}
    sample = dataclasses.replace(pipe.config.sample, **change)
    pipe.config = dataclasses.replace(pipe.config, sample=sample)
    reached = []
    output = pipe([1], seed=4, output_type="latent", callback=lambda step, t, state: reached.append(t))
    assert output.nfe == evaluations and torch.tensor(0.3) in torch.tensor(reached)
    guided, x0 = pipe.guided([1], sample), draw_noise((1, *pipe.latent_shape), [generator_for(4, 0)])
    with torch.inference_mode():
        expected = integrate_ode(guided, x0, time_grid(8), method, jumps=[0.3])
    torch.testing.assert_close(output.images, expected, rtol=0, atol=1e-5)


def test_a_solver_that_the_path_does_not_allow_is_said_before_the_weights_are_read(tiny_folder):
    text = (tiny_folder / "config.yaml").read_text()
    (tiny_folder / "config.yaml").write_text(
        text.replace("sample: {", "transport: {path_type: GVP}\nsample: {sampling_method: unipc2, ")
    )
    (tiny_folder / "transformer.safetensors").unlink()
    with pytest.raises(LightningDiTError, match="sampling_method='unipc2' needs path_type Linear, not GVP"):
        LightningDiTPipeline.from_pretrained(tiny_folder)


@pytest.mark.parametrize("method", ["euler", *OWN_METHODS, "calibrated", "SDE"])
def test_nothing_waits_for_a_value_of_the_device(method):
    """The states are on the meta device of torch, where reading a value is an error; on a GPU it would wait."""
    settings, labels = GuidanceSettings(2.0, 0.3, 0.7, "all"), torch.zeros(2, device="meta")
    evaluations = []

    def model(x, t, y):
        assert t.device.type == "cpu" and x.device.type == "meta"
        evaluations.append(len(x))
        return 0.5 * x

    guided, x0 = GuidedVelocity(model, labels, labels, settings), torch.zeros(2, 3, 4, 4, device="meta")
    times = time_grid(12)
    if method == "SDE":
        *_, last = sde_states(
            create_transport(), guided, x0, SdeSettings("Heun", num_steps=8), [generator_for(0, 0)] * 2
        )
    elif method == "calibrated":
        last = linear_multistep(guided, x0, times, velocity_coefficients(times, 3).float())
    else:
        last = integrate_ode(guided, x0, times, method, jumps=jumps_of(settings))
    assert last.device.type == "meta" and last.shape == x0.shape
    assert set(evaluations) == {2, 4}  # guided within the interval alone


def ucgm_by_hand(velocity, z: float) -> tuple[float, list[float]]:
    """UCGM's sampler of order 1 on one number, in its own time r = 1 - t (1 is noise), as arXiv 2505.07447 has it.

    Returns the last prediction of the data, and the times t of the evaluations.
    """
    steps, ratio = 50, 0.5
    grid = [1 - (1 - (1 - (0.001 + 0.998 * k / 49) ** 1.17) ** 0.8) ** 1.1 for k in range(steps)] + [0.0]
    x, data, noises, called = z, [], [], []
    for k in range(steps):
        r = grid[k]
        called.append(1 - r)
        f = -velocity(x, 1 - r)  # d x / d r
        data.append(x - r * f)
        noises.append(x + (1 - r) * f)
        d, e = data[-1], noises[-1]
        if k >= 2:
            d, e = d + ratio * (d - data[-2]), e + ratio * (e - noises[-2])
        x = (1 - grid[k + 1]) * d + grid[k + 1] * e
    return data[-1], called


def test_the_grid_of_ucgm() -> None:
    grid = kumaraswamy_grid(51)
    assert grid.dtype == torch.float64 and len(grid) == 51 and grid[-1] == 1 and bool((grid.diff() > 0).all())
    # by hand at u = 0.001 and u = 0.999: u^1.17 = 3.0903e-4 and 0.998830
    ends = [(1 - (1 - 3.090295e-4) ** 0.8) ** 1.1, (1 - (1 - 0.9988301) ** 0.8) ** 1.1]
    assert [float(grid[0]), float(grid[-2])] == pytest.approx(ends, rel=1e-5)
    assert kumaraswamy_grid(2).tolist() == pytest.approx([ends[0], 1], rel=1e-5)
    with pytest.raises(ValueError, match="num_steps=1 is too small"):
        kumaraswamy_grid(1)


def test_ucgm_is_its_published_sampler() -> None:
    def velocity(x: float, t: float) -> float:
        return math.sin(3 * x) - 2 * t**2 + 0.3 * x

    starts, seen = [-1.3, 0.2, 2.5], []

    def batched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(float(t[0]))
        return torch.sin(3 * x) - 2 * t[:, None] ** 2 + 0.3 * x

    x0 = torch.tensor(starts, dtype=torch.float64)[:, None]
    last = integrate_ode(batched, x0, kumaraswamy_grid(51), "extrapolated", jumps=[0.125])
    by_hand = [ucgm_by_hand(velocity, start) for start in starts]
    assert last.flatten().tolist() == pytest.approx([end for end, _ in by_hand], abs=1e-12)
    assert len(seen) == 50 and seen == pytest.approx(by_hand[0][1], abs=1e-12)


def test_ucgm_is_exact_where_data_and_noise_are_predicted_alike() -> None:
    """On a straight line, x_t = t d + (1 - t) z: every prediction of the data is d, whatever is extrapolated."""
    z, d = noise(2, 3), noise(2, 3, seed=1)
    times = kumaraswamy_grid(51)
    start = z + times[0] * (d - z)
    last = integrate_ode(lambda x, t: d - z, start, times, "extrapolated")
    torch.testing.assert_close(last, d, rtol=0, atol=1e-12)


def test_extrapolation_errs_to_the_other_side_of_euler() -> None:
    """With v = 2 t the extra term of step n is q_n = (h dv + q_n-1) / 2 = h^2 (2 - 2^(2 - n)), Euler lacks h^2."""
    steps, times = 64, time_grid(65, dtype=torch.float64)
    h, start = 1 / steps, torch.zeros(1, 1, dtype=torch.float64)
    ends = [
        integrate_ode(lambda x, t: 2 * t[:, None], start, times, method).item() for method in ("euler", "extrapolated")
    ]
    added = sum(h**2 * 2 * (1 - 0.5 ** (n - 1)) for n in range(2, steps - 1))
    assert ends == pytest.approx([1 - h, 1 - h + added], abs=1e-12) and added == pytest.approx(2 * h, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_method": "ucgm", "reverse": True}, "from noise to data only"),
        ({"time_grid": "kumaraswamy", "reverse": True}, "kumaraswamy runs from noise to data only"),
        ({"time_grid": "kumaraswamy", "timestep_shift": 0.3}, "not with kumaraswamy"),
        ({"mode": "SDE", "sampling_method": "ucgm"}, "ucgm goes with mode ODE"),
    ],
)
def test_what_ucgm_does_not_go_with(change: dict[str, object], message: str) -> None:
    with pytest.raises(LightningDiTError, match=message):
        check_solver(SampleConfig(**change))


def test_ucgm_needs_the_linear_path_and_its_own_ends() -> None:
    with pytest.raises(LightningDiTError, match="needs path_type Linear, not GVP"):
        check_solver(SampleConfig(sampling_method="ucgm"), "GVP")
    sample = SampleConfig(sampling_method="ucgm")
    assert Solver.of(sample, create_transport(), str).steps == 50
    with pytest.raises(ValueError, match="from t = 0.00011 to 0.995, and transport.sample_eps keeps it in 0.001 to"):
        Solver.of(sample, create_transport("Linear", "noise"), str)


def test_the_preset_ucgm_takes_50_evaluations_with_the_published_guidance(tiny_folder: Path) -> None:
    pipe = LightningDiTPipeline.from_pretrained(tiny_folder)
    sample = with_preset(SampleConfig(cfg_scale=2.0, guided_channels="all", guide_ckpt="weak.pt"), "ucgm")
    assert guidance_of(sample) == GuidanceSettings(6.7, 0.125, 1.0, 3) and sample.guide_ckpt is None
    few = dataclasses.replace(sample, guided_channels=2)
    together = pipe.with_sample(few)([0, 1, 2], seed=5, output_type="latent", batch_size=3)
    assert together.nfe == 50
    alone = pipe.with_sample(few)([2], seed=5, indices=[2], output_type="latent")
    torch.testing.assert_close(alone.images, together.images[2:], rtol=0, atol=1e-5)
    guided = pipe.guided([0], few)
    acts = [guided.settings.acts_at(t[None]) for t in pipe.solver(few).times()[:-1].float()]
    assert acts == [float(t) >= 0.125 for t in kumaraswamy_grid(51)[:-1]] and acts.count(False) == 12
