"""Calibrated solvers: the fit in closed form, the file, and who may use it."""

import dataclasses
import math
import re
import shutil

import pytest
import torch

from LightningDiT.checkpoint import load_weights
from LightningDiT.config import load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import guidance_of
from LightningDiT.sampling.calibrated import SolverFile, load_solvers, save_solvers, weights_fingerprint
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tools.calibrate_solver import (
    Candidate,
    Problem,
    Times,
    as_solver,
    candidate,
    least_squares,
    main,
    make_problem,
    refine,
    relative_error,
    whitening,
)
from LightningDiT.transport import GuidanceSettings, graded_grid, linear_multistep
from LightningDiT.transport.solvers import velocity_coefficients
from tests.conftest import BUNDLED
from tests.test_sampler import MEAN, STD, Gaussian, noise

QUICK = ["--noises", "3", "--checks", "3", "--reference-steps", "24", "--iterations", "3"]


def gaussian_problem(count: int, seed: int) -> Problem:
    """States of the Gaussian model, whose trajectories are known."""
    x0, times = noise(count, 1, 2, 2, seed=seed, dtype=torch.float32), torch.linspace(0, 1, 401)
    states = torch.stack([t * MEAN + math.hypot(t * STD, 1 - t) * x0 for t in times.tolist()])
    return Problem(x0, Gaussian("Linear"), times, states)


def growth_problem(count: int) -> Problem:
    """x' = cos(3 t) x, so that every state is a multiple of its noise."""
    x0, times = noise(count, 1, 2, 2, dtype=torch.float32), torch.linspace(0, 1, 2001)
    states = torch.stack([math.exp(math.sin(3 * t) / 3) * x0 for t in times.tolist()])
    return Problem(x0, lambda x, t: torch.cos(3 * t)[:, None, None, None] * x, times, states)


def test_least_squares_is_exact_where_one_factor_a_step_suffices():
    problem, times = growth_problem(3), torch.linspace(0, 1, 5)
    fitted = linear_multistep(problem.velocity, problem.noise, times, least_squares(problem, times))
    torch.testing.assert_close(fitted, problem.states[-1], rtol=0, atol=1e-5)
    classical = candidate(problem, times, velocity_coefficients(times, 2).float())
    assert classical.error > 1e-3


def test_the_target_lies_on_the_line_between_neighbours():
    problem = Problem(torch.zeros(1, 1), Gaussian("Linear"), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([2.0, 4, 8]))
    assert [float(problem.target(t)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)] == [2, 3, 4, 6, 8]


def test_the_relative_error_is_the_mean_over_states():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert float(relative_error(reference + torch.tensor([[0.0, 1.0], [0.0, 1.0]]), reference)) == pytest.approx(0.35)


