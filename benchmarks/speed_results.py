"""Set the tables of the page on speed from the files that `crbp bench` has written.

    python benchmarks/speed_results.py [FOLDER]

Without a folder those are of `results/speed`: `bench.json` and `epyc.json`, of two processors, and, of commits of
their own, the parts that take long.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from _runs import ROOT
from _tables import markdown, with_tables

Numbers = dict[str, Any]
MACHINES = {"bench": "Xeon", "epyc": "EPYC"}  # by file
FILES = (*MACHINES, "kernels", "memory", "solvers", "scaling")
STEPS = (5, 20, 100, 500)
PRODUCTS = (1, 3, 6, 10, 15, 20, 30, 40)
METHODS = {
    "C-RBP": "**C-RBP**",
    "BPTT": "BPTT", "CheckpointedBPTT": "checkpointed BPTT", "TruncatedBPTT": "truncated BPTT, 5 steps", "RBP": "RBP",
    "OneStep": "one step", "Phantom": "phantom, 5 steps",
}  # fmt: skip
WANTED = {3: "never slower, 2×", 5: "never slower", 9: "never slower"}  # by the side of the kernel
AXES = {"batch": "batch", "image": "image side", "channels": "channels"}


def tables(parts: dict[str, Numbers]) -> dict[str, str]:
    """The tables of the page by name, from the parts by the name of their file."""
    return {
        "kernels": kernels(parts["kernels"]["kernels"]),
        "memory": memory(parts["memory"]["memory"], "saved_bytes"),
        "grown": memory(parts["memory"]["memory"], "peak_bytes"),
        "paper": paper(parts["memory"]["memory"]["paper"]),
        "step": steps({machine: parts[file]["step"] for file, machine in MACHINES.items()}),
        "f1": time_to_f1({machine: parts[file]["time_to_f1"] for file, machine in MACHINES.items()}),
        "precision": precision(parts["bench"]["precision"]),
        "solvers": solvers(parts["solvers"]["solvers"]),
        "scaling": scaling(parts["scaling"]["scaling"]),
    }


def kernels(part: Numbers) -> str:
    """Seconds by size of kernel, fused and not, each beside the textbook's in turns with it."""
    body = []
    for row in part["rows"]:
        side = row["kernel_size"]
        for what, found in (("fused" if part["size"]["fused"] else "not fused", row), ("not fused", row["not_fused"])):
            seconds = [_spread(found[name], unit=" s") for name in ("crbp", "textbook")]
            ratio = _spread(found["speedup"], unit="×", bold=True)
            body.append([f"{side}×{side}", f"{row['steps']}", what, *seconds, ratio, WANTED[side]])
    return markdown(("kernel", "N", "", "crbp", "textbook", "ratio", "wanted"), body)


def memory(part: Numbers, what: str) -> str:
    """MiB that autograd saves or the process grows by, by method and number of steps."""
    body = []
    for name, title in METHODS.items():
        saved = {row["steps"]: row[what] / 2**20 for row in part["methods"][name]["rows"]}
        body.append([title, *(_three(saved[steps]) for steps in STEPS)])
    return markdown(("N", *map(str, STEPS)), body)


def paper(part: Numbers) -> str:
    """C-RBP beside one step of BPTT at the paper's size, MiB."""
    body = []
    for row in part["rows"]:
        of = [(f"{row[f'{code}_bytes'] / 2**20:.1f}") for code in ("crbp", "bptt_one_step")]
        grown = [row.get(f"{code}_peak_bytes") for code in ("crbp", "bptt_one_step")]
        sizes = [f"{each / 2**20:.0f}" if each else "" for each in grown]
        ratio = f"{grown[0] / grown[1]:.2f}×" if all(grown) else ""
        body.append([row["what"], *of, f"**{row['saved_ratio']:.2f}×**", *sizes, ratio])
    saved, grown_by = ("kept, C-RBP", "one step", "ratio"), ("process grows by, C-RBP", "one step", "ratio")
    return markdown(("images", *saved, *grown_by), body)


