"""Every key of the two kinds of YAML file with its type, default, meaning and readers.

The dataclasses are the source: a field's annotation, its default, and the comment on its line, which is the meaning.
The readers are the modules whose code takes the value from its section. Nothing here needs torch: classes that do are
read as text.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from LightningDiT import config
from LightningDiT.config import NAMED_SOLVERS, PRESETS, RULES, UNREAD_KEYS, Config
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_text
from LightningDiT.tokenizer import config as tokenizer_config
from LightningDiT.tokenizer.config import FIXED_LOSS_KEYS, LOSS_KEYS, TOKENIZER_RULES, TokenizerTrainConfig

PACKAGE = Path(config.__file__).parent
TRANSFORMER, TOKENIZER = "configuration", "tokenizer"  # kinds of files
#: Modules that hold every key for another reason than to act on it.
NO_READERS = ("config.py", "idle_settings.py")
#: Modules in which the settings of a tokenizer's training and of its layers are read, as attributes of these names.
TOKENIZER_MODULES, TOKENIZER_NAMES = ("tokenizer/", "training/tokenizer_training.py"), ("config", "train", "settings")
#: Sections that one call takes whole, by keyword; a test compares the names.
WHOLE = {"transport": "loading.py"}
#: Keys that a module reads otherwise than as an attribute of its section; a test finds the words there.
READ_BY_NAME = {
    "data.class_names": ("data/labels.py",),
    "data.condition_names": ("data/labels.py",),
    "use_vf": ("tokenizer/config.py",),
    "lossconfig": ("tokenizer/config.py",),
    "reverse_proj": ("training/tokenizer_training.py",),
    "double_z": ("tokenizer/autoencoder.py",),
}
HIDDEN = ("source", "notes")  # fields of `Config` that no file sets
NO_CODE = re.compile(r'"""[\s\S]*?"""|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*')
PAIR = re.compile(r"(?<!\w)(\w+)(?=\.(\w+))")
UNREAD = "accepted, and read by nothing"


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a YAML file.

    Attributes:
        file: kind of the file, `TRANSFORMER` or `TOKENIZER`.
        name: sections and key, joined by dots.
        type, default: as a person writes them in YAML.
        meaning: what the value does; with what it must be, beyond its type.
        field: name of the value in a tokenizer's settings, where it differs from the key; empty for a configuration.
    """

    file: str
    name: str
    type: str
    default: str
    meaning: str
    field: str = ""

    @property
    def readers(self) -> tuple[str, ...]:
        """Modules of the library that act on the value, relative to the package."""
        if self.meaning == UNREAD:
            return ()
        return tokenizer_readers(self.field) if self.file == TOKENIZER else readers_of(self.name)

    def lines(self) -> list[str]:
        """Return the key as lines for the screen."""
        where = "a tokenizer's YAML" if self.file == TOKENIZER else "a configuration"
        return [
            f"{self.name} ({where})",
            f"  type     {self.type}",
            f"  default  {self.default}",
            f"  meaning  {self.meaning}",
            f"  read by  {', '.join(self.readers) or 'nothing'}",
        ]


@functools.cache
def all_keys() -> tuple[Key, ...]:
    """Return every key of both kinds of files, in the order of the dataclasses."""
    return (*_transformer_keys(), *_tokenizer_keys())


def find_keys(name: str) -> list[Key]:
    """Return the keys of a full name, of a last part, or of a section.

    Raises:
        LightningDiTError: no key has the name; the nearest ones are listed.
    """
    keys = all_keys()
    for match in (
        lambda key: key.name == name,
        lambda key: key.name.startswith(f"{name}."),
        lambda key: key.name.rpartition(".")[2] == name,
    ):
        if found := [key for key in keys if match(key)]:
            return found
    known = {one for key in keys for one in (key.name, key.name.rpartition(".")[2])}
    nearest = difflib.get_close_matches(name, sorted(known), 3, 0.5)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "no key is like it"
    raise LightningDiTError(f"no YAML key is called {name!r}; {hint}", "python -m LightningDiT.command.config")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a dataclass as its source text has it."""

    name: str
    annotation: str
    default: str
    comment: str


@functools.cache
def fields_of(module: Path, cls: str) -> tuple[Field, ...]:
    """Return the fields of a dataclass from its module's text, with the comment on the line of each."""
    text = read_text(module)
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    (found,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == cls)
    return tuple(
        Field(
            node.target.id,
            ast.unparse(node.annotation),
            ast.unparse(node.value) if node.value else "",
            comments.get(node.end_lineno or node.lineno, ""),
        )
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )


def _transformer_keys() -> Iterator[Key]:
    usual = Config()
    for field in fields_of(PACKAGE / "config.py", "Config"):
        values = getattr(usual, field.name)
        if field.name in HIDDEN:
            continue
        if not dataclasses.is_dataclass(values):
            yield _key(TRANSFORMER, field.name, field, values)
            continue
        for inner in fields_of(PACKAGE / "config.py", type(values).__name__):
            yield _key(TRANSFORMER, f"{field.name}.{inner.name}", inner, getattr(values, inner.name))
        for name in UNREAD_KEYS.get(field.name, ()):
            yield Key(TRANSFORMER, f"{field.name}.{name}", "any", "none", UNREAD)


