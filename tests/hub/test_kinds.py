"""Adapters of every kind in the hub: ReFT, and LoRA with ReFT, are published, found, shown and refused as LoRA is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.errors import AdapterFormatError, AtollError, HubError
from atoll.hub import Hub
from atoll.hub.intake import KINDS
from atoll.model.adapter import AdapterSpec, new_adapter
from atoll.model.adapter_files import write_adapter
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec
from atoll.model.sites import TARGETS

from .conftest import D

LAYERS = 2
CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"


def reft_folder(folder: Path, seed: int = 0, *, lora: bool = False, parts: tuple[ReftSpec, ...] = (ReftSpec(rank=2),)) -> Path:
    """A stranger's folder of an adapter with edits, for a toy base of two layers."""
    targets = {"target_modules": ("q_proj",), "layers_to_transform": (0,)} if lora else {"target_modules": ()}
    spec = AdapterSpec("toy/base", rank=2, alpha=2.0, reft=parts, **targets)
    write_adapter(folder, new_adapter(spec, dict.fromkeys(TARGETS, (D, D)), LAYERS, torch.Generator().manual_seed(seed)))
    return folder


@pytest.fixture
def filled(hub: Hub, make: Callable[..., Path], tmp_path: Path) -> Hub:
    """One adapter of each kind, named by it."""
    hub.publish(make(1), "plain-lora")
    hub.publish(reft_folder(tmp_path / "reft"), "plain-reft", message="edits")
    hub.publish(reft_folder(tmp_path / "both", lora=True), "both")
    hub.publish(make(2, manifest={"kind": "composed"}), "mix")
    return hub


def test_a_version_says_what_kind_it_is_and_how_large(filled: Hub):
    """Kind, rank and parameters are what a user chooses by; a ReFT adapter's are those of its edits."""
    lora, reft, both = (filled.resolve(name) for name in ("plain-lora", "plain-reft", "both"))
    edits = LAYERS * (2 * D + 2 * D + 2)
    assert [(each.kind, each.rank, each.num_parameters) for each in (lora, reft, both)] == [
        ("lora", 2, 4 * D), ("reft", 2, edits), ("lora+reft", 2, 4 * D + edits)
    ]  # fmt: skip
    assert json.loads((reft.path / MANIFEST).read_text())["kind"] == "reft"


def test_lists_and_searches_of_one_kind(filled: Hub):
    """Every kind is its own: LoRA with ReFT is neither the one nor the other. A kind that there is not must not look like an empty hub."""
    named = {kind: [version.name for version in filled.list(kind=kind)] for kind in KINDS}
    assert named == {"lora": ["plain-lora"], "reft": ["plain-reft"], "lora+reft": ["both"], "composed": ["mix"]}
    assert [version.name for version in filled.search("plain", kind="reft")] == ["plain-reft"]
    for ask in (lambda: filled.list(kind="loreft"), lambda: filled.search("plain", kind="LoRA")):
        with pytest.raises(HubError, match="no kind") as caught:
            ask()
        assert "lora+reft" in caught.value.hint


