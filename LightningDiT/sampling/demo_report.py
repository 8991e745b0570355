"""The report of a demonstration: one HTML page with its images, and their copies under the names of their classes."""

from __future__ import annotations

import base64
import contextlib
import html
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from LightningDiT.config import describe_guidance, describe_solver
from LightningDiT.console import duration, printable
from LightningDiT.data.image_files import open_image
from LightningDiT.files import atomic_path, check_target, digest, holding, kind_of, write_text
from LightningDiT.sampling.demo import RECORD, Demo, Record, Session
from LightningDiT.sampling.resumable_run import UNFINISHED
from LightningDiT.sampling.views import shown_bytes

SMALLEST = 128  # pixels; smaller images are shown enlarged by a whole factor
TITLE = "<title>LightningDiT samples</title>"  # by which the page is known for ours
MOST_LETTERS = 50  # of a class's name in that of a file: 200 bytes at most
#: All rules hold below one class, so that a notebook can show the page in its own; both themes by the system's colours.
STYLE = """
.ldit-report { color-scheme: light dark; background: Canvas; color: CanvasText; max-width: 72rem; margin: 0 auto;
  padding: 1rem 1.5rem; font: 16px/1.5 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif }
.ldit-report h1 { font-size: 1.6rem; margin: .5rem 0 }
.ldit-report h2 { font-size: 1.2rem; margin: 1.5rem 0 .5rem }
.ldit-report [lang] { font-weight: normal; opacity: .75; margin-left: .5em }
.ldit-report figure { display: inline-block; vertical-align: top; margin: .4rem; text-align: center }
.ldit-report figcaption { font-size: .85rem; max-width: 16rem; overflow-wrap: anywhere }
.ldit-report img { max-width: 100%; height: auto; border-radius: 4px; vertical-align: bottom }
.ldit-report .small { image-rendering: pixelated }
.ldit-report .wide { overflow-x: auto }
.ldit-report table { border-collapse: collapse; font-size: .9rem; margin: 0 }
.ldit-report th, .ldit-report td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid rgba(128, 128, 128, .35) }
.ldit-report td { overflow-wrap: anywhere }
.ldit-report th { white-space: nowrap }
.ldit-report pre { background: rgba(128, 128, 128, .15); color: inherit; padding: .8rem 1rem; margin: .5rem 0;
  border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere }
""".strip()


def copy_by_name(demo: Demo) -> None:
    """Copy each image beside the grid, under its number and the name of its class, and remove those of earlier classes.

    Removed is what the record of a run in that folder names, and only as it was written.

    Raises:
        LightningDiTError: a file has the name of a copy and is no image of a run in that folder.
    """
    folder, copies = demo.grid.parent, dict[str, str]()
    for name, path in _copies(demo).items():
        with atomic_path(folder / name, ours=_is_copy) as fresh:
            shutil.copyfile(path, fresh)
        copies[name] = digest(path)
    Record(demo.sessions, copies).write(demo.folder)
    for record in folder.glob(f"run-*/{RECORD}"):
        for name, written in Record.read(record.parent).copies.items():
            old = folder / name
            if name not in copies and Path(name).name == name and kind_of(old) == "file":
                with contextlib.suppress(OSError):
                    if digest(old) == written:
                        old.unlink()


def _copies(demo: Demo) -> dict[str, Path]:
    """Return the images by the names of their copies; raises as `copy_by_name`."""
    found = dict[str, Path]()
    for path, caption in zip(demo.run.paths, demo.captions, strict=True):
        if path is not None:
            letters = "".join(letter if letter.isalnum() else "_" for letter in caption[:MOST_LETTERS])
            found[f"{int(path.stem):02d}_{letters}.png"] = path
    for name in found:
        check_target(demo.grid.parent / name, _is_copy)
    return found


def _is_copy(path: Path) -> bool:
    """Return whether a file has the bytes of an image of a run in its folder, as it is or as it was copied."""
    written = digest(path)
    records = (Record.read(record.parent) for record in path.parent.glob(f"run-*/{RECORD}"))
    return any(record.copies.get(path.name) == written for record in records) or any(
        digest(image) == written for image in path.parent.glob("run-*/*.png")
    )


def check_report(path: Path) -> None:
    """Raise LightningDiTError unless `write_report` may write `path`: a new page, or one that it wrote before."""
    check_target(path, holding(TITLE))


