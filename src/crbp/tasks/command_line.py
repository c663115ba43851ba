"""`crbp fit | validate | test | predict`: Lightning's command line with the defaults and the error messages of crbp."""

from __future__ import annotations

import errno
import json
import logging
import signal
import sys
import warnings
from argparse import ArgumentError, ArgumentParser
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from crbp._code import code
from crbp._command import Parser, told_examples
from crbp._files import write_whole
from crbp._threads import set_threads
from crbp.data.pathfinder import DataError, GenerationError
from crbp.errors import CrbpError, StorageError
from crbp.ops import compile_seconds
from crbp.tasks._messages import one_line
from crbp.tasks._resume import LastCheckpoint, Restoring, ResumableModule, WholeCheckpoints
from crbp.tasks._stop import StopOnSignal, Stopped, lost_process
from crbp.tasks.finite import NonFinite
from crbp.tasks.learning import LearningCheck
from crbp.tasks.predictions import PredictionWriter
from crbp.tasks.weights import (
    CODE,
    Origin,
    SafetensorsExport,
    read_state,
    refuse_functions,
    to_hand_on,
    trust_packages,
)

COMMANDS = ("fit", "validate", "test", "predict")

_MONITOR = "val/f1"
_UNNAMED = "unnamed"
_TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs",
    "logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": _UNNAMED},
    },
    # A Neumann series on dynamics that do not contract yet can make a single gradient very long.
    "gradient_clip_val": 1.0,
    # The spectral radius is estimated in validation and needs a graph there.
    "inference_mode": False,
    # Deterministic kernels where there are any; the others are named in a warning rather than refused.
    "deterministic": "warn",
}
_EXPECTED_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch, harmless
    "Experiment logs directory .* exists and is not empty",  # the same; its table of metrics is put aside
    "Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its folder
    "Be aware that when using `ckpt_path`, callbacks used to create",  # measuring a checkpoint needs none of them
)
_UNWRITABLE = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)
_MISTAKES = (
    *(ArgumentError, CrbpError, MisconfigurationException, ValueError, TypeError, OSError, ImportError),
    *(MemoryError, OverflowError, RecursionError),
)
# A class that a configuration names is imported, which runs its module.
_TRUSTED = ["crbp", "lightning.pytorch", "torch.nn", "torch.optim"]


def run(arguments: list[str]) -> None:
    """Carry out one of `COMMANDS`, the first of the arguments.

    Classes are imported from crbp, Lightning and torch alone, and from the packages named after ``--trust``.

    Raises:
        CrbpError: for a mistake in the arguments, the configuration or a checkpoint, in one line.
        KeyboardInterrupt: if the user broke off the run, which has been shut down in order.
    """
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    arguments = _trust(arguments)
    try:
        _CommandLine(args=arguments)
    except (MisconfigurationException, DataError, GenerationError) as error:  # what a run can hold against its settings
        raise CrbpError(one_line(error)) from error


def _trust(arguments: list[str]) -> list[str]:
    """Say which packages classes may come from; the arguments without those of ``--trust``."""
    parser = Parser(prog="crbp", add_help=False, allow_abbrev=False)
    parser.add_argument("--trust", nargs="+", action="extend", default=[])
    found, others = parser.parse_known_args(arguments)
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*_TRUSTED, *found.trust])
        trust_packages(found.trust)
    except ValueError as error:
        raise CrbpError(f"--trust takes names of packages; {error}") from error
    return others


class _SaveConfig(SaveConfigCallback):
    """Writes the whole configuration, and which code ran, beside the logs; a resumed run brings them up to date."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # agreed on by all processes, so asked for by all of them
        if trainer.loggers and folder is not None and trainer.is_global_zero:
            content = self.parser.dump(self.config, skip_unset=False)
            write_whole(Path(folder) / self.config_filename, content.encode())
            if stage == "fit":
                write_whole(Path(folder) / CODE, (json.dumps(code(), indent=2) + "\n").encode())


class _CompileTime(pl.Callback):
    """Says after training how much of it went into compiling fused cells."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = compile_seconds()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and (spent := compile_seconds() - self._before) >= 1:
            print(f"crbp: compiling fused cells took {spent:.0f} s of the training", file=sys.stderr)


class _Parser(LightningArgumentParser):
    """Ends its help with examples, as they are typed; takes no abbreviation, nor do the parsers of classes in it."""

    examples = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def format_help(self, *formatter: Any) -> str:  # jsonargparse passes one on, argparse none
        return f"{super().format_help(*formatter)}{self.examples}"


