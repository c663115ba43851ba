"""The numbers of each part as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from crbp.bench.measure import Numbers

_MIB = 2**20


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _spread(found: Numbers, unit: str = "") -> str:
    return f"{found['median']:.3g}{unit} ({found['min']:.3g} to {found['max']:.3g})"


def _pair(found: Numbers) -> list[str]:
    return [
        _spread(found["crbp"], " s"),
        _spread(found["textbook"], " s"),
        _spread(found["speedup"], "×"),
        f"{found['gradient_difference_overall']:.1e}",
        f"{found['compile_seconds']:.1f} s",
    ]


_PAIR = ("crbp", "textbook", "speed-up", "gradient differs by", "compiling")


def step(numbers: Numbers) -> Table:
    """Both codes at one size."""
    size = numbers["size"]
    title = (
        f"A training step: {size['channels']} channels, {size['kernel_size']}×{size['kernel_size']} kernels, "
        f"{size['batch']} images of {size['image']}×{size['image']}, N = {size['steps']}, K = {size['terms']}"
    )
    rows = [
        ["fused" if size["fused"] else "not fused", *_pair(numbers)],
        ["not fused", *_pair(numbers["not_fused"])],
        ["fused, eager", *_pair(numbers["eager"])],
    ]
    return _table(title, ("", *_PAIR), rows)


def compiling(numbers: Numbers) -> Table:
    """Seconds of compiling."""
    rows = [[f"{name} cache", _spread(found, " s")] for name, found in numbers.items()]
    return _table("Compiling a fused cell", ("", "seconds"), rows)


def images(numbers: Numbers) -> Table:
    """Milliseconds of an image."""
    return _table("Making an image", ("task", "ms"), [[name, _spread(found)] for name, found in numbers.items()])


def kernels(numbers: Numbers) -> Table:
    """Both codes at several kernels."""
    size, rows = numbers["size"], []
    for row in numbers["rows"]:
        of = [f"{row['kernel_size']}×{row['kernel_size']}", str(row["steps"])]
        rows.append([*of, "fused" if size["fused"] else "not fused", *_pair(row)])
        if "not_fused" in row:
            rows.append([*of, "not fused", *_pair(row["not_fused"])])
    title = f"Smaller kernels: {size['batch']} images of {size['image']}×{size['image']}"
    return _table(title, ("kernel", "N", "", *_PAIR), rows)


def precision(numbers: Numbers) -> Table:
    """float32 beside bfloat16."""
    rows = [
        [
            f"{row['kernel_size']}×{row['kernel_size']}",
            _spread(row["float32"], " s"),
            _spread(row["bfloat16"], " s"),
            _spread(row["speedup"], "×"),
            f"{row['gradient_error_overall']:.1e}",
            f"{row['gradient_error']:.1e} ({row['gradient_error_at']})",
        ]
        for row in numbers["rows"]
    ]
    columns = ("kernel", "float32", "bfloat16", "speed-up", "gradient error", "of the worst parameter")
    return _table("Under autocast to bfloat16", columns, rows)


def memory(numbers: Numbers) -> Table:
    """Saved activations and growth of the process."""
    counts = numbers["steps"]
    rows = []
    for name, curve in numbers["methods"].items():
        found = {row["steps"]: row for row in curve["rows"]}
        rows.append(
            [name]
            + [
                f"{found[n]['saved_bytes'] / _MIB:.3g} / {found[n]['peak_bytes'] / _MIB:.3g}" if n in found else "–"
                for n in counts
            ]
        )
    paper = numbers["paper"]
    limits = ", ".join(f"{steps} steps of {batch}" for batch, steps in paper["bptt_steps_in_24_gib"].items())
    table = _table("MiB saved / grown by", ("", *(f"N = {n}" for n in counts)), rows)
    over = ", ".join(f"{row['saved_ratio']:.2f} ({row['what']})" for row in paper["rows"])
    table.caption = (
        f"At the paper's size C-RBP saves so many times what one step of BPTT does: {over}. BPTT fills 24 GiB at "
        f"{limits} images."
    )
    return table


def time_to_f1(numbers: Numbers) -> Table:
    """Seconds to the target."""
    rows = []
    for name, found in numbers["codes"].items():
        reached = [f"{found['seconds']:.0f} s", str(found["images"])] if found["seconds"] is not None else ["–", "–"]
        best = "–" if found["best_f1"] is None else f"{found['best_f1']:.3f}"
        whole = "–" if found["speedup"] is None else f"{found['speedup']:.2f}×"
        an_image = [f"{1e3 * found['seconds_per_image']:.3g} ms", f"{found['speedup_per_image']:.2f}×"]
        rows.append([name, *reached, whole, *an_image, best])
    columns = ("", "seconds", "images", "speed-up", "an image", "speed-up", "best F1")
    return _table(f"Training to a validation F1 of {numbers['target']}", columns, rows)


def solvers(numbers: Numbers) -> Table:
    """Error against products."""
    products = numbers["products"]
    shown = [i for i, k in enumerate(products) if k in (1, 4, 8, 15, 16, 30, 40)]
    rows = [
        [name.split("_")[0], f"{found['spectral_radius']:.3f}", solver, *(f"{errors[i]:.1e}" for i in shown)]
        for name, found in numbers["networks"].items()
        for solver, errors in found["relative_error"].items()
    ]
    title = "Relative error of the gradient after K products"
    return _table(title, ("", "radius", "", *(f"K = {products[i]}" for i in shown)), rows)


def scaling(numbers: Numbers) -> Table:
    """Seconds and exponents."""
    rows = []
    for axis in ("batch", "image", "channels"):
        part = numbers[axis]
        for row in part["rows"]:
            rows.append([f"{axis} {row['value']}", *(_spread(row[name]) for name in ("crbp", "textbook", "speedup"))])
        rows.append([f"{axis}: exponent", *(f"{part['exponents'][name]:.2f}" for name in ("crbp", "textbook")), ""])
    return _table("How a training step scales", ("", "crbp (s)", "textbook (s)", "speed-up"), rows)


def roofline(numbers: Numbers) -> Table:
    """What the machine allows."""
    work = {"direct": "direct_gflop", "fft": "fft_gflop", "elementwise": "elementwise_gbyte"}
    rows = [
        [name, f"{numbers[work[name]]:.4g} {'GB' if name == 'elementwise' else 'GFLOP'}", f"{seconds:.3g} s"]
        for name, seconds in numbers["least_seconds"].items()
    ]
    title = (
        f"The least this machine allows the step: {numbers['gflops']['best']:.0f} GFLOP/s, "
        f"{numbers['gbytes_per_second']['triad']:.1f} GB/s"
    )
    table = _table(title, ("", "work", "at least"), rows)
    took = (f"a {name} {1e3 * seconds:.3g} ms" for name, seconds in numbers["measured_seconds"].items())
    table.caption = f"Measured, by itself: {', '.join(took)}."
    return table


def convolutions(numbers: Numbers) -> Table:
    """Ways to convolve side by side."""
    names = list(numbers["rows"][0]["seconds"])
    rows = []
    for row in numbers["rows"]:
        size, seconds = row["size"], row["seconds"]
        what = f"{size['batch']}×{size['channels']}×{size['image']}², {size['kernel_size']}×{size['kernel_size']}"
        rows.append([what, *(f"{1e3 * seconds[n]['median']:.3g} ({seconds[n]['error']:.0e})" for n in names)])
    return _table("A convolution and its gradient in the image, ms (error of the result)", ("", *names), rows)


def rollout(numbers: Numbers) -> Table:
    """Ways to run a cell side by side."""
    rows = [
        [f"{row['batch']}", name, _spread(found, " s"), f"{found['first_seconds']:.3g} s", f"{found['difference']:.1e}"]
        for row in numbers["rows"]
        for name, found in row["seconds"].items()
    ]
    title = f"{numbers['size']['steps']} steps without a graph"
    table = _table(title, ("images", "", "seconds", "the first time", "differs by"), rows)
    if skipped := numbers["cuda_graphs_skipped"]:
        table.caption = f"Of {skipped} compiled graphs PyTorch made no CUDA graph."
    return table


TABLES: dict[str, Callable[[Numbers], Table]] = {
    "step": step,
    "compiling": compiling,
    "kernels": kernels,
    "precision": precision,
    "memory": memory,
    "time_to_f1": time_to_f1,
    "solvers": solvers,
    "scaling": scaling,
    "roofline": roofline,
    "images": images,
    "convolutions": convolutions,
    "rollout": rollout,
}
