"""The page itself, by gradio 5 and 6: fields, buttons, and what they start."""

from __future__ import annotations

import importlib
import inspect
import os
import secrets
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from LightningDiT.console import describe_os_error
from LightningDiT.demo.choices import MOST_GUIDANCE, Model, wish_of
from LightningDiT.demo.pictures import STYLE, frame_html, words_html, words_of
from LightningDiT.demo.session import People, Studio, checked
from LightningDiT.demo.texts import ENGLISH, LANGUAGES, TEXTS, error_text, say
from LightningDiT.errors import LightningDiTError, first_line, is_out_of_memory

FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")
CSS = f"""
{STYLE}
.gradio-container {{ max-width: 76rem !important; margin: 0 auto }}
.ldit-head {{ align-items: center; flex-wrap: wrap }}
.ldit-head > :first-child {{ flex: 1 1 16rem }}
.ldit-head > :last-child {{ flex: 0 0 13.5rem }}
.ldit-buttons button {{ font-size: .95rem; padding-inline: .4rem; white-space: nowrap }}
.ldit-head h1 {{ font-size: 1.5rem; font-weight: 600; margin: .2rem 0 }}
#command textarea {{ font-family: ui-monospace, Consolas, monospace; font-size: .85rem }}
footer {{ display: none !important }}
"""
QUEUE = 32  # people who may wait
NEW_SEEDS = 10**6  # a new seed lies below, so that it can be remembered


def gradio() -> Any:
    """Return gradio, told to send nothing to anybody.

    Raises:
        LightningDiTError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        reason = f"the page needs gradio, which cannot be imported ({first_line(error)})"
        raise LightningDiTError(reason, "pip install gradio") from error


def accepted(function: Any, **values: Any) -> dict[str, Any]:
    """Return those of `values` that a function of this gradio takes: release 6 renamed and moved several."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in known}


def look() -> dict[str, Any]:
    """Return theme and style, which gradio 5 takes when the page is made, 6 when it starts."""
    gr = gradio()
    fonts = ([gr.themes.Font(name) for name in names] for names in (FONTS, MONO))  # of the system: none is fetched
    return {"theme": gr.themes.Default(**dict(zip(("font", "font_mono"), fonts, strict=True))), "css": CSS}


class Page:
    """What the fields and buttons of the page do; its functions need no browser.

    Args:
        studio: that samples.
        language: of the page when it opens.
    """

    def __init__(self, studio: Studio, language: str = ENGLISH) -> None:
        self.studio, self.language, self.people = studio, language, People()

    def sample(self, language: str, model: str, *fields: Any, person: str = "") -> Iterator[tuple[str, str, str]]:
        """Yield words, images and command, as HTML, HTML and text, while a wish is carried out.

        Args:
            language: of the words.
            model: name.
            fields: see `wish_of`.
            person: whose wish before this one ends.
        """
        images, command = "", ""
        try:
            wish = wish_of(checked(self.studio.models, model), *fields)
            stop = self.people.begin(person)
            for frame in self.studio.sample(wish, stop):
                images, command = frame_html(frame, language), wish.command(f"{frame.folder}-again")
                yield words_html(words_of(frame, language)), images, command
        except Exception as error:
            yield words_html(_message(error, language), is_error=True), images, command

    def stop(self, person: str) -> None:
        """Stop a person's wish."""
        self.people.stop(person)

    def fields_of(self, name: str, language: str) -> dict[str, dict[str, Any]]:
        """Return what the fields of a model get when it is chosen: value, choices, whether they are seen."""
        model = checked(self.studio.models, name)
        sample = model.config.sample
        return {
            "classes": {"choices": named_choices(model), "value": model.first_classes},
            "conditions": {
                "choices": named_choices(model, conditions=True),
                "value": [0] if model.conditions else [],
                "visible": model.conditions is not None,
            },
            "guidance": {"value": sample.cfg_scale},
            "solver": {"choices": list(model.solvers), "value": sample.sampling_method},
            "steps": {"value": 0},
        }


def named_choices(model: Model, conditions: bool = False) -> list[tuple[str, int]]:
    """Return number and name of each class, or of each condition, as a field with a search shows them."""
    labels = model.conditions if conditions else model.labels
    if labels is None:
        return []
    if labels.names is None:
        return [(str(number), number) for number in range(labels.count)]
    return [(f"{number} {name}", number) for number, name in enumerate(labels.names)]


def _message(error: Exception, language: str) -> str:
    """Return an error in words; one that nobody foresaw has its traceback on the console."""
    if isinstance(error, LightningDiTError):
        return error_text(error, language)
    if is_out_of_memory(error):
        reason = f"memory ran out ({first_line(error)})"
        return error_text(LightningDiTError(reason, "choose fewer images or a smaller model"), language)
    if isinstance(error, OSError):
        return error_text(describe_os_error(error), language)
    traceback.print_exception(error, file=sys.stderr)
    return say("unexpected", language, message=first_line(error))


# ---- gradio's side