class _CommandLine(LightningCLI):
    def __init__(self, args: list[str]) -> None:
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            trainer_defaults=_TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=_Parser,
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Let mistakes come back as exceptions, so that they are worded in one place."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.epilog = f"--trust PACKAGE …: whose classes may be named, besides those of {', '.join(_TRUSTED)}"
        assert isinstance(parser, _Parser)
        parser.examples = told_examples(f"crbp {subcommand}")
        if subcommand == "predict":
            parser.add_argument("--out", type=str, default="predictions", help="Folder to write to.")
            # They go to disk batch by batch; kept as well, they would fill the memory.
            parser.set_defaults({"return_predictions": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in one line what is wrong."""
        try:
            self.config = parser.parse_args(args)
            refuse_functions(self.config)
        except _MISTAKES as error:
            where = f"see crbp {_command(args)} --help, and configs/ in the folder of the project for examples"
            raise CrbpError(f"{one_line(error)} ({where})") from error
        if not isinstance(self._settings.get("trainer"), Namespace):
            raise CrbpError(f"trainer: {self._settings.get('trainer')!r} is no table of settings")
        if self._settings.get("weights_only") is False:
            raise CrbpError("weights_only=False would run what a checkpoint holds; leave it out")

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise CrbpError(f"seed_everything: {one_line(error)}") from error

    def _parse_ckpt_path(self) -> None:
        """Look at the checkpoint before anything is built; what it says of settings does not override the config's."""
        path = self._settings.get("ckpt_path")
        if path is None or path in ("last", "best", "hpc"):
            self._weights = None
            return
        if self.config.subcommand == "fit" and self._weights_alone:
            raise CrbpError(
                f"{path} holds weights alone, and training goes on from a whole checkpoint; give checkpoints/last.ckpt "
                "of its run, or, for a panoptic network, start from these with --model.weights"
            )
        self._weights = read_state(Path(path))

    def before_instantiate_classes(self) -> None:
        """Name the run after its configuration, let a resumed one go on in its folder, and use the cores once."""
        logger = getattr(self._settings.trainer.logger, "init_args", None)
        if logger is not None and logger.get("name") == _UNNAMED:
            logger.name = self._name
            run = Path(self._settings.get("ckpt_path") or "").absolute().parent.parent
            if self.subcommand == "fit" and run.parent == Path(logger.save_dir, logger.name).absolute():
                logger.version = run.name
                _keep_metrics(run)
        _set_up_torch()

    def instantiate_classes(self) -> None:
        """Build model, data and trainer, and say in one line which value one of them refused."""
        try:
            self.config_init = self.parser.instantiate(self.config)
            self.datamodule = self._get(self.config_init, "data")
            self.model = self._get(self.config_init, "model")
            self.trainer = self.instantiate_trainer()
        except _MISTAKES as error:
            raise CrbpError(one_line(error)) from error

    def after_instantiate_classes(self) -> None:
        """Compare the checkpoint with the model; see that what is to be measured has weights."""
        if self._weights is not None:
            _check_fit(self._weights, self.model.state_dict(), self._settings.ckpt_path)
            if self._weights_alone:
                self.model.load_state_dict(self._weights)
            self._weights = None
        elif self.subcommand != "fit" and self._settings.get("ckpt_path") != "hpc" and _has_no_weights(self.model):
            # `best` and `last` would be of a training in this process.
            raise CrbpError(
                f"crbp {self.subcommand} is for a trained network, and this one has no weights; give --ckpt_path, a "
                ".ckpt or .safetensors file that crbp fit wrote, or, for a panoptic network, --model.weights"
            )

    @property
    def _weights_alone(self) -> bool:
        return Path(self._settings.get("ckpt_path") or "").suffix == ".safetensors"

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Have the trainer unpickle nothing but weights, from wherever it takes a checkpoint."""
        found = {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}
        return {**found, "ckpt_path": None} if self._weights_alone else found

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, with the callbacks and the plugin for checkpoints that its settings leave room for."""
        given = self._get(self.config_init, "trainer").callbacks or []
        given = given if isinstance(given, list) else [given]
        plugins = self._get(self.config_init, "trainer").plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, WholeCheckpoints()]
        self._restoring = Restoring()
        callbacks = [*given, *self._callbacks(given), self._restoring]
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    def _callbacks(self, given: list[Callback]) -> list[Callback]:
        settings = self._settings.trainer
        if self.subcommand == "predict":
            writer = getattr(self.model, "prediction_writer", PredictionWriter)
            return [writer(self._settings.out)]
        if self.subcommand != "fit":
            return []
        chosen: list[Callback] = [_CompileTime()]
        monitor = getattr(self.model, "monitor", _MONITOR)
        for check in (NonFinite, LearningCheck):
            if not any(isinstance(callback, check) for callback in given):
                chosen.append(check())
        if settings.logger is not False:
            chosen.append(LearningRateMonitor(logging_interval="step"))
        if settings.enable_checkpointing is not False and not settings.fast_dev_run:
            if not any(isinstance(callback, ModelCheckpoint) for callback in given):
                chosen.append(
                    ModelCheckpoint(filename="best", monitor=monitor, mode="max", enable_version_counter=False)
                )
            last = next((each for each in given if isinstance(each, LastCheckpoint)), None) or LastCheckpoint()
            chosen += [StopOnSignal(last)] if last in given else [last, StopOnSignal(last)]
            if (origin := self._origin()) is not None:
                chosen.append(SafetensorsExport(origin, monitor=monitor))
        return chosen

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (Stopped, CrbpError, DataError, GenerationError, MisconfigurationException):
            raise
        except SystemExit:
            if self.trainer.interrupted:  # the trainer turns Ctrl+C into an exit with status 1
                raise KeyboardInterrupt from None
            raise
        except Exception as error:
            if (said := self._said_of(error)) is None:
                raise
            raise said from error

    def _said_of(self, error: Exception) -> BaseException | None:
        """What to raise in the place of an error that does not say what to do; None where it is not known."""
        if isinstance(error, dist.DistNetworkError) and "EADDRINUSE" in str(error):
            port = self.trainer.strategy.cluster_environment.main_port  # type: ignore[attr-defined]
            if (launcher := self.trainer.strategy.launcher) is not None:
                launcher.kill(signal.SIGTERM)  # the others would wait at the port
            return SystemExit(
                f"crbp: error: port {port}, at which the processes of this run are to meet, is taken by another "
                "program; give a free one as MASTER_PORT (torchrun has --master-port, and crbp's torchrun.sh PORT)"
            )
        if isinstance(error, RuntimeError) and self.trainer.world_size > 1 and lost_process(error):
            return SystemExit(self._told_lost(error))
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            # A logger that writes in a thread of its own does not say which file it was.
            return StorageError.at(error.filename or self.trainer.log_dir or self.trainer.default_root_dir, error)
        if self._restoring.active and (path := self._settings.get("ckpt_path")):
            return CrbpError(
                f"the checkpoint {path} cannot be read or taken up ({one_line(error)}); give one that crbp fit wrote "
                "with this configuration"
            )
        return None

    def _told_lost(self, error: RuntimeError) -> str:
        """What to say where this process ends since another one has."""
        trainer = self.trainer
        saved = [each.path for each in trainer.callbacks if isinstance(each, LastCheckpoint) and each.path is not None]  # type: ignore[attr-defined]
        return (
            f"crbp: error: process {trainer.global_rank} ends, since another of the {trainer.world_size} has ended or "
            f"does not answer ({str(error).splitlines()[0]})"
            + (f"; resume with --ckpt_path {saved[0]}" if saved else "")
        )

    @property
    def _settings(self) -> Any:
        """The configuration of the command that runs."""
        return self.config[self.config.subcommand]

    @property
    def _name(self) -> str:
        """The name of the first configuration file."""
        files = self._settings.get("config") or []
        return Path(str(files[0])).stem if files else _UNNAMED

    def _origin(self) -> Origin | None:
        """What the exported weights are to say about themselves; None for a task that has no `net`."""
        run = to_hand_on(
            json.loads(self._parser(self.subcommand).dump(self._settings, skip_unset=False, format="json"))
        )
        net = run["model"].get("init_args", {}).get("net")
        return Origin(net=net, run=run, name=self._name, code=code()) if net is not None else None


class _Parsers(_CommandLine):
    """The parsers alone."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Go no further: nothing is to be built."""
        raise _Made(self._subcommand_parsers)


class _Made(Exception):  # noqa: N818  # nothing is wrong
    def __init__(self, parsers: dict[str, LightningArgumentParser]) -> None:
        super().__init__()
        self.parsers = parsers


@cache
def parsers() -> dict[str, ArgumentParser]:
    """The parser of each of `COMMANDS`."""
    try:
        _Parsers(args=[])
    except _Made as made:
        return {name: made.parsers[name] for name in COMMANDS}
    raise AssertionError("the command line did not ask for its arguments")


def _keep_metrics(run: Path) -> None:
    """Put the table of a run that is resumed aside: Lightning's `CSVLogger` would delete it."""
    metrics = run / "metrics.csv"
    if metrics.exists() and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        metrics.rename(run / f"metrics_{len(list(run.glob('metrics_*.csv')))}.csv")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "💡 Tip" not in record.getMessage()


def _has_no_weights(model: pl.LightningModule) -> bool:
    """Of a task of one's own it is not known."""
    return isinstance(model, ResumableModule) and not model.has_weights()


def _command(args: Any) -> str:
    return args[0] if isinstance(args, list) and args else "fit"


def _set_up_torch() -> None:
    """As many threads as this process may use cores, memory that is not filled first, fast products on a GPU."""
    set_threads()
    # `deterministic` would have all new memory filled first, for code that reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        # Convolutions take TF32 already; matrix products are to be no different.
        torch.set_float32_matmul_precision("high")


def _check_fit(weights: dict[str, torch.Tensor], model: dict[str, torch.Tensor], path: str) -> None:
    wrong = [
        *(f"{key} is missing" for key in model if key not in weights),
        *(f"{key} is unknown" for key in weights if key not in model),
        *(
            f"{key} has shape {tuple(weights[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in model.items()
            if key in weights and weights[key].shape != tensor.shape
        ),
    ]
    if wrong:
        raise CrbpError(
            f"the checkpoint {path} does not fit the model of this configuration: {wrong[0]}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + "; use the config.yaml that was saved beside it"
        )
