"""The command `crbp`: finds the command asked for, imports what it needs and words its mistakes in one line."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from crbp import __version__
from crbp._command import EXAMPLES, Parser
from crbp.errors import CrbpError


class _Command(NamedTuple):
    """One command: what it does, how it is carried out, given the arguments after its name, and its parser.

    Its examples are in `crbp._command.EXAMPLES`.
    """

    summary: str
    run: Callable[[list[str]], int | None]  # returns the exit status where that is not always 0
    parser: Callable[[], argparse.ArgumentParser]  # raises ImportError where its extra is not installed
    parts: Mapping[str, Callable[[], argparse.ArgumentParser]] = {}  # of the commands within it


def _lightning(name: str) -> Callable[[list[str]], None]:
    def run(arguments: list[str]) -> None:
        _need("train", "lightning", "jsonargparse", "torchmetrics", "safetensors", "tensorboard", "numba", "PIL")
        from crbp.ops import keep_freed_memory
        from crbp.tasks.command_line import run

        keep_freed_memory()
        run([name, *arguments])

    return run


def _generate(arguments: list[str]) -> None:
    _need("data", "numba", "numpy", "PIL", "pyarrow", "rich")
    if arguments[:1] == ["shapes"]:
        from crbp.data.panoptic.command import shapes

        return shapes(arguments[1:])
    options = _generate_parser().parse_args(arguments)
    return _write_data(options)


def _data(arguments: list[str]) -> None:
    _need("data", "numpy", "PIL", "rich")
    from crbp.data.panoptic.command import data

    data(arguments)


def _demo(arguments: list[str]) -> None:
    _need("train", "lightning", "jsonargparse", "torchmetrics", "safetensors", "numba", "matplotlib", "scipy")
    from crbp.demo import main as demo

    demo(arguments)


def _analyze(arguments: list[str]) -> None:
    _need("train", "lightning", "jsonargparse", "torchmetrics", "safetensors", "numba", "matplotlib", "scipy", "rich")
    from crbp.analysis.command import main as analyze
    from crbp.ops import keep_freed_memory

    keep_freed_memory()
    analyze(arguments)


def _compare(arguments: list[str]) -> None:
    _need("train", "lightning", "jsonargparse", "torchmetrics", "safetensors", "numba", "matplotlib", "scipy", "rich")
    from crbp.analysis.comparison import main as compare
    from crbp.ops import keep_freed_memory

    keep_freed_memory()
    compare(arguments)


def _bench(arguments: list[str]) -> None:
    _need("train", "lightning", "jsonargparse", "torchmetrics", "safetensors", "numba", "matplotlib", "scipy", "rich")
    from crbp.bench.command import main as bench

    bench(arguments)


def _export(arguments: list[str]) -> None:
    _need("train", "lightning", "jsonargparse", "torchmetrics", "safetensors", "PIL")
    from crbp._export_command import main as export

    export(arguments)


def _app(arguments: list[str]) -> None:
    _need("app", "gradio", "lightning", "jsonargparse", "torchmetrics", "safetensors", "numba", "matplotlib", "scipy")
    from crbp.app import main as app
    from crbp.ops import keep_freed_memory

    keep_freed_memory()
    app(arguments)


def _doctor(arguments: list[str]) -> int:
    from crbp.doctor import main as doctor

    return doctor(arguments)


def _model_summary(arguments: list[str]) -> None:
    _need("panoptic", "torchvision", "numpy", "rich")
    from crbp.models.panoptic.summary import main as summary

    summary(arguments)


def _completion(arguments: list[str]) -> None:
    from crbp._completion_command import main as completion

    completion(arguments, COMMANDS)


def _parser(module: str, name: str = "parser") -> Callable[[], argparse.ArgumentParser]:
    def make() -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = getattr(import_module(module), name)()
        return made

    return make


def _lightning_parser(name: str) -> Callable[[], argparse.ArgumentParser]:
    def make() -> argparse.ArgumentParser:
        from crbp.tasks.command_line import parsers

        return parsers()[name]

    return make


COMMANDS = {
    "fit": _Command("train a model as a configuration says", _lightning("fit"), _lightning_parser("fit")),
    "validate": _Command(
        "measure a checkpoint on the validation split", _lightning("validate"), _lightning_parser("validate")
    ),
    "test": _Command("measure a checkpoint on the test split", _lightning("test"), _lightning_parser("test")),
    "predict": _Command(
        "write what a checkpoint sees in the test split, or in images given, as PNG files",
        _lightning("predict"),
        _lightning_parser("predict"),
    ),
    "generate": _Command(
        "write a data set of contour images, or (generate shapes) of panoptic segmentation",
        _generate,
        lambda: _generate_parser(),
        {"shapes": _parser("crbp.data.panoptic.command", "shapes_parser")},
    ),
    "data": _Command(
        "find what is wrong with a panoptic data set, and print its statistics",
        _data,
        _parser("crbp.data.panoptic.command", "data_parser"),
    ),
    "demo": _Command("see the stable and the unstable way to train side by side", _demo, _parser("crbp.demo.command")),
    "analyze": _Command(
        "see what a trained model does beyond the steps it was trained for",
        _analyze,
        _parser("crbp.analysis.command"),
    ),
    "compare": _Command(
        "see several trained models on the same images, side by side", _compare, _parser("crbp.analysis.comparison")
    ),
    "app": _Command("watch models trace contours in the browser, offline", _app, _parser("crbp.app.command")),
    "model-summary": _Command(
        "count the parameters of a panoptic model", _model_summary, _parser("crbp.models.panoptic.summary")
    ),
    "bench": _Command("measure speed and memory beside the textbook C-RBP", _bench, _parser("crbp.bench.command")),
    "export": _Command(
        "write a contour-tracing network, its steps fixed, as a file that runs without crbp",
        _export,
        _parser("crbp._export_command"),
    ),
    "doctor": _Command(
        "say what is installed, what is missing and what the machine has", _doctor, _parser("crbp.doctor")
    ),
    "completion": _Command(
        "print a script by which a shell completes all of these", _completion, _parser("crbp._completion_command")
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 is success, 1 the answer of `crbp doctor` where training would not work, 2 a mistake in what was asked for, told
    in one line on standard error, and 130 a run that the user broke off. Anything else that goes wrong is a fault of
    crbp and shows its traceback.

    Args:
        argv: the arguments without the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except CrbpError as error:
        print(f"crbp: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name in ("-V", "--version"):
        print(f"crbp {__version__}")
    elif name in COMMANDS:
        return COMMANDS[name].run(arguments[1:]) or 0
    else:
        raise CrbpError(f"{name!r} is no command of crbp; choose one of {', '.join(COMMANDS)} (see crbp --help)")
    return 0


def _help() -> str:
    lines = ["usage: crbp COMMAND [OPTIONS]", "", "Train recurrent networks at constant memory, stably."]
    lines += ["", "commands (crbp COMMAND --help lists the options of one):"]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<15}{command.summary}", f"  {'':<15}  {EXAMPLES[f'crbp {name}'][0]}"]
    return "\n".join([*lines, "", "options:", "  --version   print the version", "  --help      print this"])


def _need(extra: str, *modules: str) -> None:
    """Raise, naming the extra to install, unless the modules can be imported. They are only looked up here."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CrbpError(
            f"this command needs {', '.join(missing)}, not installed here; run: pip install 'crbp[{extra}]'"
        )


