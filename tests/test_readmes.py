"""The Chinese pages keep step with the English ones, use one term for one thing, and are set as Chinese is."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from setup_steps.weights import SETS
from tests.conftest import PROJECT

#: One thing, one term, in every Chinese text: the term, and a pattern of the variants that are not used for it.
TERMS = {
    "CPU 核心": r"CPU 核(?!心)|处理器核",
    "Hub": r"\bhub\b",
    "Transformer": r"\btransformer\b",
    "令牌": r"\btoken\b",
    "分片": r"\bshards?\b|碎片",
    "图像": r"图片|图象",
    "官方权重": r"发布的?权重|预训练权重",
    "引导强度": r"引导(?:系数|比例|尺度|权重|力度)|\bCFG\b",
    "批大小": r"批次|批量|批尺寸|\bbatch\b",
    "挂载": r"附加的?数据|关联的?数据",
    "数据集": r"资料集|数据集合",
    "时频图": r"频谱图|光谱图|谱图",
    "显存": r"GPU ?内存|视频内存",
    "检查点": r"存档点|\bcheckpoints?\b",
    "步骤": r"第 ?[\d一二三四] ?步|步骤[\d一二三四]",
    "求值": r"函数评估|评估次数|\bNFE\b",
    "求解器": r"采样器|解算器|\bsolvers?\b",
    "潜变量": r"隐变量|潜在变量|\blatents?\b(?! diffusion)",
    "潜变量统计量": r"统计文件|潜变量(?:的)?统计(?!量)",
    "潜空间": r"隐空间|潜在空间",
    "文件夹": r"(?<!工作)(?<!当前)目录",
    "笔记本电脑": r"笔记本(?!电脑)",  # a Kaggle notebook stays "notebook"
    "类别名": r"类名|类别的?名称",
    "精确率": r"精准率|查准率|\brecall\b",
    "翻转": r"镜像(?!站)",  # 镜像站 is a mirror of the hub
    "自带模型": r"内置的?模型|捆绑|自带的小模型",
}


@dataclass(frozen=True)
class Pair:
    """An English page and its Chinese counterpart.

    Attributes:
        headings: those of the English page, each with its Chinese one.
        added: headings of the Chinese page alone.
        figures: by English heading, the English and the Chinese figures that differ, with the reason in a comment.
    """

    english: str
    chinese: str
    headings: dict[str, str]
    added: tuple[str, ...] = ()
    figures: dict[str, tuple[str, str]] = field(default_factory=dict)


README = Pair(
    "README.md",
    "README.zh-CN.md",
    {
        "LightningDiT + VA-VAE that runs": "能真正运行的 LightningDiT + VA-VAE",
        "Two commands": "两条命令",
        "As a package": "作为软件包安装",
        "Step by step, as in a Kaggle notebook": "分步执行（Kaggle notebook 中的做法）",
        "On Kaggle": "在 Kaggle 上",
        "Choosing what to sample": "选择要生成的内容",
        "The published weights": "官方权重",
        "The bundled model": "自带模型",
        "Training your own": "训练自己的模型",
        "Speed": "速度",
        "Credits": "致谢",
    },
    added=("项目结构", "预期结果", "常见问题", "下一步：微多普勒"),
    figures={"The bundled model": ("2.7 4.8", "270 480")},  # Chinese counts millions in 万, ten thousands
)
SETUP = Pair(
    "docs/setup.md",
    "docs/setup.zh-CN.md",
    {
        "Set-up": "安装与配置",
        "Messages in Chinese": "中文提示",
        "Step 1: which torch": "步骤 1：用哪个 torch",
        "Step 1: which other packages": "步骤 1：其他软件包的版本",
        "Step 1: from a mirror, or without internet": "步骤 1：使用镜像站，或没有网络",
        "Step 2: the files": "步骤 2：文件",
        "Where the weights lie": "权重放在哪里",
        "Mirrors": "镜像站",
        "Files from elsewhere": "其他来源的文件",
        "Step 3: the configuration": "步骤 3：配置",
        "The repair": "修复",
        "Common problems": "常见问题",
    },
)
IMAGES = Pair(
    "docs/images.md",
    "docs/images.zh-CN.md",
    {
        "Step 4: several GPUs, the report, captions": "步骤 4：多个 GPU、报告、图注",
        "Several GPUs": "多个 GPU",
        "The report of the simple form": "简化版的报告",
        "Captions": "图注",
    },
)
RADAR = Pair(
    "docs/radar.md",
    "docs/radar.zh-CN.md",
    {
        "Spectrograms of people who walk": "行走者的时频图",
        "From a folder to samples": "从文件夹到样本",
        "Data": "数据",
        "Audit": "检查",
        "Split": "划分",
        "Levels and draws": "电平与变体",
        "Augmentation": "数据增强",
        "What a training refuses": "训练拒绝什么",
        "Tokenizer": "Tokenizer",
        "Training on few images": "用少量图像训练",
        "Conditions": "条件",
        "U-Net": "U-Net",
        "Part of the network": "只训练一部分",
        "Choosing the weights": "选择权重",
        "Sweep of guidance": "引导的扫描",
        "A start: models/walkers": "起点：models/walkers",
        "Transformer or U-Net, fine-tuned or from scratch": "Transformer 还是 U-Net，微调还是从头训练",
        "Does generated data help?": "生成的数据有帮助吗",
        "On Kaggle": "在 Kaggle 上",
        "Simulator": "仿真器",
        "What is simulated": "仿真了什么",
        "What is not": "没有仿真什么",
        "How well walkers can be told apart": "行走者能在多大程度上区分",
        "Limits": "局限",
    },
)
PAIRS = (README, SETUP, IMAGES, RADAR)
PROMISES = "docs/promises.md"  # its table has an English and a Chinese column
#: Each of their cells of text is English first, then Chinese.
NOTEBOOKS = ("kaggle_reproduction.ipynb", "kaggle_micro_doppler.ipynb")
FIXES = "LightningDiT/fixes_zh.json"  # from English to Chinese
CHINESE_PAGES = tuple(pair.chinese for pair in PAIRS)
CHINESE_TEXTS = (*CHINESE_PAGES, PROMISES, *NOTEBOOKS, FIXES)
PAGES = sorted(
    path.relative_to(PROJECT).as_posix()
    for folder in (PROJECT, PROJECT / "docs", PROJECT / "models" / "fashion-mnist")
    for path in folder.glob("*.md")
)

FENCE = "```"
MEASURED = re.compile(r"(?s)<!-- (.+?): begin -->.*?<!-- \1: end -->")  # by a study, on the English page or on both
CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
ITEM = re.compile(r"- |\d+\. ")
BARE_CODE = re.compile(  # in a text without marks: options and their values, keys, files, calls, places to fill in
    r"`[^`]*`|'[a-z]+'|\"[a-z]+\"|--[a-z-]+(?:[ =][\w./{}]+)?|!?\{\d?\}|\w+(?:[._]\w+)+(?:\([^()]*\))?", re.ASCII
)
COMMENT = re.compile(r"(?:^|\s)#.*$")
FIGURE = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)*(?:e-?\d+)?")
HAN = r"[\u3400-\u9fff]"
FULL_WIDTH = "，。；：！？、（）“”《》"


@dataclass
class Section:
    """A heading with its number of marks, the text below it, and its blocks of code."""

    heading: str
    level: int
    text: list[str] = field(default_factory=list)
    blocks: list[list[str]] = field(default_factory=list)

    @property
    def prose(self) -> str:
        return " ".join(self.text)

    def commands(self) -> list[list[str]]:
        """Return the lines of each block without comments."""
        return [[bare for line in block if (bare := COMMENT.sub("", line).rstrip())] for block in self.blocks]

    def code(self) -> set[str]:
        return {" ".join(span.split()) for span in CODE.findall(self.prose)}

    def links(self) -> Counter[str]:
        return Counter(target for _, target in LINK.findall(self.prose))

    def figures(self) -> Counter[str]:
        return Counter(FIGURE.findall(CODE.sub(" ", LINK.sub(r"\1", self.prose))))

    def rows(self) -> list[int]:
        """Return the number of columns in each row of its tables."""
        return [len(cells(line)) for line in self.text if line.startswith("|")]

    def parts(self) -> list[str]:
        """Return what its text consists of: paragraphs and items of lists, in order."""
        found = []
        for before, line in zip(["", *self.text], self.text, strict=False):
            if ITEM.match(line):
                found.append("item")
            elif line and not before and not line.startswith("|"):
                found.append("paragraph")
        return found


def read(name: str) -> str:
    """Return a page, or a notebook's text, or the Chinese texts of a catalogue, as Markdown."""
    text = (PROJECT / name).read_text(encoding="utf-8")
    if name in NOTEBOOKS:
        return "\n\n".join(notebook_texts(name))
    if name == FIXES:
        return "\n\n".join(
            BARE_CODE.sub(lambda code: f"`{code[0].strip('`')}`", fix) for fix in json.loads(text).values()
        )
    return text