def test_adam_improves_on_its_start_and_reports_only_what_is_better():
    fit, check = gaussian_problem(8, 1), gaussian_problem(8, 2)
    times = torch.linspace(0, 1, 5)
    start = candidate(check, times, velocity_coefficients(times, 2).float())
    found: list[Candidate] = []
    refine(start, fit, check, 60, found.append)
    errors = [start.error, *(one.error for one in found)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < start.error / 3
    again = linear_multistep(check.velocity, check.noise, found[-1].times, found[-1].coefficients)
    assert float(check.error(again)) == pytest.approx(errors[-1])


def test_times_keep_their_ends_and_nodes_wherever_they_move():
    grid, _ = graded_grid(9, (0.1,))
    times = Times(grid, (0.1,))
    torch.testing.assert_close(times.grid(), grid)
    with torch.no_grad():
        times.logarithms += torch.randn(8, generator=torch.Generator().manual_seed(0))
    moved = times.grid()
    assert moved[0] == 0 and moved[-1] == 1 and bool((moved.diff() > 0).all())
    assert torch.tensor(0.1) in moved and not torch.allclose(moved, grid, atol=1e-2)


def test_whitened_directions_have_unit_size_and_are_independent():
    problem, times = gaussian_problem(50, 0), torch.linspace(0, 1, 4)
    problem = dataclasses.replace(problem, velocity=lambda x, t: torch.sin(9 * t[:, None, None, None] + 3 * x))
    start = candidate(problem, times, velocity_coefficients(times, 1).float())
    directions = whitening(problem, start)
    asked = []

    def spy(x, t):
        asked.append(problem.velocity(x, t))
        return asked[-1]

    linear_multistep(spy, problem.noise, times, start.coefficients)
    for size, matrix in enumerate(directions, 1):
        moved = torch.stack([value.flatten() for value in asked[:size]], 1) @ matrix
        torch.testing.assert_close(moved.T @ moved / len(moved), torch.eye(size), rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def solver_file(tiny_source, tmp_path_factory):
    """Solvers of 3 and 4 evaluations for the small pipeline."""
    file = tmp_path_factory.mktemp("solvers") / "solvers.yaml"
    argv = ["--config", str(tiny_source / "config.yaml"), "--output", str(file), *QUICK]
    assert main([*argv, "--evaluations", "3", "4"]) == 0
    return file


@pytest.fixture
def calibrated(tiny_folder, solver_file):
    """A copy of the small pipeline's folder that samples with its calibrated solvers."""
    shutil.copy(solver_file, tiny_folder)
    text = (tiny_folder / "config.yaml").read_text()
    changed = text.replace("sample: {", "sample: {sampling_method: calibrated, solver_file: solvers.yaml, ")
    (tiny_folder / "config.yaml").write_text(changed)
    return tiny_folder


def test_the_command_writes_what_the_pipeline_samples_with(calibrated):
    file = load_solvers(calibrated / "solvers.yaml")
    assert [solver.evaluations for solver in file.solvers] == [3, 4]
    pipe = LightningDiTPipeline.from_pretrained(calibrated)
    assert file.weights == weights_fingerprint(calibrated / "transformer.safetensors")
    check = make_problem(pipe, (0, 2), 3, 24)
    labels = [0, 1, 2]
    for solver in file.solvers:
        points = solver.evaluations + 1
        output = pipe(labels, latents=check.noise, num_inference_steps=points, output_type="latent", batch_size=3)
        assert output.nfe == solver.evaluations
        assert float(check.error(output.images)) == pytest.approx(solver.error, rel=0.01)
    # The most evaluations that the number of points allows.
    assert pipe([0], num_inference_steps=200, output_type="latent").nfe == 4
    alone = pipe(labels[1], latents=check.noise[1:2], output_type="latent").images
    together = pipe(labels, latents=check.noise, output_type="latent", batch_size=3).images
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-4)


def test_a_second_run_goes_on_and_never_makes_it_worse(calibrated, capsys):
    config = str(calibrated / "config.yaml")
    before = load_solvers(calibrated / "solvers.yaml")
    argv = ["--config", config, *QUICK, "--evaluations", "4", "5"]
    assert main(argv) == 0
    after = load_solvers(calibrated / "solvers.yaml")
    assert [solver.evaluations for solver in after.solvers] == [3, 4, 5]
    for old, new in zip(before.solvers, after.solvers, strict=False):
        assert new.error <= old.error
    assert main([*argv, "--guidance-scale", "3"]) == 0
    assert len(load_solvers(calibrated / "solvers.yaml").solvers) == 5
    assert "mean relative error" in capsys.readouterr().out


def test_ctrl_c_keeps_the_best_so_far(tiny_folder, monkeypatch):
    import LightningDiT.tools.calibrate_solver as tool

    def interrupted(start, fit, check, steps, kept):
        kept(dataclasses.replace(start, error=start.error / 2))
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "refine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--config", str(tiny_folder / "config.yaml"), *QUICK, "--evaluations", "3"])
    (solver,) = load_solvers(tiny_folder / "solvers.yaml").solvers
    assert solver.evaluations == 3 and solver.noises == 3


