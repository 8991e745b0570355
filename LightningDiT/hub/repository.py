"""Pipelines by name: a folder, a repository on the Hugging Face hub in the layout of `save_pretrained`, or one of the
published repositories.

What comes from the hub is data: tensors and YAML whose paths stay in its folder. The client `huggingface_hub` is
imported when the hub is asked, its bytes lie in its own cache, and its errors become one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from operator import getitem
from pathlib import Path
from typing import Any

from LightningDiT.config import PATHS, Config, load_config, read_yaml
from LightningDiT.errors import OS_FIXES, LightningDiTError, first_line, warn_user
from LightningDiT.hub.card import CARD_NAME, PICTURE_NAME, is_own_card
from LightningDiT.hub.registry import CONFIGS, DIT, MODELS_VARIABLE, STATS, VAVAE, WeightFile, usable_names

CONFIG_NAME, TOKENIZER_NAME = "config.yaml", "tokenizer.yaml"
WINDOWS_NAME = "spectrograms.json"  # what the axes of spectrograms need
#: The files of `save_pretrained`; of a repository nothing else is downloaded, and its YAML names nothing else.
LAYOUT = (
    CONFIG_NAME,
    TOKENIZER_NAME,
    "transformer.safetensors",
    "tokenizer.safetensors",
    "guide.safetensors",
    "solvers.yaml",
    STATS.name,
    WINDOWS_NAME,
)
#: The same for the settings of a tokenizer.
TOKENIZER_PATHS = ("ckpt_path", "train.weight_init", "train.lpips_weights", "train.vision_weights")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
PACKAGE = Path(__file__).resolve().parents[1]
STEP2 = "python step2_download_models.py"
HUB = "https://huggingface.co"
PATIENCE = 10.0  # seconds
PUSHED = "name a repository that push_to_hub wrote"
LOG_IN = "run hf auth login, or give token="
Token = str | bool | None


@dataclass(frozen=True)
class Repository:
    """A repository on the hub and how it is asked.

    Args:
        name: owner/name.
        revision: branch, tag or commit; None: main.
        token: of an account; None: the one that `hf auth login` stored; False: none.
        cache_dir: folder of the downloads; None: the cache of huggingface_hub.
    """

    name: str
    revision: str | None = None
    token: Token = None
    cache_dir: str | Path | None = None

    @classmethod
    def named(cls, name: str, **how: Any) -> Repository:
        """Return the repository owner/name; raise LightningDiTError for another form of a name."""
        if not REPOSITORY.fullmatch(name):
            raise LightningDiTError(f"{name!r} is no repository on the hub", "name it as owner/name")
        return cls(name, **how)

    def file(self, name: str) -> Path:
        """Return a file, downloaded unless the cache has it.

        Raises:
            LightningDiTError: the hub refuses, is out of reach or lacks it.
        """
        with self.errors(name):
            from huggingface_hub import hf_hub_download

            found = Path(hf_hub_download(self.name, name, **self._asked, revision=self.revision))
        if not self._answers:
            warn_user(f"{endpoint() or HUB} does not answer: {name} of {self.name} comes from the cache")
        return found

    def snapshot(self) -> Path:
        """Return the folder with the files of `LAYOUT`, downloaded unless the cache has them.

        Raises:
            LightningDiTError: the hub refuses or is out of reach, the repository holds no pipeline of `save_pretrained`
                or one whose YAML leads elsewhere.
        """
        folder = self.file(CONFIG_NAME).parent  # that of a commit
        named = checked_files(folder / CONFIG_NAME, PATHS, self.name)  # before the weights come
        with self.errors():
            from huggingface_hub import snapshot_download

            asked = {**self._asked, "revision": folder.name, "allow_patterns": [*LAYOUT]}
            found = Path(snapshot_download(self.name, **asked))
        named += checked_files(found / TOKENIZER_NAME, TOKENIZER_PATHS, self.name)
        if missing := [name for name in named if not (found / name).exists()]:
            raise LightningDiTError(f"{self.name} lacks {', '.join(missing)}, which its YAML names", PUSHED)
        return found

    def push(self, folder: Path, private: bool | None, message: str) -> str:
        """Upload the files of `save_pretrained` in one commit, and return its address.

        The repository is made if it does not exist. A model card there that somebody wrote stays, which is said.

        Args:
            private: of a new repository; None: as the account's owner has set it.

        Raises:
            LightningDiTError: the hub refuses or is out of reach.
        """
        names = [*LAYOUT, PICTURE_NAME]
        with self.errors(writing=True):
            from huggingface_hub import HfApi

            api = HfApi(endpoint=endpoint(), token=self.token)
            api.create_repo(self.name, private=private, exist_ok=True)
            if api.file_exists(self.name, CARD_NAME) and not is_own_card(self.file(CARD_NAME)):
                warn_user(f"{self.name} has a {CARD_NAME} that this program did not write; it stays")
            else:
                names.append(CARD_NAME)
            commit = api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message=message,
                allow_patterns=names,
                delete_patterns=[*LAYOUT, PICTURE_NAME],
            )
            return str(commit.commit_url)

    @property
    def _asked(self) -> dict[str, Any]:
        """What every download is told: the client would ask a hub that is out of reach for half a minute."""
        where = {"cache_dir": self.cache_dir, "endpoint": endpoint()}
        return {"token": self.token, **where, "local_files_only": not self._answers}

    @cached_property
    def _answers(self) -> bool:
        from huggingface_hub import constants

        return bool(constants.HF_HUB_OFFLINE) or answers(endpoint() or HUB)

    @contextlib.contextmanager
    def errors(self, file: str | None = None, writing: bool = False) -> Iterator[None]:
        """Turn each error of the client, and of the libraries below it, into one line.

        Args:
            file: what is asked for, for the message.
            writing: the block uploads.
        """
        try:
            yield
        except LightningDiTError:
            raise
        except Exception as error:  # the client's own, and those of three HTTP libraries, by its version
            raise LightningDiTError(*self._refusal_of_hub(error, file, writing)) from error

    def _refusal_of_hub(self, error: Exception, file: str | None, writing: bool) -> tuple[str, str]:
        """Return what happened and what to do about it."""
        kinds, at = {kind.__name__ for kind in type(error).__mro__}, f"{self.name} on {endpoint() or HUB}"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, ImportError):
            return f"huggingface_hub does not import ({error})", "pip install huggingface_hub"
        if "HFValidationError" in kinds:
            return f"{self.name} is no name of a repository ({first_line(error)})", "name it as owner/name"
        if "LocalTokenNotFoundError" in kinds or (writing and status in (401, 403)):
            what = "a token that may write" if writing else "a token"
            return f"{at} needs {what} ({first_line(error)})", LOG_IN
        if "GatedRepoError" in kinds:
            page = f"{endpoint() or HUB}/{self.name}"
            return f"{at} is gated: its owner says who may read it", f"ask for access at {page}, then {LOG_IN}"
        if "RepositoryNotFoundError" in kinds or status in (401, 403):
            return f"{at} does not exist, or is private and not open to this token", f"check the name, or {LOG_IN}"
        if "RevisionNotFoundError" in kinds:
            return f"{at} has no revision {self.revision}", "name a branch, a tag or a commit, or leave out revision="
        if "LocalEntryNotFoundError" not in kinds and "EntryNotFoundError" in kinds:
            return f"{at} holds no {file or CONFIG_NAME}", f"{PUSHED}, or name {' or '.join(published())}"
        return self._silence_of_hub(error)

    def _silence_of_hub(self, error: Exception) -> tuple[str, str]:
        """Return what happened and what to do if the hub did not answer, or the disk took no more."""
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return f"{self.name} is not in the cache, and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
        if isinstance(error, OSError) and error.errno in OS_FIXES:
            return f"{self.name} cannot be kept ({first_line(error)})", OS_FIXES[error.errno]
        reason = f"{type(error).__name__}: {first_line(error.__cause__ or error)}"
        if not self.__dict__.get("_answers", True):
            reason = "it does not answer, and the cache has not all of it"
        if "xet" in reason:
            return f"{self.name} on {endpoint() or HUB} has no Xet ({reason})", "export HF_HUB_DISABLE_XET=1"
        fix = "check the internet connection (Kaggle: Settings, Internet, On) and HF_ENDPOINT"
        return f"{self.name} on {endpoint() or HUB} cannot be had ({reason})", fix


def answers(address: str) -> bool:
    """Return whether a server answers within `PATIENCE` seconds, whatever it says; what the client alone may be able to
    do (other certificates, another kind of proxy) counts as an answer."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.URLError as error:
        return not isinstance(error.reason, OSError) or isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    except (ValueError, HTTPException):
        return True
    return True