def _tokenizer_keys() -> Iterator[Key]:
    module, params = Path(tokenizer_config.__file__), "model.params"
    own = {field.name: field for field in fields_of(module, "TokenizerConfig")}
    train = {field.name: field for field in fields_of(module, "TokenizerTrainConfig")}
    yield _key(TOKENIZER, "ckpt_path", own["ckpt_path"], None)
    for name in tokenizer_config.SCALAR_PARAMS:
        yield _key(TOKENIZER, f"{params}.{name}", own[name], ast.literal_eval(own[name].default))
    for field in fields_of(PACKAGE / "tokenizer" / "autoencoder.py", "AutoencoderSettings"):
        if field.name != "embed_dim":  # lies beside ddconfig
            yield _key(TOKENIZER, f"{params}.ddconfig.{field.name}", field, ast.literal_eval(field.default))
    for published, ours, default in LOSS_KEYS:
        told = dataclasses.replace(train[ours], comment=f"the published name of train.{ours}, with its default there")
        yield _key(TOKENIZER, f"{params}.lossconfig.params.{published}", told, default)
    for name, only in FIXED_LOSS_KEYS.items():
        text = as_yaml_value(only)
        kind, meaning = type(only).__name__, f"of the published loss, where {text} alone is supported"
        yield Key(TOKENIZER, f"{params}.lossconfig.params.{name}", kind, text, meaning, "lossconfig")
    for name in ("monitor", "ckpt_path"):
        yield Key(TOKENIZER, f"{params}.{name}", "any", "none", UNREAD)
    for field in train.values():
        yield _key(TOKENIZER, f"train.{field.name}", field, getattr(TokenizerTrainConfig(), field.name))


def _key(file: str, name: str, field: Field, default: Any) -> Key:
    """Return the key of a field: its comment, then what the value must be and the names to choose from."""
    rules = RULES if file == TRANSFORMER else [(f"train.{key}", test, words) for key, test, words in TOKENIZER_RULES]
    parts = [field.comment, *(words for key, _, words in rules if key == name and words not in field.comment)]
    if file == TRANSFORMER and name in LISTS:
        parts.append(LISTS[name]())
    known = "" if file == TRANSFORMER else field.name
    return Key(file, name, as_yaml_type(field.annotation), as_yaml_value(default), "; ".join(parts), known)


def _model_types() -> str:
    sizes = (", ".join(_table_names(f"models/{name}.py")) for name in ("lightningdit", "unet"))
    return "sizes {} of LightningDiT, each with patch 1 or 2; sizes {} of UNet".format(*sizes)


def _table_names(module: str) -> list[str]:
    """Return the names in a module's table of presets, `PRESETS` or `UNET_PRESETS`."""
    for node in ast.parse(read_text(PACKAGE / module)).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        named = any(isinstance(one, ast.Name) and one.id in ("PRESETS", "UNET_PRESETS") for one in targets)
        if named and isinstance(table := getattr(node, "value", None), ast.Dict):
            return [str(key.value) for key in table.keys if isinstance(key, ast.Constant)]
    return []


def _solver_names() -> str:
    rows = (f"{name} is {method} with {points} points" for name, (method, points, _) in NAMED_SOLVERS.items())
    return f"named: {'; '.join(rows)}"


def _tokenizer_names() -> str:
    return "shipped: " + ", ".join(sorted(path.stem for path in tokenizer_config.TOKENIZER_CONFIGS.glob("*.yaml")))


#: Keys whose meaning ends with the names in a table.
LISTS: dict[str, Callable[[], str]] = {
    "model.model_type": _model_types,
    "vae.model_name": _tokenizer_names,
    "sample.sampling_method": _solver_names,
    "sample.cfg_scale": lambda: f"--preset {', '.join(PRESETS)} sets it",
}


def as_yaml_type(annotation: str) -> str:
    """Return a field's annotation in words."""
    names = [re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", part.strip()) for part in annotation.split("|")]
    return " or ".join("none" if name == "None" else name for name in names)


def as_yaml_value(value: Any) -> str:
    """Return a value as YAML writes it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(as_yaml_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


@functools.cache
def _attributes() -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the modules with OWNER.ATTRIBUTE in their code, by owner and attribute; strings and comments are none."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if module not in NO_READERS and path.parent.name != "reference":
            code = NO_CODE.sub("", read_text(path))
            for pair in set(PAIR.findall(code)):
                found.setdefault(pair, []).append(module)
    return {pair: tuple(modules) for pair, modules in found.items()}


def _modules_with(owners: tuple[str, ...], attribute: str) -> tuple[str, ...]:
    index = _attributes()
    return tuple(sorted({module for owner in owners for module in index.get((owner, attribute), ())}))


@functools.cache
def readers_of(name: str) -> tuple[str, ...]:
    """Return the modules that read a key of a configuration."""
    section, _, key = name.rpartition(".")
    if section in WHOLE:
        return (WHOLE[section],)
    found = _modules_with((section,) if section else ("config", "settings"), key)
    others = TOKENIZER_MODULES if section == "train" else ()  # whose `train` is that of the tokenizer's YAML
    return READ_BY_NAME.get(name) or tuple(module for module in found if not module.startswith(others))


@functools.cache
def tokenizer_readers(field: str) -> tuple[str, ...]:
    """Return the modules that read a field of a tokenizer's settings."""
    found = _modules_with(TOKENIZER_NAMES, field)
    acting = (module for module in found if module.startswith(TOKENIZER_MODULES) and module != "tokenizer/config.py")
    return READ_BY_NAME.get(field) or tuple(acting)
