"""The app's panoptic tab: one image segmented by an R-FPN after each of its steps."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from crbp._torch_file import load_plain
from crbp.analysis.overlay import overlay
from crbp.app.images import ImageError
from crbp.data.errors import DataError
from crbp.data.panoptic import Categories, Resize
from crbp.data.panoptic.formats import read_image
from crbp.data.panoptic.transforms import view_image
from crbp.errors import CrbpError, DivergenceError
from crbp.models import RFPN
from crbp.tasks import Origin, PanopticData, load_trained
from crbp.tasks.panoptic import segments_info
from crbp.tasks.weights import build

_LONGEST = 1024  # pixels of a picture's side as it is shown


@dataclass(frozen=True, kw_only=True)
class Panoptic:
    """A trained R-FPN, and how the run that trained it showed it images.

    Attributes:
        net: in evaluation mode.
        categories: what its labels stand for.
        resize: as in validation.
        data: of the run, whose validation images can be shown.
    """

    net: RFPN
    categories: Categories
    resize: Resize
    data: PanopticData


def load_panoptic(file: Path, *, trust: Sequence[str] = ("crbp",)) -> Panoptic:
    """Read a checkpoint of `crbp.tasks.PanopticTask`.

    Args:
        file: a `.safetensors` file, or a `.ckpt` file in the folder of its run, which knows its categories by itself.
        trust: packages whose classes the file may name.

    Raises:
        CrbpError: if it cannot be read, is of no recurrent model, or its categories cannot be had.
    """
    net, origin = load_trained(file, trust=trust)
    if not isinstance(net, RFPN):
        raise CrbpError(f"{file} is of a {type(net).__name__}, which has no steps to change; give an R-FPN")
    if "data" not in origin.run:
        raise CrbpError(f"{file} does not say what it was trained on; give weights that crbp fit wrote")
    data = build(PanopticData, origin.run["data"], f"the data of {file}", trust=trust)
    net.merged_only = True
    categories = _categories(file, origin, data)
    if (len(categories.things), len(categories.stuff)) != (net.things, net.stuff):
        raise CrbpError(f"{file} has {net.things} classes of things and {net.stuff} of stuff, its data have others")
    return Panoptic(net=net.requires_grad_(False), categories=categories, resize=data.resize, data=data)


def _categories(file: Path, origin: Origin, data: PanopticData) -> Categories:
    if file.suffix == ".ckpt" and (known := load_plain(file).get("categories")):
        return Categories(known)
    try:
        return data.categories
    except (DataError, ValueError, OSError) as error:
        raise CrbpError(
            f"the classes of {file} are named in the data of its run, which are not here ({error}); give the .ckpt "
            "file of the run, which names them itself"
        ) from error


def picture_of(found: Panoptic, file: str | None, *, index: int, name: str | None = None) -> Image.Image:
    """A file, or, where there is none, a validation image of the data that the network was trained on.

    Raises:
        ImageError: if it cannot be had.
    """
    try:
        if file is not None:
            return read_image(file)
        images = found.data.source.split("val", found.resize)
        if not 0 <= index < len(images):
            raise ImageError(f"image {index} of validation is outside 0 to {len(images) - 1}; choose one within")
        return images.scene(index).image
    except DataError as error:
        what = (name or Path(file).name) if file is not None else "validation images"
        remedy = "choose a PNG, JPEG, WebP, BMP or TIFF file of 8 bits a channel"
        raise ImageError(f"{what}: {error.what.split(' (', 1)[0]}; {remedy}") from error


@torch.no_grad()
def frames(found: Panoptic, image: Image.Image, *, steps: int) -> Iterator[dict[str, Any]]:
    """What the network sees after each of so many steps: a picture as the page takes it, and what is in it.

    Raises:
        ImageError: once the state is not finite.
    """
    image = image.copy()
    image.thumbnail((_LONGEST, _LONGEST))  # the page holds a picture for each step
    size = (image.height, image.width)
    view = found.resize.view(*size, epoch=0, index=0)
    pixels = torch.from_numpy(view_image(image, view)).permute(2, 0, 1).contiguous()
    of = found.categories
    names = {category: of.name(category) for category in (*of.things, *of.stuff)}
    colours = {category: of.colour(category) for category in names}
    try:
        for step, (result,) in enumerate(found.net.unroll([pixels], steps=steps, sizes=[size]), start=1):
            listed = segments_info(result, of)
            drawn = overlay(np.asarray(image), result.panoptic.numpy(), listed, names, colours)
            things = sum(segment["isthing"] for segment in result.segments)
            yield {"t": step, "source": _jpeg(drawn), "told": f"{things} things, {len(listed) - things} kinds of stuff"}
    except DivergenceError as error:
        raise ImageError(f"{error}; show fewer steps") from error


def _jpeg(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
