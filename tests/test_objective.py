"""Losses and training times against closed forms and the published values."""

import itertools
import math
import warnings

import pytest
import torch

from LightningDiT.transport import PATHS, Transport, create_transport


def fresh(text):
    """Return an equal string that is another object, as those read from a file are."""
    return None if text is None else "".join(list(text))


def draws(seed=0, n=4):
    generator = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, n, 3, 4, 4, dtype=torch.float64, generator=generator)
    return x0, x1, torch.linspace(0.1, 0.9, n, dtype=torch.float64)


@pytest.mark.parametrize(
    ("path", "prediction", "expected"),
    [
        ("Linear", "velocity", (0, 0)),
        ("GVP", "velocity", (0, 0)),
        ("GVP", "noise", (1e-3, 1e-3)),
        ("Linear", "score", (1e-3, 1e-3)),
        ("VP", "velocity", (1e-5, 1e-3)),
        ("VP", "noise", (1e-5, 1e-3)),
    ],
)
def test_default_eps(path, prediction, expected):
    transport = create_transport(fresh(path), fresh(prediction))
    assert (transport.train_eps, transport.sample_eps) == expected


def test_the_factory_and_the_class_have_the_same_defaults():
    plain = Transport("Linear", "velocity", None, 0.0, 0.0, use_cosine_loss=False, use_lognorm=False)
    assert Transport() == create_transport() == plain


def test_a_given_eps_stands_and_the_other_keeps_its_default():
    transport = create_transport("VP", "noise", train_eps=0.01)
    assert (transport.train_eps, transport.sample_eps) == (0.01, 1e-3)


@pytest.mark.parametrize(
    ("path", "prediction", "options", "expected"),
    [
        ("Linear", "velocity", {}, (0, 1)),
        ("Linear", "noise", {}, (0.01, 0.99)),
        ("VP", "velocity", {}, (0, 0.99)),
        ("VP", "noise", {"sde": True, "last_step_size": 0.04}, (0, 0.96)),
        ("Linear", "velocity", {"sde": True, "last_step_size": 0.04}, (0.01, 0.96)),
        ("Linear", "velocity", {"sde": True, "diffusion_form": "SBDM"}, (0.01, 0.99)),
        ("Linear", "noise", {"last_step_size": 0.04}, (0.01, 0.99)),  # that of an SDE alone
        ("Linear", "velocity", {"sde": True, "diffusion_form": "sigma"}, (0, 0.99)),
        ("GVP", "score", {"sde": True, "diffusion_form": "sigma"}, (0.01, 0.99)),
    ],
)
def test_interval(path, prediction, options, expected):
    options = {key: fresh(value) if isinstance(value, str) else value for key, value in options.items()}
    interval = create_transport(fresh(path), fresh(prediction)).interval(0.01, **options)
    assert interval == pytest.approx(expected)


def test_sde_keeps_away_from_its_singular_ends_without_an_eps():
    assert create_transport().interval(0.0, sde=True) == pytest.approx((1e-3, 1 - 1e-3))


@pytest.mark.parametrize(
    ("prediction", "weight"),
    [
        ("velocity", None),
        *itertools.product(("noise", "score"), (None, "velocity", "likelihood")),
    ],
)
@pytest.mark.parametrize("name", PATHS)
def test_a_perfect_model_has_no_loss_and_a_wrong_one_its_weight(name, weight, prediction):
    transport, path = create_transport(fresh(name), fresh(prediction), fresh(weight)), PATHS[name]
    x0, x1, t = draws()
    column = t.reshape(-1, 1, 1, 1)
    _, u_t = path.plan(t, x0, x1)
    truth = {"velocity": u_t, "noise": x0, "score": -x0 / path.sigma(column)}[prediction]
    terms = transport.training_losses(lambda x, t: truth, x1, x0=x0, t=t)
    torch.testing.assert_close(terms["loss"], torch.zeros(4, dtype=torch.float64))
    terms = transport.training_losses(lambda x, t: truth + 0.5, x1, x0=x0, t=t)
    noise_error = 0.5 * path.sigma(t) if prediction == "score" else torch.full_like(t, 0.5)
    rate = path.score_weight(t)
    factor = {None: 1.0, "velocity": (rate / path.sigma(t)) ** 2}.get(weight, rate / path.sigma(t) ** 2)
    torch.testing.assert_close(terms["loss"], factor * noise_error**2)
    assert "cos_loss" not in terms


