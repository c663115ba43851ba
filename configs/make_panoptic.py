"""Writes `configs/panoptic/*.yaml`: one file per published row of panoptic segmentation, and small ones for a CPU.

As with `make_pathfinder.py`, the rows are kept here as data and every file runs alone. After a change run
`python configs/make_panoptic.py`; a test compares the files with what this script would write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from _rows import text, thing, write

FOLDER = Path(__file__).parent / "panoptic"

PUBLISHED = {  # PQ on val2017, and trained parameters
    "fpn_r50_1x": "39.39, 45 751 590 parameters", "rfpn_r50_bptt1_1x": "40.94, 44 968 038 parameters",
    "rfpn_r50_bptt3_1x": "41.55, 44 968 038 parameters", "rfpn_r50_bptt5_1x": "41.54, 44 968 038 parameters",
    "rfpn_r50_rbp20_1x": "41.22, 44 968 038 parameters", "rfpn_r50_crbp20_1x": "41.63, 44 968 038 parameters",
    "fpn_r101_3x": "43.31, 64 691 494 parameters", "rfpn_r101_crbp20_3x": "43.62, 63 907 942 parameters",
}  # fmt: skip
METHODS = {
    "bptt1": ("BPTT", 1), "bptt2": ("BPTT", 2), "bptt3": ("BPTT", 3), "bptt5": ("BPTT", 5),
    "crbp5": ("C-RBP", 5), "crbp10": ("C-RBP", 10), "crbp20": ("C-RBP", 20), "rbp20": ("RBP", 20),
}  # fmt: skip
TERMS = 15  # of the Neumann series
LATER = [7 / 9, 25 / 27]  # when the rate falls in detectron2's 3× schedule: steps 210 000 and 250 000 of 270 000
SMALL_BOXES = {"channels": 256, "samples": 64, "detections": 50}
NARROW_BOXES = {"channels": 64, "size": 6, "samples": 32, "positive_share": 0.5, "detections": 50}
COMPARED = ("fpn", "bptt1", "bptt3", "crbp10", "crbp20")  # on generated shapes
# The same from so few images, and the seed of these: by what the names of rows begin with.
FROM_FEW = {
    "few100": (100, 1, ("fpn", "bptt3", "crbp5")),
    "few25": (25, 1, ("fpn", "crbp5")),
    "few25b": (25, 2, ("fpn", "crbp5")),
}
MASKS = ["roi_heads.mask_head.", "roi_heads.mask_predictor."]
STARTED = ("shapes_", "few")  # how rows are called that start from it
START = "start_shapes"  # the row whose weights those on shapes start from
START_HEAPS = "start_heaps"  # the same, of shapes that lie in heaps of one look
START_STEPS, ROW_STEPS, MINI_STEPS = 3_000, 1_000, 500  # of four images
STOP = 0.01  # relative size of a term at which the series of these rows ends


def recurrence(method: str, **solver: Any) -> dict[str, Any]:
    """What an R-FPN has beside a Panoptic FPN: how its mask head is run and differentiated."""
    title, steps = METHODS[method]
    gradient = thing("BPTT")
    if title != "BPTT":
        gradient = thing("RBP", solver=thing("Neumann", terms=TERMS, **solver), on_divergence="fallback")
    settings: dict[str, Any] = {"evolve": {"steps": steps, "gradient": gradient}}
    if title == "C-RBP":
        settings["penalty"] = thing("tasks.LipschitzPenalty", weight=0.001, bound=0.95, reduction="sum_square")
    return settings


def network(method: str, solver: Mapping[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Panoptic FPN, or R-FPN trained by a method."""
    if method == "fpn":
        return thing("models.PanopticFPN", **settings)
    return thing("models.RFPN", **settings, **recurrence(method, **(solver or {})))