def build(page: Page) -> Any:
    """Return the page as gradio's Blocks."""
    gr = gradio()
    with gr.Blocks(
        title=say("title", page.language), analytics_enabled=False, **accepted(gr.Blocks.__init__, **look())
    ) as blocks:
        parts = _fields(gr, page)
        _wire(gr, page, blocks, parts)
    return blocks


def _fields(gr: Any, page: Page) -> dict[str, Any]:
    """Make the fields, buttons and results; return them by name."""
    language, first = page.language, next(iter(page.studio.models))
    fields, parts = page.fields_of(first, language), dict[str, Any]()

    def words(name: str) -> dict[str, Any]:
        return labels_of(name, language)

    with gr.Row(elem_classes="ldit-head"):
        parts["title"] = gr.HTML(f"<h1>{say('title', language)}</h1>")
        languages = [(name, key) for key, name in LANGUAGES.items()]
        parts["language"] = gr.Radio(
            languages, value=language, show_label=False, container=False, scale=0, min_width=220
        )
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            names = list(page.studio.models)
            parts["model"] = gr.Dropdown(names, value=first, visible=len(names) > 1, **words("model"))
            many = {"multiselect": True}
            parts["classes"] = gr.Dropdown(**many, **words("classes"), **fields["classes"])
            parts["conditions"] = gr.Dropdown(**many, **words("conditions"), **fields["conditions"])
            with gr.Row():
                parts["each"] = gr.Number(1, precision=0, min_width=100, **words("each"))
                parts["seed"] = gr.Number(0, precision=0, min_width=100, **words("seed"))
            parts["guidance"] = gr.Slider(0, MOST_GUIDANCE, step=0.1, **words("guidance"), **fields["guidance"])
            with gr.Row():
                parts["solver"] = gr.Dropdown(min_width=100, **words("solver"), **fields["solver"])
                parts["steps"] = gr.Number(precision=0, min_width=100, **words("steps"), **fields["steps"])
            with gr.Row(elem_classes="ldit-buttons"):
                parts["sample"] = gr.Button(say("sample", language), variant="primary", min_width=80)
                parts["another"] = gr.Button(say("another", language), min_width=80)
                parts["stop"] = gr.Button(say("stop", language), variant="stop", min_width=80)
        with gr.Column(scale=5, min_width=300):
            parts["words"] = gr.HTML(words_html(say("start", language)))
            parts["images"] = gr.HTML("")
            copy = accepted(gr.Textbox.__init__, buttons=["copy"], show_copy_button=True)
            parts["command"] = gr.Textbox(lines=2, interactive=False, elem_id="command", **copy, **words("command"))
    return parts


def labels_of(name: str, language: str) -> dict[str, str]:
    """Return label and, if it has some, further words of a field in a language."""
    more = {"info": say(f"{name}_info", language)} if f"{name}_info" in TEXTS else {}
    return {"label": say(name, language), **more}


LABELLED = ("model", "classes", "conditions", "each", "seed", "guidance", "solver", "steps", "command")
BUTTONS = ("sample", "another", "stop")
WISHED = ("language", "model", "classes", "conditions", "each", "seed", "guidance", "solver", "steps")
OF_MODEL = ("classes", "conditions", "guidance", "solver", "steps")


def _wire(gr: Any, page: Page, blocks: Any, parts: Mapping[str, Any]) -> None:
    """Say what each button and field starts."""
    hidden = accepted(parts["stop"].click, api_visibility="private") or {"api_name": False}
    results = [parts[name] for name in ("words", "images", "command")]

    def sample(request: Any, *values: Any) -> Iterator[Any]:
        yield from page.sample(*values, person=str(request.session_hash))

    def stop(request: Any) -> None:
        page.stop(str(request.session_hash))

    for function in (sample, stop):  # by which gradio finds the argument that is no field
        function.__annotations__["request"] = gr.Request

    def change_model(name: str, language: str) -> list[Any]:
        return [gr.update(**values) for values in page.fields_of(name, language).values()]

    def change_language(language: str) -> list[Any]:
        return [
            f"<h1>{say('title', language)}</h1>",
            words_html(say("start", language)),
            *(gr.update(**labels_of(name, language)) for name in LABELLED),
            *(gr.update(value=say(name, language)) for name in BUTTONS),
        ]

    wished = [parts[name] for name in WISHED]
    run = {"inputs": wished, "outputs": results, "show_progress": "hidden", "concurrency_limit": None, **hidden}
    parts["sample"].click(sample, trigger_mode="multiple", **run)
    quick = {"queue": False, "show_progress": "hidden", **hidden}
    parts["another"].click(lambda: secrets.randbelow(NEW_SEEDS), outputs=parts["seed"], **quick).then(sample, **run)
    parts["stop"].click(stop, **quick)
    of_model = [parts[name] for name in OF_MODEL]
    parts["model"].change(change_model, inputs=[parts["model"], parts["language"]], outputs=of_model, **quick)
    shown = [parts[name] for name in ("title", "words", *LABELLED, *BUTTONS)]
    parts["language"].change(change_language, inputs=parts["language"], outputs=shown, **quick)
    blocks.unload(stop)
