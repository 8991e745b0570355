"""Scales that match: corrections whose size is known, and the small pipeline."""

import dataclasses
import math

import pytest
import torch

from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tools.match_guidance import channel_energies, main, match, matched_scale
from LightningDiT.transport import GuidanceSettings, GuidedVelocity, create_transport, sampling_times


def test_channels_that_are_alike_follow_the_square_root():
    assert float(matched_scale(torch.full((32,), 0.7), 10.0, 3)) == pytest.approx(1 + 9 * math.sqrt(3 / 32))
    assert float(matched_scale(torch.full((32,), 0.7), 0.0, 8)) == pytest.approx(0.5)


def test_the_ends_are_all_of_the_scale_and_no_guidance():
    first, last = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 3.0, 4.0])
    torch.testing.assert_close(matched_scale(torch.stack([first, last]), 7.0, 2), torch.tensor([7.0, 1.0]))


def test_the_two_corrections_have_one_root_mean_square():
    strengths = torch.arange(1.0, 7.0)[None, :, None, None]
    strong, weak = strengths * torch.randn(2, 50, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    scale = float(matched_scale((strong - weak).square().mean((0, 2, 3)), 5.0, 2))

    def correction(scale, channels):
        settings = GuidanceSettings(scale, guided_channels=channels)
        guided = GuidedVelocity(lambda x, t, y: x, torch.zeros(50), torch.zeros(50), settings)
        return float((guided.mix(strong, weak) - strong).square().mean().sqrt())

    assert correction(scale, "all") == pytest.approx(correction(5.0, 2), rel=1e-5)
    assert 1 < scale < 5


class Known:
    """v = x + label t a_c, so that two labels differ by known numbers at every time and state."""

    def __init__(self, strengths):
        self.strengths, self.calls = torch.tensor(strengths)[None, :, None, None], []

    def __call__(self, x, t, y):
        self.calls.append(len(x))
        return x + (y * t)[:, None, None, None] * self.strengths


def energies_of(model, points, guide=None, start=0.3):
    y, null = torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3)
    guided = GuidedVelocity(model, y, null, GuidanceSettings(3.0, start, guided_channels=1), guide)
    transport, noise = create_transport(), torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    return channel_energies(guided, transport, noise, sampling_times(transport, points))


def test_energies_of_a_known_correction():
    model = Known([3.0, 0.5])
    times, energies = energies_of(model, 9)
    # 0.25 moves onto the start of guidance
    torch.testing.assert_close(times, torch.tensor([0.3, 0.375, 0.5, 0.625, 0.75, 0.875]))
    labels = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    expected = (times[:, None, None] * labels[None, :, None] * torch.tensor([3.0, 0.5])) ** 2
    torch.testing.assert_close(energies, expected.double(), rtol=1e-5, atol=1e-6)
    assert model.calls == [3] * 2 + [6] * 6  # one evaluation a step
    assert float(matched_scale(energies.mean((0, 1)), 3.0, 1)) == pytest.approx(1 + 2 * math.sqrt(9 / 9.25), rel=1e-5)


def test_energies_under_a_guide_are_those_between_the_networks():
    model, guide = Known([3.0, 0.5]), Known([1.0, 1.5])
    times, energies = energies_of(model, 9, guide)
    labels = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    expected = (times[:, None, None] * labels[None, :, None] * torch.tensor([2.0, -1.0])) ** 2
    torch.testing.assert_close(energies, expected.double(), rtol=1e-5, atol=1e-6)
    assert guide.calls == [3] * 6


@pytest.fixture
def pipe(tiny_folder):
    return LightningDiTPipeline.from_pretrained(tiny_folder, device="cpu")


def test_a_match_of_the_small_pipeline(pipe):
    """Against the differences of the network itself along Euler's path, which is near to the one that is followed."""
    sample = dataclasses.replace(pipe.config.sample, cfg_scale=4.0, guided_channels=1, per_proc_batch_size=3)
    found = match(pipe, sample, 6, 17, 0)
    assert (found.by_noise.shape, found.by_time.shape) == ((6,), (16,))
    assert found.if_alike == pytest.approx(2.5)
    for values in (found.by_noise, found.by_time):
        assert values.min() < found.matched < values.max()
    other_batches = match(pipe, dataclasses.replace(sample, per_proc_batch_size=4), 6, 17, 0)
    assert other_batches.matched == pytest.approx(found.matched, rel=1e-4)
    x = torch.randn(12, *pipe.latent_shape, generator=torch.Generator().manual_seed(1))
    y, null = torch.arange(12) % 3, torch.full((12,), 3)
    squares = torch.zeros(4)
    with torch.no_grad():
        for step in range(16):
            t = torch.full((12,), step / 16)
            strong, weak = pipe.transformer(x, t, y), pipe.transformer(x, t, null)
            squares += (strong - weak).square().mean((0, 2, 3))
            strong[:, :1] = weak[:, :1] + 4.0 * (strong[:, :1] - weak[:, :1])
            x = x + strong / 16
    assert found.matched == pytest.approx(1 + 3 * math.sqrt(float(squares[0] / squares.sum())), rel=0.05)


def test_the_command_prints_what_to_set(tiny_folder, capsys):
    config = tiny_folder / "config.yaml"
    argv = ["--config", str(config), "--guidance-scale", "4", "--channels", "1", "--noises", "3", "--points", "5"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "scale 4 on the first 1 of 4 channels is matched by " in shown
    assert "if all channels were alike: 2.50" in shown
    scale = float(shown.split("cfg_scale: ")[1].split()[0])
    settings = shown[shown.index("sample:") :]
    text = config.read_text()
    config.write_text(text[: text.index("sample:")] + settings)
    sample = load_config(config).sample
    assert (sample.cfg_scale, sample.guided_channels) == (scale, "all") and 1 < scale < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance-scale", "1", "--channels", "1"], "the guidance scale is 1, which is no guidance; fix: give"),
        (["--guidance-scale", "nan", "--channels", "1"], "--guidance-scale is nan; a scale from 0 to below 10000"),
        (["--channels", "4"], "guided channels are 4 of 4; 1 to 3 are expected"),
        ([], "guided channels are all of 4; 1 to 3 are expected"),
    ],
)
def test_what_cannot_be_matched_is_one_line(options, message, tiny_folder, capsys):
    assert run_main(lambda: main(["--config", str(tiny_folder / "config.yaml"), *options])) == 1
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_guidance_that_never_acts_or_changes_nothing_is_named(pipe):
    sample = dataclasses.replace(pipe.config.sample, guided_channels=1)
    never = dataclasses.replace(sample, cfg_interval_start=1.0, cfg_interval_end=1.0)
    with pytest.raises(LightningDiTError, match=r"from t = 1 to 1 changes nothing at the 3 times"):
        match(pipe, never, 2, 3, 0)
    pipe.guide = pipe.transformer
    with pytest.raises(LightningDiTError, match="changes nothing"):
        match(pipe, sample, 2, 5, 0)


@pytest.mark.parametrize("options", [["--noises", "0"], ["--points", "2"], ["--seed", "-1"], ["--channels", "0"]])
def test_bad_options_are_refused(options, tiny_folder, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(tiny_folder / "config.yaml"), *options])
    assert caught.value.code == 2 and capsys.readouterr().err
