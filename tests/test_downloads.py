"""The downloader against a real server on 127.0.0.1 and the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from setup_steps import downloads
from setup_steps.console import PROJECT, StepError
from setup_steps.downloads import Patience, RemoteFile
from tests.hub_server import COMMIT, Fault, Hub, running_hub

REPO, NAME = "someone/weights", "weights.pt"
DATA = random.Random(0).randbytes(3_000_000)
QUICK = Patience(timeout=5, attempts=3, backoff=0.01, longest_wait=2)


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
    """Leave a part of about `count` bytes, as a run that was cut off does."""
    hub.faults[:] = [Fault(drop_after=count)]
    hub.always = Fault(status=503)
    with pytest.raises(StepError):
        fetch(target)
    hub.always = None
    hub.log.clear()


def assert_nothing_left(target: Path) -> None:
    """Only the final file is there: no part, no state."""
    assert target.read_bytes() == DATA
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


def test_small_file_is_checked_by_its_git_hash(hub: Hub, tmp_path: Path) -> None:
    hub.put(REPO, NAME, b"statistics", large=False)
    assert downloads.describe(REPO, NAME).hashed_by == "git"
    fetch(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == b"statistics"
    hub.always = Fault(wrong_bytes=True)
    (tmp_path / NAME).unlink()
    with pytest.raises(StepError, match="wrong bytes"):
        fetch(tmp_path / NAME)
    assert not (tmp_path / NAME).exists()


def test_a_dropped_connection_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(drop_after=1_000_000), Fault(drop_after=500_000)]
    fetch(tmp_path / NAME)
    assert hub.ranges() == [None, "bytes=1000000-", "bytes=1500000-"]
    assert hub.sent == len(DATA)
    assert_nothing_left(tmp_path / NAME)


def test_the_next_run_goes_on_where_the_last_one_stopped(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / NAME
    begin(target, hub, 1_200_000)
    assert not target.exists()
    assert part_of(target).read_bytes() == DATA[:1_200_000]
    result = fetch(target)
    assert (result.resumed_from, result.fetched) == (1_200_000, len(DATA) - 1_200_000)
    assert hub.ranges() == ["bytes=1200000-"]
    assert next(seen.if_range for seen in hub.log if seen.range).startswith('"cdn-')
    assert_nothing_left(target)


def test_a_server_that_ignores_ranges_never_shortens_the_part(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / NAME
    begin(target, hub, 2_000_000)
    hub.faults = [Fault(ignore_range=True, drop_after=700_000), Fault(ignore_range=True)]
    fetch(target)
    assert hub.ranges() == ["bytes=2000000-", "bytes=2000000-"]
    assert_nothing_left(target)


def test_a_file_that_changed_between_runs_is_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    target, other = tmp_path / NAME, DATA[::-1]
    begin(target, hub, 1_000_000)
    hub.put(REPO, NAME, other)
    assert fetch(target).resumed_from == 0
    assert hub.ranges() == [None]
    assert target.read_bytes() == other


def test_a_damaged_part_is_noticed_and_replaced(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / NAME
    begin(target, hub, 1_000_000)
    part_of(target).write_bytes(b"x" * 1_000_000)
    fetch(target)
    assert hub.ranges() == ["bytes=1000000-", None]
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


def test_a_complete_part_needs_no_bytes(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / NAME
    begin(target, hub, 1_000_000)
    part_of(target).write_bytes(DATA)
    assert fetch(target).fetched == 0
    assert hub.ranges() == []
    assert_nothing_left(target)


def test_wrong_bytes_of_the_right_length_leave_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.always = Fault(wrong_bytes=True)
    with pytest.raises(StepError, match=r"wrong bytes came .*; mend: "):
        fetch(tmp_path / NAME)
    assert list(tmp_path.glob("weights*")) == []


def test_a_good_file_outlives_a_failed_download(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"mine")
    hub.always = Fault(wrong_bytes=True)
    with pytest.raises(StepError):
        fetch(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == b"mine"


def test_the_file_that_was_there_is_set_aside(hub: Hub, tmp_path: Path) -> None:
    target, aside = tmp_path / NAME, tmp_path / (NAME + ".bad-1")
    target.write_bytes(b"mine")
    downloads.download(downloads.describe(REPO, NAME), target, aside=aside)
    assert (target.read_bytes(), aside.read_bytes()) == (DATA, b"mine")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.faults = [Fault(status=status), Fault(status=status)]
    hub.hub_faults = [Fault(status=status)]
    fetch(tmp_path / NAME)
    assert len(hub.ranges()) == 3
    assert_nothing_left(tmp_path / NAME)


def test_retry_after_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(status=429, headers={"Retry-After": "1"})]
    began = time.monotonic()
    fetch(tmp_path / NAME)
    assert time.monotonic() - began >= 1.0
    hub.faults = [Fault(status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(StepError, match="asks to wait 1 h 00 min"):
        downloads.download(downloads.describe(REPO, NAME), tmp_path / "other.pt", None, QUICK)


def test_a_server_that_stays_down_ends_the_download(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / NAME
    hub.faults = [Fault(drop_after=1_000_000)]
    hub.always = Fault(status=503)
    remote = RemoteFile(NAME, f"{hub.cdn}/{REPO}/resolve/main/{NAME}", len(DATA), "0" * 64, "main")
    with pytest.raises(StepError, match=r"answered 503; 1.0 MB of 3.0 MB are kept"):
        downloads.download(remote, target, None, QUICK)
    # One failure with new bytes, then as many as are allowed without.
    assert len(hub.ranges()) == QUICK.attempts
    assert part_of(target).stat().st_size == 1_000_000


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "not open to this login"), (403, "may not read someone/weights"), (404, "is not in")],
)
def test_refusals_name_the_mend(hub: Hub, tmp_path: Path, status: int, words: str) -> None:
    for where in (hub.hub_faults, hub.faults):
        where[:] = [Fault(status=status)]
        with pytest.raises(StepError, match=f"{words}.*{status}.*; mend: .*step2") as caught:
            fetch(tmp_path / NAME)
        assert "\n" not in str(caught.value)


def test_416_starts_again(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / NAME
    begin(target, hub, 1_000_000)
    hub.faults = [Fault(status=416)]
    fetch(target)
    assert hub.ranges() == ["bytes=1000000-", None]
    assert_nothing_left(target)


def test_a_stall_times_out(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(drop_after=1_000_000, stall=3)]
    began = time.monotonic()
    fetch(tmp_path / NAME, patience=Patience(timeout=0.5, attempts=2, backoff=0.01))
    assert time.monotonic() - began < 2.5
    assert_nothing_left(tmp_path / NAME)


def test_a_lie_about_the_length_is_not_believed(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(lie=100)]
    fetch(tmp_path / NAME)
    assert_nothing_left(tmp_path / NAME)
    hub.always = Fault(lie=100)
    with pytest.raises(StepError, match="offers 3000100 bytes, the hub says 3000000"):
        downloads.download(downloads.describe(REPO, NAME), tmp_path / "other.pt", None, QUICK)


def test_a_web_page_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(html=True)]
    with pytest.raises(StepError, match="a web page came in place of the file"):
        fetch(tmp_path / NAME)
    hub.hub_faults = [Fault(html=True)]
    with pytest.raises(StepError, match="does not answer like a hub"):
        fetch(tmp_path / NAME)


def test_the_token_stays_with_the_hub(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path / NAME, token="secret")
    tokens = {(seen.host, seen.token) for seen in hub.log if seen.method == "GET"}
    assert tokens == {("hub", "Bearer secret"), ("cdn", None)}


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


def test_no_network_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(StepError, match=r"127.0.0.1:9 cannot be reached .*--model bundled"):
        downloads.describe(REPO, NAME)
    assert time.monotonic() - began < 10


def test_too_little_disk(tmp_path: Path) -> None:
    downloads.require_disk(tmp_path / "not" / "there", 1000)
    with pytest.raises(StepError, match="are needed on the disk of"):
        downloads.require_disk(tmp_path, 10**18)


def test_two_processes_do_not_write_one_part(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    remote = downloads.describe(REPO, NAME)
    first = downloads.PartFile(tmp_path / NAME, remote)
    with pytest.raises(StepError, match="written by another process"):
        downloads.PartFile(tmp_path / NAME, remote)
    first.close()
    fetch(tmp_path / NAME)
    assert_nothing_left(tmp_path / NAME)


def test_endpoint_must_be_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    downloads.use_endpoint(None)
    assert "HF_ENDPOINT" not in os.environ
    monkeypatch.setenv("HF_ENDPOINT", "http://a")
    downloads.use_endpoint("https://mirror.example/")
    assert os.environ["HF_ENDPOINT"] == "https://mirror.example"
    with pytest.raises(StepError, match="'mirror' is no address"):
        downloads.use_endpoint("mirror")


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from setup_steps import downloads
remote = downloads.RemoteFile(**json.loads(sys.argv[2]))
downloads.download(remote, Path(sys.argv[3]))
"""


def test_killed_at_random_moments(hub: Hub, tmp_path: Path) -> None:
    """After kill -9 the part is a true beginning of the file, and a rerun fetches only the rest."""
    target = tmp_path / NAME
    hub.always = Fault(drop_after=300_000, stall=0.3)
    remote = json.dumps(vars(downloads.describe(REPO, NAME)))
    draw = random.Random(1)
    for number in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(PROJECT), remote, str(target)],
            stdout=subprocess.DEVNULL,
        )
        # Killed at a random moment after its first bytes (a start takes seconds on a busy machine).
        deadline = time.monotonic() + 60
        while size_of(part_of(target)) <= number * 300_000 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.wait()
        held = part_of(target).read_bytes()
        assert held == DATA[: len(held)]
        assert len(held) > number * 300_000
    hub.always, held = None, part_of(target).stat().st_size
    hub.log.clear()
    assert 0 < held < len(DATA)
    assert fetch(target).resumed_from == held
    assert_nothing_left(target)