def _generate_parser() -> Parser:
    from crbp.data.pathfinder import PRESETS, PathfinderConfig

    about = "Write a data set of contour images, the same on every machine; crbp generate shapes writes a panoptic one."
    parser = Parser(prog="crbp generate", description=about, allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; one per split")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="task to start from (default: the published pf14)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="(default: train)")
    parser.add_argument("--size", type=int, default=200_000, help="images of the whole set (default: 200000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images (default: 0)")
    parser.add_argument("--format", choices=("folder", "parquet"), default="folder", help="(default: folder)")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="write part I of N, I from 0")
    parser.add_argument("--workers", type=int, help="processes (default: the cores at hand)")
    task = parser.add_argument_group(
        "settings of the task", "see crbp.data.pathfinder.PathfinderConfig; lengths in pixels"
    )
    for field in dataclasses.fields(PathfinderConfig):
        kind = str if "Literal" in str(field.type) else float if field.type == "float" else int
        name = f"--{field.name.replace('_', '-')}"
        task.add_argument(name, type=kind, metavar=kind.__name__.upper(), default=argparse.SUPPRESS)
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, _, total = text.partition("/")
    try:
        return int(index), int(total)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 0/4") from None


def _write_data(options: argparse.Namespace) -> None:
    from crbp.data.pathfinder import GenerationError, PathfinderConfig, write

    settings = vars(options)
    names = ("out", "split", "size", "seed", "format", "shard", "workers")
    chosen = {name: settings.pop(name) for name in names}
    preset = settings.pop("preset")
    try:
        config = PathfinderConfig(**settings) if preset is None else PathfinderConfig.preset(preset, **settings)
        written = write(config, **chosen)
    except (ValueError, OSError, GenerationError) as error:
        raise CrbpError(str(error)) from error
    print(f"{written.made} images made, {written.kept} kept from before: {written.manifest}")


if __name__ == "__main__":
    sys.exit(main())
