"""The downloader against a real server on 127.0.0.1 and the real huggingface_hub client."""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import pytest

from LightningDiT import console
from LightningDiT.errors import LightningDiTError
from setup_steps import downloads
from setup_steps.downloads import BackgroundHash, Patience, RemoteFile
from setup_steps.project import PROJECT
from tests.hub_server import COMMIT, Fault, Hub, running_hub

REPO, NAME = "someone/weights", "weights.pt"
DATA = random.Random(0).randbytes(3_000_000)
OTHER = DATA[::-1]
QUICK = Patience(timeout=5, attempts=3, backoff=0.01, longest_wait=2)
HASTY = replace(QUICK, timeout=0.5)  # for servers that stall
IMPATIENT = replace(QUICK, timeout=0.2, window=0.3)  # for those that drip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running hub that holds DATA, with this process pointed at it and no login."""
    with running_hub() as running:
        running.put(REPO, NAME, DATA)
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield running


def fetch(target: Path, token: str | None = None, patience: Patience = QUICK) -> downloads.Fetched:
    remote = downloads.describe(REPO, NAME, patience)
    return downloads.download(remote, target, token, patience)


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def begin(target: Path, hub: Hub, count: int) -> None:
    """Leave a part of `count` bytes, as a run that was cut off does."""
    hub.faults[:] = [Fault(drop_after=count)]
    hub.always = Fault(status=503)
    with pytest.raises(LightningDiTError):
        fetch(target)
    hub.always = None
    hub.log.clear()
    assert size_of(part_of(target)) == count


def assert_nothing_left(target: Path, content: bytes = DATA) -> None:
    """Only the final file is there: no part, no state."""
    assert target.read_bytes() == content
    assert [path.name for path in target.parent.glob("weights*")] == [NAME]


def test_metadata_comes_from_the_hub(hub: Hub) -> None:
    remote = downloads.describe(REPO, NAME)
    assert (remote.size, remote.revision) == (len(DATA), COMMIT)
    assert remote.etag == hashlib.sha256(DATA).hexdigest()
    assert remote.hashed_by == "sha256"
    assert COMMIT in remote.url


def test_plain_download(hub: Hub, tmp_path: Path) -> None:
    result = fetch(tmp_path / NAME)
    assert (result.fetched, result.resumed_from) == (len(DATA), 0)
    assert hub.ranges() == [None]
    assert_nothing_left(tmp_path / NAME)


def test_an_empty_file_is_a_file(hub: Hub, tmp_path: Path) -> None:
    hub.put(REPO, NAME, b"", large=False)
    fetch(tmp_path / NAME)
    assert_nothing_left(tmp_path / NAME, b"")


