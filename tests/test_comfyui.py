"""The nodes for ComfyUI, run by a small executor of its protocol: types, limits, links, and one call a node."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.views import views
from tests.conftest import BUNDLED, PROJECT

FOLDER = PROJECT / "integrations" / "comfyui"
TYPES = {"STRING": str, "INT": int, "FLOAT": float}


class Saved:
    """ComfyUI's SaveImage: pixels are cut off, not rounded."""

    FUNCTION, RETURN_TYPES = "save", ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "x"})}}

    def save(self, images: torch.Tensor, filename_prefix: str) -> tuple[list[np.ndarray]]:
        return ([np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8) for image in images],)


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """The package as ComfyUI imports it: from its folder, under a name of its own."""
    spec = importlib.util.spec_from_file_location("comfyui_lightningdit", FOLDER / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def execute(prompt: dict[str, Any], classes: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Run a workflow in the API's format and return what each node gave."""
    results: dict[str, tuple[Any, ...]] = {}

    def value_of(given: Any, kind: str, limits: dict[str, Any]) -> Any:
        if isinstance(given, list):
            source, slot = given
            run(source)
            assert classes[prompt[source]["class_type"]].RETURN_TYPES[slot] == kind
            return results[source][slot]
        assert isinstance(given, TYPES[kind])
        assert limits.get("min", given) <= given <= limits.get("max", given)
        return given

    def run(name: str) -> None:
        if name in results:
            return
        node, given = classes[prompt[name]["class_type"]], prompt[name]["inputs"]
        inputs = node.INPUT_TYPES()
        known = inputs["required"] | inputs.get("optional", {})
        assert inputs["required"].keys() <= given.keys() <= known.keys()
        values = {key: value_of(value, known[key][0], {**dict(*known[key][1:])}) for key, value in given.items()}
        results[name] = getattr(node(), node.FUNCTION)(**values)

    for name in prompt:
        run(name)
    return results


def test_the_workflow_saves_the_pixels_of_the_pipeline(nodes: ModuleType) -> None:
    prompt = json.loads((FOLDER / "workflow_api.json").read_text())
    results = execute(prompt, {**nodes.NODE_CLASS_MAPPINGS, "SaveImage": Saved})
    pipe = LightningDiTPipeline.from_config(BUNDLED / "config.yaml")
    wanted = pipe(["Bag", "Coat"], seed=7, output_type="np").images
    assert np.array_equal(np.stack(results["4"][0]), wanted) and wanted.std() > 10
    assert results["2"][0]["samples"].shape == (2, 6, 8, 8)
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys()


def test_options_reach_the_sampler(nodes: ModuleType, tiny_folder: Path) -> None:
    """Steps are evaluations, so one point more; a guidance of 0 or more replaces the configuration's."""
    loader, sampler, decoder = (node() for node in nodes.NODE_CLASS_MAPPINGS.values())
    (pipe,) = loader.load(str(tiny_folder / "config.yaml"))
    (latents,) = sampler.sample(pipe, "2\n\n dog \n", 3, 5, 3.5, 4)
    options = {"guidance_scale": 3.5, "num_inference_steps": 5, "seed": 5, "output_type": "latent"}
    assert latents["samples"].equal(pipe([2, "dog", 2], **options).images)
    (images,) = decoder.decode(pipe, latents)
    assert images.shape == (3, 16, 16, 3) and images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
    (again,) = loader.load(str(tiny_folder))
    assert again.latent_shape == pipe.latent_shape


def test_levels_are_shown_in_their_colour_map(nodes: ModuleType) -> None:
    levels = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    tokenizer = SimpleNamespace(decode=lambda latents: levels.expand(len(latents), 1, 4, 4))
    pipe = SimpleNamespace(tokenizer=tokenizer, device="cpu", latent_shape=(2, 1, 1))
    (images,) = nodes.NODE_CLASS_MAPPINGS["LightningDiTDecode"]().decode(pipe, {"samples": torch.zeros(2, 2, 1, 1)})
    wanted = np.asarray(views(levels)[0])
    assert np.array_equal((images[1] * 255).numpy(), wanted.astype(np.float32)) and np.ptp(wanted, axis=-1).max() > 100


def test_wrong_inputs_are_one_line(nodes: ModuleType, tiny_folder: Path) -> None:
    loader, sampler, decoder = (node() for node in nodes.NODE_CLASS_MAPPINGS.values())
    (pipe,) = loader.load(str(tiny_folder / "config.yaml"))
    with pytest.raises(ValueError, match="classes is empty"):
        sampler.sample(pipe, " \n", 1, 0, -1.0, 0)
    with pytest.raises(LightningDiTError, match="bird"):
        sampler.sample(pipe, "bird", 1, 0, -1.0, 0)
    with pytest.raises(LightningDiTError, match="conditions are given, and the model has none"):
        sampler.sample(pipe, "dog", 1, 0, -1.0, 0, "night")
    with pytest.raises(ValueError, match=r"latents have the shape \[4, 9, 9\]; \[4, 8, 8\] is expected"):
        decoder.decode(pipe, {"samples": torch.zeros(1, 4, 9, 9)})
    with pytest.raises(LightningDiTError):
        loader.load(str(tiny_folder / "missing.yaml"))


def test_progress_and_stop_are_comfyuis(nodes: ModuleType, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    class StoppedError(Exception):
        pass

    def throw() -> None:
        if len(seen) == 2:
            raise StoppedError

    bar = SimpleNamespace(update_absolute=lambda value, total: seen.append((value, total)))
    management = SimpleNamespace(throw_exception_if_processing_interrupted=throw)
    monkeypatch.setitem(sys.modules, "comfy", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    monkeypatch.setitem(sys.modules, "comfy.utils", SimpleNamespace(ProgressBar=lambda total: bar))
    pipe = LightningDiTPipeline.from_config(tiny_folder / "config.yaml", "cpu")
    sampler = nodes.NODE_CLASS_MAPPINGS["LightningDiTSampler"]()
    with pytest.raises(StoppedError):
        sampler.sample(pipe, "dog", 1, 0, -1.0, 0)
    assert seen == [(1, 3), (2, 3)]  # of four points
