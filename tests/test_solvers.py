"""Multistep solvers and Heun: orders, exactness on polynomials, nodes where the velocity jumps."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.pipeline import LightningDiTPipeline
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


@pytest.mark.parametrize("method", OWN_METHODS)
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
    few, kept = with_nodes(time_grid(3), [0.2, 0.7])
    assert few.tolist() == pytest.approx([0, 0.2, 1]) and kept == {1}
    assert with_nodes(time_grid(2), [0.2])[1] == frozenset()


@pytest.mark.parametrize("jumps", [(), (0.125,), (0.7, 0.1), (0.0, 1.0), (0.01, 0.02)])
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
    assert [t for _, t, _ in seen[8:]] == with_nodes(times, [0.1])[0][1:].tolist()


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
    tolerance = 2e-3 if prediction == "velocity" else 5e-3
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
