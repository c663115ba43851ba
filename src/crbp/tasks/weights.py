"""Trained weights as `.safetensors` files that carry their configuration, and the way back to a network."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch.trainer.states import TrainerFn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import crbp
from crbp._files import write_whole
from crbp._torch_file import load_plain
from crbp.tasks._messages import one_line

_PREFIX = "net."
CODE = "code.json"  # in the folder of a run
_trusted: list[str] = []


class WeightsError(crbp.CrbpError, ValueError):
    """A file of weights cannot be read, or does not fit the network that its configuration describes."""


def trust_packages(packages: Sequence[str]) -> None:
    """Say which packages the user trusts, besides crbp, for the rest of this process."""
    _trusted[:] = packages


def trusted_packages() -> tuple[str, ...]:
    """crbp, and what `trust_packages` was told."""
    return ("crbp", *_trusted)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a file of weights says about itself.

    Attributes:
        net: the network, ``{"class_path": …, "init_args": …}`` of plain values; what it is rebuilt from.
        run: the configuration of the run that trained it, where there was one; not where it was logged.
        name: of that configuration.
        code: that trained it, as far as it is known: ``crbp``, the version; ``commit`` of its checkout; ``project
            commit`` of the one it was used in.
    """

    net: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    code: Mapping[str, str] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """The texts that the file carries."""
        return {
            "format": "pt",
            "crbp.version": crbp.__version__,
            "crbp.name": self.name,
            "crbp.net": json.dumps(self.net),
            "crbp.run": json.dumps(self.run),
            "crbp.code": json.dumps(self.code),
        }


def save_net(state: Mapping[str, Tensor], path: str | Path, origin: Origin) -> None:
    """Write the weights of a network and what it takes to rebuild it.

    The file appears under its name only once it is complete.

    Args:
        state: the network's ``state_dict()``.
        path: of the file to write.
        origin: what it is rebuilt from.

    Raises:
        StorageError: if it cannot be written.
    """
    # A copy of each tensor: the format refuses views and tensors that share memory.
    copies = {key: value.detach().cpu().clone() for key, value in state.items()}
    write_whole(Path(path), save(copies, origin.metadata()))


def load_net(path: str | Path, *, trust: Sequence[str] = ("crbp",)) -> nn.Module:
    """Rebuild the network that a file of weights was saved from, in evaluation mode, on the CPU.

    Nothing is unpickled. The classes named in the file are imported, so only those from packages in ``trust`` are.

    Args:
        path: of a `.safetensors` file that `save_net` or `SafetensorsExport` wrote.
        trust: packages whose classes the file may name; add your own where the cell is yours.

    Raises:
        WeightsError: if the file cannot be read, was not written by crbp, names a class outside ``trust``, or does
            not fit the network that its configuration describes.
    """
    return load_trained(path, trust=trust)[0]


