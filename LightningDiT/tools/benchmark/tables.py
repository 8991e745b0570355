"""The figures as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from LightningDiT.tools.report import table

from .demo import DEMO
from .forward import summary
from .machine import machine_line
from .predict import predicted_table
from .rounds import Result
from .rows import Row

MEGA, GIGA = 1e6, 1e9


def notes(skipped: Sequence[str]) -> list[str]:
    """Return a line that names the skipped cases and the reasons."""
    return [f"Left out: {'; '.join(skipped)}.", ""] if skipped else []


def rates(product: Result, triad: Result) -> str:
    """Return the rates of the two references."""
    return (
        f"{product.name.capitalize()}: {product.gflops:,.0f} GFLOP/s. Triad a = b + 2 c of"
        f" {triad.moved / 12 * 4 / 2**20:.0f} MiB arrays, two reads and one write counted: {triad.gbytes:,.1f} GB/s."
    )


def product_table(results: Sequence[Result]) -> list[str]:
    """Return seconds and rates of the cases after the product and the triad that were timed beside them."""
    head = ("what", "seconds", "seconds an image", "GFLOP", "GFLOP/s", "share of the product's rate")
    product, triad, *cases = results
    body = [
        (
            case.name,
            f"{case.seconds:.3f}",
            f"{case.seconds / case.units:.3f}",
            f"{case.flops / GIGA:,.1f}",
            f"{case.gflops:,.0f}",
            f"{case.product_share:.2f}",
        )
        for case in cases
    ]
    return [rates(product, triad), "", *table(head, body)]


def forward_table(part: dict[str, Any]) -> list[str]:
    """Return the forwards of every model."""
    return [line for group in part["groups"] for line in product_table(group)] + notes(part["skipped"])


def profile_table(part: dict[str, Any]) -> list[str]:
    """Return the parts of one forward."""
    forward, triad, found = part["forward"], part["triad"], summary(part)
    head = ("part of the forward", "ms", "share of the forward", "GFLOP/s", "share of the product's rate")

    def row(name: str, seconds: float, gflops: str = "", share: str = "") -> tuple[str, ...]:
        return name, f"{1e3 * seconds:.1f}", f"{seconds / forward.seconds:.1%}", gflops, share

    alone = sorted(part["alone"], key=lambda result: -result.seconds)
    body = [row(one.name, one.seconds, f"{one.gflops:,.0f}", f"{one.product_share:.2f}") for one in alone]
    bound = f"{forward.flops / found['alone'] / GIGA:,.0f}", f"{found['bound']:.2f}"
    body += [
        row("all of these by themselves: a bound on the share", found["alone"], *bound),
        row("everything else", found["rest"]),
        row(forward.name, forward.seconds, f"{forward.gflops:,.0f}", f"{forward.product_share:.2f}"),
    ]
    small = part["small_triad"]
    lines = [
        rates(part["product"], triad),
        "",
        *table(head, body),
        f"Everything else moves at least {part['moved'] / MEGA:,.0f} MB: {1e3 * found['in_memory']:.1f} ms at the"
        f" triad's rate in memory, {1e3 * found['in_cache']:.1f} ms at that of a {small.name},"
        f" {small.gbytes:,.1f} GB/s. The weights, {part['weights'] / MEGA:,.0f} MB, take"
        f" {1e3 * part['weights'] / GIGA / triad.gbytes:.1f} ms to be read from memory.",
        "",
        "By torch.profiler, over the same forward:",
        "",
    ]
    kinds = sorted(part["kinds"].items(), key=lambda pair: -pair[1])
    return lines + table(("kind of operator", "share"), [(kind, f"{share:.1%}") for kind, share in kinds])


def _megabytes(value: int | None) -> str:
    return "not known here" if value is None else f"{value / MEGA:,.0f}"


def load_table(part: dict[str, Any]) -> list[str]:
    """Return seconds and peaks of loading."""
    on_gpu = any(row["gpu_peak"] is not None for row in part["loaded"])
    head = ("float32 file of", "MB", "seconds", "resident before, MB", "resident at the peak, MB")
    body = [
        (
            row["model_type"],
            _megabytes(row["file"]),
            f"{row['seconds']:.2f}",
            _megabytes(row["before"]),
            _megabytes(row["peak"]),
            *([_megabytes(row["gpu_peak"])] if on_gpu else []),
        )
        for row in part["loaded"]
    ]
    return table((*head, "on the GPU at the peak, MB") if on_gpu else head, body) + notes(part["skipped"])


def image_table(part: dict[str, Any]) -> list[str]:
    """Return images a minute of the two procedures and their ratio."""
    slow = part["results"][0]
    head = ("bundled model, noise to pixels", "images", "seconds", "images a minute", "times faster")
    body = [
        (
            one.name,
            str(one.units),
            f"{one.seconds:.2f}",
            f"{60 * one.units / one.seconds:,.0f}",
            f"{slow.seconds / slow.units * one.units / one.seconds:.1f}",
        )
        for one in part["results"]
    ]
    return table(head, body)


def growth_table(part: dict[str, Any]) -> list[str]:
    """Return seconds against the size of batch, evaluations or images, and seconds a unit."""
    head = ("bundled model, what grows", "size", "seconds", "ms a unit")
    body = [
        (what, str(one.units), f"{one.seconds:.3f}", f"{1e3 * one.seconds / one.units:.2f}")
        for what, results in part.items()
        for one in results
    ]
    return table(head, body)


def demo_table(part: dict[str, Any]) -> list[str]:
    """Return the seconds of the demonstration."""
    if part["seconds"] is None:
        return notes(part["skipped"])
    named = (("first_step", "start to first sampling step"), ("picture", "start to pictures"))
    return table((DEMO.name, "seconds"), [(title, f"{part['seconds'][key]:.1f}") for key, title in named])


def training_table(part: dict[str, Any]) -> list[str]:
    """Return the steps of all loops, the shares of waiting, and the shares of an extraction's seconds."""
    steps = [
        (f"{one.case}: {step.loop}", f"{step.seconds:.3f}", f"{one.batch / step.seconds:.2f}", f"{step.ratio:.2f}")
        for one in part["comparisons"]
        for step in one.steps
    ]
    largest = max((one.loss_difference for one in part["comparisons"]), default=0.0)
    waiting = [(one.case, str(one.steps), f"{one.seconds:.3f}", f"{one.share:.2%}") for one in part["waiting"]]
    spent = ("encoder", "waiting for images", "writing")
    extractions = [
        (one.case, str(one.images), f"{one.images / one.seconds:.1f}", *(f"{one.shares[name]:.1%}" for name in spent))
        for one in part["extractions"]
    ]
    return [
        *table(("a training step", "seconds", "images a second", "seconds over ours"), steps),
        f"The first losses of both loops differ by {largest:.0e} of their value at most.",
        "",
        *table(("training", "steps", "seconds a step", "share waiting for data"), waiting),
        *table(("extraction", "images", "images a second", *spent), extractions),
        *notes(part["skipped"]),
    ]