def endpoint() -> str | None:
    """Return the mirror that HF_ENDPOINT names when the hub is asked, None for the hub itself.

    Raises:
        LightningDiTError: the address has a login, which messages would show.
    """
    address = (os.environ.get("HF_ENDPOINT") or "").rstrip("/")
    if "@" in address:
        raise LightningDiTError(
            "HF_ENDPOINT is an address with a login; https://HOST without one is expected",
            f"unset HF_ENDPOINT, or {LOG_IN}",
        )
    return address or None


def published() -> dict[str, str]:
    """Return the published models by their repository."""
    return {file.repo: model for model, file in DIT.items()}


def pretrained_config(
    source: str | Path, revision: str | None = None, token: Token = None, cache_dir: str | Path | None = None
) -> Config:
    """Return the settings of a pipeline by its name, with its files on this machine.

    Args:
        source: a folder that `save_pretrained` wrote, which wins; or owner/name on the hub, in the same layout or one
            of the published repositories.
        revision, token, cache_dir: see `Repository`; without effect on a folder.

    Raises:
        LightningDiTError: nothing has the name, or the hub does not give its files.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision:
            warn_user(f"revision {revision} has no effect: {source} is a folder")
        return _of_folder(folder)
    if folder.is_file():
        raise LightningDiTError(
            f"{source} is a file; a folder that save_pretrained wrote, or owner/name on the hub, is expected",
            f"LightningDiTPipeline.from_config({str(source)!r}) for a configuration",
        )
    name = source.as_posix() if isinstance(source, Path) else source
    if re.match(r"(\.[\\/])*models([\\/]|$)", name):
        raise LightningDiTError(f"the folder {name} does not exist, and models/ is never asked of the hub", STEP2)
    if not REPOSITORY.fullmatch(name):
        raise LightningDiTError(
            f"{name!r} is neither a folder nor owner/name on the hub", "name a folder that save_pretrained wrote"
        )
    if name in published():
        return _published(Repository(name, revision, token, cache_dir))
    if name == VAVAE.repo:
        raise LightningDiTError(
            f"{name} holds the tokenizer and its statistics alone", f"name {' or '.join(published())}"
        )
    return load_config(Repository(name, revision, token, cache_dir).snapshot() / CONFIG_NAME)


def without_files(config: Config) -> Config:
    """Return settings that name no file of this machine."""
    changes: dict[str, dict[str, Any]] = {}
    for key in PATHS:
        section, _, name = key.rpartition(".")
        owner = getattr(config, section) if section else config
        changes.setdefault(section, {})[name] = type(owner).__dataclass_fields__[name].default
    own = changes.pop("")
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **own, **sections)


def _of_folder(folder: Path) -> Config:
    if not (folder / CONFIG_NAME).is_file():
        raise LightningDiTError(f"{folder} holds no {CONFIG_NAME}", "name a folder that save_pretrained wrote")
    return load_config(folder / CONFIG_NAME)


def _published(repository: Repository) -> Config:
    """Return the settings of the published figures with the files of a published transformer, and of its tokenizer."""
    model = published()[repository.name]
    settings = load_config(PACKAGE / "configs" / CONFIGS[model])
    transformer = _weights(DIT[model], repository)
    tokenizer, stats = (
        _weights(file, dataclasses.replace(repository, name=file.repo, revision=None)) for file in (VAVAE, STATS)
    )
    return dataclasses.replace(
        settings,
        ckpt_path=str(transformer),
        vae=dataclasses.replace(settings.vae, ckpt_path=str(tokenizer)),
        data=dataclasses.replace(settings.data, data_path=str(stats.parent)),
    )


def _weights(file: WeightFile, repository: Repository) -> Path:
    """Return a published file from the folder of step 2, where a converted copy counts too, else from the hub.

    Another revision than main is asked of the hub: the files of step 2 do not say which theirs is.
    """
    here = [models_folder() / name for name in usable_names(file)] if repository.revision is None else []
    found = next((path for path in here if path.is_file() and path.stat().st_size), None)
    return found or repository.file(file.name)


def models_folder() -> Path:
    """Return where step 2 puts the published files: the folder in LIGHTNINGDIT_MODELS, else models/ of this clone, or
    of the working folder if the package is installed without one."""
    if named := os.environ.get(MODELS_VARIABLE, "").strip(" \t\"'"):
        return Path(named).expanduser()
    clone = PACKAGE.parent
    return (clone if (clone / STEP2.partition(" ")[2]).is_file() else Path()) / "models"


def checked_files(file: Path, keys: tuple[str, ...], whose: str) -> list[str]:
    """Return the files that a downloaded YAML names; they are files of `LAYOUT` beside it.

    Args:
        keys: dotted keys that hold a path.
        whose: the repository, for the message.

    Raises:
        LightningDiTError: it is missing, or names something else.
    """
    if not file.is_file():
        raise LightningDiTError(f"{whose} holds no {file.name}", PUSHED)
    values = read_yaml(file)
    named = {key: _at(values, key) for key in keys}
    expected = {"data.data_path": (".",)}
    if file.name == CONFIG_NAME:  # whose default is a tokenizer of this machine
        named["vae.model_name"], expected["vae.model_name"] = _at(values, "vae.model_name"), (TOKENIZER_NAME,)
    for key, value in named.items():
        wanted = expected.get(key, LAYOUT)
        if value not in wanted and (value is not None or key == "vae.model_name"):
            raise LightningDiTError(
                f"{whose}: {file.name} sets {key} to {str(value)[:100]!r}, which is no file of a pushed pipeline",
                PUSHED,
            )
    return [str(value) for value in named.values() if value is not None]


def _at(values: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key, None if it is not set."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = getitem(values, part)
    return values
