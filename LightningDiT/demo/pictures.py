"""Images and words of a frame as HTML; spectrograms have axes."""

from __future__ import annotations

import base64
import io
from urllib.parse import quote

from PIL import Image

from LightningDiT.demo.session import DONE, LOADING, SAMPLING, STOPPED, WAITING, Frame
from LightningDiT.demo.texts import say
from LightningDiT.sampling.demo_report import escaped
from LightningDiT.verdict.gait import Axes
from LightningDiT.verdict.pictures import STYLE as REPORT_STYLE
from LightningDiT.verdict.pictures import plot_figure

SMALL = 128  # pixels of a side below which pixels are shown as squares
FILES = "gradio_api/file="  # address of a file of the output folder, relative to the page
#: Rules of the axes are those of the report on generated windows.
STYLE = (
    REPORT_STYLE.replace(".ldit-report", ".ldit-page")
    + """
.ldit-page { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 8.5rem), 1fr)); gap: .8rem }
.ldit-page.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)) }
.ldit-page figure { margin: 0; min-width: 0 }
.ldit-page .plot { grid-template-columns: 3.2rem minmax(0, 1fr) }
.ldit-page img, .ldit-page .gap { display: block; width: 100%; max-width: none;
  margin: 0 !important; border-radius: 6px }
.ldit-page .plot img { border-radius: 0 }
.ldit-page img.small { image-rendering: pixelated }
.ldit-page img.forming { outline: 2px dashed color-mix(in srgb, currentColor 45%, transparent) }
.ldit-page .gap { aspect-ratio: 1; background: color-mix(in srgb, currentColor 8%, transparent) }
.ldit-page a { display: block; line-height: 0; padding: 0 !important; border: 0 }
.ldit-page figcaption { font-size: .85rem; text-align: center; overflow-wrap: anywhere; margin: 0; padding: .25rem 0 }
.ldit-words { margin: 0; min-height: 1.6em; overflow-wrap: anywhere }
.ldit-error { padding: .6rem .8rem; border-radius: 6px; border: 1px solid #d1495b;
  background: color-mix(in srgb, #d1495b 14%, transparent) }
"""
)


def frame_html(frame: Frame, language: str) -> str:
    """Return the images of a frame, each above its caption; a grey square for those that have not begun."""
    axes = frame.wish.model.axes
    figures = [_figure(frame, index, caption, axes, language) for index, caption in enumerate(frame.wish.captions)]
    return f'<div class="ldit-page{" plots" if axes else ""}">' + "\n".join(figures) + "</div>"


def _figure(frame: Frame, index: int, caption: str, axes: Axes | None, language: str) -> str:
    picture, words = frame.pictures[index], escaped(caption)
    if picture is None:
        return f'<figure><div class="gap"></div><figcaption>{words}</figcaption></figure>'
    finished = index < frame.finished
    kinds = [*(["small"] if picture.width < SMALL else []), *([] if finished else ["forming"])]
    image = f'<img class="{" ".join(kinds)}" alt="{words}" src="data:image/png;base64,{encoded(picture)}">'
    if finished:
        address = FILES + quote(str((frame.folder / f"{index:06d}.png").absolute()))
        image = f'<a href="{address}" download="{index:06d}.png">{image}</a>'
    if axes is None:
        return f"<figure>{image}<figcaption>{words}</figcaption></figure>"
    units = [say(unit, language) if unit in ("columns", "rows") else unit for unit in (axes.time_unit, axes.speed_unit)]
    names = say("time", language, unit=units[0]), say("speed", language, unit=units[1])
    return plot_figure(image, axes, names, words)


def encoded(picture: Image.Image) -> str:
    """Return a picture as a PNG in base64."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def words_of(frame: Frame, language: str) -> str:
    """Return what a frame says in one line."""
    total = len(frame.wish.labels)
    if frame.state == WAITING and not frame.ahead:
        return say("loading", language)
    values = {
        WAITING: {"ahead": frame.ahead},
        LOADING: {},
        SAMPLING: {"finished": frame.finished, "total": total, "step": frame.step, "steps": frame.steps},
        DONE: {
            "total": total,
            "seconds": say("seconds", language, seconds=frame.seconds),
            "nfe": frame.nfe,
            "solver": frame.solver,
            "folder": frame.folder,
        },
        STOPPED: {"finished": frame.finished, "total": total, "folder": frame.folder},
    }
    return say(frame.state, language, **values[frame.state])


def words_html(text: str, is_error: bool = False) -> str:
    """Return a line for people; an error is announced."""
    kind = 'class="ldit-words ldit-error" role="alert"' if is_error else 'class="ldit-words" role="status"'
    return f"<p {kind}>{escaped(text)}</p>"
