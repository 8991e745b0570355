"""Guidance against its formula and the published values."""

import pytest
import torch

from LightningDiT.transport import GuidanceSettings, GuidedVelocity
from LightningDiT.transport.guidance import jumps_of

X = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
Y, NULL = torch.tensor([3, 7]), torch.tensor([10, 10])


class Linear:
    """v = (start + slope label) x, with a record of the batch sizes that it was called on."""

    def __init__(self, start=1.0, slope=0.1):
        self.start, self.slope = start, slope
        self.calls = []

    def __call__(self, x, t, y):
        assert len(x) == len(t) == len(y)
        self.calls.append(len(x))
        return (self.start + self.slope * y.reshape(-1, 1, 1, 1)) * x


def at(time, n=2):
    return torch.full((n,), time)


def guided(model, time, *settings, guide=None, **more):
    return GuidedVelocity(model, Y, NULL, GuidanceSettings(*settings, **more), guide)(X, at(time))


def gains(v):
    """Return the factor v / x per state and channel, which is constant over positions."""
    ratio = v / X
    torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio))
    return ratio[..., 0, 0]


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (3, 3), (5, 5), ("".join(["a", "ll"]), 5)])
def test_guidance_mixes_the_guided_channels_only(channels, count):
    model = Linear()
    v = guided(model, 0.5, 4.0, guided_channels=channels)
    # null + 4 (cond - null): 2 + 4 (1.3 - 2) = -0.8 and 2 + 4 (1.7 - 2) = 0.8
    expected = torch.tensor([[-0.8] * count + [1.3] * (5 - count)] * 2)
    expected[1] = torch.tensor([0.8] * count + [1.7] * (5 - count))
    torch.testing.assert_close(gains(v), expected)
    assert model.calls == [4]


@pytest.mark.parametrize(
    ("time", "scale", "acts"),
    [(0.2, 4.0, False), (0.3, 4.0, True), (0.8, 4.0, True), (0.9, 4.0, False), (0.5, 1.0, False)],
)
def test_half_the_work_where_guidance_does_not_act(time, scale, acts):
    model = Linear()
    v = guided(model, time, scale, 0.3, 0.8)
    assert model.calls == [4 if acts else 2]
    if not acts:
        assert torch.equal(v, Linear()(X, at(time), Y))


def test_a_bound_includes_its_own_grid_point():
    # float32(0.7) < 0.7, but both stand for the same grid point.
    assert float(torch.tensor(0.7)) < 0.7
    assert GuidanceSettings(4.0, cfg_interval_start=0.7).acts_at(at(0.7))


def test_defaults_are_the_published_ones_without_guidance():
    assert GuidanceSettings() == GuidanceSettings(1.0, 0.0, 1.0, 3)
    assert not GuidanceSettings().acts_at(at(0.5))


def test_an_interval_may_be_one_time_and_a_batch_empty():
    settings = GuidanceSettings(4.0, 0.5, 0.5)
    for n in (1, 2):
        assert [settings.acts_at(at(time, n)) for time in (0.4, 0.5, 0.6)] == [False, True, False]
    assert not settings.acts_at(torch.empty(0))


@pytest.mark.parametrize(
    ("settings", "jumps"),
    [
        ((4.0, 0.1, 0.7), (0.1, 0.7)),
        ((4.0, 0.1, 1.0), (0.1,)),
        ((4.0, 0.0, 0.7), (0.7,)),
        ((4.0, 0.5, 0.5), (0.5,)),
        ((0.0, 0.1, 0.7), (0.1, 0.7)),
        ((4.0, 0.0, 1.0), ()),
        ((1.0, 0.1, 0.7), ()),
    ],
)
def test_the_velocity_jumps_where_guidance_sets_in_and_ends(settings, jumps):
    assert jumps_of(GuidanceSettings(*settings)) == jumps


@pytest.mark.parametrize("n", [1, 3])
def test_any_number_of_states_is_guided(n):
    y, null_y = torch.arange(n), torch.full((n,), 10)
    v = GuidedVelocity(Linear(), y, null_y, GuidanceSettings(4.0))(torch.ones(n, 3, 1, 1), at(0.5, n))
    torch.testing.assert_close(v[:, 0, 0, 0], 2 + 4 * (1 + 0.1 * y - 2))  # null + 4 (cond - null)


def test_settings_are_shown_in_one_line():
    assert str(GuidanceSettings(4.0, 0.125, 0.75, 3)) == "4 on 3 channels from 0.125 to 0.75"


