"""What is handed on comes back as it was, from a folder, by a shipped name and through a Hub on this machine."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from crbp import hub
from crbp.tasks import Origin, WeightsError, load_net, save_net
from hub_server import COMMIT, Files, reached

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "pathfinder"
SHIPPED = RESULTS / "weights" / "small5_hgru_bptt_k3.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hub.save_pretrained(SHIPPED, tmp_path / "net")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Files]]:
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    with reached(monkeypatch, tmp_path / "cache") as repos:
        yield repos


def assert_same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    image = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(one(image).logits, other(image).logits)


def test_a_folder_comes_back_as_the_same_network(folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = hub.from_pretrained(folder)
    assert_same(again, load_net(SHIPPED))
    assert not again.training
    config = json.loads((folder / "config.json").read_text())
    assert config["net"]["class_path"] == "crbp.models.PathfinderNet"
    assert (config["name"], config["library_name"]) == ("small5_hgru_bptt_k3", "crbp")


def test_the_card_tells_what_the_table_knows(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: crbp\nlicense: "mit"\n')
    for told in (
        "# small5_hgru_bptt_k3",
        "A `PathfinderNet` of 6,162 parameters",
        "| f1_at_n | 0.9223 |",
        "| commit | 848fb778f97c6afe50360975d25ff7617e2a486c |",
        "preset: small5",
        "kernel_size: 3",
    ):
        assert told in card


def test_the_card_tells_what_the_run_has_and_the_caller_adds(tmp_path: Path) -> None:
    run = tmp_path / "version_0"
    file = run / "weights" / "last.safetensors"
    save_net(load_file(SHIPPED), file, Origin(net=net_of(SHIPPED), name="mine"))
    (run / "analysis").mkdir()
    analysis = {"checkpoint": str(file), "f1_at_end": 0.51234, "f1": [0.1]}
    (run / "analysis" / "analysis.json").write_text(json.dumps(analysis))
    card = (hub.save_pretrained(file, tmp_path / "a", numbers={"mine": 3}, licence="cc0-1.0") / "README.md").read_text()
    assert "| f1_at_end | 0.5123 |" in card
    assert "| mine | 3 |" in card
    assert "| f1 |" not in card
    assert 'license: "cc0-1.0"' in card
    assert "The commit of crbp is not known." in card
    assert ", in a version that is not known." in card
    analysis["checkpoint"] = "best.safetensors"  # of other weights of the run
    (run / "analysis" / "analysis.json").write_text(json.dumps(analysis))
    assert "f1_at_end" not in (hub.save_pretrained(file, tmp_path / "a") / "README.md").read_text()


def test_the_card_tells_which_code_trained_the_network(tmp_path: Path) -> None:
    code = {"crbp": "0.0.9", "commit": "abc-dirty", "project commit": "de|f", "f1_at_n": "1.0"}
    save_net(load_file(SHIPPED), tmp_path / "a.safetensors", Origin(net=net_of(SHIPPED), code=code))
    folder = hub.save_pretrained(tmp_path / "a.safetensors", tmp_path / "net")
    again = hub.save_pretrained(folder / "model.safetensors", tmp_path / "again")  # it is handed on
    for card in ((each / "README.md").read_text() for each in (folder, again)):
        assert "trained with [crbp](https://arxiv.org/abs/2005.11362) 0.0.9." in card
        assert "| commit | abc-dirty |" in card
        assert "| project commit | de\\|f |" in card
        assert "is not known" not in card
        assert "f1_at_n" not in card  # code is no number
    assert json.loads((again / "config.json").read_text())["code"] == code


@pytest.mark.parametrize("spoilt", [b"{", b"[1]", b"null", b"\xff"])
def test_what_is_spoilt_beside_the_weights_is_left_out_of_the_card(tmp_path: Path, spoilt: bytes) -> None:
    run = tmp_path / "version_0"
    file = run / "weights" / "last.safetensors"
    save_net(load_file(SHIPPED), file, Origin(net=net_of(SHIPPED), name="a|b\n# c"))
    (run / "analysis").mkdir()
    for place in ("analysis/analysis.json", "made.json", "table.csv"):
        (run / place).write_bytes(spoilt)
    card = (hub.save_pretrained(file, tmp_path / "a", licence="mit\nfoo: bar") / "README.md").read_text()
    assert "Nothing is recorded beside the weights." in card
    assert "# a\\|b # c\n" in card
    assert "\nfoo" not in card


def test_the_card_has_what_the_logs_say_of_these_weights(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    run = tmp_path / "version_0"
    with SummaryWriter(run) as log:
        for step, f1 in ((49, 0.5), (99, 0.75), (149, 0.625)):
            log.add_scalar("val/f1", f1, step)
            log.add_scalar("val/loss", step / 100, step)
    cards = {}
    for name in ("best", "last"):
        file = run / "weights" / f"{name}.safetensors"
        save_net(load_file(SHIPPED), file, Origin(net=net_of(SHIPPED)))
        cards[name] = (hub.save_pretrained(file, tmp_path / name) / "README.md").read_text()
    assert "| training steps | 100 |\n| val/f1 | 0.75 |\n| val/loss | 0.99 |" in cards["best"]
    assert "val/f1" not in cards["last"]  # it may have been trained on since


def net_of(file: Path) -> dict[str, object]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        net: dict[str, object] = json.loads(content.metadata()["crbp.net"])
        return net


def test_a_shipped_network_is_had_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_same(hub.from_pretrained(SHIPPED.stem), load_net(SHIPPED))
    assert hub.shipped().keys() == {file.stem for file in (ROOT / "results").glob("*/weights/*")}


def test_what_the_package_takes_along_is_there_and_small() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    taken = wheel["wheel"]["force-include"]
    assert taken
    assert all(into == f"crbp/{file}" for file, into in taken.items())
    assert sum((ROOT / file).stat().st_size for file in taken) < 2_500_000
    assert hub.save_pretrained.__kwdefaults__["licence"] == "mit"


@pytest.mark.parametrize("name", ["small5_hgru", "", "a/b/c", "./absent/net", str(SHIPPED)])
def test_unknown_names_say_what_there_is(name: str) -> None:
    with pytest.raises(WeightsError, match="shipped, as are ") if name else pytest.raises(WeightsError):
        hub.from_pretrained(name)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_spoilt_folder_is_refused(folder: Path) -> None:
    flip(folder / "model.safetensors")
    with pytest.raises(WeightsError, match="is not the file that was saved: it is spoilt"):
        hub.from_pretrained(folder)
    with pytest.raises(WeightsError, match="spoilt"):
        hub.push_to_hub(folder, "someone/net")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match="no whole folder"):
        hub.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no whole folder"):
        hub.from_pretrained(folder)


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(WeightsError, match="has no revision 'v1'"):
        hub.from_pretrained(folder, revision="v1")


def test_published_and_fetched_it_is_the_same_network(folder: Path, server: dict[str, Files]) -> None:
    (folder / "secret.txt").write_text("stays here")
    address = hub.push_to_hub(folder, "someone/net")
    assert address.endswith("/someone/net")
    assert server["someone/net"].keys() == {"README.md", "config.json", "model.safetensors"}
    assert_same(hub.from_pretrained("someone/net"), load_net(SHIPPED))
    assert_same(hub.from_pretrained("someone/net", revision=COMMIT), load_net(SHIPPED))


def test_what_was_fetched_once_is_had_without_a_network(
    folder: Path, server: dict[str, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.push_to_hub(folder, "someone/net")
    hub.from_pretrained("someone/net")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(hub.from_pretrained("someone/net"), load_net(SHIPPED))
    with pytest.raises(hub.HubError, match=r"someone/other cannot be had from the Hub .*network.*shipped are .*small9"):
        hub.from_pretrained("someone/other")


def test_what_the_hub_does_not_have_is_told(folder: Path, server: dict[str, Files]) -> None:
    with pytest.raises(hub.HubError, match=r"someone/absent cannot be had from the Hub .*RepositoryNotFound"):
        hub.from_pretrained("someone/absent")
    hub.push_to_hub(folder, "someone/net")
    with pytest.raises(hub.HubError, match="RevisionNotFound"):
        hub.from_pretrained("someone/net", revision="v2")
    server["someone/net"].pop("model.safetensors")
    with pytest.raises((WeightsError, hub.HubError)):
        hub.from_pretrained("someone/net")


def test_without_the_extra_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'crbp\[hub\]'"):
        hub.push_to_hub(folder, "someone/net")
    with pytest.raises(ImportError, match=r"pip install 'crbp\[hub\]'"):
        hub.from_pretrained("someone/net")
    assert hub.from_pretrained(folder) is not None


def test_a_network_of_a_package_of_ones_own_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_cells.py").write_text("from crbp.cells import HGRU\nclass Mine(HGRU): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    net = net_of(SHIPPED)
    net["init_args"]["cell"]["class_path"] = "own_cells.Mine"  # type: ignore[index]
    save_net(load_file(SHIPPED), tmp_path / "own.safetensors", Origin(net=net))
    with pytest.raises(WeightsError, match="if you trust it"):
        hub.save_pretrained(tmp_path / "own.safetensors", tmp_path / "net")
    trust = ("crbp", "own_cells")
    hub.save_pretrained(tmp_path / "own.safetensors", tmp_path / "net", trust=trust)
    sys.modules.pop("own_cells", None)
    with pytest.raises(WeightsError, match="if you trust it"):
        hub.from_pretrained(tmp_path / "net")
    assert "own_cells" not in sys.modules
    assert_same(hub.from_pretrained(tmp_path / "net", trust=trust), load_net(tmp_path / "own.safetensors", trust=trust))