def coco(method: str, depth: int, times: int, *, weights: str | None = "imagenet") -> dict[str, Any]:
    """A run on COCO: the published schedule, or detectron2's that is three times as long."""
    start: dict[str, Any] = {}  # pixels and stride of detectron2's
    if weights == "imagenet":
        start = {
            "pixels": {"order": "rgb", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]},
            "backbone": {"stride_in_1x1": False},
        }
    net = network(method, depth=depth, **start)
    falls = {"milestones": LATER} if times == 3 else {}
    return {
        "seed_everything": 0,
        "trainer": {
            "max_steps": 90_000 * times,
            "accumulate_grad_batches": 8,  # of two images on one device; on eight devices set 1
            "gradient_clip_val": None,
            "sync_batchnorm": True,
            "inference_mode": True,
            "check_val_every_n_epoch": times,
        },
        "model": thing("tasks.PanopticTask", net=net, weights=weights, **falls),
        "data": thing("tasks.PanopticData", source=thing("tasks.Coco", root="data/coco"), batch_size=2),
    }


def small(method: str, side: int, steps: int, *, narrow: bool = False, heaps: bool = False) -> dict[str, Any]:
    """A run on generated shapes, from scratch, on two CPU cores."""
    net = network(
        method,
        {"tolerance": STOP},
        depth=18,
        things=10,
        stuff=6,
        # As crbp.models.panoptic.mini_settings has them.
        backbone={"norm": "group", **({"width": 12} if narrow else {}), "channels": 64, "canonical_size": side // 2},
        proposals={
            "anchor_sizes": [side / 12 * 2 ** (level / 1.25) for level in range(5)],
            "before_nms": 200,
            "before_nms_test": 200,
            "after_nms": 100,
            "after_nms_test": 100,
            "samples": 128,
        },
        boxes=dict(NARROW_BOXES if narrow else SMALL_BOXES),
        masks={"channels": 64},
        semantic={"channels": 32 if narrow else 64},
        merge={"stuff_area": side * side // 150},
    )
    task = thing(
        "tasks.PanopticTask",
        net=net,
        optimizer="adamw",
        learning_rate=0.001,
        reference_batch=4,
        warmup_steps=100,
        milestones=[0.6, 0.9],
    )
    # Where shape alone tells the class, few things are found in so many steps (results/panoptic).
    looks = {"objects": [3, 7], "looks": "coloured", "zoom": 1.6}
    if heaps:  # neighbours of one look, so that only borders and form tell what a pixel belongs to
        looks |= {"objects": [4, 8], "alike": 0.6}
    source = thing("tasks.GeneratedShapes", size=side, train=4 * steps, val=200 if narrow else 100, **looks)
    data = {"batch_size": 4, "shortest": [side], "shortest_test": side, "longest": 2 * side}
    return {
        "seed_everything": 0,
        "trainer": {
            "max_epochs": 1,
            "val_check_interval": steps // (4 if narrow else 2),
            "gradient_clip_val": 5.0,
        },
        "model": task,
        "data": thing("tasks.PanopticData", source=source, **data),
    }


def started(method: str) -> dict[str, Any]:
    """A run on generated shapes that trains the masks alone, from scratch: all else is as another row left it."""
    made = small(method, 128, ROW_STEPS, narrow=True)
    made["trainer"]["val_check_interval"] = 1.0
    made["model"]["init_args"]["net"]["init_args"]["boxes"]["samples"] = 8  # half of them on objects: masks of a step
    made["model"]["init_args"] |= {
        "learning_rate": 0.003,
        "average_precision": False,
        "weights": f"runs/{START}/version_0/weights/last.safetensors",
        "without": [*MASKS],
        "trained": [*MASKS],
    }
    made["data"]["init_args"]["source"]["init_args"]["seed"] = 1  # no image of those that the weights have seen
    return made


def from_few(method: str, images: int, seed: int) -> dict[str, Any]:
    """The same from few images, each seen as often as the steps allow, with settings of `benchmarks/mask_heads.py`."""
    made = started(method)
    epochs = 4 * ROW_STEPS // images
    made["trainer"] |= {"max_epochs": epochs, "check_val_every_n_epoch": epochs}
    made["model"]["init_args"]["beta2"] = 0.99
    made["data"]["init_args"]["source"]["init_args"] |= {"train": images, "val": 1_000, "seed": seed}
    net = made["model"]["init_args"]["net"]["init_args"]
    if method != "fpn":
        net["norm_scale"] = 1.0
    if method.startswith("crbp"):
        net["horizon"] = 3
        net["evolve"]["gradient"]["init_args"]["solver"]["init_args"]["terms"] = 4  # steps before the last
        net["penalty"]["init_args"]["weight"] /= 10
    return made


def named(method: str) -> str:
    """What a row is called in its file's first line."""
    if method == "fpn":
        return "Panoptic FPN"
    title, steps = METHODS[method]
    return f"R-FPN, {title}, {steps} step{'s' if steps > 1 else ''}"


def rows() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, title and content of every file."""
    for method in ("fpn", *METHODS):
        name = "fpn_r50_1x" if method == "fpn" else f"rfpn_r50_{method}_1x"
        yield name, f"COCO, ResNet-50, {named(method)}, 1× schedule", coco(method, 50, 1)
    for method in ("fpn", "crbp20"):
        name = "fpn_r101_3x" if method == "fpn" else f"rfpn_r101_{method}_3x"
        yield name, f"COCO, ResNet-101, {named(method)}, 3× schedule", coco(method, 101, 3)
    for method in ("fpn", "crbp20"):
        name = "fpn" if method == "fpn" else f"rfpn_{method}"
        what = f"COCO, ResNet-50, {named(method)}, as detectron2's weights need it: its pixels, its place of the stride"
        yield f"{name}_r50_detectron2", what, coco(method, 50, 1, weights=None)
    shapes = "Coloured shapes of 128 pixels, narrow ResNet-18"
    yield START, f"{shapes}: what the rows shapes_* start from", small("fpn", 128, START_STEPS, narrow=True)
    what = f"{shapes}, in heaps of one look: pools the crops of benchmarks/mask_heads.py --start {START_HEAPS}"
    yield START_HEAPS, what, small("fpn", 128, START_STEPS, narrow=True, heaps=True)
    short = {method: "fpn" if method == "fpn" else f"rfpn_{method}" for method in ("fpn", *METHODS)}
    for method in COMPARED:
        what = f"Coloured shapes of 192 pixels, ResNet-18, {named(method)}; on two CPU cores"
        yield f"mini_{short[method]}", what, small(method, 192, MINI_STEPS)
        yield f"shapes_{short[method]}", f"{shapes}, {named(method)}", started(method)
    for kind, (images, seed, methods) in FROM_FEW.items():
        for method in methods:
            what = f"{shapes}, {named(method)}, of {images} images{' of another seed' if seed > 1 else ''}"
            yield f"{kind}_{short[method]}", what, from_few(method, images, seed)


def comments(name: str, title: str) -> Iterator[str]:
    """What a file says of itself."""
    yield f"{title}."
    if name in PUBLISHED:
        yield f"Published PQ (Linsley et al., NeurIPS 2020; not at equal images): {PUBLISHED[name]}."
    if name.startswith(STARTED):
        yield f"It starts from the weights of {START}.yaml, which is to be run before it."
    root = "" if name.startswith(("mini_", "start_", *STARTED)) else " --data.source.root FOLDER_OF_COCO"
    if name.endswith("_detectron2"):
        yield f"Measure a checkpoint of {'the released R-FPN' if name.startswith('rfpn') else 'detectron2'} with it:"
        yield f"crbp test --config configs/panoptic/{name}.yaml --model.weights FILE{root}"
    else:
        yield f"Run it with: crbp fit --config configs/panoptic/{name}.yaml{root}"
    yield "Written by configs/make_panoptic.py, where all rows stand side by side: change it there."


def files() -> dict[str, str]:
    """Name and content of every file."""
    return {f"{name}.yaml": text(comments(name, title), content) for name, title, content in rows()}


if __name__ == "__main__":
    write(FOLDER, files())
