"""Folders in the three layouts are read, and every kind of broken file is named with its remedy or skipped."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from crbp.data.pathfinder import DataError, FolderPathfinder, PathfinderConfig, generate_batch

MINI = PathfinderConfig.preset("mini")
COUNT = 6


@pytest.fixture(scope="module")
def made():
    return generate_batch(MINI, split="train", seed=0, start=0, count=COUNT)


@pytest.fixture
def root(tmp_path, made):
    """A folder with images and masks but no index."""
    for k in range(COUNT):
        for kind, pixels in (("imgs", made.images[k]), ("seg", made.masks[k].astype(np.uint8) * 255)):
            path = tmp_path / kind / "1" / f"sample_{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path


def _rows(count=COUNT):
    tail = ["1.8", "6", "2", "2", "1", "1", "1"]
    return [["imgs/1", "seg/1", f"sample_{k}.png", str(k), *tail] for k in range(count)]


def _lra_rows(count=COUNT):
    return [["imgs/1", f"sample_{k}.png", str(k), str(k % 2), "1.8", "6"] for k in range(count)]


def _save_array(root, rows, name="1"):
    path = root / "metadata" / f"{name}.npy"
    path.parent.mkdir(exist_ok=True)
    np.save(path, np.array(rows))
    return path


def _save_text(root, rows, name="1"):
    path = root / "metadata" / f"{name}.npy"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(" ".join(row) + "\n" for row in rows))
    return path


def _check_all(data, made, labels):
    assert len(data) == COUNT
    for k in range(COUNT):
        sample = data[k]
        np.testing.assert_array_equal(sample["image"][0].mul(255).round().numpy(), made.images[k])
        np.testing.assert_array_equal(sample["mask"].numpy(), made.masks[k])
        assert sample["label"] == labels[k]


@pytest.mark.parametrize("save", [_save_array, _save_text])
@pytest.mark.parametrize("named", [True, False])
def test_metadata_layout_as_array_or_text(root, made, save, named):
    save(root, _rows())
    data = FolderPathfinder(root, layout="metadata" if named else "auto")
    assert data.layout == "metadata"
    assert data.has_masks
    _check_all(data, made, [0] * COUNT)


@pytest.mark.parametrize("save", [_save_array, _save_text])
def test_long_range_arena_layout_as_text_or_array(root, made, save):
    save(root, _lra_rows())
    data = FolderPathfinder(root)
    assert data.layout == "lra"
    _check_all(data, made, [k % 2 for k in range(COUNT)])


def test_long_range_arena_without_masks_has_none(root, made):
    shutil.rmtree(root / "seg")
    _save_text(root, _lra_rows())
    data = FolderPathfinder(root)
    assert not data.has_masks
    assert "mask" not in data[0]
    assert data[1]["label"] == 1


@pytest.mark.parametrize("inside", [True, False])
def test_list_layout(root, made, inside, tmp_path_factory):
    folder = root if inside else tmp_path_factory.mktemp("lists")
    path = folder / "train.txt"
    path.write_text("".join(f"imgs/1/sample_{k}.png {k % 2}\n" for k in range(COUNT)) + "\n")
    data = FolderPathfinder(root) if inside else FolderPathfinder(root, list_file=path)
    assert data.layout == "list"
    _check_all(data, made, [k % 2 for k in range(COUNT)])


def test_several_lengths_under_one_root(root, made, tmp_path_factory):
    top = tmp_path_factory.mktemp("mix")
    for name in ("curv_contour_length_9", "curv_contour_length_14"):
        shutil.copytree(root, top / name)
        _save_array(top / name, _rows())
    data = FolderPathfinder(top)
    assert len(data) == 2 * COUNT
    assert data.name(0) == "curv_contour_length_14/imgs/1/sample_0.png"


def test_batches_are_read_in_the_order_of_their_numbers(root):
    for number in ("10", "9", "2"):
        _save_array(root, [_rows()[int(number) % COUNT]], name=number)
    data = FolderPathfinder(root)
    assert [data.name(k) for k in range(3)] == [f"imgs/1/sample_{n % COUNT}.png" for n in (2, 9, 10)]


def test_resizing_averages_by_area_and_thresholds_the_mask(root, made):
    _save_array(root, _rows())
    sample = FolderPathfinder(root, image_size=16)[0]
    means = made.images[0].astype(float).reshape(16, 2, 16, 2).mean(axis=(1, 3))
    assert np.abs(sample["image"][0].mul(255).numpy() - means).max() <= 1
    share = made.masks[0].astype(float).reshape(16, 2, 16, 2).mean(axis=(1, 3))
    np.testing.assert_array_equal(sample["mask"].numpy(), share > 0.2)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
def test_other_pixel_formats_give_the_same_grey(root, made, mode):
    _save_array(root, _rows())
    grey = made.images[0]
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(root / "imgs/1/sample_0.png")
    sample = FolderPathfinder(root)[0]
    np.testing.assert_array_equal(sample["image"][0].mul(255).round().numpy(), grey)


def _empty(root):
    (root / "imgs/1/sample_2.png").write_bytes(b"")


def _missing_image(root):
    (root / "imgs/1/sample_2.png").unlink()


def _missing_mask(root):
    (root / "seg/1/sample_2.png").unlink()


def _truncated(root):
    path = root / "imgs/1/sample_2.png"
    path.write_bytes(path.read_bytes()[:-30])


def _not_png(root):
    (root / "imgs/1/sample_2.png").write_bytes(b"GIF89a" + bytes(100))


def _other_size(root):
    for kind in ("imgs", "seg"):
        Image.new("L", (20, 20)).save(root / kind / "1" / "sample_2.png")


def _mask_size(root):
    Image.new("L", (20, 20)).save(root / "seg/1/sample_2.png")


BROKEN = [
    (_empty, "imgs/1/sample_2.png: the file is empty; fetch or generate it again"),
    (_missing_image, "imgs/1/sample_2.png: cannot be read .No such file"),
    (_missing_mask, "seg/1/sample_2.png: cannot be read .No such file"),
    (_truncated, "imgs/1/sample_2.png: the PNG image is cut short"),
    (_not_png, "imgs/1/sample_2.png: the file is not a PNG"),
    (_other_size, "imgs/1/sample_2.png: .20, 20. pixels.*image_size="),
    (_mask_size, "seg/1/sample_2.png: the mask is .20, 20. pixels"),
]


@pytest.mark.parametrize(("break_it", "words"), BROKEN)
def test_a_broken_file_is_named_at_construction(root, break_it, words):
    _save_array(root, _rows())
    break_it(root)
    with pytest.raises(DataError, match=words):
        FolderPathfinder(root)


@pytest.mark.parametrize(("break_it", "words"), BROKEN)
def test_a_broken_file_can_be_skipped_and_is_listed(root, made, break_it, words):
    _save_array(root, _rows())
    break_it(root)
    with pytest.warns(RuntimeWarning, match=f"skipped 1 of {COUNT} images"):
        data = FolderPathfinder(root, on_error="skip")
    assert [skipped.name for skipped in data.skipped] == ["imgs/1/sample_2.png"]
    assert len(data) == COUNT - 1 == len([data[k] for k in range(len(data))])
    np.testing.assert_array_equal(data[2]["image"][0].mul(255).round().numpy(), made.images[3])
    with pytest.raises(IndexError):
        data[COUNT - 1]


def test_damage_inside_a_file_is_found_by_the_full_check_or_on_reading(root):
    _save_array(root, _rows())
    path = root / "imgs/1/sample_2.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    data = FolderPathfinder(root)
    with pytest.raises(DataError, match=r"cannot be read.*check='full'"):
        data[2]
    with pytest.raises(DataError, match=r"sample_2.png: the PNG image cannot be read"):
        FolderPathfinder(root, check="full")
    with pytest.warns(RuntimeWarning, match="skipped 1"):
        assert len(FolderPathfinder(root, check="full", on_error="skip")) == COUNT - 1


def test_without_a_check_nothing_is_opened_before_it_is_read(root):
    _save_array(root, _rows())
    _empty(root)
    data = FolderPathfinder(root, check="none")
    assert len(data) == COUNT
    with pytest.raises(DataError, match="the file is empty"):
        data[2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("../imgs/1/sample_0.png 0", "line 2: the path '../imgs/1/sample_0.png' is absolute or leaves the folder"),
        ("/etc/imgs/1/sample_0.png 0", "line 2: the path '/etc/imgs/1/sample_0.png' is absolute"),
        ("imgs/1/../../x.png 0", "leaves the folder"),
        ("imgs\\1\\sample_0.png 0", "line 2"),
        ("C:/imgs/1/sample_0.png 0", "absolute"),
        ("imgs/1/sample_0.png", "is not 'path label'"),
        ("imgs/1/sample_0.png cat", "is not 'path label'"),
        ("pictures/1/sample_0.png 0", "has no folder 'imgs'"),
    ],
)
def test_bad_lines_are_refused_or_skipped(root, line, words):
    (root / "train.txt").write_text(f"imgs/1/sample_0.png 0\n{line}\n")
    with pytest.raises(DataError, match=words) as error:
        FolderPathfinder(root)
    assert "train.txt" in str(error.value)
    assert "correct or delete the line" in str(error.value)
    with pytest.warns(RuntimeWarning, match="skipped 1 of 2"):
        data = FolderPathfinder(root, on_error="skip")
    assert len(data) == 1
    assert "train.txt, line 2" in data.skipped[0].name


@pytest.mark.parametrize("save", [_save_array, _save_text])
def test_metadata_cannot_lead_out_of_the_folder(root, save):
    rows = _rows()
    rows[1][0] = "../outside"
    save(root, rows)
    with pytest.raises(DataError, match=r"1.npy, row 2: the path .* leaves the folder"):
        FolderPathfinder(root)


def test_a_pickle_is_never_read(root):
    path = root / "metadata" / "1.npy"
    path.parent.mkdir()

    class Boom:
        def __reduce__(self):
            return (exec, ("raise SystemExit('a pickle was run')",))

    np.save(path, np.array([[Boom()]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"1.npy: the array holds Python objects.*astype\(str\)"):
        FolderPathfinder(root)


def test_damaged_metadata_is_an_error_in_either_mode(root):
    path = _save_array(root, _rows())
    path.write_bytes(path.read_bytes()[:200])
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError, match=r"1.npy: the NumPy array cannot be read"):
            FolderPathfinder(root, on_error=on_error)
    np.save(path, np.zeros((3, 11)))
    with pytest.raises(DataError, match=r"float64 and shape \(3, 11\), not strings"):
        FolderPathfinder(root)
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(DataError, match="neither a NumPy array nor plain text"):
        FolderPathfinder(root)
    _save_text(root, [["imgs/1", "sample_0.png"]])
    with pytest.raises(DataError, match="row 1: the row has 2 columns"):
        FolderPathfinder(root)


def test_a_wrongly_named_layout_is_an_error(root):
    _save_array(root, _rows())
    with pytest.raises(DataError, match="layout 'metadata', not 'lra'; leave layout='auto'"):
        FolderPathfinder(root, layout="lra")


def test_what_is_not_a_data_set_is_an_error(root, tmp_path_factory):
    with pytest.raises(DataError, match="no such folder"):
        FolderPathfinder(root / "nowhere")
    with pytest.raises(DataError, match="no index was found"):
        FolderPathfinder(tmp_path_factory.mktemp("empty"))
    for name in ("train.txt", "val.txt"):
        (root / name).write_text("imgs/1/sample_0.png 0\n")
    with pytest.raises(DataError, match=r"2 list files \(train.txt, val.txt\); choose one with list_file="):
        FolderPathfinder(root)
    with pytest.raises(DataError, match=r"test.txt: the list cannot be read"):
        FolderPathfinder(root, list_file="test.txt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "D"}, "layout='D' is unknown"),
        ({"on_error": "ignore"}, "on_error='ignore' is unknown"),
        ({"check": "none", "on_error": "skip"}, "needs the check"),
        ({"list_file": "a.txt", "layout": "lra"}, "list_file is for layout='list'"),
        ({"image_size": 0}, "image_size=0"),
    ],
)
def test_wrong_options_are_refused(root, options, words):
    with pytest.raises(ValueError, match=words):
        FolderPathfinder(root, **options)


def test_readers_and_their_errors_pickle(root, made):
    _save_array(root, _rows())
    _check_all(pickle.loads(pickle.dumps(FolderPathfinder(root))), made, [0] * COUNT)
    error = pickle.loads(pickle.dumps(DataError("file", "is bad", "mend it")))
    assert str(error) == "file: is bad; mend it"
    assert torch.equal(FolderPathfinder(root)[-1]["mask"], torch.from_numpy(made.masks[-1]))