def test_small_file_is_checked_by_its_git_hash(hub: Hub, tmp_path: Path) -> None:
    hub.put(REPO, NAME, b"statistics", large=False)
    assert downloads.describe(REPO, NAME).hashed_by == "git"
    fetch(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == b"statistics"
    hub.always = Fault(wrong_bytes=True)
    (tmp_path / NAME).unlink()
    with pytest.raises(LightningDiTError, match="wrong bytes"):
        fetch(tmp_path / NAME)
    assert not (tmp_path / NAME).exists()


@dataclass(frozen=True)
class Case:
    """A server's fault and what must come of it.

    Args:
        name: the fault in words.
        says: what the error says; None where the run ends well.
        faults: what requests for bytes get, in turn.
        always: what they get after that.
        asked: what the hub's metadata requests get, in turn.
        held: bytes of the part that an earlier run left.
        kept: bytes of the part that the failed run leaves; 0 for no part at all, None for a few more than before.
        ranges: the Range headers of the run, where they are settled.
    """

    name: str
    says: str | None = None
    faults: tuple[Fault, ...] = ()
    always: Fault | None = None
    asked: tuple[Fault, ...] = ()
    held: int = 1_000_000
    kept: int | None = 1_000_000
    ranges: tuple[str | None, ...] | None = None
    patience: Patience = QUICK


FROM_THE_PART = "bytes=1000000-"
AN_HOUR = {"Retry-After": "3600"}
TEN_YEARS = {"Retry-After": email.utils.formatdate(time.time() + 315_000_000, usegmt=True)}
AGES, ENDLESS = {"Retry-After": "9" * 5000}, {"Content-Length": "9" * 5000}
LIES = {
    "a size without end": {"X-Linked-Size": "9" * 5000},
    "a size of a planet": {"X-Linked-Size": "9" * 30},
    "a size below nothing": {"X-Linked-Size": "-5"},
    "a size in words": {"X-Linked-Size": "many"},
    "a redirect that is none": {"Location": "http://[::1/x"},
}
AS_BYTES = {"Content-Type": "application/octet-stream"}
NO_ADDRESSES = {
    "an address without its bracket": "http://[::1/x",
    "a port of thousands of digits": f"http://127.0.0.1:{'9' * 5000}/x",
    "a port that is too large": "http://127.0.0.1:99999/x",
    "a port that is a word": "http://127.0.0.1:\x1b[31m/x",
    "a host of thousands of letters": f"http://{'a' * 5000}/x",
    "a host of no letters": "http://\x80..\x80/x",
    "another kind of server": "ftp://127.0.0.1:9/x",
    "a file of this machine": "file:///etc/passwd",
    "no address": "data:,x",
}
RIGHT = [
    Case("nothing wrong", ranges=(FROM_THE_PART,)),
    *(
        Case(f"{status} once each", faults=(Fault(status=status),), asked=(Fault(status=status),))
        for status in (408, 425, 429, 500, 502, 503, 504)
    ),
    Case("Retry-After that is no time", faults=(Fault(status=429, headers={"Retry-After": "inf"}),)),
    Case("drop", faults=(Fault(drop_after=700_000),), ranges=(FROM_THE_PART, "bytes=1700000-")),
    Case("drop at once, twice", faults=(Fault(drop_after=0),) * 2, ranges=(FROM_THE_PART,) * 3),
    Case("drop before the last byte", faults=(Fault(drop_after=1_999_999),), ranges=(FROM_THE_PART, "bytes=2999999-")),
    Case("range cut short", faults=(Fault(short=5000),), ranges=(FROM_THE_PART, "bytes=2995000-")),
    Case("ranges ignored", faults=(Fault(ignore_range=True),), ranges=(FROM_THE_PART,)),
    Case(
        "ranges ignored, and a drop within what is there",
        faults=(Fault(ignore_range=True, drop_after=700_000), Fault(ignore_range=True)),
        ranges=(FROM_THE_PART, FROM_THE_PART),
    ),
    Case("416", faults=(Fault(status=416),), ranges=(FROM_THE_PART, None)),
    Case(
        "416, then a drop", faults=(Fault(status=416), Fault(drop_after=2_000_000)), ranges=(FROM_THE_PART, None, None)
    ),
    Case("lie once, longer", faults=(Fault(lie=100),), ranges=(FROM_THE_PART, FROM_THE_PART)),
    Case("lie once, shorter", faults=(Fault(lie=-100),), ranges=(FROM_THE_PART, FROM_THE_PART)),
    Case("lie once, fresh", faults=(Fault(lie=-100),), held=0, ranges=(None, None)),
    Case("no length at all", faults=(Fault(headers={"Content-Length": ""}),), held=0),
    Case("another range", faults=(Fault(headers={"Content-Range": "bytes 5-2999999/3000000"}),)),
    Case("the beginning whatever is asked for", always=Fault(from_start=True), ranges=(FROM_THE_PART, None)),
    Case("Retry-After without end", faults=(Fault(status=429, headers={"Retry-After": "soon, 99999 Jan 9 9:9:9"}),)),
    Case("bytes that drip once", faults=(Fault(drip=0.05),), patience=IMPATIENT),
    Case("a header that drips once", faults=(Fault(drip=-0.05),), patience=IMPATIENT),
    *(
        Case(f"{name} once", faults=(Fault(status=302, headers={"Location": address}),))
        for name, address in NO_ADDRESSES.items()
        if "//" in address and "file" not in address  # which the standard library refuses at once
    ),
    Case("web page as bytes once", faults=(Fault(html=True, headers=AS_BYTES),)),
    Case("wrong bytes behind the part", faults=(Fault(wrong_bytes=True),), ranges=(FROM_THE_PART, None)),
    Case(
        "wrong bytes in the second answer",
        faults=(Fault(drop_after=500_000), Fault(wrong_bytes=True)),
        held=0,
        ranges=(None, "bytes=500000-", None),
    ),
    Case("silence before the answer", faults=(Fault(late=2),), patience=HASTY),
    Case("silence in the body", faults=(Fault(drop_after=500_000, stall=2),), patience=HASTY),
    Case("the hub silent once", asked=(Fault(late=2),), patience=HASTY),
]
WRONG = [
    *(
        Case(f"{status} from the hub", f"{words}.*{status} from 127", asked=(Fault(status=status),))
        for status, words in (
            (401, "someone/weights is not open to this login"),
            (403, "may not read someone/weights"),
            (404, "weights.pt is not in someone/weights"),
        )
    ),
    *(
        Case(
            f"{status} from the second host",
            f"localhost.* \\(to which 127.* leads\\) answered {status}",
            (Fault(status=status),),
        )
        for status in (401, 403, 404)
    ),
    Case("416 whatever is asked", "answered 416", always=Fault(status=416)),
    *(
        Case(f"{status} for ever", f"answered {status}; 1.0 MB of 3.0 MB are kept", always=Fault(status=status))
        for status in (429, 500, 503)
    ),
    Case("the hub down", "answered 503", asked=(Fault(status=503),) * 3),
    Case("an hour to wait", "asks to wait 1 h 0 min", always=Fault(status=429, headers=AN_HOUR)),
    Case("the hub wants an hour", "asks to wait 1 h 0 min", asked=(Fault(status=429, headers=AN_HOUR),)),
    Case("a date to wait for", r"asks to wait 8\d{4} h", always=Fault(status=503, headers=TEN_YEARS)),
    Case(
        "a drop each time", "the connection ended after 1.0 MB; 1.0 MB of 3.0 MB are kept", always=Fault(drop_after=0)
    ),
    Case("silence before every answer", "no byte came for too long.*are kept", always=Fault(late=1.5), patience=HASTY),
    Case("silence in every body", "no byte came.*kept", always=Fault(drop_after=0, stall=1.5), patience=HASTY),
    Case("the hub silent", "127.* cannot be reached", asked=(Fault(late=1.5),) * 3, patience=HASTY),
    Case("longer", "offers 3000100 bytes, the hub says 3000000; 1.0 MB", always=Fault(lie=100)),
    Case("shorter", "offers 2999900 bytes, the hub says 3000000; 1.0 MB", always=Fault(lie=-100)),
    Case("longer, fresh", "offers 3000100 bytes", always=Fault(lie=100), held=0, kept=0),
    Case("shorter, fresh", "offers 2999900 bytes", always=Fault(lie=-100), held=0, kept=0),
    Case("cut short and said so, fresh", "offers 2999000 bytes", always=Fault(short=1000), held=0, kept=0),
    Case("the hub says more", "offers 3000000 bytes, the hub says 3000100", asked=(Fault(lie=100),)),
    Case("the hub says less", "offers 3000000 bytes, the hub says 2999900", asked=(Fault(lie=-100),)),
    Case("the hub says more, fresh", "the hub says 3000100", asked=(Fault(lie=100),), held=0, kept=0),
    Case("wrong bytes", "wrong bytes came .*nothing was kept", always=Fault(wrong_bytes=True), held=0, kept=0),
    Case(
        "wrong bytes behind the part, and again",
        "wrong bytes came .*nothing was kept",
        always=Fault(wrong_bytes=True),
        kept=0,
        ranges=(FROM_THE_PART, None),
    ),
    Case("web page", "a web page came in place of the file from localhost", always=Fault(html=True)),
    Case("web page, fresh", "a web page came", always=Fault(html=True), held=0, kept=0),
    Case("web page as bytes", "offers 26 bytes", always=Fault(html=True, headers=AS_BYTES)),
    Case("web page from the hub", "does not answer like a hub", asked=(Fault(html=True),)),
    Case("web page as bytes from the hub", "does not answer like a hub", asked=(Fault(html=True, headers=AS_BYTES),)),
    Case("bytes that drip", r"only \d+ B came in 0 s; 1.0 MB", always=Fault(drip=0.05), patience=IMPATIENT, kept=None),
    Case("a header that drips", "; 1.0 MB of 3.0 MB are kept", always=Fault(drip=-0.05), patience=IMPATIENT),
    Case("the hub's header drips", "no whole answer came", asked=(Fault(drip=-0.05),) * 3, patience=IMPATIENT),
    Case("a byte with each answer", "the connection ended after 1.0 MB", always=Fault(drop_after=1), kept=None),
    Case(
        "a length without end",
        "offers 99999999999999999999 bytes, the hub",
        always=Fault(headers=ENDLESS),
        held=0,
        kept=0,
    ),
    Case("ages to wait", "asks to wait 277777 h", always=Fault(status=503, headers=AGES)),
    *(
        Case(name, "are kept|answered 302", always=Fault(status=302, headers={"Location": address}))
        for name, address in NO_ADDRESSES.items()
    ),
    *(Case(f"{name} from the hub", "127", asked=(Fault(headers=lie),) * 3) for name, lie in LIES.items()),
    Case(
        "redirect to itself",
        "answered 302",
        always=Fault(status=302, headers={"Location": f"/{REPO}/resolve/main/{NAME}"}),
    ),
]


def meet(case: Case, hub: Hub, target: Path) -> None:
    """Prepare the part and the faults of a case."""
    if case.held:
        begin(target, hub, case.held)
    hub.faults[:], hub.always, hub.hub_faults[:] = case.faults, case.always, case.asked


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.name)
def test_faults_that_pass_end_in_the_right_file(hub: Hub, tmp_path: Path, case: Case) -> None:
    target = tmp_path / NAME
    meet(case, hub, target)
    fetch(target, patience=case.patience)
    assert_nothing_left(target)
    if case.ranges:
        assert hub.ranges() == list(case.ranges)
    assert not hub.faults
    assert not hub.hub_faults


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_faults_that_stay_end_in_one_line_and_the_next_run_goes_on(hub: Hub, tmp_path: Path, case: Case) -> None:
    """No file under the final name; the part stays where it is good and goes where it is not."""
    target = tmp_path / NAME
    meet(case, hub, target)
    with pytest.raises(LightningDiTError, match=f"{case.says}.*; fix: .*step2") as caught:
        fetch(target, patience=case.patience)
    assert "\n" not in str(caught.value)
    if case.ranges:
        assert hub.ranges() == list(case.ranges)
    kept = part_of(target).stat().st_size if case.kept is None else case.kept
    assert case.kept is not None or case.held < kept < case.held + downloads.ENOUGH
    state = [NAME + ".part", NAME + ".part.json"] if kept else []
    assert sorted(path.name for path in tmp_path.glob("weights*")) == state
    if kept:
        assert part_of(target).read_bytes() == DATA[:kept]
    hub.faults[:], hub.always, hub.hub_faults[:] = [], None, []
    hub.log.clear()
    assert fetch(target).resumed_from == kept
    assert hub.ranges() == [f"bytes={kept}-" if kept else None]
    assert_nothing_left(target)