def notebook_texts(name: str) -> list[str]:
    cells = json.loads((PROJECT / name).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def sections(page: str) -> list[Section]:
    found: list[Section] = []
    inside = False
    for line in page.splitlines():
        heading = re.match(r"(#+) (.*)", line)
        if line.startswith(FENCE):
            inside = not inside
            if inside:
                found[-1].blocks.append([])
        elif inside:
            found[-1].blocks[-1].append(line)
        elif heading:
            found.append(Section(heading[2], len(heading[1])))
        else:
            found[-1].text.append(line)
    return found


def matched(pair: Pair) -> list[tuple[Section, Section]]:
    """Return each English section with its Chinese one; the test of sections finds those without a counterpart."""
    chinese = {section.heading: section for section in sections(MEASURED.sub("", read(pair.chinese)))}
    page = MEASURED.sub("", read(pair.english))
    both = [(section, chinese.get(pair.headings.get(section.heading))) for section in sections(page)]
    return [(english, found) for english, found in both if found]


def in_chinese(link: str, pair: Pair) -> str:
    """Return the Chinese page's link: to a Chinese page if there is one, but the line of languages leads back."""
    if link == Path(pair.chinese).name:
        return Path(pair.english).name
    page, mark, heading = link.partition("#")
    for other in PAIRS:
        if page == other.english:
            headings = {anchor(english): anchor(chinese) for english, chinese in other.headings.items()}
            return other.chinese + mark + headings.get(heading, heading)
    return link


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.english)
def test_both_pages_have_the_same_sections(pair: Pair) -> None:
    english, chinese = sections(read(pair.english)), sections(read(pair.chinese))
    assert [section.heading for section in english] == list(pair.headings)
    shared = [section for section in chinese if section.heading not in pair.added]
    assert [section.heading for section in shared] == list(pair.headings.values())
    assert [section.level for section in shared] == [section.level for section in english]
    assert set(pair.added) <= {section.heading for section in chinese}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.english)
