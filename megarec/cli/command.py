"""From a command line to a mapping: hydra composes, typos are refused, `--help` answers at once.

This and its siblings in `megarec.cli` are the only places that know hydra; nothing here imports torch.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from textwrap import wrap
from typing import Any, NoReturn, TypeVar

import yaml
from hydra import compose, initialize, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megarec.base.config import build, describe, flatten, plain
from megarec.base.errors import NoPeers, Peers, UserError, nearest, run_command
from megarec.base.progress import say

C = TypeVar("C")
HELP_WIDTH = 100
MISSING_VALUE = "???"  # as hydra marks a key that must be given


Ready = Mapping[str, Mapping[str, Any]]  # by key: ready values of it, dataclasses, by name


def run(
    name: str,
    kind: type[C],
    work: Callable[[C], None],
    *,
    about: str | None,
    presets: str | None = None,
    ready: Ready | None = None,
    peers: Callable[[], Peers] = NoPeers,
) -> NoReturn:
    """Runs one command: reads its settings, does its work and ends the process with its exit code.

    Args:
        name: the command, as the user types it.
        kind: the dataclass of its settings.
        work: what it does; imports torch and other heavy modules itself, so that `--help` answers at once.
        about: what it does, for `--help`.
        presets: see `read_command_line`.
        ready: see `read_command_line`.
        peers: the other processes of the job, see `run_command`.
    """
    run_command(
        lambda: work(build(kind, read_command_line(name, kind, about=about or "", presets=presets, ready=ready))),
        peers=peers,
    )


def read_command_line(
    name: str, kind: type, *, about: str, presets: str | None = None, ready: Ready | None = None
) -> dict[str, Any]:
    """The settings of one command: the defaults of `kind`, a preset file, then `key=value` from the command line.

    Prints help or the composed settings and ends the process when asked to (`--help`, `--show-config`).

    Args:
        name: the command, as the user types it.
        kind: the dataclass of its settings; its field defaults are the defaults.
        about: what the command does, for `--help`.
        presets: the yaml file in `megarec.conf` that sits on top of the defaults, without its suffix.
        ready: groups of settings that can be set as a whole by a name, `protocol=hstu_public`; the default's name is
            that of the group in `kind`.

    Raises:
        UserError: an unknown key (names the nearest), a `+key`, an unknown preset, a broken override.
    """
    asked = {a for a in sys.argv[1:] if a in ("-h", "--help", "--show-config")}
    overrides = [a for a in sys.argv[1:] if a not in asked]
    names = {**_preset_names(presets), **{key: list(values) for key, values in (ready or {}).items()}}
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"'{override}' is not of the form key=value", where=name, fix=f"See {name} --help")
        if override.startswith(("+", "~")):
            raise UserError(f"'{override}' adds or removes a key", where=name, fix="Only existing keys can be set")
        key, _, value = override.partition("=")
        if key in names and value not in names[key]:  # hydra passes over an optional group that is not there
            raise UserError(f"'{value}' is not there", where=key, fix=nearest(value, names[key]))
    _register(kind, ready or {})
    settings = _compose(presets, overrides)
    if asked:
        shown = yaml.safe_dump(settings, sort_keys=False).rstrip()
        texts = describe(kind, settings)
        say(shown if asked == {"--show-config"} else _help(name, about, settings, names=names, texts=texts))
        sys.exit(0)
    missing = sorted(key for key, value in flatten(settings).items() if value == MISSING_VALUE)
    if missing:
        raise UserError(f"{', '.join(missing)} not set", fix=f"Give {missing[0]}=...")
    return settings


def defaults_of(kind: type) -> dict[str, Any]:
    """The field defaults of a dataclass as a plain mapping; a field without one is `MISSING_VALUE`."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.default is not MISSING:
            value: Any = field.default
        elif field.default_factory is not MISSING:
            value = field.default_factory()
        else:
            value = MISSING_VALUE
        if is_dataclass(value) and not isinstance(value, type):
            value = plain(value)
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def _register(kind: type, ready: Ready) -> None:
    """Gives hydra the defaults of `kind`, in which each group of `ready` starts as the one it is named after."""
    store, defaults = ConfigStore.instance(), defaults_of(kind)
    for key, values in ready.items():
        for name, value in values.items():
            store.store(group=key, name=name, node=plain(value))
    chosen = [{key: defaults.pop(key)["name"]} for key in ready]
    store.store(name="defaults", node={"defaults": ["_self_", *chosen], **defaults})


def _compose(presets: str | None, overrides: list[str]) -> dict[str, Any]:
    # without presets the groups of megarec.conf must stay out of sight: `model=` is then a key like any other
    folder = (
        initialize_config_module(config_module="megarec.conf", version_base="1.3")
        if presets
        else initialize(config_path=None, version_base="1.3")
    )
    with folder:
        try:
            composed = compose(config_name=presets or "defaults", overrides=overrides)
            settings = OmegaConf.to_container(composed, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(error, presets, overrides) from None
    assert isinstance(settings, dict)
    return {str(k): v for k, v in settings.items()}


def _explain(error: Exception, presets: str | None, overrides: list[str]) -> UserError:
    """Turns hydra's message about an override into one line that names the nearest key."""
    with_groups = [o for o in overrides if "/" in o.split("=")[0]]
    try:
        composed = compose(config_name=presets or "defaults", overrides=with_groups)
        known = list(flatten(OmegaConf.to_container(composed, resolve=False)))  # type: ignore[arg-type]
    except (HydraException, OmegaConfBaseException):
        known = []
    for override in overrides:
        key = override.split("=")[0]
        groups = {k.rsplit(".", depth)[0] for k in known for depth in range(1, k.count(".") + 1)}
        if known and key not in known and key not in groups:
            return UserError(f"unknown key '{key}'", fix=nearest(key, [*known, *groups]))
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(first_line, where="command line")


def _preset_names(presets: str | None) -> dict[str, list[str]]:
    """The names of the settings files in `megarec.conf` by what they are for: `model: [argus/mini, ...]`."""
    entries = resources.files("megarec.conf").iterdir() if presets else ()
    folders = sorted((e for e in entries if e.is_dir() and not e.name.startswith("_")), key=lambda e: e.name)
    return {folder.name: sorted(_names_below(folder)) for folder in folders}


def _names_below(folder: Traversable) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.name.startswith("_"):  # a part of other files
            continue
        if entry.is_dir():
            yield from (f"{entry.name}/{name}" for name in _names_below(entry))
        elif entry.name.endswith(".yaml"):
            yield entry.name.removesuffix(".yaml")


def _help(
    name: str, about: str, settings: dict[str, Any], *, names: dict[str, list[str]], texts: dict[str, str]
) -> str:
    lines = [f"{name} key=value ...", "", about.strip(), ""]
    if names:
        lines += ["Ready settings; --help beside one shows its keys:", ""]
        for group, members in names.items():
            lines += wrap(" | ".join(members), HELP_WIDTH, initial_indent=f"  {group}=", subsequent_indent=" " * 6)
        lines += [""]
    lines += ["Keys, their defaults (??? must be given) and what they mean:", ""]
    for key, value in flatten(settings).items():
        lines.append(f"  {key}={'' if value is None else value}")
        lines += wrap(texts.get(key, ""), HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "--help this page   --show-config the settings after all overrides, as yaml"]
    return "\n".join(lines)
