"""Where the things of a picture lie: laid one over the other, so that much is hidden and all can still be told."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crbp.data.panoptic import _paint
from crbp.data.panoptic._forms import COMPACT, FORMS, MARGIN, Form, Points, Stream, Vector, stroke
from crbp.data.panoptic._looks import ACROSS, ALIKE, Looks
from crbp.data.panoptic._paint import WINDOW

THINGS = tuple(FORMS)
STUFF = ("plain", "stripes", "checks", "dots", "blotches", "waves")  # in the order of the kinds of texture
STREAM_VERSION = 1  # a change of what is drawn for a seed changes it

LEAST_VISIBLE = 0.4  # share of a thing that stays visible
LEAST_AREA = 60.0  # square units of a thing, or of a kind of stuff, that stay visible
_TRIES = 12

Texture = NDArray[np.float64]
Field = NDArray[np.float32]


class Drawn(NamedTuple):
    """A picture: `image` (H, W, 3) uint8, `places` (H, W) uint8, and of each place class name and whether a crowd."""

    image: NDArray[np.uint8]
    places: NDArray[np.uint8]
    names: tuple[str, ...]
    crowd: tuple[bool, ...]


class _Thing(NamedTuple):
    name: str
    form: Form
    at: Points
    texture: Texture
    crowd: bool


def draw(
    size: int,
    objects: tuple[int, int],
    *,
    looks: Looks = "textured",
    zoom: float = 1.0,
    alike: float = ALIKE,
    seed: int,
    split: str,
    index: int,
) -> Drawn:
    """The picture `index` of a split: a function of the arguments alone, the same on every machine."""
    changes = {looks: looks != "textured", f"{zoom!r} times": zoom != 1.0, f"{alike!r} alike": alike != ALIKE}
    kind = " ".join([*(word for word, changed in changes.items() if changed), "shapes"])
    words = f"{kind} {STREAM_VERSION} {size} {objects[0]} {objects[1]} {seed} {split} {index}"
    stream = Stream(int.from_bytes(hashlib.blake2b(words.encode(), digest_size=16).digest(), "little"))
    picture = _Picture(size, stream, WINDOW / zoom, looks, alike)
    if stream.chance(0.1):
        picture.add_crowd()
    for _ in range(stream.whole(*objects)):
        for _ in range(_TRIES):
            if picture.add(picture.propose()):
                break
    for _ in range(stream.whole(2, 10)):
        picture.add_stroke()
    return picture.finish()


class _Picture:
    """A picture `window` units wide while it is made. Places count from 1: regions of stuff, then things."""

    def __init__(self, size: int, stream: Stream, window: float, looks: Looks, alike: float) -> None:
        self.stream, self.window, self.pixel, self.looks = stream, window, window / size, looks
        self.alike = alike
        self.image = np.empty((size, size, 3), np.float32)
        self.places = np.empty((size, size), np.uint8)
        kinds = list(range(len(STUFF)))
        self.stuff = [kinds.pop(stream.whole(0, len(kinds) - 1)) for _ in range(stream.whole(2, 4))]
        sites = np.array([self._point(0.0) for _ in self.stuff])
        textures = np.array([_texture(stream, kind, period=(8.0, 16.0)) for kind in self.stuff])
        wobble, salt = stream.uniform(10.0, 60.0), stream.whole(0, 1 << 20)
        _paint.ground(self.image, self.places, self.pixel, sites, textures, wobble, salt)
        self.ground = textures
        self.things: list[_Thing] = []
        self.cut: set[int] = set()  # things that something was laid across already
        self.areas: list[int] = []  # pixels of the things were nothing in front of them
        self.visible = self._count()  # pixels of every place

    def propose(self) -> _Thing:
        """A thing laid across a long one, beside one that looks the same, or anywhere."""
        stream = self.stream
        name = THINGS[stream.whole(0, len(THINGS) - 1)]
        way = stream.uniform()
        long = [k for k, each in enumerate(self.things) if len(each.form.spine) and k not in self.cut]
        if way < ACROSS and long:
            return self._across(long[stream.whole(0, len(long) - 1)])
        if way < ACROSS + self.alike and self.things:
            return self._beside(self.things[stream.whole(0, len(self.things) - 1)], name)
        return _Thing(name, FORMS[name](stream, 1.0), self._point(8.0), self._new_texture(name), False)

    def add(self, thing: _Thing) -> bool:
        """Paint a thing unless too little of it, or of one behind it, could be seen."""
        field, left, top = self._field_of(thing.form, thing.at)
        counts = np.zeros(256, np.int64)
        total = _paint.covered(field, left, top, self.places, counts)
        if not self._enough(int(counts.sum()), total):
            return False
        left_over = self.visible - counts
        behind = np.flatnonzero(counts[len(self.stuff) + 1 :]).tolist()
        if any(not self._enough(int(left_over[len(self.stuff) + 1 + k]), self.areas[k]) for k in behind):
            return False
        self.cut.update(k for k in behind if _near(self.things[k], thing.at))
        self.things.append(thing)
        self.areas.append(total)
        place = len(self.stuff) + len(self.things)
        self.visible = left_over
        self.visible[place] = counts.sum()
        self._paint(field, left, top, place, thing.texture, self._edge())
        return True

    def add_crowd(self) -> None:
        """A heap of small things of one class, each with its own looks, that make one segment."""
        stream = self.stream
        name, middle = COMPACT[stream.whole(0, len(COMPACT) - 1)], self._point(40.0)
        place = len(self.stuff) + 1
        for _ in range(stream.whole(9, 16)):
            form, at = FORMS[name](stream, 0.32), _moved(middle, 34.0 * stream.uniform(), stream.direction())
            self._paint(*self._field_of(form, at), place, self._new_texture(name), self._edge())
        texture = self.ground[0] if self.looks == "textured" else self._new_texture(name)  # of things laid beside it
        self.things.append(_Thing(name, form, middle, texture, True))
        self.visible = self._count()
        self.areas.append(int(self.visible[place]))

    def add_stroke(self) -> None:
        """A thin line over what is there, which leaves the labels as they are."""
        field, left, top = self._field_of(stroke(self.stream), self._point(0.0))
        texture = _texture(self.stream, _paint.PLAIN, period=(8.0, 9.0))
        self._paint(field, left, top, 0, texture, np.array([0.0, 1.0, 0.0, 1.0, 0.0]))

    def finish(self) -> Drawn:
        """The picture, with what remains too small to be told left out of the labels."""
        names = [STUFF[kind] for kind in self.stuff] + [each.name for each in self.things]
        crowd = [False] * len(self.stuff) + [each.crowd for each in self.things]
        areas = self._count()[1 : len(names) + 1]
        kept = np.flatnonzero(areas * self.pixel**2 >= LEAST_AREA)
        renumber = np.zeros(256, np.uint8)
        renumber[kept + 1] = np.arange(1, len(kept) + 1)
        image = (np.clip(self.image, 0.0, 255.0) + 0.5).astype(np.uint8)
        return Drawn(image, renumber[self.places], tuple(names[k] for k in kept), tuple(crowd[k] for k in kept))

    def _across(self, k: int) -> _Thing:
        """A compact thing on the spine of a long one, which cuts it in two."""
        stream, long = self.stream, self.things[k]
        name = COMPACT[stream.whole(0, len(COMPACT) - 1)]
        at = long.at + long.form.spine[stream.whole(0, len(long.form.spine) - 1)]
        at = _moved(at, 3.0 * stream.uniform(), stream.direction())
        scale = min(1.0, stream.uniform(0.25, 0.45) * long.form.extent / 18.0)
        return _Thing(name, FORMS[name](stream, max(0.5, scale)), at, self._new_texture(name), False)

    def _beside(self, other: _Thing, name: str) -> _Thing:
        """A thing that overlaps another one and looks the same, in place too or from its own place on."""
        stream = self.stream
        if stream.chance(0.4) or self.looks == "coloured":
            name = other.name
        form = FORMS[name](stream, 1.0)
        reach = stream.uniform(0.35, 0.8) * (other.form.extent + form.extent)
        texture = other.texture.copy()
        if stream.chance(0.5):
            texture[_paint.PHASE_U], texture[_paint.PHASE_V] = stream.uniform(), stream.uniform()
            texture[_paint.SALT] = stream.whole(0, 1 << 20)
        return _Thing(name, form, _moved(other.at, reach, stream.direction()), texture, False)

    def _point(self, margin: float) -> Points:
        far = self.window - margin
        return np.array([self.stream.uniform(margin, far), self.stream.uniform(margin, far)])

    def _count(self) -> NDArray[np.int64]:
        return np.bincount(self.places.ravel(), minlength=256)

    def _enough(self, visible: int, total: int) -> bool:
        return visible >= LEAST_VISIBLE * total and visible * self.pixel**2 >= LEAST_AREA

    def _new_texture(self, name: str) -> Texture:
        stream = self.stream
        if self.looks != "textured":
            texture = _texture(stream, _paint.PLAIN, period=(5.0, 11.0))
            if self.looks == "coloured":
                hue = (THINGS.index(name) + stream.uniform(-0.2, 0.2)) / len(THINGS)
                paleness, light = stream.uniform(0.0, 0.3), stream.uniform(200.0, 250.0)
                texture[_paint.COLOUR :] = [*_tint(hue, paleness, light), *_tint(hue, paleness, 0.6 * light)]
            return texture
        kind = _paint.PLAIN if stream.chance(0.35) else stream.whole(0, len(STUFF) - 1)
        texture = _texture(stream, kind, period=(5.0, 11.0))
        if stream.chance(0.15):  # the colours of the ground: only shape and edge remain to tell it
            behind = self.ground[stream.whole(0, len(self.ground) - 1)]
            texture[_paint.COLOUR :] = behind[_paint.COLOUR :]
        return texture

    def _edge(self) -> NDArray[np.float64]:
        stream = self.stream
        line, width = stream.uniform(0.15, 0.6), stream.uniform(1.0, 2.0)
        return np.array([line, width, stream.uniform(0.0, 0.4), stream.uniform(2.0, 4.5), stream.whole(0, 1 << 20)])

    def _field_of(self, form: Form, at: Points) -> tuple[Field, int, int]:
        reach = form.extent + MARGIN
        left, top = (int(np.floor((value - reach) / self.pixel)) for value in at)
        side = int(np.ceil(2.0 * reach / self.pixel)) + 1
        field = np.empty((side, side), np.float32)
        form.draw(field, left, top, self.pixel, at)
        return field, left, top

    def _paint(
        self, field: Field, left: int, top: int, place: int, texture: Texture, edge: NDArray[np.float64]
    ) -> None:
        _paint.paint(self.image, self.places, self.pixel, field, left, top, place, texture, edge)


def _near(thing: _Thing, at: Points) -> bool:
    """Whether a place is on the spine of a thing."""
    if not len(thing.form.spine):
        return False
    return bool(((thing.at + thing.form.spine - at) ** 2).sum(axis=1).min() < 64.0)


def _moved(at: Points, by: float, heading: Vector) -> Points:
    return np.array([at[0] + by * heading[0], at[1] + by * heading[1]])


def _texture(stream: Stream, kind: int, *, period: tuple[float, float]) -> Texture:
    """A texture of a kind, in two colours that can be told apart."""
    along, phases = stream.direction(), (stream.uniform(), stream.uniform())
    looks = [kind, *along, stream.uniform(*period), *phases, stream.uniform(0.55, 0.8), stream.whole(0, 1 << 20)]
    first = second = _colour(stream)
    while sum(abs(a - b) for a, b in zip(first, second, strict=True)) < 130.0:
        second = _colour(stream)
    return np.array([*looks, *first, *second])


def _tint(hue: float, paleness: float, light: float) -> tuple[float, ...]:
    """The colour of a hue in turns, of which 0, ⅓ and ⅔ are red, green and blue; no channel is above `light`."""
    full = (min(max(abs((6.0 * hue + shift) % 6.0 - 3.0) - 1.0, 0.0), 1.0) for shift in (0.0, 4.0, 2.0))
    return tuple(light * (1.0 - (1.0 - paleness) * (1.0 - each)) for each in full)


def _colour(stream: Stream) -> tuple[float, float, float]:
    return stream.uniform(15.0, 240.0), stream.uniform(15.0, 240.0), stream.uniform(15.0, 240.0)