@pytest.mark.filterwarnings("ignore:use_cosine_loss")
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_the_cosine_loss_is_of_velocities_alone(prediction):
    x0, x1, t = draws()
    terms = create_transport(prediction=prediction, use_cosine_loss=True).training_losses(
        lambda x, t: x, x1, x0=x0, t=t
    )
    assert terms.keys() == {"pred", "loss"}


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("name", PATHS)
def test_a_perfect_model_has_the_velocity_and_the_score_of_the_path(name, prediction):
    transport, path = create_transport(fresh(name), fresh(prediction)), PATHS[name]
    x0, x1, t = draws()
    score = -x0 / path.sigma(t.reshape(-1, 1, 1, 1))
    x_t, u_t = path.plan(t, x0, x1)
    seen = []

    def model(x, t, y):
        seen.append((x, t, y))
        return {"velocity": u_t, "noise": x0, "score": score}[prediction]

    torch.testing.assert_close(transport.velocity(model, x_t, t, y="label"), u_t)
    velocity, found = transport.velocity_and_score(model, x_t, t, y="label")
    torch.testing.assert_close(velocity, u_t)
    torch.testing.assert_close(found, score)
    assert seen == [(x_t, t, "label")] * 2


def test_velocity_weight_makes_the_noise_loss_a_velocity_loss():
    path = PATHS["GVP"]
    x0, x1, t = draws()
    x_t, _ = path.plan(t, x0, x1)
    guess = x0 + 0.1 * x1
    by_noise = create_transport("GVP", "noise", "velocity").training_losses(lambda x, t: guess, x1, x0=x0, t=t)
    as_velocity = path.velocity_from_noise(guess, x_t, t)
    by_velocity = create_transport("GVP").training_losses(lambda x, t: as_velocity, x1, x0=x0, t=t)
    torch.testing.assert_close(by_noise["loss"], by_velocity["loss"])


def test_cosine_loss_is_over_channels():
    transport = create_transport(use_cosine_loss=True)
    x0, x1, t = draws()
    opposite = transport.training_losses(lambda x, t: x0 - x1, x1, x0=x0, t=t)
    torch.testing.assert_close(opposite["cos_loss"], torch.full((4,), 2.0, dtype=torch.float64))
    scaled = transport.training_losses(lambda x, t: 3 * (x1 - x0), x1, x0=x0, t=t)
    torch.testing.assert_close(scaled["cos_loss"], torch.zeros(4, dtype=torch.float64))
    # A channel swap has, at each position, the cosine of the swapped velocity with itself.
    u = x1 - x0
    expected = 1 - (u * u.flip(1)).sum(1) / (u**2).sum(1)
    swapped = transport.training_losses(lambda x, t: u.flip(1), x1, x0=x0, t=t)
    torch.testing.assert_close(swapped["cos_loss"], expected.mean(dim=(1, 2)))


def test_the_cosine_of_a_prediction_of_zero_has_a_bounded_gradient():
    """It divides by a length of 0.01 at least: at each of 16 positions of the mean the gradient is 100 / 16."""
    x0, x1, t = draws()
    prediction = torch.zeros_like(x0, requires_grad=True)
    terms = create_transport(use_cosine_loss=True).training_losses(lambda x, t: prediction, x1, x0=x0, t=t)
    terms["cos_loss"].sum().backward()
    torch.testing.assert_close(prediction.grad.norm(dim=1), torch.full((4, 4, 4), 100 / 16, dtype=torch.float64))


def test_noise_and_times_come_from_the_generator():
    transport = create_transport()
    x1 = torch.zeros(5, 3, 4, 4)
    seen = []

    def model(x, t, y):
        seen.append((x, t, y))
        return torch.zeros_like(x)

    for seed in (5, 5, 6):
        generator = torch.Generator().manual_seed(seed)
        transport.training_losses(model, x1, {"y": "label"}, generator=generator)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][0], seen[2][0]) and not torch.equal(seen[0][1], seen[2][1])
    assert seen[0][2] == "label"