def test_files_return_what_was_written(tmp_path):
    guidance = GuidanceSettings(2.0, 0.1, 1.0, "all")
    found = Candidate(torch.tensor([0, 0.1, 1.0]), torch.tensor([[1e-7, 0.0], [-0.5, 1.25]]), 0.0125)
    solver = as_solver(found, load_config(BUNDLED / "config.yaml").sample, "Linear", 8)
    assert solver.guidance == guidance
    save_solvers(SolverFile("0123", (solver,)), tmp_path / "solvers.yaml")
    (read,) = load_solvers(tmp_path / "solvers.yaml").solvers
    for ours, theirs in zip(solver.tensors(), read.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert dataclasses.replace(read, times=solver.times, coefficients=solver.coefficients) == solver


def test_the_better_solver_stays():
    found = Candidate(torch.tensor([0, 1.0]), torch.ones(1, 1), 0.2)
    solver = as_solver(found, load_config(BUNDLED / "config.yaml").sample, "Linear", 1)
    file = SolverFile("0").with_solver(solver)
    assert file.with_solver(dataclasses.replace(solver, error=0.3)) == file
    better = dataclasses.replace(solver, error=0.1)
    assert file.with_solver(better).solvers == (better,)
    other = dataclasses.replace(solver, path_type="GVP")
    assert len(file.with_solver(other).solvers) == 2
    sample = load_config(BUNDLED / "config.yaml").sample
    assert file.best(sample, "Linear", 0) is None and file.best(sample, "Linear") == solver


def test_the_fingerprint_follows_the_weights_and_not_the_file(tiny_folder):
    original = tiny_folder / "transformer.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_weights(original).items()}
    torch.save({"ema": {f"module.{name}": tensor for name, tensor in weights.items()}}, tiny_folder / "copy.pt")
    assert weights_fingerprint(tiny_folder / "copy.pt") == weights_fingerprint(original)
    weights["blocks.0.attn.proj.bias"][0] += 1e-3
    torch.save(weights, tiny_folder / "other.pt")
    assert weights_fingerprint(tiny_folder / "other.pt") != weights_fingerprint(original)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cfg_scale": 3.0},
            "no solver of .* guidance 3 on all channels.* it has guidance 2 on all",
        ),
        ({"num_sampling_steps": 3}, "has no solver of at most 2 evaluations"),
        ({"reverse": True}, "from data to noise"),
        ({"solver_file": None}, "needs sample.solver_file"),
        ({"solver_file": "nowhere.yaml"}, "nowhere.yaml does not exist"),
    ],
)
def test_settings_that_do_not_fit_are_said_in_one_line(calibrated, change, message):
    pipe = LightningDiTPipeline.from_pretrained(calibrated)
    pipe.config = dataclasses.replace(pipe.config, sample=dataclasses.replace(pipe.config.sample, **change))
    with pytest.raises(LightningDiTError, match=message) as caught:
        pipe([0], output_type="latent")
    assert "\n" not in str(caught.value) and "tools.calibrate_solver" in str(caught.value)


def test_other_weights_are_refused(calibrated):
    file = calibrated / "solvers.yaml"
    file.write_text(re.sub("weights: .*", "weights: 'fff'", file.read_text()))
    pipe = LightningDiTPipeline.from_pretrained(calibrated)
    with pytest.raises(LightningDiTError, match="belongs to weights fff"):
        pipe([0], output_type="latent")
    with pytest.raises(LightningDiTError, match="belongs to weights fff"):
        main(["--config", str(calibrated / "config.yaml"), "--evaluations", "3"])


def test_fast_falls_back_with_a_warning_and_published_is_euler_with_250_points(calibrated):
    pipe = LightningDiTPipeline.from_pretrained(calibrated)

    def sampled(**change):
        pipe.config = dataclasses.replace(pipe.config, sample=dataclasses.replace(pipe.config.sample, **change))
        return pipe([1], seed=5, output_type="latent")

    assert sampled(sampling_method="fast").nfe == 4  # the most that the file has
    with pytest.warns(UserWarning, match="no solver for .* ab3 with 26 points is used instead"):
        scaled = sampled(sampling_method="fast", cfg_scale=3.0)
    assert scaled.nfe == 25
    without = sampled(sampling_method="fast", solver_file=None)
    assert torch.equal(without.images, scaled.images)
    published = sampled(sampling_method="published", num_sampling_steps=7)
    assert published.nfe == 249
    torch.testing.assert_close(without.images, published.images, rtol=0, atol=0.1)