def row_table(part: dict[str, Any]) -> list[str]:
    """Return the measurements of a GPU."""
    head = (
        "what",
        "at once",
        "ms",
        "ms each",
        "each a minute",
        "product's rate",
        "first run, s",
        "GB",
        "J each",
        "note",
    )

    def known(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def cells(row: Row) -> tuple[str, ...]:
        each = None if row.seconds is None else row.seconds / row.units
        return (
            row.name,
            str(row.units),
            known(row.seconds and 1e3 * row.seconds, ",.2f"),
            known(each and 1e3 * each, ",.3f"),
            known(each and 60 / each, ",.0f"),
            known(row.share or None, ".2f"),
            known(row.first, ".1f"),
            known(row.peak and row.peak / GIGA, ".1f"),
            known(row.joules, ".2f"),
            row.note,
        )

    return [*table(head, map(cells, part["rows"])), *notes(part["skipped"])]


def first_table(part: dict[str, Any]) -> list[str]:
    """Return the first results of fresh processes."""
    body = [
        (
            f"{one['images']} images at once, compile {one['compile']}, code {one['code']}",
            *(f"{one[name]:.1f}" if name in one else one["failed"] for name in ("loading", "first", "second")),
        )
        for one in part["firsts"]
    ]
    return table(("a fresh process, `fast`", "loading, s", "first images, s", "second time, s"), body)


#: Title and table of each part.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "forward": ("Forwards of the transformer", forward_table),
    "profile": ("Where a forward goes", profile_table),
    "decode": ("Decoding by VA-VAE f16d32, in float32 everywhere,", lambda part: product_table(part["results"])),
    "load": ("Loading", load_table),
    "images": ("Pictures", image_table),
    "growth": ("Growth", growth_table),
    "demo": ("The demonstration", demo_table),
    "training": ("Training and extraction, each row in the precision that it names,", training_table),
    "gpu-forward": ("Forwards of LightningDiT-XL/1", row_table),
    "gpu-decode": ("Decoding by VA-VAE f16d32", row_table),
    "gpu-training": ("Training steps", row_table),
    "gpu-sampling": ("Images of LightningDiT-XL/1, 256 x 256, noise to pixels,", row_table),
    "gpu-first": ("First images of LightningDiT-XL/1", first_table),
    "predicted": ("Predicted, not measured", lambda part: predicted_table(part["work"])),
}


def render(part: str, figures: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return one part: a line about the machine, then its tables."""
    title, lines_of = TABLES[part]
    if part == "predicted":
        return "\n".join([f"**{title}:**", "", *lines_of(figures)])
    return "\n".join([f"**{title}** on {machine_line(facts)}:", "", *lines_of(figures)])


def mark_of(part: str) -> str:
    """Return the name of a part's marks in a page."""
    return f"benchmark, {part}"