@pytest.mark.parametrize("seed", range(6))
def test_drops_at_any_byte(hub: Hub, tmp_path: Path, seed: int) -> None:
    """Cut points at random, and at the first, second and last byte: each answer goes on where the last
    one stopped, and no byte is sent twice.
    """
    draw = random.Random(seed)
    points = sorted({0, 1, len(DATA) - 1, *(draw.randrange(len(DATA)) for _ in range(20))})
    cuts = [end - start for start, end in zip([0, *points], points, strict=False)]
    hub.faults = [Fault(drop_after=cut) for cut in cuts]
    fetch(tmp_path / NAME, patience=replace(QUICK, attempts=len(cuts)))
    assert hub.ranges() == [None, *(f"bytes={point}-" if point else None for point in points)]
    assert hub.sent == len(DATA)
    assert_nothing_left(tmp_path / NAME)


MISCHIEF = (
    lambda draw: Fault(drop_after=draw.randrange(200_000)),
    lambda draw: Fault(status=draw.choice([401, 403, 404, 416, 429, 500, 503])),
    lambda draw: Fault(ignore_range=True, drop_after=draw.randrange(200_000)),
    lambda draw: Fault(wrong_bytes=True, drop_after=draw.choice([None, draw.randrange(200_000)])),
    lambda draw: Fault(lie=draw.choice([-7, 7]), short=draw.choice([0, 9])),
    lambda draw: Fault(html=True, headers=draw.choice([{}, AS_BYTES])),
    lambda draw: Fault(headers={"ETag": f'"{draw.random()}"'}, drop_after=draw.randrange(200_000)),
)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_the_final_name_holds_the_right_file_or_nothing(hub: Hub, tmp_path: Path, seed: int) -> None:
    draw, target, content = random.Random(seed), tmp_path / NAME, DATA[:200_000]
    hub.put(REPO, NAME, content)
    for _ in range(12):
        hub.faults = [draw.choice(MISCHIEF)(draw) for _ in range(draw.randrange(6))]
        try:
            fetch(target, patience=replace(QUICK, backoff=0.001))
        except LightningDiTError:
            assert not target.exists()
        else:
            assert_nothing_left(target, content)
            target.unlink()
    hub.faults = []
    fetch(target)
    assert_nothing_left(target, content)


