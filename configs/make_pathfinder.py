"""Writes `configs/pathfinder/*.yaml`: one file per published row of contour tracing, and small ones for two CPU cores.

The rows differ in a line or two each, so they are kept here as data; every file still runs alone. After a change run
`python configs/make_pathfinder.py`; a test compares the files with what this script would write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from _rows import text, thing, write

FOLDER = Path(__file__).parent / "pathfinder"

LENGTHS = (9, 14, 20, 25)
STEPS = {  # of the methods that need a steady state; the others take 6
    "crbp": {9: 20, 14: 20, 20: 30, 25: 80},
    "rbp": {9: 20, 14: 20, 20: 20, 25: 50},
}
SMALL_KERNELS = {3: 300, 5: 100, 9: 30}  # steps of C-RBP for each kernel size, PF14
METHODS = {
    "bptt": "BPTT",
    "cbptt": "C-BPTT",
    "rbp": "RBP",
    "crbp": "C-RBP",
    "truncated": "BPTT truncated to the last 3 steps",
    "allsteps": "BPTT, loss at all steps",
}
CELLS = {"hgru": "hGRU", "convlstm": "ConvLSTM"}
PUBLISHED = {  # F1 on validation: peak / last where both are known
    "pf14_hgru_bptt": ".993 / .992", "pf20_hgru_bptt": ".945 / .940", "pf25_hgru_bptt": ".853 / .846",
    "pf14_hgru_cbptt": ".993 / .991", "pf20_hgru_cbptt": ".924 / .919", "pf25_hgru_cbptt": ".859 / .837",
    "pf14_hgru_rbp": ".849 / .676", "pf20_hgru_rbp": ".781 / .614", "pf25_hgru_rbp": ".785 / .529",
    "pf14_hgru_crbp": ".984 / .963", "pf20_hgru_crbp": ".975 / .919", "pf25_hgru_crbp": ".969 / .960",
    "pf14_hgru_truncated": ".957", "pf20_hgru_truncated": ".851", "pf25_hgru_truncated": ".761",
    "pf14_hgru_allsteps": ".990", "pf20_hgru_allsteps": ".933", "pf25_hgru_allsteps": ".839",
    "pf14_feedforward": ".883", "pf20_feedforward": ".777", "pf25_feedforward": ".721",
    "pf14_hgru_crbp_k9": ".976", "pf14_hgru_crbp_k5": ".976 / .533", "pf14_hgru_crbp_k3": ".964 / .756",
    "pf14_hgru_bptt_k9": ".885", "pf14_hgru_bptt_k5": ".753", "pf14_hgru_bptt_k3": ".691",
    "pf14_convlstm_bptt": ".93", "pf14_convlstm_crbp": ".965",
}  # fmt: skip


SMALL_STEPS = {
    5: 8,
    9: 12,
    14: 24,
}  # N of the methods that need a steady state, by length of contour; the others take 6
SMALL_LEAD_IN = {5: {3: 1_280}, 9: {3: 1_280, 6: 2_560}, 14: {3: 1_280, 6: 2_560, 10: 2_560}}  # dashes: images
SMALL_SIZE = {5: 8_000, 9: 12_800, 14: 16_000}  # images seen in training
SMALL_LONG = 24_000  # images seen where training goes on
SMALL_SIDES = {5: {3: 20, 5: 12, 9: 8}, 14: {3: 48}}  # steps of C-RBP for each length of contour and kernel size
SMALL_GROWTH = {"small14_hgru_crbp": 0.05}  # weight of the penalty on growth where it is not that of the others
# Of the ConvLSTM, which on 9 and 14 dashes learns less at the hGRU's rate, and by C-RBP with its gates.
SMALL_LSTM_RATE, SMALL_LSTM_GATES = 0.005, 3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The settings that all rows of one scale share."""

    channels: int
    norm: str
    norm_scale: float
    filter_scale: float
    terms: int
    weight: float
    solver: str = "Neumann"
    trainer: dict[str, Any]
    task: dict[str, Any]
    data: dict[str, Any]
    # Dashes of the contours that the first images show, and how many those are, one stage after the other.
    lead_in: dict[int, int] = field(default_factory=dict)
    # Of the task, where there is a penalty; the published training has none of these.
    contracting: dict[str, Any] = field(
        default_factory=lambda: {"penalty_ramp": 0.0, "residual_weight": 0.0, "spectral_weight": 0.0, "step_jitter": 0}
    )
    fused: bool = False
    horizon: int | None = None  # of the gates, at most; None for the number of steps


