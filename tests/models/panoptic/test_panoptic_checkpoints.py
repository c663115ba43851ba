"""Weights made elsewhere: names, what is refused, what is read from files."""

import os
import pickle
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from tiny_panoptic import tiny_settings
from torch import Tensor
from torchvision.models import ResNet, resnet18

from crbp.models import RFPN, PanopticFPN
from crbp.models.panoptic import BackboneSettings, CheckpointError, PixelSettings, ProposalSettings, load_weights
from crbp.models.panoptic._names import caffe2_name, detectron2_name
from crbp.models.panoptic._unpickle import read_checkpoint, tensors

FROZEN = BackboneSettings(channels=32)


def _model(kind: type[PanopticFPN] = PanopticFPN, **changes) -> PanopticFPN:
    return kind(**tiny_settings(**{"backbone": FROZEN, **changes}))


def _empty(**changes) -> PanopticFPN:
    """A model whose weights take no time to make, for what is refused."""
    with torch.device("meta"):
        return _model(**changes)


def _theirs(model: PanopticFPN) -> dict[str, Tensor]:
    """The model's weights as detectron2 names them, none of which is a start value."""
    return {detectron2_name(name): torch.rand_like(value.float()) for name, value in model.state_dict().items()}


def _assert_loaded(model: PanopticFPN, table: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, table[detectron2_name(name)].view_as(value)), name


@pytest.mark.parametrize("kind", [PanopticFPN, RFPN])
def test_every_tensor_of_a_whole_model(kind):
    model = _model(kind)
    table = _theirs(model)
    if kind is RFPN:
        name = "roi_heads.mask_head.recurrent.u0_spatial_bias"
        table[name] = table[name].view(-1, 1, 1)  # as the released model has it
    load_weights(model, table)
    _assert_loaded(model, table)


def test_the_released_model_names_the_tensors_of_its_cell_twice():
    model = _model(RFPN)
    table = _theirs(model)
    cell = "roi_heads.mask_head.recurrent."
    twice = {name.replace(cell, "roi_heads.mask_head.mask_fcn_rnn."): table[name] for name in table if cell in name}
    assert len(twice) == 17
    load_weights(model, table | twice)
    _assert_loaded(model, table)
    load_weights(model, {name: value for name, value in table.items() if cell not in name} | twice)
    _assert_loaded(model, table)
    with pytest.raises(CheckpointError, match=r"mask_fcn_rnn\.alpha and .*recurrent\.alpha .* differ"):
        load_weights(model, table | twice | {"roi_heads.mask_head.mask_fcn_rnn.alpha": table[f"{cell}alpha"] + 1})


def test_what_a_checkpoint_does_not_say_is_said():
    pixels = {"pixel_mean": torch.tensor(PixelSettings.torchvision().mean)}
    for changes, stored, told in (
        ({}, {}, None),
        ({"pixels": PixelSettings.torchvision()}, {}, r"pixels=PixelSettings\(order='bgr'"),
        ({"pixels": PixelSettings.torchvision()}, pixels, None),
        ({"depth": 50, "backbone": BackboneSettings(channels=32, stride_in_1x1=False)}, {}, "stride_in_1x1=True"),
    ):
        model = _model(**changes) if stored else _empty(**changes)
        table = {detectron2_name(name): torch.empty_like(value) for name, value in model.state_dict().items()}
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            load_weights(model, table | stored)
        assert [bool(re.search(told, str(each.message))) for each in found] == ([True] if told else [])


def test_names_of_detectron2():
    for ours, theirs in {
        "backbone.body.conv1.weight": "backbone.bottom_up.stem.conv1.weight",
        "backbone.body.bn1.running_var": "backbone.bottom_up.stem.conv1.norm.running_var",
        "backbone.body.layer3.2.bn3.bias": "backbone.bottom_up.res4.2.conv3.norm.bias",
        "backbone.body.layer1.0.downsample.0.weight": "backbone.bottom_up.res2.0.shortcut.weight",
        "backbone.body.layer1.0.downsample.1.weight": "backbone.bottom_up.res2.0.shortcut.norm.weight",
        "backbone.fpn.inner_blocks.0.0.bias": "backbone.fpn_lateral2.bias",
        "backbone.fpn.layer_blocks.3.0.weight": "backbone.fpn_output5.weight",
        "rpn.head.conv.0.0.weight": "proposal_generator.rpn_head.conv.weight",
        "roi_heads.mask_head.3.0.weight": "roi_heads.mask_head.mask_fcn4.weight",
        "roi_heads.mask_head.cell.excitation_norm.bias": "roi_heads.mask_head.recurrent.bn.1.bias",
        "semantic_head.levels.p5.4.1.weight": "sem_seg_head.p5.4.norm.weight",
    }.items():
        assert detectron2_name(ours) == theirs