def test_the_same_edits_are_the_same_version_and_leave_bit_exact(hub: Hub, tmp_path: Path):
    """Identity is content for edits too: written again from what was read, the files have the same bytes."""
    from atoll.model.adapter_files import read_adapter

    source = reft_folder(tmp_path / "one", lora=True)
    version = hub.publish(source, "a")
    exported = hub.export("a", tmp_path / "out")
    assert (exported / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    write_adapter(tmp_path / "again", read_adapter(exported))
    assert hub.publish(tmp_path / "again", "a").ref == version.ref
    assert hub.publish(reft_folder(tmp_path / "other", 1, lora=True), "a").number == 2


def test_a_card_describes_every_part_of_the_edits(hub: Hub, tmp_path: Path):
    """Where an adapter edits, how, and with how many numbers: without it nobody can judge a ReFT adapter."""
    parts = (
        ReftSpec("loreft", 2, layers=(0, 1), positions=Positions.parse("f3+l2"), tied=False, rank_pattern={1: 1}),
        ReftSpec("direft", 1, layers=(1,), component="mlp_output", positions=Positions.parse([0, -1]), activation="relu", weight=0.5),
    )
    version = hub.publish(reft_folder(tmp_path / "reft", parts=parts), "edits")
    page = hub.show("edits").markdown()
    table = page.partition("## Edits")[2].partition("##")[0].strip().splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]] == [
        ["loreft", "0, 1", "2 \\(layer 1: 1\\)", "f3\\+l2", "block\\_output", "no", "none", "0.0", "1.0"],
        ["direft", "1", "1", "0, -1", "mlp\\_output", "yes", "relu", "0.0", "0.5"],
    ]
    assert "| kind | reft |" in page and f"| parameters | {version.num_parameters:,} |" in page and f"| bytes | {version.size_bytes:,} |" in page


def test_a_composed_adapter_s_card_says_what_its_files_hold(filled: Hub):
    """Composed says where it came from; what its files hold decides what can be done with it. Without edits there is no table of them."""
    assert "composed \\(lora\\)" in filled.show("mix").markdown()
    assert "| kind | lora\\+reft |" in filled.show("both").markdown() and "## Edits" in filled.show("both").markdown()
    assert "## Edits" not in filled.show("plain-lora").markdown()


def _config(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))

    return write


def _part(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["reft"][0] |= changes
        (folder / CONFIG).write_text(json.dumps(config))

    return write


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], None]:
    """The tensor of layer 0 changed, or left out."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        key = next(key for key in tensors if ".layers.0." in key and key.endswith("." + name))
        old = tensors.pop(key)
        save_file(tensors if change is None else {**tensors, key: change(old).contiguous()}, folder / WEIGHTS)

    return write


def _added(folder: Path) -> None:
    save_file({**load_file(folder / WEIGHTS), "reft.0.layers.0.block_output.both.z": torch.zeros(2)}, folder / WEIGHTS)


def _manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "kind": "lora", "base": {}}))


@pytest.mark.parametrize(
    "damage",
    [
        _config(peft_type="LORA"),
        _config(peft_type="LORA_REFT"),
        _config(atoll_format=2),
        _config(r=8),
        _config(reft=[]),
        _config(reft="loreft"),
        _part(method="magic"),
        _part(rank=3),
        _part(rank=10**9),
        _part(layers=[10**9]),
        _part(layers=[0]),
        _part(positions="f7+f7"),
        _part(component="embedding"),
        _part(code="print()"),
        _part(weight=float("nan")),
        _tensor("r", None),
        _tensor("r", lambda r: 2 * r),
        _tensor("w", lambda w: w[:, :-1]),
        _tensor("b", lambda b: b / 0),
        _added,
        _manifest,
    ],
)
def test_a_hostile_folder_of_edits_is_one_sentence_and_leaves_nothing(hub: Hub, tmp_path: Path, damage: Callable[[Path], None]):
    """What would be applied wrongly, or not at all, is refused before a byte is kept, in words that name the user's own file."""
    source = reft_folder(tmp_path / "bad")
    damage(source)
    with pytest.raises(AtollError) as caught:
        hub.publish(source, "a")
    assert not isinstance(caught.value, HubError) and caught.value.message and "\n" not in caught.value.message
    assert "staging" not in caught.value.message
    assert hub.list() == () and not list(hub._blobs.all()) and not list((hub.root / "staging").iterdir())
    assert hub.publish(reft_folder(tmp_path / "good"), "a").number == 1


def test_a_manifest_of_another_kind_is_named(hub: Hub, tmp_path: Path):
    """A manifest that calls edits a LoRA would list and serve them as what they are not."""
    source = reft_folder(tmp_path / "bad")
    _manifest(source)
    with pytest.raises(AdapterFormatError, match="'lora', its files are 'reft'"):
        hub.publish(source, "a")
