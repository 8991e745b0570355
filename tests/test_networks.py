"""Networks by a plan: what a graph could get wrong, with a recorder that behaves as a CUDA graph does."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from LightningDiT.compiling import BLOCK, PLAIN, Plan, is_compiled
from LightningDiT.config import load_config, typed
from LightningDiT.device import Abilities, Precision
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling import networks, pipeline
from LightningDiT.sampling.networks import note_code, padded, plan_of
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from tests.test_pipeline import loud_pipeline

GPU = Abilities("a card", (4, 0), (2, 11), "", "there is no compiler")  # of a capability without a kernel in the table
GRAPHS = Plan(graphs=True, batch=4)


class Replay:
    """Stands for `device.Recording`: runs what it recorded on its own inputs, into one and the same output.

    Weights are read from where they lay during the recording: values that were copied into them show, others do not.
    """

    made: list[weakref.ref[Replay]]
    most: int  # states that the memory holds
    failure: Callable[[], None]  # raises what a recording raises

    def __init__(self, network: torch.nn.Module, inputs: Sequence[Tensor], place: object = None) -> None:
        type(self).failure()
        if len(inputs[0]) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.made.append(weakref.ref(self))
        with torch.inference_mode(False):
            self._network = copy.deepcopy(network)
        self.weights = {name: value.detach() for name, value in network.state_dict().items()}
        self.inputs = [value.clone() for value in inputs]
        self.output = torch.full_like(inputs[0], torch.nan)
        self.busy = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        assert not self.busy
        self.busy = True
        for own, given in zip(self.inputs, inputs, strict=True):
            assert own.shape == given.shape and own.dtype == given.dtype
            own.copy_(given)
        made = torch.func.functional_call(self._network, self.weights, tuple(self.inputs))
        self.output.copy_(made)
        self.busy = False
        return self.output

    @classmethod
    def kept(cls) -> list[Replay]:
        """The recordings that exist."""
        gc.collect()
        return [one for one in (made() for made in cls.made) if one is not None]

    @classmethod
    def shapes(cls) -> list[int]:
        """The states of each recording that exists."""
        return [len(one.inputs[0]) for one in cls.kept()]


@pytest.fixture(autouse=True)
def replays(monkeypatch: pytest.MonkeyPatch) -> type[Replay]:
    monkeypatch.setattr(networks, "Recording", Replay)
    monkeypatch.setattr(networks, "abilities", lambda device: GPU)
    Replay.made, Replay.most, Replay.failure = [], 2**20, staticmethod(lambda: None)
    return Replay


def opened(folder: Path, **change: object) -> LightningDiTPipeline:
    config = load_config(folder / "config.yaml")
    sample = dataclasses.replace(config.sample, per_proc_batch_size=4, **change)
    return LightningDiTPipeline.from_config(dataclasses.replace(config, sample=sample), device="cpu")


@pytest.fixture
def pipe(tiny_source: Path) -> LightningDiTPipeline:
    return opened(tiny_source)


def latents(pipe: LightningDiTPipeline, plan: Plan, labels: Sequence[int] = (0, 1, 2, 1), **call: Any) -> Tensor:
    with pipe.settled(plan, "the test"):
        return pipe(labels, output_type="latent", **call).images


def test_a_run_by_graphs_gives_the_bits_of_one_without(tiny_source: Path) -> None:
    """By a method that keeps predictions; guidance sets in on the way, so there are two shapes, each recorded once."""
    interval = {"cfg_interval_start": 0.3, "cfg_interval_end": 0.7}
    pipe = opened(tiny_source, sampling_method="ab3", num_sampling_steps=6, **interval)
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    for plan in (PLAIN, GRAPHS):
        latents(pipe, plan, callback=lambda step, t, state, to=seen[plan.graphs]: to.append(state))
    assert len(seen[True]) == 5
    assert all(map(torch.equal, seen[True], seen[False]))  # the states that the callback kept, too
    assert sorted(Replay.shapes()) == [4, 8] and len(Replay.made) == 2
    assert plan_of(pipe.solver(pipe.config.sample), pipe.transformer, pipe.precision, 9, 4).graphs


def test_padding_reaches_nothing_but_the_network(tiny_source: Path) -> None:
    """Class 0, that of the padding, is NaN."""
    pipe = opened(tiny_source)
    with pipe.settled(PLAIN, "the test"):
        wanted = pipe([1, 2, 1], seed=3, output_type="np")
    with torch.no_grad():
        pipe.transformer.y_embedder.embedding_table.weight[0] = torch.nan
    counts = []
    with pipe.settled(GRAPHS, "the test"), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = pipe([1, 2, 1], seed=3, output_type="np", callback=lambda step, t, state: counts.append(len(state)))
    assert Replay.shapes() == [8]
    assert np.abs(out.images.astype(int) - wanted.images).max() <= 1
    assert (len(out.images), out.nfe, set(counts)) == (3, wanted.nfe, {3})
    assert pipe.batch_limit.most is None


def test_a_single_picture_is_not_padded(pipe: LightningDiTPipeline) -> None:
    sizes = []
    with pipe.transformer.x_embedder.register_forward_hook(lambda module, inputs, out: sizes.append(len(inputs[0]))):
        latents(pipe, GRAPHS, [1])
    assert set(sizes) == {2} and not Replay.made  # with and without its class
    pipe([1])  # a run of one picture has a plan for just that
    assert Replay.shapes() == [2]


def changed(pipe: LightningDiTPipeline) -> dict[str, Tensor]:
    return {
        name: value if "pos_embed" in name or "freqs" in name else 1.1 * value
        for name, value in pipe.transformer.state_dict().items()
    }


def swap_data(pipe: LightningDiTPipeline) -> None:
    for name, value in pipe.transformer.named_parameters():
        value.data = changed(pipe)[name].clone()


def swap_block(pipe: LightningDiTPipeline) -> None:
    pipe.transformer.blocks[1] = copy.deepcopy(pipe.transformer.blocks[2])


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (lambda pipe: pipe.transformer.load_state_dict(changed(pipe)), True),  # the graph reads the new values
        (lambda pipe: pipe.transformer.load_state_dict(changed(pipe), assign=True), False),
        (lambda pipe: pipe.transformer.to(torch.bfloat16), False),
        (lambda pipe: pipe.to("cpu", torch.float16), False),
        (swap_data, False),
        (swap_block, False),
    ],
)
def test_a_graph_never_computes_with_old_weights(
    change: Callable[[LightningDiTPipeline], None], stays: bool, tiny_source: Path
) -> None:
    pipe = opened(tiny_source)
    before = latents(pipe, GRAPHS)
    first = Replay.kept()
    change(pipe)
    wanted = latents(opened_like(pipe, tiny_source), PLAIN)
    assert (wanted - before).abs().max() > 1e-4
    assert torch.equal(latents(pipe, GRAPHS), wanted)
    assert (Replay.kept() == first) is stays


def opened_like(pipe: LightningDiTPipeline, folder: Path) -> LightningDiTPipeline:
    """Another pipeline with the same weights."""
    other = opened(folder)
    other.transformer = copy.deepcopy(pipe.transformer)
    return other.to("cpu")


def test_weights_that_a_callback_replaces_count_from_the_next_step(tiny_source: Path) -> None:
    """Old weights in the first step and new ones in the two others, in both ways."""
    results = []
    for plan in (PLAIN, GRAPHS):
        pipe = opened(tiny_source)

        def replace(step: int, t: float, state: Tensor, pipe: LightningDiTPipeline = pipe) -> None:
            if step == 0:
                with torch.inference_mode(False):
                    pipe.transformer.load_state_dict(changed(pipe), assign=True)

        results.append(latents(pipe, plan, callback=replace))
    assert torch.equal(*results)


def test_a_repeat_in_float32_and_the_search_for_the_layer_use_no_graph(tiny_source: Path) -> None:
    loud = loud_pipeline(tiny_source, 2e4, torch.float16)
    with pytest.warns(UserWarning, match="first the input of blocks"):
        wanted = latents(loud, PLAIN, [0, 1], batch_size=2)
    loud = loud_pipeline(tiny_source, 2e4, torch.float16)
    kinds, make = [], Replay.__init__

    def noted(self: Replay, network: torch.nn.Module, *arguments: object) -> None:
        kinds.append(network.pos_embed.dtype)
        make(self, network, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replay, "__init__", noted)
        with pytest.warns(UserWarning, match="first the input of blocks"):
            assert torch.equal(latents(loud, Plan(graphs=True, batch=2), [0, 1], batch_size=2), wanted)
        latents(loud, Plan(graphs=True, batch=2), [1, 1], batch_size=2)
    assert kinds == [torch.float16] * 2  # the weights lie elsewhere after the repeat


def test_an_adaptive_solver_uses_no_graph(tiny_source: Path) -> None:
    pipe = opened(tiny_source, sampling_method="dopri5", rtol=0.1, atol=0.1)
    pipe([0, 1])
    latents(pipe, Plan(graphs=True, batch=1), [0, 1])  # as no run chooses
    assert not Replay.made


@pytest.mark.parametrize("hidden", [False, True])
def test_memory_that_ends_in_a_recording_halves_the_batch_and_frees_all(
    hidden: bool, pipe: LightningDiTPipeline
) -> None:
    """The second shape, that of four guided images, is too large; torch may hide the reason behind another error."""
    wanted = latents(pipe, PLAIN, [0, 1, 2, 1, 0])
    Replay.most = 4

    class Hiding(Replay):
        def __init__(self, network: torch.nn.Module, inputs: Sequence[Tensor], place: object = None) -> None:
            try:
                super().__init__(network, inputs)
            except RuntimeError:
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    with pytest.MonkeyPatch.context() as patch:
        if hidden:
            patch.setattr(networks, "Recording", Hiding)
        with pytest.warns(UserWarning, match="memory ran out with 4 images at once; going on with 2") as warned:
            made = latents(pipe, GRAPHS, [0, 1, 2, 1, 0])
    assert len(warned) == 1 and pipe.batch_limit.most == 2
    assert Replay.shapes() == [4]
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)


def test_memory_that_ends_frees_the_recordings(pipe: LightningDiTPipeline) -> None:
    latents(pipe, GRAPHS)
    assert Replay.shapes() == [8]

    def full(step: int, t: float, state: Tensor) -> None:
        if len(state) == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning, match="going on with 2"):
        latents(pipe, GRAPHS, callback=full)
    assert Replay.shapes() == [4]


def test_what_cannot_be_recorded_is_computed_as_it_is(pipe: LightningDiTPipeline) -> None:
    wanted, tried = latents(pipe, PLAIN), []

    def fail() -> None:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    Replay.failure = staticmethod(fail)
    with pytest.warns(UserWarning) as warned:
        made = [latents(pipe, GRAPHS) for _ in range(2)]
    assert [str(one.message) for one in warned] == [
        "graphs do not work here (operation not permitted when stream is capturing); going on without them"
    ]
    assert len(tried) == 1 and all(torch.equal(one, wanted) for one in made)


def test_hooks_are_called_and_training_drops_no_label(pipe: LightningDiTPipeline) -> None:
    wanted = latents(pipe, GRAPHS)
    called = []
    with pipe.transformer.blocks[2].register_forward_hook(lambda *inputs: called.append(1)):
        latents(pipe, GRAPHS)
    assert len(called) == 3
    pipe.transformer.train()
    pipe.transformer.y_embedder.dropout = 1.0
    assert all(torch.equal(latents(pipe, plan), wanted) for plan in (GRAPHS, PLAIN))
    assert pipe.transformer.y_embedder.training


def test_the_guide_has_graphs_of_its_own(tiny_source: Path) -> None:
    pipe = opened(tiny_source)
    guided = LightningDiTPipeline(
        pipe.transformer,
        pipe.tokenizer,
        pipe.transport,
        dataclasses.replace(pipe.config, sample=dataclasses.replace(pipe.config.sample, guide_ckpt="weaker")),
        pipe.device,
        pipe.dtype,
        opened_like(pipe, tiny_source).transformer,
    )
    with torch.no_grad():
        guided.guide.final_layer.linear.weight *= 0.9
    wanted = latents(guided, PLAIN)
    assert torch.equal(latents(guided, GRAPHS), wanted)
    assert Replay.shapes() == [4, 4]


def test_a_callback_may_sample_with_the_same_networks(pipe: LightningDiTPipeline) -> None:
    """The call within replays the graph of the call around it, which goes on with its own values."""
    other = pipe.with_sample(dataclasses.replace(pipe.config.sample, cfg_scale=3.0))
    wanted, inner = latents(pipe, PLAIN), []
    within = latents(other, PLAIN, LABELS[::-1])

    def sample(step: int, t: float, state: Tensor) -> None:
        inner.append(latents(other, GRAPHS, LABELS[::-1]))

    assert torch.equal(latents(pipe, GRAPHS, callback=sample), wanted)
    assert len(inner) == 3 and all(torch.equal(one, within) for one in inner)
    assert len(Replay.made) == 1


def test_recordings_of_many_shapes_do_not_pile_up(pipe: LightningDiTPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "MOST_RECORDINGS", 2)
    for count in (2, 3, 4, 3):
        pipe([1] * count, num_inference_steps=2, output_type="latent")
    assert Replay.shapes() == [6, 8] and len(Replay.made) == 3


def test_two_threads_take_turns(pipe: LightningDiTPipeline) -> None:
    """Both share the networks; one that entered a replay of the other would mix their inputs."""
    other = pipe.with_sample(dataclasses.replace(pipe.config.sample, cfg_scale=3.0))
    wanted = [latents(one, PLAIN) for one in (pipe, other)]
    made: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(index: int) -> None:
        for _ in range(3):
            one = (pipe, other)[index]
            made[index].append(one(LABELS, output_type="latent", callback=lambda *state: time.sleep(0.001)).images)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(made[index]) == 3 and all(torch.equal(wanted[index], one) for one in made[index]) for index in made)


LABELS = (0, 1, 2, 1)

# --- deterministic


@pytest.fixture
def fixed(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LightningDiTPipeline]:
    monkeypatch.undo()  # the CPU's own abilities
    return opened(tiny_source, deterministic=True, cfg_interval_end=0.4)


def test_a_deterministic_image_has_the_same_bits_in_every_row_of_every_batch(fixed: LightningDiTPipeline) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        fixed.to("cpu", dtype)
        whole = fixed([0, 1, 2, 1], seed=5, output_type="np").images
        for indices in ([3], [2, 3], [3, 1, 0], [2, 0, 3, 1]):
            labels = [(0, 1, 2, 1)[index] for index in indices]
            assert np.array_equal(fixed(labels, seed=5, indices=indices, output_type="np").images, whole[indices])
    plan = fixed.plan(3, 4)
    assert (plan.deterministic, plan.batch, plan.graphs) == (True, 4, False)


def test_a_repeat_of_a_deterministic_image_has_the_same_bits_too(tiny_source: Path) -> None:
    with torch.inference_mode(False):
        loud = loud_pipeline(tiny_source, 2e4, torch.float16)
    loud.config = dataclasses.replace(
        loud.config, sample=dataclasses.replace(loud.config.sample, deterministic=True, per_proc_batch_size=3)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the batch is made again
        whole = loud([0, 1, 0], seed=1, output_type="np").images
        for indices in ([2], [1, 0]):
            again = loud([(0, 1, 0)[index] for index in indices], seed=1, indices=indices, output_type="np").images
            assert np.array_equal(again, whole[indices])


def test_a_deterministic_run_keeps_its_shape_or_ends(fixed: LightningDiTPipeline) -> None:
    def full(step: int, t: float, state: Tensor) -> None:
        raise MemoryError("no memory")

    with pytest.raises(LightningDiTError, match=r"does not hold 4 images at once, which --deterministic .*\(no memory"):
        fixed([0, 1], callback=full)


# --- compiled code


def test_compiled_code_runs_where_the_plan_says_so(
    pipe: LightningDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile is replaced by a count of its calls; the code is noted when a batch is done."""
    asked = []

    def counted(plain: Callable[..., Tensor], dynamic: bool) -> Callable[..., Tensor]:
        def run(*inputs: Any) -> Tensor:
            asked.append(len(inputs[1]))
            return plain(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(networks, "abilities", lambda device: dataclasses.replace(GPU, no_compiler=""))
    wanted, depth = latents(pipe, PLAIN), len(pipe.transformer.blocks)
    assert pipe.plan(40, 4).compiled == ""
    plan = Plan(compiled=BLOCK, batch=4)
    assert torch.equal(latents(pipe, plan), wanted)
    assert asked == [8] * 3 * depth and is_compiled(*pipe.transformer.blocks)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert pipe.plan(40, 4).compiled == BLOCK and pipe.plan(40, 5).compiled == ""
    latents(pipe, PLAIN)
    latents(pipe, plan, [1])  # a single picture would need a shape of its own
    assert len(asked) == 3 * depth
    for block in pipe.transformer.blocks:
        del block.forward
    note_code(dataclasses.replace(plan, batch=3), pipe.solver(pipe.config.sample), pipe.transformer)
    assert len(list(tmp_path.iterdir())) == 1  # nothing is noted of code that failed


def test_a_kernel_that_does_not_work_here_is_not_chosen(
    pipe: LightningDiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An H100 takes the next one of the table; a run that has begun with the first ends with the reason."""
    monkeypatch.setattr(networks, "abilities", lambda device: dataclasses.replace(GPU, capability=(9, 0)))
    asked = []

    def failure(kernel: str, *shape: Any) -> str | None:
        asked.append((kernel, *shape))
        return "no engine" if kernel == "cudnn" else None

    monkeypatch.setattr(networks, "attention_failure", failure)
    pipe.to("cpu", torch.bfloat16)
    assert pipe.plan(9, 4).attention == "flash"
    assert ("cudnn", 3, 16, 64, torch.bfloat16, torch.device("cpu")) in asked
    message = r"the test computes attention by cudnn, which does not work here \(no engine\); fix: choose another"
    with pytest.raises(LightningDiTError, match=message), pipe.settled(Plan(attention="cudnn"), "the test"):
        pass


def test_zeros_fill_what_is_missing() -> None:
    values = torch.arange(6.0).view(3, 2)
    assert torch.equal(padded(values, 5), torch.tensor([[0.0, 1], [2, 3], [4, 5], [0, 0], [0, 0]]))
    assert padded(values, 3) is values


def test_a_plan_says_how_the_decoder_computes(
    pipe: LightningDiTPipeline, monkeypatch: pytest.MonkeyPatch, tiny_source: Path
) -> None:
    """Compiled is the fp16 decoder alone; its batches are filled up, and a single picture is not."""
    compiled, asked, plain = [], [], pipe.tokenizer.decode
    monkeypatch.setattr(networks, "compile_forward", lambda *modules: compiled.extend(modules))
    monkeypatch.setattr(networks, "abilities", lambda device: dataclasses.replace(GPU, no_compiler=""))
    monkeypatch.setattr(pipe.tokenizer, "decode", lambda x, half, tf32: asked.append((len(x), half, tf32)) or plain(x))
    for plan in (
        Plan(compiled="whole", batch=4, half_decoder=True),
        Plan(compiled="whole", batch=4),
        Plan(batch=4, half_decoder=True),
    ):
        with pipe.settled(plan, "the test"):
            images = pipe([0, 1, 2, 1, 0, 1, 2], output_type="np").images
            assert len(images) == 7
            pipe([0], output_type="np")
    assert compiled == [pipe.transformer, pipe.tokenizer.model.decoder]
    assert asked == [
        *[(4, True, False)] * 2,
        (1, True, False),
        *[(4, False, False), (3, False, False), (1, False, False)],
        *[(4, True, False), (3, True, False), (1, True, False)],
    ]


def test_the_plan_has_what_the_precision_says(pipe: LightningDiTPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    within, plain = [], networks.float32_products
    monkeypatch.setattr(
        networks, "float32_products", lambda device, tf32: within.append((device, tf32)) or plain(device, tf32)
    )
    for precision in (Precision(torch.float32, tf32=True), Precision(torch.float16, half_decoder=True)):
        plan = plan_of(pipe.solver(pipe.config.sample), pipe.transformer, precision, 9, 4)
        assert (plan.tf32, plan.half_decoder) == (precision.tf32, precision.half_decoder)
        kept = [plan.plainly(), plan.of_batch(1, 4)]
        assert kept == [Plan(tf32=precision.tf32, half_decoder=precision.half_decoder)] * 2
        assert typed(Plan, {"graphs": True, "batch": 4}, "a manifest of an earlier release") == GRAPHS
    latents(pipe, PLAIN)
    assert set(within) == {(torch.device("cpu"), False)}


@pytest.mark.parametrize(
    ("dtype", "free", "processes", "batch"),
    [
        (torch.float16, 10_000_000_000, 1, 256),
        (torch.float16, 100_000_000, 1, 62),
        (torch.float16, 100_000_000, 2, 31),  # of one GPU
        (torch.float32, 100_000_000, 1, 46),
        (torch.float16, 100, 1, 1),
    ],
)
def test_the_batch_follows_from_the_memory_of_a_gpu(
    dtype: torch.dtype,
    free: int,
    processes: int,
    batch: int,
    pipe: LightningDiTPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """85 % of it, by 2.5 times the 2 rows of 64 tokens x (19 x 48 + 4 x 128) values of 3 or 4 bytes of a step."""
    monkeypatch.setattr(pipeline, "gpu_free_bytes", lambda device: free)
    monkeypatch.setattr(pipeline, "gpu_count", lambda: 1)
    unnamed = dataclasses.replace(pipe.config.sample, per_proc_batch_size=None)
    pipe.to("cpu", dtype)
    assert not pipe.batch_follows_memory(unnamed) and pipe.batch_size(unnamed, processes) == 4
    pipe.device = torch.device("meta")  # some device that is no CPU
    assert pipe.batch_size(dataclasses.replace(unnamed, deterministic=True)) == 4
    assert pipe.batch_size(dataclasses.replace(unnamed, per_proc_batch_size=7)) == 7
    assert pipe.batch_follows_memory(unnamed)
    found = pipe.batch_size(unnamed, processes)
    assert pipe.batch_size(unnamed) == found == batch  # asked once, since recordings then take memory