def test_scale_zero_is_the_null_model():
    v = guided(Linear(), 0.5, 0.0, guided_channels="all")
    torch.testing.assert_close(v, 2 * X)


@pytest.mark.parametrize("channels", [3, "all"])
def test_a_guide_sees_the_same_labels_as_the_model(channels):
    model, guide = Linear(), Linear(start=0.5, slope=0.2)
    v = guided(model, 0.5, 4.0, guided_channels=channels, guide=guide)
    # labels 3 and 7: the model's gains are 1.3 and 1.7, the guide's 1.1 and 1.9;
    # 1.1 + 4 (1.3 - 1.1) = 1.9 and 1.9 + 4 (1.7 - 1.9) = 1.1
    count = 5 if channels == "all" else channels
    expected = torch.tensor([[1.9] * count + [1.3] * (5 - count), [1.1] * count + [1.7] * (5 - count)])
    torch.testing.assert_close(gains(v), expected)
    assert model.calls == [2] and guide.calls == [2]


@pytest.mark.parametrize(("time", "scale"), [(0.2, 4.0), (0.9, 4.0), (0.5, 1.0)])
def test_a_guide_is_not_called_where_guidance_does_not_act(time, scale):
    model, guide = Linear(), Linear(start=0.5)
    v = guided(model, time, scale, 0.3, 0.8, guide=guide)
    assert torch.equal(v, Linear()(X, at(time), Y))
    assert model.calls == [2] and guide.calls == []


def test_scale_zero_is_the_guide():
    guide = Linear(start=0.5)
    v = guided(Linear(), 0.5, 0.0, guided_channels="all", guide=guide)
    assert torch.equal(v, guide(X, at(0.5), Y))


@pytest.mark.parametrize("scale", [0.0, 0.7, 2.0, 10.0, 1000.0])
@pytest.mark.parametrize("channels", [3, "all"])
def test_a_model_that_guides_itself_is_unguided(scale, channels, unit_model, golden):
    model, x, y = unit_model("default"), golden["cfg.x"][:2], golden["cfg.y"][:2]
    with torch.no_grad():
        settings = GuidanceSettings(scale, guided_channels=channels)
        v = GuidedVelocity(model, y, y, settings, guide=model)(x, at(0.5))
        assert torch.equal(v, model(x, at(0.5), y))


def test_the_two_predictions_and_their_mix_make_the_guided_one():
    settings = GuidanceSettings(4.0, guided_channels=3)
    for guide, weak in ((None, [2.0, 2.0]), (Linear(start=0.5, slope=0.2), [1.1, 1.9])):
        velocity = GuidedVelocity(Linear(), Y, NULL, settings, guide)
        pair = velocity.both(X, at(0.5))
        for prediction, expected in zip(pair, ([1.3, 1.7], weak), strict=True):
            torch.testing.assert_close(gains(prediction), torch.tensor(expected)[:, None].expand(2, 5))
        assert torch.equal(velocity.mix(*pair), velocity(X, at(0.5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_scale": float("nan")}, "cfg_scale=nan is not finite"),
        ({"cfg_scale": float("inf")}, "cfg_scale=inf is not finite"),
        ({"cfg_interval_start": 0.5, "cfg_interval_end": 0.4}, r"interval \[0.5, 0.4\] is invalid"),
        ({"cfg_interval_start": -0.1}, "interval"),
        ({"cfg_interval_end": 1.5}, "interval"),
        ({"cfg_interval_start": 1.2, "cfg_interval_end": 1.5}, "interval"),
        ({"guided_channels": 0}, "guided_channels=0 is out of range"),
        ({"guided_channels": -1}, "guided_channels=-1 is out of range"),
        ({"guided_channels": "some"}, "guided_channels='some' is out of range"),
        ({"guided_channels": 6}, "guided_channels=6 is out of range.* 5 channels"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        guided(Linear(), 0.5, **{"cfg_scale": 2.0, **options})


def test_guided_outputs_equal_the_published_ones(golden, manifest, unit_model):
    model = unit_model("default")
    x, y = golden["cfg.x"][:2], golden["cfg.y"]
    for name, case in manifest["cfg"].items():
        settings = GuidanceSettings(
            case["cfg_scale"], case["cfg_interval_start"] or 0.0, guided_channels=case["guided_channels"]
        )
        with torch.no_grad():
            out = GuidedVelocity(model, y[:2], y[2:], settings)(x, at(case["t"]))
        torch.testing.assert_close(out, golden[f"cfg.{name}"][:2], rtol=0, atol=1e-4)
