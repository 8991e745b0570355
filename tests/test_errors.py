"""Errors in one line, and their fixes in Chinese: every fix that the code can show has a text in the catalogue."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from LightningDiT import errors
from LightningDiT.errors import JOINTS, in_chinese
from tests.conftest import PACKAGE, PROJECT
from tests.fixes_of_code import COMMAND, Code, stands_for

FOLDERS = (PACKAGE, PROJECT / "setup_steps", PROJECT / "studies")
CATALOGUE: dict[str, str] = json.loads((PACKAGE / "fixes_zh.json").read_text(encoding="utf-8"))
HAN = "[\u3400-\u9fff]"
#: Words of Latin letters that Chinese texts on this topic keep; commands, options, keys and names of files are others.
KEPT = {*("docs", "dropout", "import", "notebook", "tokenizer", "torch", "train", "transformer", "venv", "wheel")}
KEPT |= {*("hub", "lossconfig", "path", "safetensors", "timm", "x")}
KEPT |= {*("apt", "clone", "false", "git", "install", "ls", "mu", "python", "sigma", "torchrun", "true")}


@pytest.fixture(scope="module")
def fixes() -> dict[str, str]:
    """Every fix of the code with a place where it is raised."""
    paths = [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))]
    return Code([*paths, *sorted(PROJECT.glob("*.py"))]).fixes()


def test_every_fix_has_a_chinese_text(fixes: dict[str, str]) -> None:
    """If this fails, fill in the lines that it shows and put them into LightningDiT/fixes_zh.json, sorted."""
    missing = {}
    for text, place in fixes.items():
        if in_chinese(text) is None:
            parts = [part for part in re.split("|".join(JOINTS), text) if in_chinese(part) is None]
            missing |= dict.fromkeys((stands_for("{}", part) for part in parts or [text]), place)
    assert not missing, "".join(f'\n{place}\n  {json.dumps(row)}: "",' for row, place in missing.items())


def test_the_chinese_is_whole_and_chinese(fixes: dict[str, str]) -> None:
    """Values, commands and options stay, English words go; signs are full-width; a space stands beside Latin."""
    wrong = []
    for text in fixes:
        chinese = in_chinese(text)
        if chinese is None:  # the test above says so
            continue
        kept = [sorted(re.findall(rf"VALUE\d|{re.escape(COMMAND)}|--[\w-]+", line)) for line in (text, chinese)]
        prose = re.sub(rf"{re.escape(COMMAND)}|(?<=运行 )[ -~]+|--[\w-]+ \w+|VALUE\d|`.*`|'.*'|\".*\"", "", chinese)
        english = set(re.findall(r"(?<![\w.@/=:*-])[a-z]+(?![\w.@/=:(*+-])", prose)) - KEPT
        signs = re.findall(rf"{HAN} ?[,;:?)]|[,;:?] ?{HAN}|{HAN}[!(A-Za-z0-9]|[!)A-Za-z0-9]{HAN}", chinese)
        if kept[0] != kept[1] or english or signs or not re.search(HAN, chinese):
            wrong.append((text, chinese, kept, english, signs))
    assert not wrong, "\n".join(map(str, wrong))


def test_the_catalogue_has_no_row_without_a_fix(fixes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(CATALOGUE) == sorted(CATALOGUE)
    marks = {row: f"<{number}>" + "{}" * row.count("{}") for number, row in enumerate(CATALOGUE)}
    monkeypatch.setattr(errors, "_catalogue", lambda: marks)
    used = {mark for text in fixes for mark in re.findall(r"<\d+>", in_chinese(text) or "")}
    dead = [row for row, mark in marks.items() if mark.partition(">")[0] + ">" not in used]
    assert not dead, "rows to remove from LightningDiT/fixes_zh.json:\n" + "\n".join(dead)


@pytest.mark.parametrize(
    ("fix", "chinese"),
    [
        ("python step3_setup_configs.py", "运行 python step3_setup_configs.py"),
        (".venv/bin/python a.py --output 'a, or b; c (d)'", "运行 .venv/bin/python a.py --output 'a, or b; c (d)'"),
        (
            "'C:\\Program Files\\python.exe' -m ensurepip --upgrade",
            "运行 'C:\\Program Files\\python.exe' -m ensurepip --upgrade",
        ),
        ("name another file, or mv '/a, or b' '/a, or b.old'", "指定其他文件，或运行 mv '/a, or b' '/a, or b.old'"),
        ("set data.num_classes: 3 in /数据/a b.yaml", "在 /数据/a b.yaml 中设置 data.num_classes: 3"),
        ("name another {0} %s \\1 file", "指定其他 {0} %s \\1 file"),
        ("do what nobody has thought of", None),
        ("name another file, or do what nobody has thought of", None),
        ("name /tmp/a, or b", None),
        ("git restore the page or remove it", None),
        ("", None),
        ("name another file" + ", or name another file" * 40 + ", or x", None),
    ],
)
def test_a_fix_is_put_into_chinese_whole_or_not_at_all(fix: str, chinese: str | None) -> None:
    assert in_chinese(fix) == chinese


def code(tmp_path: Path, text: str) -> dict[str, str]:
    """Return what the reader finds in a module of this text."""
    path = tmp_path / "module.py"
    path.write_text(text, encoding="utf-8")
    return Code([path]).fixes()


def test_the_reader_of_the_code_finds_each_form_of_a_fix(tmp_path: Path) -> None:
    """A new form that it cannot read ends with the place, not with a gap in the list."""
    text = """
AGAIN = "run it"
TABLE = {1: "free", **dict.fromkeys((2, 3), "move")}
class OtherError(LightningDiTError): pass
class OwnError(LightningDiTError):
    def __init__(self, name):
        super().__init__(name, f"lower {name}")
def fix_of(x):
    return "a" if x else f"name {x}, or {AGAIN}"
def pair(x):
    return "message", "of a pair"
def check(x, fix="default"):
    fix = fix or "never"
    raise OtherError("m", fix)
def f(x):
    for weight, fix in ((1, "set one"), (2, "set two")):
        raise LightningDiTError("m", fix)
    raise LightningDiTError("m", TABLE.get(x, "other"))
    raise LightningDiTError(*pair(x))
    raise LightningDiTError("m", fix=fix_of(x))
    check(x, "given")
    if said := "walrus": raise LightningDiTError("m", said)
    command = partial(again, "a")
    raise LightningDiTError("m", command("b"))
    with fixed_by(f"{again()}, or {x!r}" + " too" * x): pass
"""
    assert sorted(code(tmp_path, text)) == sorted(
        [
            *("lower VALUE1", "a", "name VALUE1, or run it", "of a pair", "default", "never", "given", "set one"),
            *(
                "set two",
                "free",
                "move",
                "other",
                f"{COMMAND}, or VALUE1",
                f"{COMMAND}, or VALUE1 too",
                "walrus",
                COMMAND,
            ),
        ]
    )


@pytest.mark.parametrize("fix", ["", ", x.y", ", None", ", unknown(x)", ", fix=g[0]", ", f'name {x}' if x else 3"])
def test_a_fix_that_cannot_be_read_is_named_with_its_place(fix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"module.py:1"):
        code(tmp_path, f"def f(x): raise LightningDiTError('m'{fix})")


def test_a_fix_that_grows_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"module.py:4: fix \+= ', or b' changes a fix"):
        code(tmp_path, "def f(x):\n  fix = 'a'\n  fix += ', or b'\n  raise LightningDiTError('m', fix)")
