"""Sampling for people at a page: one batch at a time in turns, with the forming images, until done or stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image
from torch import Tensor

from LightningDiT.demo.choices import Model, Wish, check_wish
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import check_space, disk_errors
from LightningDiT.sampling.options import images_at_once
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.preview import Predictions
from LightningDiT.sampling.resumable_run import save_image
from LightningDiT.sampling.views import shown_file, views

WAITING, LOADING, SAMPLING, DONE, STOPPED = "waiting", "loading", "sampling", "done", "stopped"
MOST_LOADED = 2  # models that are kept in memory
PREVIEW_SHARE = 0.2  # of the time at most goes into decoding forming images
PATIENCE = 0.1  # seconds between two looks at a person's stop while waiting


class StoppedError(Exception):
    """A person wants no more images."""


class Turns:
    """Who may compute: one at a time, in the order of asking."""

    def __init__(self) -> None:
        self._line: list[object] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, stop: threading.Event, waits: Callable[[int], None]) -> Iterator[None]:
        """Wait for a turn, and keep it for the block.

        Args:
            waits: called with the number of people ahead whenever it changes, as long as there is one.

        Raises:
            StoppedError: `stop` was set meanwhile.
        """
        ticket, ahead = object(), 0
        with self._changed:
            self._line.append(ticket)
        try:
            while True:
                with self._changed:
                    if self._line[0] is ticket:
                        break
                    before, ahead = ahead, self._line.index(ticket)
                    if ahead == before:
                        self._changed.wait(PATIENCE)
                if stop.is_set():
                    raise StoppedError
                if ahead != before:
                    waits(ahead)
            if stop.is_set():
                raise StoppedError
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()


@dataclass(frozen=True)
class Frame:
    """What a person sees at a moment.

    Attributes:
        wish: that is carried out.
        state: one of those above.
        folder: of the finished images, `000000.png` and so on.
        pictures: view of each image, forming or finished; None before its first step.
        finished: how many images are finished, the first ones.
        ahead: people who compute first.
        step, steps: of the present batch.
        nfe, seconds, solver: evaluations of each image, wall clock of sampling, the solver in words; when done.
    """

    wish: Wish
    state: str
    folder: Path
    pictures: tuple[Image.Image | None, ...]
    finished: int = 0
    ahead: int = 0
    step: int = 0
    steps: int = 0
    nfe: int = 0
    seconds: float = 0.0
    solver: str = ""

    @property
    def is_last(self) -> bool:
        return self.state in (DONE, STOPPED)

    def with_pictures(self, first: int, pictures: Sequence[Image.Image]) -> tuple[Image.Image | None, ...]:
        """Return the pictures with new ones from number `first` on."""
        return (*self.pictures[:first], *pictures, *self.pictures[first + len(pictures) :])


class Studio:
    """The models of a page and the folder of its images; people use it at the same time.

    Args:
        models: by name.
        output: folder that gets a folder for each wish.
    """

    def __init__(self, models: Mapping[str, Model], output: Path) -> None:
        self.models, self.output = models, output
        self.turns = Turns()
        self._loaded: OrderedDict[str, LightningDiTPipeline] = OrderedDict()

    def sample(self, wish: Wish, stop: threading.Event) -> Iterator[Frame]:
        """Yield what a person sees while a wish is carried out; the last frame is done or stopped.

        Frames that nobody took are left out. Ending the iteration early stops the work within a step.

        Raises:
            LightningDiTError: and whatever else `LightningDiTPipeline` raises.
        """
        news: queue.SimpleQueue[Frame | BaseException] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(wish, stop, news.put), daemon=True).start()
        try:
            while True:
                new = news.get()
                while not news.empty():
                    new = news.get()
                if isinstance(new, BaseException):
                    raise new
                yield new
                if new.is_last:
                    return
        finally:
            stop.set()

    def _work(self, wish: Wish, stop: threading.Event, tell: Callable[[Frame | BaseException], None]) -> None:
        """Carry out a wish in a thread of its own, and tell each frame, or the error that ends it."""
        work = _Work(self, wish, stop, tell)
        try:
            work.run()
        except StoppedError:
            work.show(state=STOPPED)
        except BaseException as error:
            tell(error)

    def pipeline(self, model: Model) -> LightningDiTPipeline:
        """Return a model's pipeline, loaded if it is not in memory; the one used longest ago gives way."""
        key = model.config.source
        if key not in self._loaded:
            while len(self._loaded) >= MOST_LOADED:
                self._loaded.popitem(last=False)
            self._loaded[key] = LightningDiTPipeline.from_config(model.config)
        self._loaded.move_to_end(key)
        return self._loaded[key]


