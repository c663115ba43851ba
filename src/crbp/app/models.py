"""The models that the app lets one choose from: those that come with crbp, and files of the user's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import safe_open

from crbp._checkpoint import not_taken
from crbp.app.compare import Model, load_recurrent
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
    _read: dict[str, Model] = field(default_factory=dict)

    @classmethod
    def with_files(cls, files: Iterable[tuple[str, Path]], *, trust: Sequence[str] = ("crbp",)) -> Models:
        """The recurrent models that come with crbp, and these, which are read at once.

        Args:
            files: and what to call them; where that is empty, as the run that trained them.
            trust: packages whose classes they may name.

        Raises:
            CrbpError: if one cannot be read or is of another kind of model.
        """
        found = {name: file for name, file in shipped().items() if _is_recurrent(file)}
        read = {}
        for given, file in files:
            model = load_recurrent(file, trust=trust)
            name = not_taken(given or model.name, found)
            found[name], read[name] = file, replace(model, name=name)
        return cls(files=found, trust=trust, _read=read)

    def get(self, name: str) -> Model:
        """The model of a name.

        Raises:
            CrbpError: if there is none, or its file cannot be read.
        """
        if name not in self.files:
            raise CrbpError(f"{name!r} is no model here; choose one of {', '.join(self.files)}")
        if name not in self._read:
            self._read[name] = replace(load_recurrent(self.files[name], trust=self.trust), name=name)
        return self._read[name]

    @property
    def pair(self) -> tuple[str, str]:
        """The two to begin with: the user's own first, if any, else C-RBP beside BPTT."""
        own = [name for name in self._read if name not in DEFAULTS]
        first, second = [*own, *(name for name in DEFAULTS if name in self.files), *self.files][:2]
        return first, second


def _is_recurrent(file: Path) -> bool:
    with safe_open(file, framework="pt") as weights:
        described = json.loads((weights.metadata() or {}).get("crbp.net", "{}"))
    return str(described.get("class_path", "")).endswith(PathfinderNet.__name__)