def test_the_etag_of_the_host_is_sent_along(hub: Hub, tmp_path: Path) -> None:
    begin(tmp_path / NAME, hub, 1_200_000)
    result = fetch(tmp_path / NAME)
    assert (result.resumed_from, result.fetched) == (1_200_000, len(DATA) - 1_200_000)
    assert next(seen.if_range for seen in hub.log if seen.range).startswith('"cdn-')


def test_a_file_that_changed_between_runs_is_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    begin(tmp_path / NAME, hub, 1_000_000)
    hub.put(REPO, NAME, OTHER)
    assert fetch(tmp_path / NAME).resumed_from == 0
    assert hub.ranges() == [None]
    assert_nothing_left(tmp_path / NAME, OTHER)


@pytest.mark.parametrize(
    "second",
    [Fault(), Fault(ignore_if_range=True), Fault(ignore_range=True)],
    ids=["If-Range is heeded", "If-Range is ignored", "ranges are ignored"],
)
def test_a_file_that_changes_between_two_answers(hub: Hub, tmp_path: Path, second: Fault) -> None:
    """The old beginning is not joined to the new end, and the new file waits for a run that was told of it."""
    target = tmp_path / NAME
    hub.faults = [Fault(drop_after=1_000_000, becomes=OTHER), second]
    with pytest.raises(LightningDiTError, match=r"the file changed on the server \(hash .*nothing was kept"):
        fetch(target)
    assert list(tmp_path.glob("weights*")) == []
    fetch(target)
    assert_nothing_left(target, OTHER)


def test_a_file_that_grows_between_two_answers(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(drop_after=1_000_000, becomes=DATA + b"more")]
    with pytest.raises(
        LightningDiTError, match="offers 3000004 bytes, the hub says 3000000; 1.0 MB of 3.0 MB are kept"
    ):
        fetch(tmp_path / NAME)
    fetch(tmp_path / NAME)
    assert_nothing_left(tmp_path / NAME, DATA + b"more")


def test_hosts_whose_etags_differ_each_time_start_again_only_once(hub: Hub, tmp_path: Path) -> None:
    """Some mirrors are several machines that name the same file differently; the hash decides then."""
    hub.faults = [Fault(headers={"ETag": f'"{number}"'}, drop_after=500_000) for number in range(5)]
    fetch(tmp_path / NAME)
    asked = hub.ranges()
    assert asked == [None, "bytes=500000-", "bytes=500000-", "bytes=1000000-", "bytes=1500000-", "bytes=2000000-"]
    assert_nothing_left(tmp_path / NAME)