PAPER = Scale(
    channels=25,
    norm="batch",
    norm_scale=0.1,
    filter_scale=1.0,
    terms=15,
    weight=10.0,
    trainer={"max_epochs": 20, "gradient_clip_val": None},
    task={"learning_rate": 0.001, "schedule": "constant", "warmup": 0.0},
    data={"batch_size": 128, "train_size": 189_952, "val_size": 10_000, "flips": True},
)
MINI = Scale(
    channels=16,
    norm="instance",
    norm_scale=1.0,
    filter_scale=2.5,
    terms=6,
    weight=100.0,
    trainer={"max_epochs": 2},
    task={"learning_rate": 0.01, "schedule": "cosine", "beta2": 0.99, "gamma": 1.0},
    data={"batch_size": 16, "train_size": 8_000, "val_size": 500, "test_size": 2_000, "flips": True},
    lead_in={3: 1_280},
    contracting={"penalty_ramp": 0.8, "residual_weight": 0.0, "spectral_weight": 0.0, "step_jitter": 14},
)


def settling(steps: int, *, beyond: float = 2, growth: float = 1.0, bound: float | None = None) -> dict[str, Any]:
    """What keeps dynamics stable through late training: `crbp.tasks.ContourTask` has the same by default.

    Half of the batches are run for up to ``beyond`` times N more than N steps; ``growth`` is the weight of its penalty,
    which growth beyond ``bound`` costs; None for what leaves a sixth of what moves at N at 4N.
    """
    return {
        "penalty_ramp": 0.8,
        "residual_weight": 1.0,
        "spectral_weight": growth,
        "spectral_bound": round(6 ** (-1 / (3 * steps)), 4) if bound is None else bound,
        "step_jitter": round(beyond * steps),
    }


def cell(scale: Scale, kind: str, kernel_size: int, steps: int) -> dict[str, Any]:
    """A recurrent cell whose gates span the run."""
    settings: dict[str, Any] = {"channels": scale.channels, "kernel_size": kernel_size, "horizon": steps}
    if scale.horizon is not None:
        settings["horizon"] = min(steps, scale.horizon)
    if kind == "hgru":
        fused = {"fused": True} if scale.fused else {}
        return thing("cells.HGRU", **settings, norm=scale.norm, norm_scale=scale.norm_scale, **fused)
    return thing("cells.ConvLSTM", **settings)


def gradient(scale: Scale, method: str) -> dict[str, Any]:
    """How the run is differentiated."""
    if method in ("rbp", "crbp"):
        # Where the series grows its best partial sum is taken, and counted in the log; it does not end in silence.
        return thing("RBP", solver=thing(scale.solver, terms=scale.terms), on_divergence="fallback")
    if method == "checkpointed":
        return thing("CheckpointedBPTT")
    return thing("TruncatedBPTT", window=3) if method == "truncated" else thing("BPTT")


def config(scale: Scale, preset: str, net: dict[str, Any], method: str = "") -> dict[str, Any]:
    """A whole run."""
    task: dict[str, Any] = {"net": net}
    if method in ("cbptt", "crbp"):
        penalty = {"weight": scale.weight, "bound": 0.9, "reduction": "mean_square"}
        task |= {"penalty": thing("tasks.LipschitzPenalty", **penalty), **scale.contracting}
    if method == "allsteps":
        task["supervision"] = "all"
    data: dict[str, Any] = {"source": thing("tasks.Generated", preset=preset), **scale.data}
    if scale.lead_in:
        stages = [thing("tasks.Generated", preset=preset, settings={"contour_length": n}) for n in scale.lead_in]
        sizes = list(scale.lead_in.values())
        data["lead_in"] = thing("tasks.Stages", sources=stages, sizes=sizes[:-1]) if len(stages) > 1 else stages[0]
        data["lead_in_size"] = sum(sizes)
    return {
        "seed_everything": 0,
        "trainer": scale.trainer,
        "model": thing("tasks.ContourTask", **task, **scale.task),
        "data": thing("tasks.ContourData", **data),
    }


def recurrent(scale: Scale, preset: str, kind: str, method: str, steps: int, kernel_size: int) -> dict[str, Any]:
    """A run of a recurrent model."""
    evolve = {"steps": steps, "gradient": gradient(scale, method)}
    made = cell(scale, kind, kernel_size, steps)
    net = thing("models.PathfinderNet", cell=made, evolve=evolve, norm=scale.norm, filter_scale=scale.filter_scale)
    return config(scale, preset, net, method)


def feedforward(scale: Scale, preset: str, kernel_size: int) -> dict[str, Any]:
    """A run of the feed-forward baseline."""
    settings = {"channels": scale.channels, "kernel_size": kernel_size, "norm": scale.norm}
    return config(scale, preset, thing("models.FeedForwardNet", **settings))