def load_trained(path: str | Path, *, trust: Sequence[str] = ("crbp",)) -> tuple[nn.Module, Origin]:
    """Rebuild a network as `load_net` does, and tell where it came from.

    Args:
        path: of a `.safetensors` file, or of a `.ckpt` file where `crbp fit` left it: its network is described in the
            ``config.yaml`` of the run.
        trust: packages whose classes the configuration may name.

    Raises:
        WeightsError: as `load_net` does.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; crbp fit writes best.safetensors and last.safetensors")
    origin, state = _read_checkpoint(path) if path.suffix == ".ckpt" else _read(path)
    what = f"the network described in {path}"
    try:
        with torch.device("meta"):  # a description that asks for more memory than its weights is refused before it does
            build(nn.Module, origin.net, what, trust=trust).load_state_dict(state, assign=True)
        net = build(nn.Module, origin.net, what, trust=trust)
        net.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"the weights in {path} do not fit the network described beside them: {' '.join(str(error).split())}"
        ) from error
    return net.eval(), origin


T = TypeVar("T")


def build(kind: type[T], config: Mapping[str, Any], what: str, *, trust: Sequence[str] = ("crbp",)) -> T:
    """Make an object of a class below ``kind`` from ``{"class_path": …, "init_args": …}``.

    Raises:
        WeightsError: if a class outside the packages of ``trust`` is named, or ``what`` cannot be made.
    """
    found = list(_texts(config))
    if hidden := next((text for text in found if _is_configuration(text)), None):
        raise WeightsError(f"{what} has the text {hidden[:80]!r}, which would be read as a configuration of its own")
    for name in (text.strip() for text in found if _DOTTED.fullmatch(text.strip())):
        if (package := _package(name, trust)) not in trust:
            raise WeightsError(f"{what} has the class {name}; pass trust=(…, {package!r}) if you trust it")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "made", required=True)
    try:
        set_parsing_settings(import_path_allowlist=list(trust))  # `crbp.cli` denies others, for the whole process
        parsed = parser.parse_object({"made": config})
        refuse_functions(parsed)
        made = parser.instantiate(parsed).made
    except Exception as error:  # a class fails in any way where it is given nonsense
        raise WeightsError(f"{what} cannot be built by crbp {crbp.__version__}: {one_line(error)}") from error
    assert isinstance(made, kind)
    return made


def refuse_functions(config: Any) -> None:
    """See that a configuration names classes alone: a function, such as `load_net`, can be told to trust others.

    Raises:
        ValueError: that names the function.
    """
    if isinstance(config, Namespace):
        config = vars(config)
    if isinstance(config, Mapping):
        name = config.get("class_path")
        if isinstance(name, str) and not isinstance(_resolved(name), type):
            raise ValueError(f"{name} is no class, and nothing else is called for a configuration")
        config = list(config.values())
    if isinstance(config, list | tuple):
        for value in config:
            refuse_functions(value)


def to_hand_on(run: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run without where it was logged, as plain values: weights are made to be passed on.

    Raises:
        TypeError: if something in it is no plain value.
    """
    kept = {key: value for key, value in run.items() if key not in ("ckpt_path", "config")}
    if isinstance(trainer := kept.get("trainer"), Mapping):
        local = ("logger", "callbacks", "default_root_dir")
        kept["trainer"] = {key: value for key, value in trainer.items() if key not in local}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found


def _read(path: Path) -> tuple[Origin, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
        net, run = json.loads(metadata["crbp.net"]), json.loads(metadata.get("crbp.run", "{}"))
        if not isinstance(net, dict) or not isinstance(run, dict):
            raise ValueError("its configuration is no mapping")
        code = texts(json.loads(metadata.get("crbp.code", "{}")))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); copy or export it again") from error
    except KeyError:
        raise WeightsError(f"{path} does not say which network it is of; save it with crbp.tasks.save_net") from None
    return Origin(net=net, run=run, name=metadata.get("crbp.name", ""), code=code), state


def _read_checkpoint(path: Path) -> tuple[Origin, dict[str, Tensor]]:
    file = path.absolute().parent.parent / "config.yaml"
    try:
        run = yaml.safe_load(file.read_text(encoding="utf-8"))
        net = run["model"]["init_args"]["net"]
        if not isinstance(run, dict):
            raise TypeError("it is no mapping")
        run = to_hand_on(run)
        code = texts(_written_code(file.with_name(CODE)))
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(
            f"{path} is to have its run's configuration, with a net, in {file}, which cannot be read "
            f"({one_line(error)}); give the .safetensors file of the run"
        ) from error
    return Origin(net=net, run=run, name=file.parent.parent.name, code=code), of_net(read_state(path))


def _written_code(file: Path) -> Any:
    """What `crbp fit` wrote beside the configuration; runs of before have none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def texts(found: Any) -> dict[str, str]:
    """A mapping of texts, seen to be one.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(found, dict) or not all(isinstance(each, str) for pair in found.items() for each in pair):
        raise ValueError("what it says of the code that trained it is no mapping of texts")
    return found