def _broken(table: dict[str, Tensor]) -> dict[str, Tensor]:
    del table["backbone.fpn_lateral3.bias"], table["sem_seg_head.p2.0.weight"]
    table["roi_heads.mystery"] = torch.zeros(1)
    table["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(81)
    return table


def test_all_that_does_not_fit_is_listed_and_nothing_changed():
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as told:
        load_weights(model, _broken(_theirs(model)))
    for part in (
        "missing: backbone.fpn_lateral3.bias, sem_seg_head.p2.0.weight",
        "unknown: roi_heads.mystery",
        "of another shape: roi_heads.box_predictor.cls_score.bias (81,) for (4,)",
    ):
        assert part in str(told.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_panoptic_fpn_is_no_rfpn():
    with pytest.raises(CheckpointError, match=r"missing: .*recurrent.*unknown: .*mask_fcn1"):
        load_weights(_model(RFPN), _theirs(_model()))


def test_constants_beside_the_weights_are_compared():
    model = _model()
    table = _theirs(model)
    constants = {
        "pixel_mean": torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": model.rpn.anchor_generator.cell_anchors[0],
    }
    load_weights(model, table | constants)
    for name, value in constants.items():
        with pytest.raises(CheckpointError, match=f"trained with {name}"):
            load_weights(model, table | constants | {name: value + 1})


# Files


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.arange(24, dtype=">i4").reshape(2, 3, 4),
        np.array([True, False]),
        np.zeros((0, 3), np.float16),
        np.array(7, np.uint8),
        np.arange(10.0)[::3],
    ],
    ids=["columns first", "big-endian", "truth", "empty", "without dimensions", "strided"],
)
def test_arrays_of_every_form_are_read(tmp_path, array, protocol):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"a": array, "b": array.ravel()[:1]}, protocol))
    read = tensors(read_checkpoint(path))["a"]
    assert read.shape == array.shape
    np.testing.assert_array_equal(read.numpy(), array)
    assert read.numpy().dtype == array.dtype.newbyteorder("=")


def _told(state: object, kind: object = None) -> bytes:
    """A pickle of an array that is told of itself what is not so."""

    class Lying:
        def __reduce__(self):
            made = np.zeros(2).__reduce__()[0]
            return made, (np.ndarray, (0,), b"b"), state

    class Kind:
        def __reduce__(self):
            return np.dtype, ("f8", False, True), kind

    if kind is not None:
        state = (1, (2,), Kind(), False, bytes(16))
    return pickle.dumps({"a": Lying()}, 2)


F8 = np.dtype("f8")


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize(
    "content",
    [
        _told((1, (2**40,), F8, False, bytes(16))),
        _told((1, (-1,), F8, False, bytes(16))),
        _told((1, (2, "a"), F8, False, bytes(16))),
        _told((1, (2,), "f8", False, bytes(16))),
        _told((1, (2,), F8, False, [1, 2])),
        _told((1, (2,))),
        _told(None, (3, "<", None, None, None, 2**40, 1, 0)),
        _told(None, (3, "<", None, ("x",), {"x": 3}, -1, -1, 0)),
        _told(None, (3, 5)),
    ],
    ids=range(9),
)
def test_arrays_that_lie_about_themselves_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(path)


def test_a_pickle_changes_no_class(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x02cnumpy\nndarray\n}X\x06\0\0\0valuesK\x01sb.")
    with pytest.raises(CheckpointError, match="it changes a type"):
        read_checkpoint(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pkl_of_arrays(tmp_path, protocol):
    table = {"whole": torch.arange(6).view(2, 3), "half": torch.rand(4).half(), "number": torch.tensor(0.5)}
    arrays = {name: value.numpy() for name, value in table.items()}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "them", "lr": np.float64(1)}, protocol))
    read = tensors(read_checkpoint(path))
    assert read.keys() == table.keys()
    for name, value in table.items():
        assert torch.equal(read[name], value)
        assert read[name].dtype == value.dtype


def test_a_pth_of_tensors(tmp_path):
    model = _model()
    table = _theirs(model)
    beside = {"optimizer": {"state": {0: torch.ones(2)}}, "iteration": 7, "scheduler": {"best": np.float64(0.5)}}
    prefixed = OrderedDict((f"module.{name}", value) for name, value in table.items())
    torch.save({"model": prefixed, **beside}, tmp_path / "model.pth")
    load_weights(model, tmp_path / "model.pth")
    _assert_loaded(model, table)