def rows() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, title and content of every file."""
    for length in LENGTHS:
        for kind in CELLS:
            for method, title in METHODS.items():
                steps = STEPS.get(method, {}).get(length, 6)
                what = f"PF{length}, {CELLS[kind]}, {title}, {steps} steps"
                run = recurrent(PAPER, f"pf{length}", kind, method, steps, 15)
                yield f"pf{length}_{kind}_{method}", what, run
        yield f"pf{length}_feedforward", f"PF{length}, feed-forward, 6 layers", feedforward(PAPER, f"pf{length}", 15)
    for size, many in SMALL_KERNELS.items():
        for method, steps in (("crbp", many), ("bptt", 6)):
            what = f"PF14, hGRU, {METHODS[method]}, {steps} steps, {size}×{size} kernels"
            yield f"pf14_hgru_{method}_k{size}", what, recurrent(PAPER, "pf14", "hgru", method, steps, size)
    for length in LENGTHS[1:]:
        steps = STEPS["crbp"][length]
        cured = replace(
            PAPER,
            trainer={"max_epochs": PAPER.trainer["max_epochs"]},
            task={"learning_rate": PAPER.task["learning_rate"]},
            contracting=settling(steps),
        )
        what = f"PF{length}, hGRU, C-RBP, {steps} steps, kept stable through late training (docs/stability.md)"
        yield f"pf{length}_hgru_crbp_cured", what, recurrent(cured, f"pf{length}", "hgru", "crbp", steps, 15)
    for kind, method, steps in (("hgru", "crbp", 8), ("hgru", "bptt", 8), ("convlstm", "crbp", 8)):
        what = f"32×32 images, {CELLS[kind]}, {METHODS[method]}, {steps} steps; quick"
        yield f"mini_{kind}_{method}", what, recurrent(MINI, "mini", kind, method, steps, 7)
    what = "32×32 images, feed-forward, 6 layers; quick"
    yield "mini_feedforward", what, feedforward(MINI, "mini", 7)
    yield from small_rows()


def small(length: int, steps: int, kernel_size: int = 7, growth: float | None = None) -> Scale:
    """The scale of the small rows for one length of contour and size of kernel.

    ``growth`` is the weight of the penalty on growth; None for that of most rows.
    """
    # Far to go for each step: with slow gates and a strong penalty the model would arrive after N (results/pathfinder).
    far = length == 14 or kernel_size < 7
    if growth is None:
        growth = 0.2 if far or length == 9 else 1.0
    beyond = 0.5 if length == 14 else 2
    return replace(
        MINI,
        trainer={"max_epochs": 1, "val_check_interval": 50},
        data={**MINI.data, "train_size": SMALL_SIZE[length], "val_size": 256},
        lead_in=SMALL_LEAD_IN[length],
        terms=max(6, steps // 2),
        fused=True,
        horizon=steps // 2 if far and steps > 6 else None,
        contracting=settling(steps, beyond=beyond, growth=growth, bound=0.95),
    )


def small_rows() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The published rows at a size for two CPU cores: 48×48 images, contours of 5, 9 and 14 dashes."""
    for length, many in SMALL_STEPS.items():
        for kind, methods in (("hgru", tuple(METHODS)), ("convlstm", ("bptt", "crbp"))):
            for method in methods:
                steps = many if method in ("rbp", "crbp") else 6
                what = f"48×48 images, {length} dashes, {CELLS[kind]}, {METHODS[method]}, {steps} steps"
                scale = small(length, steps, growth=SMALL_GROWTH.get(f"small{length}_{kind}_{method}"))
                if kind == "convlstm":
                    horizon = SMALL_LSTM_GATES if method == "crbp" else scale.horizon
                    scale = replace(scale, task={**scale.task, "learning_rate": SMALL_LSTM_RATE}, horizon=horizon)
                run = recurrent(scale, f"small{length}", kind, method, steps, 7)
                yield f"small{length}_{kind}_{method}", what, run
        what = f"48×48 images, {length} dashes, feed-forward, 6 layers"
        yield f"small{length}_feedforward", what, feedforward(small(length, 6), f"small{length}", 7)
        for size, settling_steps in SMALL_SIDES.get(length, {}).items():
            for method, steps in (("crbp", settling_steps), ("bptt", 6)):
                what = f"48×48 images, {length} dashes, hGRU, {METHODS[method]}, {steps} steps, {size}×{size} kernels"
                run = recurrent(small(length, steps, size), f"small{length}", "hgru", method, steps, size)
                yield f"small{length}_hgru_{method}_k{size}", what, run
    steps = SMALL_SIDES[14][3]
    what = f"48×48 images, 14 dashes, hGRU, checkpointed BPTT, {steps} steps, 3×3 kernels"
    run = recurrent(small(14, steps), "small14", "hgru", "checkpointed", steps, 3)
    yield "small14_hgru_checkpointed_k3", what, run
    steps = SMALL_STEPS[5]
    batch = replace(small(5, steps), norm="batch")  # as published
    what = f"48×48 images, 5 dashes, hGRU, C-RBP, {steps} steps, normalised by batch"
    yield "small5_hgru_crbp_batchnorm", what, recurrent(batch, "small5", "hgru", "crbp", steps, 7)
    gmres = replace(small(5, steps), solver="GMRES")
    what = f"48×48 images, 5 dashes, hGRU, C-RBP solved by GMRES, {steps} steps"
    yield "small5_hgru_crbp_gmres", what, recurrent(gmres, "small5", "hgru", "crbp", steps, 7)
    steps = SMALL_STEPS[9]
    stronger = replace(small(9, steps), contracting=settling(steps, bound=0.95))
    what = f"48×48 images, 9 dashes, hGRU, C-RBP, {steps} steps, five times the weight of the penalty on growth"
    yield "small9_hgru_crbp_stronger", what, recurrent(stronger, "small9", "hgru", "crbp", steps, 7)
    sure = small(9, steps)
    unfocused = {name: value for name, value in sure.task.items() if name != "gamma"}
    sure = replace(sure, task={**unfocused, "loss": "evidential"})
    what = f"48×48 images, 9 dashes, hGRU, C-RBP, {steps} steps, evidential loss: it says how sure it is"
    yield "small9_hgru_crbp_evidential", what, recurrent(sure, "small9", "hgru", "crbp", steps, 7)
    yield from long_rows()