def of_net(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a task's network, named as in the network itself."""
    return {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}


def read_state(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of Lightning's, nothing else of which is unpickled, or in a `.safetensors` file.

    Raises:
        WeightsError: if there are none that can be read.
    """
    if not path.is_file():
        raise WeightsError(f"the checkpoint {path} does not exist; crbp fit writes best.ckpt and last.ckpt under runs/")
    if path.suffix == ".safetensors":
        return {f"{_PREFIX}{name}": value for name, value in _read(path)[1].items()}
    try:
        weights: dict[str, Tensor] = load_plain(path)["state_dict"]
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
            raise TypeError("its weights are no tensors by name")
    except Exception as error:  # a broken file is a program that fails in any way
        raise WeightsError(
            f"the checkpoint {path} cannot be read: it is damaged, or not a .ckpt file that crbp fit wrote"
        ) from error
    return weights


def _texts(config: Any) -> Iterator[str]:
    """Every text in a configuration that may name a class, under ``class_path`` or in place of that.

    What a class of crbp takes as a text and nothing else, such as the name of a file, cannot: it is not parsed.
    """
    if isinstance(config, Mapping):
        owner = _own_class(config.get("class_path"))
        for key, value in config.items():
            if key == "init_args" and owner is not None and isinstance(value, Mapping):
                yield from _texts_for(owner, value)
            else:
                yield from _texts(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _texts(value)
    elif isinstance(config, str):
        yield config


def _texts_for(owner: type, arguments: Mapping[str, Any]) -> Iterator[str]:
    try:
        hints = get_type_hints(owner.__init__)  # type: ignore[misc]
    except NameError:  # of a type that is imported for type checkers alone
        hints = {}
    for name, value in arguments.items():
        hint = hints.get(name)
        either = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
        kinds = [kind for kind in either if kind is not type(None)]
        if isinstance(value, str) and kinds == [str]:
            continue
        part = kinds[0] if len(kinds) == 1 and is_dataclass(kinds[0]) and isinstance(kinds[0], type) else None
        if part is not None and _is_own(part) and isinstance(value, Mapping) and "class_path" not in value:
            yield from _texts_for(part, value)
        else:
            yield from _texts(value)


def _own_class(name: Any) -> type | None:
    """The class of crbp that is named, if it is one."""
    if not isinstance(name, str) or not _DOTTED.fullmatch(name) or _package(name, ("crbp",)) != "crbp":
        return None
    with contextlib.suppress(ImportError, AttributeError):
        found = _resolved(name)
        return found if isinstance(found, type) and _is_own(found) else None
    return None


def _is_own(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "crbp"


def _is_configuration(text: str) -> bool:
    """Whether a parser would take a text for what is written in it, or in the file that it names."""
    try:
        return isinstance(yaml.safe_load(text), dict | list) or Path(text).is_file()
    except (yaml.YAMLError, RecursionError, OSError, ValueError):
        return True


def _package(name: str, trust: Sequence[str]) -> str:
    """The package that a dotted name leads into: a module of a trusted one may hold others, as by ``import os``."""
    package, found = name.split(".")[0], None
    if package in trust and find_spec(package) is not None:
        with contextlib.suppress(ImportError, AttributeError):
            found = _resolved(name)
    owner = found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None)
    return owner.split(".")[0] if isinstance(owner, str) else package


def _resolved(name: str) -> Any:
    """What a dotted name stands for, the longest part of it that is a module being imported."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


class SafetensorsExport(pl.Callback):
    """Keep ``weights/best.safetensors`` and ``weights/last.safetensors`` beside the logs of a run.

    Both are brought up to date at the end of every validation, the last also at the end of training; `load_net` reads
    them.

    Args:
        origin: of the network.
        monitor: what to call best, larger being better.
    """

    def __init__(self, origin: Origin, *, monitor: str = "val/f1") -> None:
        self.origin, self.monitor = origin, monitor
        self.best: float | None = None
        self._written = -1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the weights of this moment, and as best ones where they are."""
        if trainer.state.fn is not TrainerFn.FITTING or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        score = trainer.callback_metrics.get(self.monitor)
        better = score is not None and (self.best is None or float(score) > self.best)
        if score is not None and better:
            self.best = float(score)
        self._write(trainer, ("last", "best") if better else ("last",))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the weights of the end, where no validation has.

        The end of training would be too early: a run that was killed after its last checkpoint, and before these
        weights, has nothing left to train when it is resumed.
        """
        if trainer.global_step != self._written and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer, ("last",))

    def _write(self, trainer: pl.Trainer, files: tuple[str, ...]) -> None:
        self._written = trainer.global_step
        # Asked for on every process, since a sharded model has to be gathered by all of them.
        state = trainer.strategy.lightning_module_state_dict()
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "weights"
        if trainer.is_global_zero:
            for file in files:
                save_net(of_net(state), folder / f"{file}.safetensors", self.origin)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, so that a resumed run does not replace better weights by worse ones."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score up again."""
        self.best = state_dict["best"]
