"""The categories of a panoptic data set: its own numbers for them, and the labels that a network learns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crbp._semantic import IGNORE, THINGS
from crbp.data._foreign import read_json, shown
from crbp.data.errors import DataError


@dataclass(frozen=True)
class Category:
    """One category: its number in the data set, name, whether it is a thing, and (red, green, blue) of 0 to 255."""

    id: int
    name: str
    isthing: bool
    color: tuple[int, int, int]


@dataclass(frozen=True)
class Categories:
    """The categories of a data set, in the order of its list, between its numbers and contiguous labels.

    A thing's label is its place ``0 … T − 1`` in `things`. A semantic label is 0 for any thing, ``j`` in ``1 … S`` for
    ``stuff[j − 1]``, and 255 for void. A set of things alone, or of stuff alone, is allowed.

    Args:
        entries: each a COCO category, ``{"id": 1, "name": "person", "isthing": 1}`` with, where wanted, ``"color"``, or
            a `Category`; without a colour one is made from its place.

    Attributes:
        things: the numbers of the things.
        stuff: the numbers of the stuff.

    Raises:
        ValueError: there is none, one lacks a key or holds a wrong value, a number occurs twice, two things or two
            kinds of stuff have one name, or there are more than 254 kinds of stuff.

    Source: Kirillov et al., Panoptic Segmentation, CVPR 2019.
    """

    entries: tuple[Category, ...]
    things: tuple[int, ...] = field(init=False)
    stuff: tuple[int, ...] = field(init=False)

    def __init__(self, entries: Iterable[Mapping[str, Any] | Category]) -> None:
        made = tuple(
            each if isinstance(each, Category) else _category(place, each) for place, each in enumerate(entries)
        )
        if not made:
            raise ValueError("there is no category; give at least one, such as {'id': 1, 'name': 'disc', 'isthing': 1}")
        _check_unique(made)
        object.__setattr__(self, "entries", made)
        object.__setattr__(self, "things", tuple(each.id for each in made if each.isthing))
        object.__setattr__(self, "stuff", tuple(each.id for each in made if not each.isthing))
        if len(self.stuff) >= IGNORE:
            raise ValueError(
                f"{len(self.stuff)} kinds of stuff are more than the {IGNORE - 1} that labels below the {IGNORE} of "
                "void can tell apart; merge some"
            )

    @classmethod
    def read(cls, source: str | Path | Iterable[Mapping[str, Any]]) -> Categories:
        """The categories of a JSON file, a list or a dict with ``"categories"``, or of such a list itself.

        Raises:
            DataError: the file cannot be read, or does not hold categories; names it.
            ValueError: a list given as such is wrong.
        """
        if not isinstance(source, str | Path):
            return cls(source)
        content = read_json(source, "give a JSON list of categories")
        if isinstance(content, dict):
            content = content.get("categories")
        if not isinstance(content, list):
            raise DataError(source, "holds no list of categories", "give a JSON list, or a dict with 'categories'")
        try:
            return cls(content)
        except ValueError as error:
            raise DataError(source, str(error), "correct the list") from error

    def thing_label(self, id: int) -> int:
        """The contiguous label of a thing.

        Raises:
            ValueError: ``id`` is no category, or stuff.
        """
        if not self.isthing(id):
            raise ValueError(f"category {id} ({self.name(id)}) is stuff and has no thing label; see semantic_label")
        return self._thing_labels[id]

    def semantic_label(self, id: int) -> int:
        """The semantic label of a category, 0 for every thing.

        Raises:
            ValueError: ``id`` is no category.
        """
        return THINGS if self.isthing(id) else self._stuff_labels[id]

    def name(self, id: int) -> str:
        """The name of a category; raises ValueError where there is none."""
        return self._get(id).name

    def colour(self, id: int) -> tuple[int, int, int]:
        """Red, green and blue of a category, of 0 to 255; raises ValueError where there is none."""
        return self._get(id).color

    def isthing(self, id: int) -> bool:
        """Whether a category is a thing; raises ValueError where there is none."""
        return self._get(id).isthing

    def as_json(self) -> list[dict[str, Any]]:
        """The list as COCO has it, from which `Categories` makes an equal value."""
        return [
            {"id": each.id, "name": each.name, "isthing": int(each.isthing), "color": list(each.color)}
            for each in self.entries
        ]

    def labels(self, ids: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Thing labels, −1 for stuff, and semantic labels of many categories at once, ``(n,)`` each."""
        things = np.array([self._thing_labels.get(int(each), -1) for each in ids], np.int64)
        return things, np.array([self.semantic_label(int(each)) for each in ids], np.int64)

    def __contains__(self, id: object) -> bool:
        return id in self._by_id

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def _by_id(self) -> dict[int, Category]:
        return {each.id: each for each in self.entries}

    @cached_property
    def _thing_labels(self) -> dict[int, int]:
        return {id: label for label, id in enumerate(self.things)}

    @cached_property
    def _stuff_labels(self) -> dict[int, int]:
        return {id: label for label, id in enumerate(self.stuff, start=1)}

    def _get(self, id: int) -> Category:
        found = self._by_id.get(int(id))
        if found is None:
            raise ValueError(f"{id} is no category of this set; it has {_some([each.id for each in self.entries])}")
        return found


def _category(place: int, entry: Mapping[str, Any]) -> Category:
    if not isinstance(entry, Mapping):
        raise ValueError(f"category {place} of the list is {shown(entry)}, not a dict with 'id', 'name' and 'isthing'")
    missing = [key for key in ("id", "name", "isthing") if key not in entry]
    if missing:
        raise ValueError(f"category {place} of the list lacks {', '.join(map(repr, missing))}: {shown(dict(entry))}")
    id, name, isthing = entry["id"], entry["name"], entry["isthing"]
    if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 1 << 31:
        raise ValueError(f"category {place} of the list has id {shown(id)}, not a whole number of 0 to 2**31 - 1")
    if not isinstance(name, str) or not name:
        raise ValueError(f"category {id} has name {shown(name)}, not a word")
    if isthing not in (0, 1):
        raise ValueError(f"category {id} ({name}) has isthing {shown(isthing)}, not 0 or 1")
    return Category(id, name, bool(isthing), _colour(id, entry["color"]) if "color" in entry else _made_up(place))


def _colour(id: int, given: Any) -> tuple[int, int, int]:
    values = tuple(given) if isinstance(given, list | tuple) else ()
    if len(values) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in values):
        raise ValueError(f"category {id} has color {shown(given)}, not three whole numbers of 0 to 255")
    return values[0], values[1], values[2]


def _made_up(place: int) -> tuple[int, int, int]:
    """A colour far from those of the places near it."""
    return 64 + 73 * place % 192, 64 + 151 * place % 192, 64 + 109 * place % 192


def _check_unique(entries: tuple[Category, ...]) -> None:
    numbers: dict[int, str] = {}
    names: dict[tuple[str, bool], int] = {}
    for each in entries:
        if each.id in numbers:
            raise ValueError(
                f"the id {each.id} belongs to both {numbers[each.id]!r} and {each.name!r}; give each its own"
            )
        numbers[each.id] = each.name
        if (each.name, each.isthing) in names:
            raise ValueError(
                f"the name {each.name!r} belongs to both {names[each.name, each.isthing]} and {each.id}; rename one"
            )
        names[each.name, each.isthing] = each.id


def _some(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:10]))
    return shown if len(values) <= 10 else f"{shown}, … ({len(values)} in all)"