def long_rows() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """C-RBP on contours of 5 dashes, trained on for long after it has learnt the task: what becomes of it, and why."""
    length, steps = 5, SMALL_STEPS[5]
    cured = small(length, steps)
    cured = replace(cured, data={**cured.data, "train_size": SMALL_LONG})
    settled = replace(cured, contracting=settling(steps))
    plain = replace(
        cured,
        trainer={**cured.trainer, "gradient_clip_val": None},
        task={**cured.task, "schedule": "constant", "warmup": 0.0},
        contracting=PAPER.contracting,
    )
    clipped = replace(plain, trainer=cured.trainer)
    falling = replace(plain, task=cured.task)
    fixed = replace(cured, contracting={**PAPER.contracting, "penalty_ramp": cured.contracting["penalty_ramp"]})
    published = replace(
        PAPER, channels=cured.channels, trainer=plain.trainer, terms=cured.terms, data=cured.data, fused=True
    )
    # It first reaches F1 .9 at six times the images of the others; this is five times that number.
    longer = replace(published, data={**published.data, "train_size": 3 * SMALL_LONG})
    as_published = "start, optimiser, rate, batch normalisation and penalty as published"
    for name, scale, title in (
        ("long", cured, "trained on"),
        ("settled", settled, "trained on, with what leaves a sixth of what moves at N at 4N"),
        ("fixed", fixed, "trained on without drawn numbers of steps and without penalties on residual and growth"),
        ("plain", plain, "trained on at a constant rate, without clipping and what makes the state settle"),
        ("clipped", clipped, "trained on as plain, but with clipping"),
        ("falling", falling, "trained on as plain, but at a falling rate"),
        ("published", published, as_published),
        ("published_5x", longer, f"{as_published}; for three times the images"),
    ):
        what = f"48×48 images, {length} dashes, hGRU, C-RBP, {steps} steps, {title}"
        yield f"small5_hgru_crbp_{name}", what, recurrent(scale, "small5", "hgru", "crbp", steps, 7)


def comments(name: str, title: str) -> Iterator[str]:
    """What a file says of itself."""
    yield f"{title}."
    if name in PUBLISHED:
        yield f"Published F1 on validation (peak / last): {PUBLISHED[name]} (Linsley et al., NeurIPS 2020)."
    yield f"Run it with: crbp fit --config configs/pathfinder/{name}.yaml"
    yield "Written by configs/make_pathfinder.py, where all rows stand side by side: change it there."


def files() -> dict[str, str]:
    """Name and content of every file."""
    return {f"{name}.yaml": text(comments(name, title), content) for name, title, content in rows()}


if __name__ == "__main__":
    write(FOLDER, files())
