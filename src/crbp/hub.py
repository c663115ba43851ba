"""Trained networks as folders that can be handed on, and back from a folder, a shipped name or the Hugging Face Hub.

These are functions and no mixin of the networks' class: a network's settings hold cells and gradient methods, which the
Hub's mixin cannot write down and which must be built from trusted packages alone; and the core needs PyTorch only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

import crbp
from crbp._card import written_card
from crbp._files import write_whole
from crbp.errors import CrbpError
from crbp.tasks import WeightsError, load_net, load_trained, save_net

LONGEST = 1_000  # characters of a name
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

__all__ = ["HubError", "from_pretrained", "push_to_hub", "save_pretrained", "shipped"]


class HubError(CrbpError, OSError):
    """The Hub cannot be reached, has no such network, or does not let this user at it."""


def save_pretrained(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    numbers: Mapping[str, Any] | None = None,
    licence: str = "mit",
    trust: Sequence[str] = ("crbp",),
) -> Path:
    """Write a network as a folder that can be handed on: weights, configuration and a model card.

    The card tells the configuration, the data and what is known of the run: the row of a ``table.csv`` beside the
    folder of the weights, or what the logs of the run have and ``crbp analyze … --out RUN/analysis`` wrote.

    Args:
        checkpoint: a `.safetensors` file, or a `.ckpt` file where ``crbp fit`` left it.
        folder: to write; what it has under the same names is replaced.
        numbers: further ones for the card, by name.
        licence: of the weights, as the Hub writes it.
        trust: packages whose classes the checkpoint may name.

    Returns:
        The folder.

    Raises:
        WeightsError: if the checkpoint cannot be read.
        StorageError: if the folder cannot be written.
    """
    folder = Path(folder)
    net, origin = load_trained(checkpoint, trust=trust)
    save_net(net.state_dict(), folder / WEIGHTS, origin)
    card = written_card(Path(checkpoint), net, origin, numbers=numbers or {}, licence=licence)
    write_whole(folder / CARD, card.encode())
    config = {
        "library_name": "crbp",
        "crbp_version": crbp.__version__,
        "name": origin.name,
        "sha256": _digest(folder / WEIGHTS),
        "net": origin.net,
        "run": origin.run,
        "code": origin.code,
    }
    write_whole(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())  # last: with it the folder is whole
    return folder


def from_pretrained(name: str | Path, *, revision: str | None = None, trust: Sequence[str] = ("crbp",)) -> nn.Module:
    """Rebuild a network, in evaluation mode, on the CPU.

    The weights file alone says which network it is; ``config.json`` is for reading, and for its checksum.

    Args:
        name: a folder that `save_pretrained` wrote, one of `shipped`, or ``OWNER/NAME`` on the Hub, in this order.
        revision: branch, tag or commit on the Hub; None for the newest.
        trust: packages whose classes the network may be made of; add your own where the cell is yours.

    Raises:
        WeightsError: if nothing is known by this name, or the file is spoilt or names a class outside ``trust``.
        HubError: if the Hub cannot be reached, and had not been before, or has no such network.
        ImportError: if it is on the Hub and the extra ``hub`` is not installed.
    """
    if not str(name) or len(str(name)) > LONGEST:
        raise WeightsError(f"{str(name)[:80]!r} is no name of a network; shipped are {', '.join(shipped())}")
    folder, ready = Path(name), shipped()
    local = folder.is_dir() or str(name) in ready
    if local and revision is not None:
        raise WeightsError(f"{name} is on this machine and has no revision {revision!r}; leave revision away")
    if folder.is_dir():
        return load_net(_checked(folder), trust=trust)
    if str(name) in ready:
        return load_net(ready[str(name)], trust=trust)
    if folder.is_file() or str(name).count("/") != 1 or str(name)[0] in "./~":
        raise WeightsError(
            f"{name} is no folder that crbp.hub.save_pretrained wrote, no OWNER/NAME on the Hub, and not shipped, as "
            f"are {', '.join(ready)}; a file of weights is read by crbp.tasks.load_net"
        )
    return load_net(_checked(_fetched(str(name), revision)), trust=trust)


def push_to_hub(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Publish a folder that `save_pretrained` wrote; read its card before you do.

    Who you are is known from ``hf auth login`` or the variable ``HF_TOKEN``.

    Args:
        folder: to publish; other files in it stay here.
        repo: ``OWNER/NAME``, made if there is none.
        private: let none but its owner see it, where it is made now.

    Returns:
        The address of what was published.

    Raises:
        WeightsError: if the folder is not whole.
        HubError: if the Hub cannot be reached or does not take it.
        ImportError: if the extra ``hub`` is not installed.
    """
    _checked(Path(folder))
    api = _api()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[WEIGHTS, CONFIG, CARD],
            commit_message=f"Saved by crbp {crbp.__version__}",
        )
    except Exception as error:  # a network fails in any way
        raise HubError(
            f"{repo} cannot be published ({_said(error)}); log in by `hf auth login`, choose a repo of your own, or "
            f"copy {folder}, which has all there is"
        ) from error
    return str(done.repo_url)


def shipped() -> dict[str, Path]:
    """The networks that come with crbp, by name: a few with the package, all of ``results`` with a checkout."""
    package = Path(__file__).parent
    roots = (package, package.parents[1])
    files = (file for root in roots for file in (root / "results").glob("*/weights/*.safetensors"))
    return {file.stem: file for file in sorted(files)}


def _checked(folder: Path) -> Path:
    """The weights of a folder, seen to be those that were saved."""
    try:
        expected = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["sha256"]
        found = _digest(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(
            f"{folder} is no whole folder that crbp.hub.save_pretrained wrote ({type(error).__name__}: {error}); save "
            "or fetch it again"
        ) from error
    if found != expected:
        raise WeightsError(f"{folder / WEIGHTS} is not the file that was saved: it is spoilt; save or fetch it again")
    return folder / WEIGHTS


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _fetched(name: str, revision: str | None) -> Path:
    api = _api()
    try:
        return Path(api.snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS, CONFIG, CARD]))
    except Exception as error:  # a network fails in any way
        raise HubError(
            f"{name} cannot be had from the Hub ({_said(error)}); look at its spelling and the network, log in by `hf "
            f"auth login` where it is private, or name a folder that holds it; shipped are {', '.join(shipped())}"
        ) from error


def _api() -> Any:
    if find_spec("huggingface_hub") is None:
        raise ImportError("crbp.hub needs huggingface_hub, not installed here; run: pip install 'crbp[hub]'")
    from huggingface_hub import HfApi

    return HfApi(library_name="crbp", library_version=crbp.__version__)


def _said(error: Exception) -> str:
    """The kind of an error and its first line: the Hub's go on for a dozen."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