def test_a_solver_file_of_other_weights_gives_no_warning_and_is_said(calibrated, recwarn):
    """As `solver_file: solvers.yaml` in a copy of the bundled configuration, for a model of one's own."""
    file = calibrated / "solvers.yaml"
    file.write_text(re.sub("weights: .*", "weights: 'fff'", file.read_text()))
    pipe = LightningDiTPipeline.from_pretrained(calibrated)
    sample = dataclasses.replace(pipe.config.sample, sampling_method="fast")
    assert pipe.with_sample(sample)([1], output_type="latent").nfe == 25
    assert not [warning for warning in recwarn if "solver" in str(warning.message)]
    assert pipe.solver(sample).describe() == "ab3, 26 points, graded grid; solvers.yaml belongs to other weights"


def test_points_asked_for_leave_a_named_solver_for_its_method_and_grid(calibrated):
    pipe = LightningDiTPipeline.from_pretrained(calibrated)

    def sampled(points=None, **change):
        pipe.config = dataclasses.replace(pipe.config, sample=dataclasses.replace(pipe.config.sample, **change))
        return pipe([1], seed=5, output_type="latent", num_inference_steps=points)

    asked = sampled(9, sampling_method="fast", timestep_shift=0.3)
    assert (asked.nfe, pipe.solver(pipe.config.sample).steps) == (8, 4)
    spelt = sampled(sampling_method="ab3", num_sampling_steps=9, time_grid="graded", timestep_shift=0.0)
    assert torch.equal(asked.images, spelt.images)
    assert not torch.equal(asked.images, sampled(time_grid="shifted").images)
    assert pipe.solver(pipe.config.sample).steps == 8


@pytest.mark.parametrize("text", ["times: [0, 1, 0.5]", "coefficients: [[1.0]]", "noise: 3"])
def test_a_damaged_file_is_named(calibrated, text):
    file, key = calibrated / "solvers.yaml", text.partition(":")[0]
    lines = [f"  {text}" if line.startswith(f"  {key}:") else line for line in file.read_text().splitlines()]
    if key == "coefficients":
        lines = [line for line in lines if not line.startswith("  - [")]
    if key == "noise":
        lines.append(f"  {text}")
    file.write_text("\n".join(lines))
    with pytest.raises(LightningDiTError, match="solvers.yaml"):
        load_solvers(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: '0'\nsolvers: 3\n", "solvers is 3; a list of mappings is expected"),
        ("weights: '0'\nsolvers: [1]\n", r"solvers is \[1\]; a list of mappings is expected"),
        ("weights: '0'\nsolvers:\n", "solvers is None; a list of mappings is expected"),
        ("weights: '0'\nsolvers: [{path_type: Linear, error: 0.1}]\n", "solver 1: guidance is missing"),
        ("solvers: [{path_type: Linear}]\n", "weights is missing"),
        ("", "solvers is None"),
    ],
)
def test_a_file_that_lacks_something_is_named(text, message, tmp_path):
    (tmp_path / "solvers.yaml").write_text(text)
    with pytest.raises(LightningDiTError, match=f"solvers.yaml: {message}"):
        load_solvers(tmp_path / "solvers.yaml")


@pytest.mark.parametrize("option", [["--evaluations", "2"], ["--noises", "0"], ["--iterations", "0"]])
def test_bad_options_are_refused(option, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--config", "x.yaml", *option])
    assert caught.value.code == 2 and "expected" in capsys.readouterr().err


def test_the_bundled_file_belongs_to_the_bundled_weights():
    config = load_config(BUNDLED / "config.yaml")
    file = load_solvers(BUNDLED / "solvers.yaml")
    assert file.weights == weights_fingerprint(config.ckpt_path)
    errors = {s.evaluations: s.error for s in file.solvers if s.guidance == guidance_of(config.sample)}
    assert list(errors) == [6, 8, 10, 12, 14, 15]
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