def steps(machines: dict[str, Numbers]) -> str:
    """Seconds of a training step by processor and by how stages run, each beside the textbook's in turns with it."""
    body = []
    for machine, part in machines.items():
        ways = {"fused": part, "not fused": part["not_fused"], "fused, eager": part.get("eager")}
        for name, found in ways.items():
            if found is None:
                continue
            seconds = [_spread(found[code], unit=" s") for code in ("crbp", "textbook")]
            differs = [_power(found[f"gradient_difference{of}"]) for of in ("_overall", "")]
            body.append([machine, name, *seconds, _spread(found["speedup"], unit="×", bold=True), *differs])
    heads = ("gradients differ by", "that of one parameter by")
    return markdown(("processor", "", "crbp", "textbook", "ratio", *heads), body)


def time_to_f1(machines: dict[str, Numbers]) -> str:
    """Seconds to the target by processor and code."""
    body = []
    for machine, part in machines.items():
        for name, found in part["codes"].items():
            whole = f"{found['seconds']:.1f} s" if found["seconds"] else "not reached"
            ratio = f"**{found['speedup']:.2f}×**" if found["speedup"] else ""
            each = [f"{1e3 * found['seconds_per_image']:.1f} ms", f"{found['speedup_per_image']:.2f}×"]
            first = f"{found['first_batch_seconds']:.1f} s"
            body.append([machine, name, f"{found['images'] or ''}", whole, ratio, first, *each])
    heads = ("code", "images", "whole", "ratio", "of which the first batch", "an image", "ratio")
    return markdown(("processor", *heads), body)


def precision(part: Numbers) -> str:
    """float32 beside bfloat16."""
    body = []
    for row in part["rows"]:
        seconds = [_spread(row[name], unit=" s") for name in ("float32", "bfloat16")]
        errors = [f"{row['gradient_error_overall']:.1%}", f"{row['gradient_error']:.0%} (`{row['gradient_error_at']}`)"]
        side = row["kernel_size"]
        body.append([f"{side}×{side}", *seconds, _spread(row["speedup"], unit="×", bold=True), *errors])
    return markdown(("kernel", "float32", "bfloat16", "ratio", "error of the gradient", "of the worst parameter"), body)


def solvers(part: Numbers) -> str:
    """Relative error of the gradient, by solver and products."""
    places = [part["products"].index(count) for count in PRODUCTS]
    body = [
        [
            name if solver == "Neumann" else "",
            f"{found['spectral_radius']:.3f}" if solver == "Neumann" else "",
            solver,
            *(_power(errors[place]) for place in places),
        ]
        for name, found in part["networks"].items()
        for solver, errors in found["relative_error"].items()
    ]
    return markdown(("network", "radius", "products", *map(str, PRODUCTS)), body)


def scaling(part: Numbers) -> str:
    """Exponents, and ratios at the ends."""
    body = []
    for axis, title in AXES.items():
        rows, exponents = part[axis]["rows"], part[axis]["exponents"]
        first, last = (f"{rows[end]['speedup']['median']:.1f}×" for end in (0, -1))
        body.append(
            [
                f"{title}, {rows[0]['value']} to {rows[-1]['value']}",
                *(f"{exponents[name]:.2f}" for name in ("crbp", "textbook")),
                f"{first} to {last}",
            ]
        )
    return markdown(("", "crbp", "textbook", "ratio at the ends"), body)


def _spread(found: Numbers, *, unit: str, bold: bool = False) -> str:
    median = _three(found["median"]) + unit
    return f"{f'**{median}**' if bold else median} ({_three(found['min'])} to {_three(found['max'])})"


def _power(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def _three(value: float) -> str:
    """Three digits, at most two of them decimals."""
    rounded = float(f"{value:.3g}")
    decimals = next((places for places, least in ((0, 100), (1, 10)) if rounded >= least), 2)
    return f"{rounded:,.{decimals}f}".replace(",", " ")


def read(folder: Path) -> dict[str, Numbers]:
    """The parts by the name of their file."""
    return {name: json.loads((folder / f"{name}.json").read_text())["parts"] for name in FILES}


def main() -> None:
    """Set the tables."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results" / "speed"
    page = folder / "README.md"
    page.write_text(with_tables(page.read_text(), tables(read(folder))))


if __name__ == "__main__":
    main()