def write_report(demo: Demo, path: Path, command: str) -> Path:
    """Write an HTML page that holds the images themselves, how they were made, and how to repeat it; return `path`.

    Headings are English and Chinese. The page needs nothing from elsewhere and holds no script.

    Args:
        command: makes the same images, as a person types it in the project's folder.
    """
    sample, done = demo.config.sample, sum(image is not None for image in demo.run.paths)
    facts = (
        ("Images", "图像", f"{done} / {len(demo.captions)}" + ("" if demo.run.complete else f". {UNFINISHED}")),
        ("Model", "模型", f"{demo.config.model.model_type}, {demo.config.ckpt_path}"),
        ("Adapter", "适配器", demo.config.adapter_path or ""),
        ("Configuration", "配置文件", demo.config.source),
        ("Seed", "随机种子", str(demo.seed)),
        ("Solver", "求解器", describe_solver(sample)),
        ("Guidance scale", "引导强度", describe_guidance(sample)),
        ("Guide", "引导模型", sample.guide_ckpt or ""),
    )
    rows = [html_row(both_languages(english, chinese), value) for english, chinese, value in facts if value]
    page = (
        '<!doctype html>\n<html lang="en" style="color-scheme: light dark">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"{TITLE}\n"
        f'<style>\n{STYLE}\n</style>\n</head>\n<body style="margin: 0">\n<div class="ldit-report">\n'
        f"<h1>{both_languages('LightningDiT samples', '样本图像')}</h1>\n{_figures(demo)}\n"
        f"<h2>{both_languages('Settings', '设置')}</h2>\n{html_table(rows)}\n"
        f"<h2>{both_languages('How they were made', '生成记录')}</h2>\n{_sessions(demo.sessions)}\n"
        f"<h2>{both_languages('Command that repeats it', '重现命令')}</h2>\n<pre>{escaped(command)}</pre>\n"
        "</div>\n</body>\n</html>\n"
    )
    write_text(path, page, holding(TITLE))
    return path


def _figures(demo: Demo) -> str:
    figures = []
    for number, (file, caption) in enumerate(zip(demo.run.paths, demo.captions, strict=True)):
        if file is None:
            continue
        with open_image(file) as image:
            width, height = image.size
        factor = max(1, SMALLEST // width)
        kind = ' class="small"' if factor > 1 else ""
        data = base64.b64encode(shown_bytes(file)).decode()
        words = escaped(caption)
        figures.append(
            f'<figure><img{kind} width="{factor * width}" height="{factor * height}" alt="Sample {number}: {words}"'
            f' src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
        )
    return "\n".join(figures)


def _sessions(sessions: Sequence[Session]) -> str:
    """Return the table of the calls that made images, a column for each, with its own time and machine."""
    if not sessions:
        return f"<p>{both_languages('No record of it is left.', '没有留下记录。')}</p>"
    facts = (
        ("Date", "日期", [made.date for made in sessions]),
        ("Images", "图像", [str(made.images) for made in sessions]),
        ("Sampling and decoding", "采样与解码", [duration(made.seconds) for made in sessions]),
        ("Loading", "加载", [f"{made.load_seconds:.1f} s" for made in sessions]),
        ("Evaluations each", "每张求值次数", [str(made.nfe) for made in sessions]),
        ("Device", "设备", [made.device for made in sessions]),
        ("torch", "", [made.torch for made in sessions]),
        ("Precision", "精度", [made.precision for made in sessions]),
    )
    return html_table(html_row(both_languages(english, chinese), *cells) for english, chinese, cells in facts)


def html_table(rows: Iterable[str]) -> str:
    """Return a table of rows, which scrolls on a narrow screen."""
    return '<div class="wide"><table>\n' + "\n".join(rows) + "\n</table></div>"


def html_row(head: str, *cells: str) -> str:
    """Return a row of a table.

    Args:
        head: HTML; cells: texts.
    """
    return f'<tr><th scope="row">{head}</th>' + "".join(f"<td>{escaped(cell)}</td>" for cell in cells) + "</tr>"


def both_languages(english: str, chinese: str) -> str:
    """Return HTML in English and Chinese, the Chinese marked as such."""
    return english + (f' <span lang="zh-CN">{chinese}</span>' if chinese else "")


def escaped(text: str) -> str:
    """Return a text as HTML, without control characters."""
    return html.escape(printable(text))