def test_another_mirror_goes_on_with_the_part(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash names the content, so a part from one mirror is the beginning of another's file."""
    begin(tmp_path / NAME, hub, 1_000_000)
    with running_hub() as mirror:
        mirror.put(REPO, NAME, DATA)
        mirror.always = Fault(headers={"ETag": '"mirror"'})
        monkeypatch.setenv("HF_ENDPOINT", mirror.endpoint)
        assert fetch(tmp_path / NAME).resumed_from == 1_000_000
        assert mirror.ranges() == [FROM_THE_PART]
    assert_nothing_left(tmp_path / NAME)


def test_a_damaged_part_is_noticed_and_replaced(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / NAME
    begin(target, hub, 1_000_000)
    part_of(target).write_bytes(b"x" * 1_000_000)
    result = fetch(target)
    assert (result.resumed_from, result.fetched) == (0, len(DATA))
    assert hub.ranges() == [FROM_THE_PART, None]
    assert_nothing_left(target)


@pytest.mark.parametrize("state", ["", "[]", '{"etag": "0", "size": 1}'])
def test_a_part_of_unknown_origin_is_not_used(hub: Hub, tmp_path: Path, state: str) -> None:
    target = tmp_path / NAME
    part_of(target).write_bytes(b"x" * 5000)
    (tmp_path / (NAME + ".part.json")).write_text(state)
    assert fetch(target).resumed_from == 0
    assert_nothing_left(target)


def test_a_part_longer_than_the_file_is_not_used(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / NAME
    begin(target, hub, 1_000_000)
    part_of(target).write_bytes(DATA + b"more")
    fetch(target)
    assert_nothing_left(target)


@pytest.mark.parametrize(("content", "asked"), [(DATA, []), (OTHER, [None])], ids=["right", "damaged"])
def test_a_complete_part_needs_no_bytes_unless_it_is_damaged(
    hub: Hub, tmp_path: Path, content: bytes, asked: list[None]
) -> None:
    target = tmp_path / NAME
    begin(target, hub, 1_000_000)
    part_of(target).write_bytes(content)
    assert fetch(target).fetched == len(DATA) * len(asked)
    assert hub.ranges() == asked
    assert_nothing_left(target)


@pytest.mark.skipif(sys.platform == "win32", reason="links of a POSIX file system")
@pytest.mark.parametrize("ending", [".part", ".part.json"])
@pytest.mark.parametrize("join", [os.symlink, os.link])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_link_at_the_name_of_a_part_leads_nowhere(
    hub: Hub, tmp_path: Path, ending: str, join: Callable[[Path, Path], None], wrong: bool
) -> None:
    """Neither the bytes nor the emptying of wrong ones reach a file of another name."""
    precious, target = tmp_path / "precious.txt", tmp_path / NAME
    precious.write_text("mine")
    join(precious, target.with_name(NAME + ending))
    if wrong:
        hub.always = Fault(wrong_bytes=True)
        with pytest.raises(LightningDiTError, match="wrong bytes"):
            fetch(target)
        assert list(tmp_path.glob("weights*")) == []
    else:
        fetch(target)
        assert_nothing_left(target)
    assert precious.read_text() == "mine"


def test_a_file_that_is_no_part_keeps_its_bytes(hub: Hub, tmp_path: Path) -> None:
    part_of(tmp_path / NAME).write_bytes(b"mine")
    fetch(tmp_path / NAME)
    assert (tmp_path / f"{NAME}.part.old-1").read_bytes() == b"mine"
    assert (tmp_path / NAME).read_bytes() == DATA


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a POSIX file system")
@pytest.mark.parametrize("name", [NAME, f"{NAME}.part"])
def test_a_pipe_at_a_name_is_one_line(hub: Hub, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(LightningDiTError, match=f"{name} cannot be written .it is a pipe"):
        fetch(tmp_path / NAME)
    assert (tmp_path / name).is_fifo()


def test_a_good_file_outlives_a_failed_download(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"mine")
    hub.always = Fault(wrong_bytes=True)
    with pytest.raises(LightningDiTError):
        fetch(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == b"mine"


def test_the_file_that_was_there_is_set_aside(hub: Hub, tmp_path: Path) -> None:
    target, aside = tmp_path / NAME, tmp_path / (NAME + ".bad-1")
    target.write_bytes(b"mine")
    downloads.download(downloads.describe(REPO, NAME), target, aside=aside)
    assert (target.read_bytes(), aside.read_bytes()) == (DATA, b"mine")


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(hub: Hub, tmp_path: Path, form: str) -> None:
    began = time.time()
    until = int(began) + 2
    value = "1" if form == "seconds" else email.utils.formatdate(until, usegmt=True)
    hub.faults = [Fault(status=429, headers={"Retry-After": value})]
    fetch(tmp_path / NAME)
    assert time.time() >= (began + 1.0 if form == "seconds" else until)
    assert_nothing_left(tmp_path / NAME)


def test_failures_in_a_row_end_the_download_and_new_bytes_begin_the_row_again(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(status=503), Fault(status=503), Fault(drop_after=1_000_000)]
    hub.always = Fault(status=503)
    with pytest.raises(LightningDiTError, match=r"answered 503; 1.0 MB of 3.0 MB are kept"):
        fetch(tmp_path / NAME)
    # Two failures, one with new bytes, and as many as are allowed from there on.
    assert len(hub.ranges()) == 2 + QUICK.attempts


def test_the_token_stays_with_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(tmp_path / NAME, token=downloads.hub_token())
    tokens = {(seen.host, seen.method, seen.token) for seen in hub.log}
    assert tokens == {("hub", "HEAD", "Bearer secret"), ("hub", "GET", "Bearer secret"), ("cdn", "GET", None)}


def test_the_token_follows_a_redirect_on_the_same_host(hub: Hub, tmp_path: Path) -> None:
    hub.put("someone/new", NAME, DATA)
    path = f"/someone/new/resolve/main/{NAME}"
    for code in (301, 302, 303, 307, 308):
        hub.log.clear()
        remote = downloads.describe(REPO, NAME)
        hub.hub_faults = [Fault(status=code, headers={"Location": path})]
        downloads.download(remote, tmp_path / f"{code}.pt", "secret", QUICK)
        seen = [(seen.path, seen.token) for seen in hub.log if seen.method == "GET"]
        assert seen[1] == (path, "Bearer secret")
        assert seen[2] == (path, None)


def test_the_token_does_not_come_back_along_a_chain_of_redirects(hub: Hub, tmp_path: Path) -> None:
    """hub -> second host -> third host -> the hub again, at two addresses: only the first request carries it."""
    path = f"/someone/small/resolve/main/{NAME}"
    hub.put("someone/small", NAME, DATA, large=False)
    with running_hub() as third:
        third.put(REPO, NAME, DATA)
        hub.faults = [Fault(status=302, headers={"Location": f"{third.cdn}/{REPO}/resolve/main/{NAME}"})]
        third.faults = [Fault(status=307, headers={"Location": hub.endpoint + path})]
        fetch(tmp_path / NAME, token="secret")
        assert [seen.token for seen in third.log] == [None]
    asked = [(seen.host, seen.token) for seen in hub.log if seen.method == "GET"]
    assert asked == [("hub", "Bearer secret"), ("cdn", None), ("hub", None), ("hub", None)]
    assert_nothing_left(tmp_path / NAME)


@pytest.mark.parametrize(("data", "large"), [(DATA, True), (b"statistics", False)], ids=["large", "small"])
def test_the_metadata_is_that_which_the_hubs_own_client_reads(hub: Hub, data: bytes, large: bool) -> None:
    """Whichever version of the client is installed."""
    hub.put(REPO, NAME, data, large)
    read = huggingface_hub.get_hf_file_metadata(
        huggingface_hub.hf_hub_url(REPO, NAME, endpoint=hub.endpoint), token=False
    )
    remote = downloads.describe(REPO, NAME)
    assert (remote.revision, remote.size, remote.etag) == (read.commit_hash, read.size, read.etag) != (None,) * 3
    assert {seen.encoding for seen in hub.log} == {"identity"}


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_mirror_that_leads_to_another_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The token stays with the mirror."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    with running_hub() as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.endpoint)
        for revision in ("main", COMMIT):
            place = {"Location": f"{hub.endpoint}/{REPO}/resolve/{revision}/{NAME}"}
            mirror.hub_faults.append(Fault(status=code, headers=place))
        fetch(tmp_path / NAME, downloads.hub_token())
        assert {seen.token for seen in mirror.log} == {"Bearer secret"}
    assert {seen.token for seen in hub.log} == {None}
    assert_nothing_left(tmp_path / NAME)


def test_a_mirror_below_a_path(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.prefix = "/hf"
    downloads.use_endpoint(f"{hub.endpoint}/hf/")
    fetch(tmp_path / NAME)
    assert {seen.path.split("/")[1] for seen in hub.log if seen.host == "hub"} == {"hf"}
    assert_nothing_left(tmp_path / NAME)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://127.0.0.1:9/x", r"127.0.0.1:9 \(to which 127.0.0.1:\d+ leads\) cannot be reached \(.*refused"),
        ("http://data.invalid/x", r"data.invalid \(to which .*\) cannot be reached"),
        ("https://{cdn}/x", r"localhost:\d+ \(to which .*\) cannot be reached \(.*SSL"),
    ],
    ids=["refused", "no such host", "no TLS"],
)
def test_a_data_host_that_cannot_be_reached_is_named(hub: Hub, tmp_path: Path, location: str, words: str) -> None:
    """The metadata came from the hub, so that its own name would be wrong."""
    remote = downloads.describe(REPO, NAME, QUICK)
    location = location.replace("{cdn}", hub.cdn.removeprefix("http://"))
    hub.hub_faults = [Fault(status=302, headers={"Location": location})] * QUICK.attempts
    fix = "fix: take another mirror: .* --endpoint https://HOST; or fetch the files elsewhere: .* --folder FOLDER"
    with pytest.raises(LightningDiTError, match=f"{words}.*{fix}"):
        downloads.download(remote, tmp_path / NAME, None, QUICK)


@pytest.mark.parametrize(
    ("repo", "token", "words"),
    [
        ("someone/nothing", "", "someone/nothing is not open to this login, or does not exist there .401"),
        ("someone/gated", "", "may not read someone/gated .401.*accept the conditions"),
        ("someone/gated", "token", "may not read someone/gated .403.*accept the conditions"),
        ("someone/other", "", "weights.pt is not in someone/other .404.*a mirror may lag behind the hub"),
    ],
)
def test_refusals_of_the_hub_are_told_apart(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, repo: str, token: str, words: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.put("someone/gated", NAME, DATA)
    hub.put("someone/other", "another.pt", DATA)
    hub.gated.add("someone/gated")
    with pytest.raises(LightningDiTError, match=words):
        downloads.describe(repo, NAME, QUICK)


def test_a_client_that_is_set_offline_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LightningDiTError, match="HF_HUB_OFFLINE is set; fix: unset HF_HUB_OFFLINE"):
        downloads.describe(REPO, NAME, QUICK)
    assert hub.log == []


def test_a_token_that_the_hub_does_not_know_is_said(hub: Hub) -> None:
    hub.hub_faults = [Fault(status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})]
    with pytest.raises(LightningDiTError, match="does not know the token of this login .401.; fix: unset HF_TOKEN"):
        downloads.describe(REPO, NAME, QUICK)


def test_no_network_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(LightningDiTError, match=r"127.0.0.1:9 cannot be reached .*--model bundled"):
        downloads.describe(REPO, NAME)
    assert time.monotonic() - began < 10


def test_too_little_disk(tmp_path: Path) -> None:
    downloads.require_disk(tmp_path / "not" / "there", 1000)
    with pytest.raises(LightningDiTError, match=r"the files may take .*, and .* has .* free"):
        downloads.require_disk(tmp_path, 10**18)


def test_two_processes_do_not_write_one_part(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    remote = downloads.describe(REPO, NAME)
    first = downloads.PartFile(tmp_path / NAME, remote)
    with pytest.raises(LightningDiTError, match="written by another process"):
        downloads.PartFile(tmp_path / NAME, remote)
    first.close()
    fetch(tmp_path / NAME)
    assert_nothing_left(tmp_path / NAME)


def test_a_part_that_was_finished_meanwhile_is_not_emptied(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process opens the part, then the first gives it its final name and lets go."""
    pytest.importorskip("fcntl")
    remote = downloads.describe(REPO, NAME)
    first = downloads.PartFile(tmp_path / NAME, remote)
    first.take_up()
    first.note(None)
    first.write(DATA)
    claim = downloads.PartFile._claim

    def claim_late(second: downloads.PartFile) -> None:
        first.finish(None)
        claim(second)

    monkeypatch.setattr(downloads.PartFile, "_claim", claim_late)
    with pytest.raises(LightningDiTError, match="written by another process"):
        downloads.PartFile(tmp_path / NAME, remote)
    first.close()
    assert_nothing_left(tmp_path / NAME)


@pytest.mark.parametrize("address", ["http://user:secret@127.0.0.1:9", "secret@hub.example", "https://secret@h/@x"])
def test_a_login_in_the_address_is_neither_sent_nor_printed(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(LightningDiTError, match="comes with a login, which is not sent; fix: .*HF_TOKEN") as caught:
        downloads.describe(REPO, NAME, QUICK)
    assert "secret" not in str(caught.value)


def test_endpoint_must_be_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    downloads.use_endpoint(None)
    assert "HF_ENDPOINT" not in os.environ
    monkeypatch.setenv("HF_ENDPOINT", "http://a")
    downloads.use_endpoint("https://mirror.example/hf/")
    assert os.environ["HF_ENDPOINT"] == "https://mirror.example/hf"
    for address in (
        "mirror",
        "http://host:port",
        "http://[bad",
        "http://exa mple",
        "ftp://host",
        "https://https://host",
        "https：//镜像.example",
    ):
        with pytest.raises(LightningDiTError, match=re.escape(f"{address!r} is no address")) as error:
            downloads.use_endpoint(address)
        assert "--endpoint https://HOST, or" in str(error.value)


@pytest.mark.parametrize(
    "typed", ["mirror.example", '"https://mirror.example"', " https://mirror.example ", "“mirror.example”"]
)
def test_an_address_that_is_almost_right_is_named_in_the_fix(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's %env keeps quotation marks."""
    monkeypatch.setenv("HF_ENDPOINT", typed)
    with pytest.raises(LightningDiTError, match="is no address.*--endpoint https://mirror.example, or unset"):
        downloads.use_endpoint(None)


def test_a_token_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "我的")
    with pytest.raises(LightningDiTError, match="HF_TOKEN holds characters that no token of the hub has"):
        downloads.describe(REPO, NAME, QUICK)


def test_a_proxy_that_is_not_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "socks5://user:secret@127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    words = r"hub.invalid through the proxy 127.0.0.1:1 cannot be reached.*fix: name an HTTP proxy in https_proxy"
    with pytest.raises(LightningDiTError, match=words) as caught:
        downloads.describe(REPO, NAME, QUICK)
    assert "secret" not in str(caught.value)


def test_the_background_hash_is_the_hash_of_the_bytes_in_order() -> None:
    remote = RemoteFile(NAME, "", len(DATA), hashlib.sha256(DATA).hexdigest(), "main")
    running, draw, start = BackgroundHash(remote), random.Random(0), 0
    while start < len(DATA):
        end = start + draw.randrange(1, 60_000)
        running.update(DATA[start:end])
        start = end
    assert running.hexdigest() == remote.etag
    running.close()


def test_what_goes_wrong_in_the_hashing_thread_is_raised_here() -> None:
    running = BackgroundHash(RemoteFile(NAME, "", 1, "0" * 64, "main"))
    running.update("no bytes")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        running.hexdigest()
    running.close()


def test_no_thread_is_left_behind(hub: Hub, tmp_path: Path) -> None:
    def hashing() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]

    hub.faults = [Fault(drop_after=1_000_000), Fault(status=404)]
    with pytest.raises(LightningDiTError):
        fetch(tmp_path / NAME)
    assert hashing() == []
    fetch(tmp_path / NAME)
    assert hashing() == []


def test_a_pipe_gets_plain_lines_with_speed_and_time_left(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.05)
    begin(tmp_path / NAME, hub, 2_000_000)
    capsys.readouterr()
    hub.faults = [Fault(pace=3_000_000)]
    fetch(tmp_path / NAME)
    said = capsys.readouterr().out
    lines = re.findall(r"^  weights\.pt: (.*) of 3\.0 MB, (\d+) %, (.*)/s, about .* s left$", said, re.MULTILINE)
    assert "goes on after 2.0 MB of 3.0 MB" in said
    assert len(lines) >= 2
    shares = [int(share) for _, share, _ in lines]
    assert shares == sorted(shares)
    assert shares[0] >= 66
    assert "\r" not in said


def test_reading_a_part_again_shows_progress(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / NAME, hub, 2_000_000)
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    fetch(tmp_path / NAME)
    said = capsys.readouterr().out
    assert "  reading weights.pt.part again: 2.0 MB of 2.0 MB, 100 %, " in said
    assert hub.ranges() == ["bytes=2000000-"]


FULL_DISK = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from setup_steps import downloads, project
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
remote = downloads.RemoteFile(**json.loads(sys.argv[2]))
project.run(lambda: bool(downloads.download(remote, Path(sys.argv[3]))))
"""


def test_a_disk_that_takes_no_more_is_one_line_and_the_part_stays(hub: Hub, tmp_path: Path) -> None:
    """The limit of a process on file sizes stands for the full disk."""
    pytest.importorskip("resource")
    remote = json.dumps(vars(downloads.describe(REPO, NAME)))
    command = [sys.executable, "-c", FULL_DISK, str(PROJECT), remote, str(tmp_path / NAME)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*weights.pt.part cannot be written \(.*\); fix: free space .*\n", done.stderr)
    assert part_of(tmp_path / NAME).read_bytes() == DATA[:1_500_000]
    hub.log.clear()
    fetch(tmp_path / NAME)
    assert hub.ranges() == ["bytes=1500000-"]
    assert_nothing_left(tmp_path / NAME)


NURSERY = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from setup_steps import downloads
remote, target = json.loads(sys.argv[2]), Path(sys.argv[3])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        url = remote["url"] + "?run=" + line.strip()
        downloads.download(downloads.RemoteFile(**{**remote, "url": url}), target)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""
KILLS = 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_random_moments(hub: Hub, tmp_path: Path) -> None:
    """After each kill -9 the part is a true beginning of the file, and the next run asks for what
    comes behind it and for nothing else. Each run says its number in its address.

    One process that has imported the downloader forks the runs, since a start of Python takes longer
    than what is tested. Half of the runs are killed at a random moment after their start, so that the
    moments before the first byte are among them, and half at one after a new byte.
    """
    target, draw, sizes = tmp_path / NAME, random.Random(1), []
    remote = json.dumps(vars(downloads.describe(REPO, NAME)))
    command = [sys.executable, "-c", NURSERY, str(PROJECT), remote, str(target)]
    hub.always = Fault(pace=500_000)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        assert nursery.stdin
        assert nursery.stdout
        for run in range(KILLS):
            sizes.append(size_of(part_of(target)))
            print(run, file=nursery.stdin, flush=True)
            child, deadline = int(nursery.stdout.readline()), time.monotonic() + 60
            while run % 2 and size_of(part_of(target)) <= sizes[-1] and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.06))
            os.kill(child, signal.SIGKILL)
            assert nursery.stdout.readline() == "ended\n"
            held = part_of(target).read_bytes() if part_of(target).exists() else b""
            assert held == DATA[: len(held)]
            assert len(held) >= sizes[-1]
        nursery.stdin.close()
    assert 0 < len(held) < len(DATA)
    for seen in (seen for seen in hub.log if seen.method == "GET" and seen.host == "cdn"):
        before = sizes[int(parse_qs(urlsplit(seen.path).query)["run"][0])]
        assert seen.range == (f"bytes={before}-" if before else None)
    hub.always = None
    hub.log.clear()
    assert fetch(target).resumed_from == len(held)
    assert hub.ranges() == [f"bytes={len(held)}-"]
    assert_nothing_left(target)
