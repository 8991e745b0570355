"""Forwards on GPUs that nobody measured here, predicted from an H100 that was: a roofline with three shares.

A forward of N states takes

    N products / (peak x share) + N attention / (peak x share) + (N passes + weights) / bandwidth,

and, without graphs, at least the time in which a host starts its kernels. Shares and passes are those of XL/1 in bf16
at 128 states on that H100; its rows of 2 and 16 states then say how far the prediction is off.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.tools.report import table

from .forward import model_flops, on_meta, products_of, published_settings

MODEL, FITTED, BATCHES = "LightningDiT-XL/1", 128, (2, 16, 128)
HALF_BYTES = 2
FAST_EVALUATIONS, STATES = 25, 2  # of an image by `fast`, guided at each evaluation


@dataclass(frozen=True)
class Card:
    """The peaks in NVIDIA's data sheet of a GPU.

    Attributes:
        tflops: 10^12 operations a second of dense products in half precision with sums in float32. The P100 has no
            Tensor Cores, so it is that of float32 there.
        bandwidth: of its memory, bytes a second.
        flash: whether it has the kernel of attention by that name (capability 8.0); the others take `efficient`.
        compiles: whether Triton serves it (capability 7.0).
    """

    name: str
    tflops: float
    bandwidth: float
    flash: bool
    compiles: bool = True


H100 = Card("H100 SXM", 989, 3.35e12, True)
CARDS = (
    Card("L4", 121, 0.30e12, True),
    Card("V100 PCIe", 112, 0.90e12, False),
    Card("T4", 65, 0.32e12, False),
    Card("P100 PCIe, 16 GB", 9.3, 0.732e12, False, compiles=False),
)


@dataclass(frozen=True)
class Way:
    """A way of computing the forward of XL/1 in bf16, in ms measured on an H100 (torch 2.11) by states.

    Attributes:
        work: the way whose forward at `FITTED` states gives the passes.
        floor: of a forward whose kernels the host starts one by one; 0 if a graph does.
    """

    name: str
    measured: dict[int, float]
    work: float
    floor: float = 0.0
    compiled: bool = False


EAGER, WHOLE = 140.3, 68.5
WAYS = (
    Way("eager", {2: 14.8, 16: 20.4, 128: EAGER}, EAGER, 14.8),
    Way("graphs", {2: 4.8, 16: 19.1}, EAGER),
    Way("compiled", {2: 5.3, 16: 9.4, 128: WHOLE}, WHOLE, 5.3, compiled=True),
    Way("compiled, graphs", {2: 2.35, 16: 9.05, 128: 67.6}, WHOLE, compiled=True),
)
PRODUCTS_MS = 39.4  # of all products at `FITTED` states, alone
ATTENTION_MS = {True: 8.5, False: 13.0}  # of attention alone, by flash and by efficient


@dataclass(frozen=True)
class Work:
    """The work of a state: operations of products and of attention, and bytes of one pass over its tokens in all
    blocks; `weights` are the bytes of the model."""

    products: float
    attention: float
    tokens: float
    weights: float


@functools.cache
def work_of(model_type: str = MODEL) -> Work:
    """Return the work of a preset, by torch's counter of operations."""
    settings = published_settings(model_type)
    model: LightningDiT = on_meta(settings)
    attention = sum(product.flops(model) for product in products_of(settings, 1) if product.name == "attention")
    tokens = settings.depth * settings.side**2 * settings.hidden_size * HALF_BYTES
    weights = HALF_BYTES * sum(value.numel() for value in model.parameters())
    return Work(model_flops(model, 1) - attention, attention, tokens, weights)


def passes_of(way: Way, work: Work) -> float:
    """Return the passes over the tokens of a block that explain what products and attention leave of a forward."""
    rest = (way.work - PRODUCTS_MS - ATTENTION_MS[True]) / 1e3 * H100.bandwidth - work.weights
    return rest / (FITTED * work.tokens)


def shares_of(card: Card, work: Work) -> tuple[float, float]:
    """Return the shares of the peak that products and attention reached on the H100."""
    return tuple(
        FITTED * flops / (milliseconds / 1e3) / (H100.tflops * 1e12)
        for flops, milliseconds in ((work.products, PRODUCTS_MS), (work.attention, ATTENTION_MS[card.flash]))
    )


def forward_ms(card: Card, way: Way, states: int, work: Work) -> float:
    """Return the predicted milliseconds of a forward."""
    products, attention = shares_of(card, work)
    computing = states * (work.products / products + work.attention / attention) / (card.tflops * 1e12)
    moving = (states * passes_of(way, work) * work.tokens + work.weights) / card.bandwidth
    return max(1e3 * (computing + moving), way.floor)


def predicted_table(work: Work) -> list[str]:
    """Return the prediction beside the H100's figures, and the other GPUs."""
    products, attention = shares_of(H100, work)
    passes = ", ".join(
        f"{passes_of(way, work):.0f} {name}" for way, name in ((WAYS[0], "eager"), (WAYS[2], "compiled"))
    )
    check = [
        (
            f"{way.name}, {states} states",
            f"{took:.2f}",
            f"{made:.2f}",
            "fitted" if took in (way.work, way.floor) else f"{made / took - 1:+.0%}",
        )
        for way in WAYS
        for states, took in way.measured.items()
        for made in [forward_ms(H100, way, states, work)]
    ]
    body = [
        (
            f"{card.name}: {way.name}",
            "predicted",
            *(f"{forward_ms(card, way, states, work):,.1f}" for states in BATCHES),
            f"{60e3 * FITTED / STATES / (FAST_EVALUATIONS * forward_ms(card, way, FITTED, work)):,.0f}",
        )
        for card in CARDS
        for way in WAYS
        if way.name in ("eager", "compiled" if card.compiles else "graphs")
    ]
    return [
        f"Shares of the H100's peak at {FITTED} states: products {products:.2f}, attention {attention:.2f}. Passes over"
        f" the tokens of a block: {passes}.",
        "",
        *table(("H100, forward of XL/1 in bf16", "measured, ms", "predicted, ms", "error"), check),
        *table(
            ("forward of XL/1", "", *(f"{states} states, ms" for states in BATCHES), "images a minute by `fast`"), body
        ),
    ]
