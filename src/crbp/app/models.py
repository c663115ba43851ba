"""The models that the app lets one choose from: those that come with crbp, and files of the user's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from crbp.app.compare import load_recurrent
from crbp.errors import CrbpError
from crbp.hub import shipped
from crbp.models import PathfinderNet

DEFAULTS = ("small9_hgru_crbp", "small9_hgru_bptt")


@dataclass(kw_only=True)
class Models:
    """Contour-tracing models by name, each read once, when it is first asked for.

    Attributes:
        files: of the models, by name.
        trust: packages whose classes the files may name.
    """

    files: Mapping[str, Path]
    trust: Sequence[str] = ("crbp",)
    _read: dict[str, PathfinderNet] = field(default_factory=dict)

    @classmethod
    def with_files(cls, files: Iterable[Path], *, trust: Sequence[str] = ("crbp",)) -> Models:
        """The recurrent models that come with crbp, and these, which are read at once.

        Raises:
            CrbpError: if one cannot be read or is of another kind of model.
        """
        found = {name: file for name, file in shipped().items() if _is_recurrent(file)}
        read = {}
        for file in files:
            net = load_recurrent(file, trust=trust)
            name = next(name for name in _names(file) if name not in found)
            found[name], read[name] = file, net
        return cls(files=found, trust=trust, _read=read)

    def get(self, name: str) -> PathfinderNet:
        """The model of a name.

        Raises:
            CrbpError: if there is none, or its file cannot be read.
        """
        if name not in self.files:
            raise CrbpError(f"{name!r} is no model here; choose one of {', '.join(self.files)}")
        if name not in self._read:
            self._read[name] = load_recurrent(self.files[name], trust=self.trust)
        return self._read[name]

    @property
    def pair(self) -> tuple[str, str]:
        """The two to begin with: the user's own first, if any, else C-RBP beside BPTT."""
        own = [name for name in self._read if name not in DEFAULTS]
        first, second = [*own, *(name for name in DEFAULTS if name in self.files), *self.files][:2]
        return first, second


def _names(file: Path) -> Iterable[str]:
    """What to call a file: as little of its path as tells it apart."""
    parts = file.with_suffix("").parts
    for length in range(1, len(parts) + 1):
        yield "/".join(parts[-length:])
    yield from (f"{file.stem} ({number})" for number in range(2, 1000))


def _is_recurrent(file: Path) -> bool:
    with safe_open(file, framework="pt") as weights:
        described = json.loads((weights.metadata() or {}).get("crbp.net", "{}"))
    return str(described.get("class_path", "")).endswith(PathfinderNet.__name__)