def test_uniform_times_fill_their_interval():
    t = create_transport("VP", "noise", train_eps=0.1).sample_times(20000, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() <= 0.9
    # The mean of n uniform draws on [0, 0.9] has the standard error 0.9 / sqrt(12 n).
    assert abs(t.mean().item() - 0.45) < 4 * 0.9 / math.sqrt(12 * 20000)


@pytest.mark.parametrize("use_lognorm", [False, True])
def test_times_keep_their_distance_from_both_singular_ends(use_lognorm):
    transport = create_transport(prediction="noise", train_eps=0.1, use_lognorm=use_lognorm)
    t = transport.sample_times(20000, torch.Generator().manual_seed(0))
    assert 0.1 <= t.min() < 0.12 and 0.88 < t.max() <= 0.9


def test_lognormal_times_are_sigmoids_of_normals():
    t = create_transport(use_lognorm=True).sample_times(20000, torch.Generator().manual_seed(0))
    logits = torch.logit(t.double())
    assert abs(logits.mean().item()) < 4 / math.sqrt(20000)
    assert abs(logits.var().item() - 1) < 4 * math.sqrt(2 / 20000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path_type": "Lineer"}, "path_type='Lineer'.*nearest is 'Linear'"),
        ({"prediction": "velocty"}, "prediction='velocty'.*nearest is 'velocity'"),
        ({"loss_weight": "likelyhood"}, "loss_weight='likelyhood'.*nearest is 'likelihood'"),
        ({"train_eps": 0.5}, "train_eps=0.5 is out of range"),
        ({"train_eps": 0.6}, "train_eps=0.6 is out of range"),
        ({"train_eps": -0.1}, "train_eps=-0.1 is out of range"),
        ({"sample_eps": float("nan")}, "sample_eps=nan is out of range"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_transport(**options)


def test_settings_without_effect_are_said():
    with pytest.warns(UserWarning, match="loss_weight is not used") as first:
        create_transport(prediction=fresh("velocity"), loss_weight=fresh("likelihood"))
    with pytest.warns(UserWarning, match="use_cosine_loss is used with") as second:
        create_transport(prediction="noise", use_cosine_loss=True)
    assert first[0].filename == second[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction": "velocity", "use_cosine_loss": True},
        {"prediction": "velocity", "loss_weight": "velocity"},
        {"prediction": "noise", "loss_weight": "likelihood"},
        {"prediction": "score", "loss_weight": "likelihood"},
    ],
)
def test_settings_with_an_effect_give_no_warning(options):
    given = {key: fresh(value) if isinstance(value, str) else value for key, value in options.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        create_transport(**given)
    assert not caught


def test_a_none_from_yaml_is_none():
    assert create_transport(loss_weight="None").loss_weight is None


def test_a_wrong_output_shape_is_named():
    with pytest.raises(ValueError, match=r"returned shape \(4, 6, 4, 4\).*\(4, 3, 4, 4\)"):
        create_transport().training_losses(lambda x, t: torch.cat([x, x], 1), torch.zeros(4, 3, 4, 4))
    with pytest.raises(ValueError, match=r"returned shape \(4, 2, 4, 4\).*\(4, 3, 4, 4\)"):
        create_transport().training_losses(lambda x, t: x[:, :2], torch.zeros(4, 3, 4, 4))


def test_losses_equal_the_published_ones(golden, manifest, unit_model):
    model = unit_model("default")
    for case in manifest["loss"]:
        transport = create_transport(
            case["path_type"],
            case["prediction"],
            case["loss_weight"],
            use_cosine_loss=case["use_cosine_loss"],
        )
        with torch.no_grad():
            terms = transport.training_losses(
                model,
                golden["loss.x1"],
                {"y": golden["loss.y"]},
                x0=golden["loss.x0"],
                t=golden["loss.t"],
            )
        torch.testing.assert_close(terms["loss"], golden[case["key"]], rtol=1e-5, atol=1e-4)
        if case["use_cosine_loss"]:
            expected = golden[case["key"] + ".cos_loss"]
            torch.testing.assert_close(terms["cos_loss"], expected, rtol=0, atol=1e-4)


def test_transport_checks_itself_without_the_factory():
    with pytest.raises(ValueError, match="prediction='x1'"):
        Transport(prediction="x1")
