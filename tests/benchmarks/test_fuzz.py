"""Spoilt files end in success or an error by name, for every reader; `benchmarks/fuzz.py` runs many more of them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = {"config": 2, "checkpoint": 6, "safetensors": 8, "handed_on": 6, "card": 10}
READERS = (
    *("contour_png", "metadata_npy", "arena_npy", "list", "panoptic_json", "panoptic_png", "categories", "predictions"),
    *("pictures", "pickle", "torch_file", "safetensors", "checkpoint", "config", "manifest", "handed_on", "card"),
)


@pytest.fixture(scope="module")
def fuzz(load_script) -> ModuleType:
    made: ModuleType = load_script("benchmarks/fuzz.py")
    made.prepare()
    return made


def test_every_reader_is_tested(fuzz: ModuleType) -> None:
    assert set(READERS) == set(fuzz.READERS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_spoilt_files_end_in_success_or_an_error_by_name(
    fuzz: ModuleType, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reader = fuzz.READERS[name]
    good = fuzz.files(reader, tmp_path_factory.mktemp("good"))

    @settings(
        max_examples=CASES.get(name, 25),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def check(random: object) -> None:
        fuzz.run(reader, random, good, tmp_path_factory.mktemp("case"))

    check()


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda path: path.write_text("x"), "TrespassError"),
        (lambda path: path.mkdir(), "TrespassError"),
        (lambda path: {}["x"], "KeyError"),
    ],
)
def test_the_guard_sees_what_a_reader_must_not_do(fuzz: ModuleType, tmp_path: Path, act: object, error: str) -> None:
    reader = fuzz.Reader(lambda root: None, (), lambda root: act(root / "outside"), 1)  # type: ignore[operator]
    with pytest.raises((fuzz.TrespassError, KeyError)) as caught:
        fuzz.run(reader, fuzz.Random(0), {}, tmp_path)
    assert type(caught.value).__name__ == error


def test_the_guard_rings_where_a_reader_hangs(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(root: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    with pytest.raises(fuzz.Hang):
        fuzz.run(fuzz.Reader(lambda root: None, (), hang, 1), fuzz.Random(0), {}, tmp_path)