def test_both_pages_have_the_same_commands(pair: Pair) -> None:
    for english, chinese in matched(pair):
        assert chinese.commands() == english.commands(), chinese.heading
        assert chinese.code() == english.code(), chinese.heading


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.english)
def test_both_pages_have_the_same_paragraphs_figures_and_tables(pair: Pair) -> None:
    for english, chinese in matched(pair):
        assert chinese.parts() == english.parts(), chinese.heading
        ours, theirs = (Counter(text.split()) for text in pair.figures.get(english.heading, ("", "")))
        figures = english.figures()
        assert ours <= figures, f"{english.heading}: an exception that is none"
        assert chinese.figures() == figures - ours + theirs, chinese.heading
        assert chinese.rows() == english.rows(), chinese.heading


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.english)
def test_both_pages_have_the_same_links(pair: Pair) -> None:
    for english, chinese in matched(pair):
        expected = Counter({in_chinese(link, pair): count for link, count in english.links().items()})
        assert chinese.links() == expected, chinese.heading


def test_the_promises_are_the_same_in_both_languages() -> None:
    rows = [cells(line) for section in sections(read(PROMISES)) for line in section.text if line.startswith("|")]
    assert len(rows) >= 20
    for _, english, chinese in rows:
        both = [Section("", 1, [text]) for text in (english, chinese)]
        assert both[0].code() == both[1].code(), english
        assert both[0].figures() == both[1].figures(), english
        assert both[0].links() == both[1].links(), english


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_says_the_same_in_both_languages(name: str) -> None:
    """Its headings have both languages in one line."""
    for text in notebook_texts(name):
        lines = [line for line in text.splitlines() if not line.startswith(("#", "---"))]
        english = Section("", 1, [line for line in lines if not re.search(HAN, line)])
        chinese = Section("", 1, [line for line in lines if not line or re.search(HAN, line)])
        pages = {pair.english: pair.chinese for pair in PAIRS}
        assert chinese.code() == {pages.get(code, code) for code in english.code()}, text
        assert chinese.figures() == english.figures(), text
        assert chinese.parts() == english.parts(), text


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for _, link in LINK.findall(re.sub(r"(?s)```.*?```", "", read(name))):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = (PROJECT / name).parent / path if path else PROJECT / name
        assert target.exists(), link
        assert not heading or heading in [anchor(found.heading) for found in sections(target.read_text("utf-8"))], link