class Malice:
    def __reduce__(self):
        return os.mkdir, (os.environ["CRBP_TEST_TRAP"],)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_nothing_in_a_file_is_run(tmp_path, monkeypatch, suffix):
    trap = tmp_path / "sprung"
    monkeypatch.setenv("CRBP_TEST_TRAP", str(trap))
    path = tmp_path / f"model{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": {"weight": Malice()}}))
    else:
        torch.save({"model": {"weight": Malice()}}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(_empty(), path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("os", "system"), ("numpy", "load"), ("torch", "load"), ("codecs", "encode")],
)
def test_only_arrays_and_containers_are_looked_up(tmp_path, module, name):
    path = tmp_path / "model.pkl"
    path.write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(CheckpointError, match=f"asks for {module}.{name}"):
        load_weights(_empty(), path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "does not exist"),
        (b"", "cannot be read"),
        (b"nonsense", "cannot be read"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"model": {"a": [1]}}), r"no array of numbers: a \(list\)"),
        (pickle.dumps({3: np.zeros(2)}), "the name 3, which is no text"),
        (pickle.dumps({"a": np.array(["x"])}), r"an array of 'U1', which are no numbers"),
    ],
)
def test_files_that_are_none(tmp_path, content, named):
    path = tmp_path / "model.pkl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        load_weights(_empty(), path)


def test_a_folder_is_told_from_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path} is a folder; give a file"):
        load_weights(_empty(), tmp_path)


# ResNets of ImageNet


def test_names_of_msra():
    for theirs, ours in {
        "conv1_w": "stem.conv1.weight",
        "res_conv1_bn_s": "stem.conv1.norm.weight",
        "res_conv1_bn_b": "stem.conv1.norm.bias",
        "res2_0_branch1_w": "res2.0.shortcut.weight",
        "res2_0_branch1_bn_s": "res2.0.shortcut.norm.weight",
        "res4_5_branch2b_bn_b": "res4.5.conv2.norm.bias",
        "res5_2_branch2c_w": "res5.2.conv3.weight",
        "fc1000_w": "fc1000.weight",
    }.items():
        assert caffe2_name(theirs) == ours


def _msra(model: PanopticFPN) -> dict[str, np.ndarray]:
    """The ResNet's weights as MSRA names them, with the statistics merged into scale and shift."""
    table = {"fc1000_w": np.zeros((2, 2)), "fc1000_b": np.zeros(2), "conv1_w_momentum": np.zeros(1)}
    table["conv1_b"] = np.zeros(64)
    for name, value in model.backbone.body.state_dict().items():
        if "running" in name:
            continue
        theirs = detectron2_name(f"backbone.body.{name}").removeprefix("backbone.bottom_up.")
        theirs = theirs.replace("norm.weight", "bn.s").replace("norm.bias", "bn.b").replace("weight", "w")
        if theirs.startswith("stem."):
            theirs = theirs.replace("stem.conv1.bn", "res.conv1.bn").removeprefix("stem.")
        else:
            for number, letter in enumerate("abc", 1):
                theirs = theirs.replace(f".conv{number}.", f".branch2{letter}.")
            theirs = theirs.replace("shortcut", "branch1")
        table[theirs.replace(".", "_")] = torch.rand_like(value).numpy()
    return table


def test_the_resnet_of_msra(tmp_path):
    model = _model()
    table = _msra(model)
    path = tmp_path / "R-18.pkl"
    path.write_bytes(pickle.dumps(table, 2))
    others = model.rpn.head.conv[0][0].weight.clone()
    with torch.no_grad():
        model.backbone.body.bn1.running_mean.fill_(3)
    load_weights(model, path)
    body = model.backbone.body.state_dict()
    assert torch.equal(body["conv1.weight"], torch.from_numpy(table["conv1_w"]))
    assert torch.equal(body["layer3.1.bn2.bias"], torch.from_numpy(table["res4_1_branch2b_bn_b"]))
    assert not any(value.any() for name, value in body.items() if name.endswith("running_mean"))
    assert all((value == 1).all() for name, value in body.items() if name.endswith("running_var"))
    assert torch.equal(model.rpn.head.conv[0][0].weight, others)
    assert not model.backbone.untouched()
    del table["res3_1_branch2a_w"]
    with pytest.raises(CheckpointError, match=r"missing: res3\.1\.conv1\.weight"):
        load_weights(model, table)


def _network() -> ResNet:
    return resnet18(weights=None)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_the_resnet_of_torchvision(norm):
    model = _model(backbone=BackboneSettings(norm=norm, channels=32), pixels=PixelSettings.torchvision())
    network = _network().eval()
    torch.nn.init.uniform_(network.bn1.running_var, 1, 2)
    load_weights(model.eval(), network.state_dict())
    image = torch.randn(1, 3, 64, 64)
    x = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(image)))))
    body = model.backbone.body
    torch.testing.assert_close(body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(image))))), x)
    assert torch.equal(body.layer4[1].conv2.weight, network.layer4[1].conv2.weight)