class _Work:
    """One wish on its way."""

    def __init__(
        self, studio: Studio, wish: Wish, stop: threading.Event, tell: Callable[[Frame | BaseException], None]
    ) -> None:
        self.studio, self.wish, self.stop, self.tell = studio, wish, stop, tell
        folder = studio.output / f"{datetime.now():%Y%m%d-%H%M%S}-{uuid4().hex[:12]}"
        self.frame = Frame(wish, WAITING, folder, (None,) * len(wish.labels))

    def show(self, **changes: Any) -> None:
        """Tell a person the frame with some changes."""
        self.frame = dataclasses.replace(self.frame, **changes)
        self.tell(self.frame)

    def run(self) -> None:
        """Sample the images batch by batch, cut as `lightningdit sample` cuts them."""
        wish, folder = self.wish, self.frame.folder
        check_space(folder, len(wish.labels), wish.model.config.data.image_size)
        with self._turn():
            self.show(state=LOADING)
            pipe = self.studio.pipeline(wish.model).with_sample(wish.sample)
            check_wish(wish, pipe.null_failure)
            solver = pipe.solver(wish.sample)
        with disk_errors(folder):
            folder.mkdir(parents=True)
        count, at_most = len(wish.labels), pipe.batch_size(wish.sample)
        size = images_at_once(count, at_most)
        plan = pipe.plan(count, at_most if wish.sample.deterministic else size)
        self.show(steps=solver.steps)
        for first in range(0, count, plan.batch or size):
            with self._turn(), pipe.settled(plan, "this wish"):
                self._batch(pipe, list(range(first, min(first + (plan.batch or size), count))))
        self.show(state=DONE, solver=solver.describe())

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        return self.studio.turns.taken(self.stop, lambda ahead: self.show(state=WAITING, ahead=ahead))

    def _batch(self, pipe: LightningDiTPipeline, indices: list[int]) -> None:
        """Sample and save the images of some indices."""
        wish, folder = self.wish, self.frame.folder
        self.show(state=SAMPLING, step=0)
        out = pipe(
            [wish.labels[index] for index in indices],
            seed=wish.seed,
            indices=indices,
            batch_size=len(indices),
            callback=_Watch(self, pipe, indices),
            output_type="pt" if pipe.channels == 1 else "pil",
            conditions=wish.conditions and [wish.conditions[index] for index in indices],
        )
        paths = [folder / f"{index:06d}.png" for index in indices]
        for image, path in zip(out.images, paths, strict=True):
            save_image(image, path)
        pictures = self.frame.with_pictures(indices[0], [shown_file(path, wish.model.colour_map) for path in paths])
        self.show(
            pictures=pictures,
            finished=indices[-1] + 1,
            nfe=max(self.frame.nfe, out.nfe),
            seconds=self.frame.seconds + out.seconds,
        )


class _Watch:
    """A pipeline's callback: shows the forming images of a batch now and then, and ends the work of who stopped it."""

    def __init__(self, work: _Work, pipe: LightningDiTPipeline, indices: Sequence[int]) -> None:
        self.work, self.pipe, self.first = work, pipe, indices[0]
        self.predictions = Predictions(pipe, work.wish.seed, indices)
        self.spent, self.decoded_at = 0.0, float("-inf")

    def __call__(self, step: int, t: float, state: Tensor) -> None:
        """Look at the state (N, C, h, w) that the solver reached at time t."""
        if self.work.stop.is_set():
            raise StoppedError
        shown, began = self.predictions.at(step, t, state), time.monotonic()
        pictures = self.work.frame.pictures
        if not self.predictions.is_end(t) and began - self.decoded_at >= self.spent / PREVIEW_SHARE:
            forming = views(self.pipe.tokenizer.decode(shown), self.work.wish.model.colour_map)
            pictures = self.work.frame.with_pictures(self.first, forming)
            self.decoded_at = time.monotonic()
            self.spent = self.decoded_at - began
        self.work.show(pictures=pictures, step=step + 1)


class People:
    """Whose work runs: a person has one wish at a time, and a stop of its own."""

    def __init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def begin(self, person: str) -> threading.Event:
        """Return the stop of a new wish, and stop the one before it."""
        with self._lock:
            self._stops.pop(person, threading.Event()).set()
            return self._stops.setdefault(person, threading.Event())

    def stop(self, person: str) -> None:
        """Stop a person's wish, if there is one."""
        with self._lock:
            self._stops.pop(person, threading.Event()).set()

    def stop_all(self) -> None:
        """Stop everybody's."""
        with self._lock:
            for stop in self._stops.values():
                stop.set()


def checked(models: Mapping[str, Model], name: str) -> Model:
    """Return a model by its name.

    Raises:
        LightningDiTError: there is none.
    """
    if name not in models:
        raise LightningDiTError(
            f"model {str(name)[:80]!r} is unknown; known: {', '.join(models)}", "choose one of these"
        )
    return models[name]