def test_the_tree_of_the_project_is_true() -> None:
    """What stands below `…` is written by the steps: their code or the registry of weights names it."""
    (block,) = next(section.blocks for section in sections(read(README.chinese)) if section.heading == "项目结构")
    code = "".join(path.read_text("utf-8") for path in [*PROJECT.glob("*.py"), *PROJECT.glob("setup_steps/*.py")])
    code += " ".join(file.name for file in SETS["all"])
    folders: list[str] = []
    written = False
    for line in block[1:]:
        name = COMMENT.sub("", line).lstrip("│├└─ ").rstrip()
        depth = re.match(r"[│├└─ ]*", line).end() // 4 - 1
        if name == "…":
            written = True
            continue
        folders[depth:] = [name]
        if not written:
            assert (PROJECT / "".join(folders)).exists(), line
        elif not name.endswith("/"):
            assert all(part in code for part in name.split("/")), line


def chinese_lines(name: str) -> Iterator[tuple[str, str]]:
    """Yield each line of text or comment that has Chinese in it: where it is, and how it looks when rendered.

    The promises' first column has the guide's own words.
    """
    inside = False
    for number, line in enumerate(read(name).splitlines(), 1):
        if line.startswith(FENCE):
            inside = not inside
        text = line
        if inside:
            comment = COMMENT.search(line)
            text = comment[0].strip(" #") if comment else ""
        parts = cells(text)[name == PROMISES :] if text.startswith("|") else [text]
        for part in parts:
            if re.search(HAN, part):
                yield f"{name}:{number}: {part}", rendered(part)


def rendered(markdown: str) -> str:
    """Return a line without marks; code and names of pages become one Latin letter, which is set like a word."""
    words = re.sub(r"[A-Za-z./-]+\.md", "c", LINK.sub(r"\1", CODE.sub("c", markdown)))
    return re.sub(r"\*+", "", words).lstrip("!#-> ")


def half_width(line: str) -> bool:
    return bool(re.search(rf"{HAN} ?[,;:!?()\"']|[,;:!?()\"'] ?{HAN}|{HAN}\.", line))


def without_space(line: str) -> bool:
    return bool(re.search(rf"{HAN}[A-Za-z0-9]|[A-Za-z0-9%]{HAN}", line))


def with_space_too_many(line: str) -> bool:
    return bool(re.search(rf"{HAN} +{HAN}|[{FULL_WIDTH}] | [{FULL_WIDTH}]", line))


def of_another_term(line: str) -> bool:
    return any(re.search(variants, line) for variants in TERMS.values())


FAULTS = {
    half_width: ("每类十张,共 5 行", "引导(可选)", "什么问题?", "结束."),
    without_space: ("步骤4", "用GPU 计算", "75%的像素"),
    with_space_too_many: ("一个 换行", "完成。 然后", "见 （英文）"),
    of_another_term: ("批次减半", "连不上 hub", "第 4 步", "GPU内存不足", "频谱图", "自带的小模型"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_chinese_is_set_as_chinese(fault: Callable[[str], bool]) -> None:
    assert all(fault(example) for example in FAULTS[fault])
    found = [line for page in CHINESE_TEXTS for line, text in chinese_lines(page) if fault(text)]
    assert not found, "\n".join(found)


def test_every_term_is_in_use() -> None:
    text = "".join(map(read, CHINESE_PAGES))
    assert [term for term in TERMS if term not in text] == []


@pytest.mark.parametrize("name", [*CHINESE_PAGES, PROMISES, *NOTEBOOKS])
def test_a_chinese_paragraph_is_one_line(name: str) -> None:
    """A line break between two Chinese characters would be shown as a space."""
    for section in sections(read(name)):
        for line, after in zip(section.text, section.text[1:], strict=False):
            chinese = len(re.findall(HAN, line + after)) > (line + after).count(" ")
            assert not chinese or not line or not after or after.startswith("|") or ITEM.match(after), after