def test_weights_of_imagenet_need_the_pixels_and_the_stride_they_were_trained_with():
    with pytest.raises(CheckpointError, match=r"need a model made with pixels=.*order='rgb'"):
        load_weights(_empty(), {"layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"MSRA's weights need .*order='bgr'"):
        load_weights(_empty(pixels=PixelSettings.torchvision()), {"conv1_w": torch.zeros(1)})
    with torch.device("meta"):
        first = PanopticFPN(50, pixels=PixelSettings.torchvision())
    with pytest.raises(CheckpointError, match=r"made with backbone=BackboneSettings\(stride_in_1x1=False\)$"):
        load_weights(first, {"layer1.0.conv1.weight": torch.zeros(1)})


def test_group_norms_have_no_weights_of_imagenet():
    model = _empty(backbone=tiny_settings()["backbone"], pixels=PixelSettings.torchvision())
    with pytest.raises(CheckpointError, match=r"unknown: bn1.running_mean"):
        load_weights(model, _network().state_dict())


def test_without_a_network_the_address_is_told(monkeypatch):
    def fail(url: str, *args: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    model = _empty(pixels=PixelSettings.torchvision())
    with pytest.raises(CheckpointError, match=r"https://.*resnet18.* cannot be downloaded.*give the file"):
        load_weights(model, "imagenet")


def test_imagenet_comes_from_torchvision(monkeypatch):
    network = _network()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kw: network.state_dict())
    model = _model(pixels=PixelSettings.torchvision())
    load_weights(model, "imagenet")
    assert torch.equal(model.backbone.body.conv1.weight, network.conv1.weight)


def test_files_are_found_by_text_too(tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(_empty(), str(tmp_path / "absent.pth"))


@pytest.mark.parametrize(
    ("kind", "other", "left"),
    [(RFPN, PanopticFPN, "roi_heads.mask_head."), (PanopticFPN, RFPN, "roi_heads.mask_head."), (RFPN, RFPN, "rpn.")],
)
def test_another_network_gives_all_but_what_stays(kind, other, left):
    model, source = _model(kind), _model(other)
    kept, given = {name: value.clone() for name, value in model.state_dict().items()}, source.state_dict()
    load_weights(model, source, without=[left])
    for name, value in model.state_dict().items():
        assert torch.equal(value, (kept if name.startswith(left) else given)[name]), name
    assert any(name.startswith(left) for name in kept)


def test_a_checkpoint_gives_all_but_what_stays():
    model, table = _model(RFPN), _theirs(_model(things=4))
    predictors = ["roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits."]
    with pytest.raises(CheckpointError, match="left out in without"):
        load_weights(model, table, without=predictors)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    left = [*predictors, "roi_heads.mask_head."]
    load_weights(model, table, without=left)
    for name, value in model.state_dict().items():
        stays = name.startswith(tuple(left))
        assert torch.equal(value, kept[name] if stays else table[detectron2_name(name)].view_as(value)), name


@pytest.mark.parametrize("name", ["roi_head.mask", ""])
def test_what_is_left_out_must_be_there(name):
    with pytest.raises(CheckpointError, match=f"begins with '{name}'"):
        load_weights(_empty(), _empty(), without=[name])


def test_what_is_left_out_is_of_what_the_source_could_give():
    with pytest.raises(CheckpointError, match=r"begins with 'rpn\.'"):
        load_weights(_empty(pixels=PixelSettings.torchvision()), _network().state_dict(), without=["rpn."])
    with pytest.raises(TypeError, match="a list of beginnings"):
        load_weights(_empty(), _empty(), without="rpn.")


def test_the_place_of_the_stride_must_be_that_of_another_network():
    with torch.device("meta"):
        theirs = PanopticFPN(**tiny_settings(depth=50, backbone=BackboneSettings(stride_in_1x1=False, channels=32)))
    with pytest.raises(CheckpointError, match="trained with stride_in_1x1=False"):
        load_weights(_empty(depth=50), theirs)


def test_weights_of_crbp_are_read_elsewhere(tmp_path):
    with pytest.raises(CheckpointError, match="give the network itself"):
        load_weights(_empty(), _model().state_dict())
    with pytest.raises(CheckpointError, match=r"is for crbp\.tasks\.load_net"):
        load_weights(_empty(), tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"things": 4}, "of another shape"),
        ({"pixels": PixelSettings.torchvision()}, "trained with pixels="),
        ({"backbone": BackboneSettings(norm="group", channels=32)}, "trained with GroupNorm"),
        ({"proposals": ProposalSettings(anchor_sizes=(1.0, 2.0, 3.0, 4.0, 5.0))}, "trained with anchors"),
    ],
)
def test_another_network_must_see_and_say_the_same(changes, said):
    model, source = _model(), _model(**changes)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        load_weights(model, source)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
