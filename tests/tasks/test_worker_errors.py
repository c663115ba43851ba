"""A wrong file is told in the same one line, whether the process that trains finds it or one of its loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_contours import LEAF_SPEC
from torch.utils.data import DataLoader, Dataset

from crbp.cli import main
from crbp.data.panoptic import CocoPanoptic, DataError, write_shapes
from crbp.data.pathfinder import GenerationError
from crbp.tasks._messages import one_line

pytestmark = [
    pytest.mark.filterwarnings(LEAF_SPEC),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]

CONFIG = str(Path(__file__).parents[2] / "configs" / "panoptic" / "mini_fpn.yaml")


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose images of training are of another size than its JSON says."""
    made = tmp_path_factory.mktemp("spoilt")
    write_shapes(made, images=(2, 1), size=128, workers=1, progress=False)
    for file in (made / "train").iterdir():
        Image.new("RGB", (64, 32)).save(file)
    return made


class Failing(Dataset[Any]):
    """Cannot give its one item."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        try:
            raise type(self.error)("the cause")
        except type(self.error) as cause:
            raise self.error from cause


def told(items: Dataset[Any], workers: int) -> str:
    with pytest.raises((DataError, GenerationError)) as caught:
        next(iter(DataLoader(items, num_workers=workers)))
    assert ("Traceback" in str(caught.value)) == bool(workers)
    return one_line(caught.value)


@pytest.mark.parametrize(
    "error", [DataError("a.png", "has 'DataError: ' in it", "draw it again"), GenerationError("no scene was found")]
)
def test_an_error_of_a_worker_says_what_it_says_without_one(error: Exception) -> None:
    assert told(Failing(error), 1) == told(Failing(error), 0) == str(error)


def test_a_wrong_file_is_named_by_a_worker_as_without_one(spoilt: Path) -> None:
    items = CocoPanoptic(spoilt / "train", spoilt / "panoptic_train.json")
    assert told(items, 1) == told(items, 0)
    assert "is 32 x 64 pixels (height x width), where the JSON says 128 x 128; run crbp data check" in told(items, 1)


def test_the_command_line_tells_it_in_one_line(
    spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = f"{{class_path: crbp.tasks.Coco, init_args: {{root: '{spoilt}', train: train, val: val}}}}"
    arguments = ["fit", "--config", CONFIG, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.num_sanity_val_steps", "0", "--trainer.logger", "false", "--trainer.max_steps", "1"]
    arguments += ["--trainer.val_check_interval", "1.0", "--data.source", source, "--data.batch_size", "1"]
    assert main([*arguments, "--data.workers", "1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Error" in line or "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"crbp: error: {spoilt}/train/")
    assert lines[0].endswith("where the JSON says 128 x 128; run crbp data check, which lists all that is wrong")
