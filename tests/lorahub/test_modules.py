"""What a name means: a folder, an adapter of the local hub, or an id of the Hugging Face hub, in this order."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.adapters import publish

from atoll.errors import AdapterFormatError, AdapterNotFound, BaseMismatch, ConfigError, HubError
from atoll.hub.store import Hub
from atoll.lorahub.modules import Module, base_of, find_modules
from atoll.model.adapter_files import read_adapter
from atoll.model.generic_adapter import read_generic_adapter


def test_a_folder_comes_before_the_hub_and_the_hub_before_hugging_face(
    llama_modules: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that means two things must mean the nearer one, everywhere the same."""
    hub = Hub()
    version = publish(hub, read_adapter(Path(llama_modules[0])), "acme/skill", tmp_path)
    monkeypatch.chdir(tmp_path)
    [found] = find_modules(["acme/skill"], hub)
    assert (found.name, found.digest, found.folder) == ("acme/skill", version.digest, hub.path(version))
    shutil.copytree(llama_modules[1], tmp_path / "acme" / "skill")
    [found] = find_modules(["acme/skill"], hub)
    assert (found.digest, found.folder) == (None, Path("acme/skill"))
    with pytest.raises(HubError, match="'acme/skill' could not be fetched"):
        find_modules(["hf:acme/skill"], hub)


def test_an_id_is_fetched_without_anything_that_could_run(t5_modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files are asked for and no more; a repository whose weights are a pickle is refused in words that help."""
    asked: list[Any] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return t5_modules[0]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    [found] = find_modules(["lorahub/flan_t5_large-coqa"])
    assert asked == [("lorahub/flan_t5_large-coqa", ["adapter_config.json", "adapter_model.safetensors"])]
    assert len(read_generic_adapter(found.folder).modules) == 12


def test_a_repository_with_a_pickle_is_refused(t5_modules: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(Path(t5_modules[0]) / "adapter_config.json", tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(AdapterFormatError, match=r"'some/module' has no adapter_model\.safetensors") as caught:
        find_modules(["some/module"])
    assert "pickles" in caught.value.hint


def test_names_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="no LoRA modules"):
        find_modules([])
    with pytest.raises(ConfigError, match="no LoRA modules"):
        find_modules("a text is no list")
    with pytest.raises(AdapterNotFound, match="no module 'skill'"):
        find_modules(["skill"])
    with pytest.raises(HubError, match="could not be fetched"):
        find_modules(["nobody/nothing"])


def test_bases_agree_by_the_last_part_of_their_names() -> None:
    """A copy in a folder is the base of the hub id; another base is another base whatever the shapes say."""

    def module(base: str) -> Module:
        return Module("m", Path(), None, "", base)

    assert base_of([module(""), module("google/flan-t5-large")]) == "google/flan-t5-large"
    with pytest.raises(ConfigError, match="which base it was made for"):
        base_of([module("")])


def test_modules_that_name_different_bases_are_refused(t5_modules: list[str], llama_modules: list[str]) -> None:
    with pytest.raises(BaseMismatch, match="tiny-llama', but"):
        find_modules([t5_modules[0], llama_modules[0]])


def test_the_hubs_manifest_says_the_base_before_the_config(llama_modules: list[str], tiny_base_dir: Path, tmp_path: Path) -> None:
    """A config may hold a name that means nothing here, while the hub knows which base the adapter was trained on."""
    hub, skill = Hub(), read_adapter(Path(llama_modules[0]))
    elsewhere = replace(skill, spec=replace(skill.spec, base="tiny"))
    for name, base in (("skill", str(tiny_base_dir)), ("moved", f"/nowhere/{tiny_base_dir.name}"), ("other", str(tmp_path / "other-base"))):
        publish(hub, elsewhere, name, tmp_path / name, base={"name": base, "weights_fingerprint": "0" * 64})
    assert base_of(find_modules(["skill"], hub)) == str(tiny_base_dir)
    assert base_of(find_modules(["moved", "skill"], hub)) == str(tiny_base_dir)  # the copy that is here
    with pytest.raises(BaseMismatch, match="other-base', but 'skill'"):
        find_modules(["skill", "other"], hub)
    shutil.copytree(llama_modules[0], tmp_path / "plain")
    (tmp_path / "plain" / "manifest.json").unlink()
    assert base_of(find_modules([tmp_path / "plain", "skill"], hub)) == str(tiny_base_dir)  # PEFT's folder has no manifest


def test_a_module_whose_recorded_base_is_gone_goes_by_its_config(llama_modules: list[str], tiny_base_dir: Path, tmp_path: Path) -> None:
    """A manifest names the folder that the base had where the adapter was made."""
    hub = Hub()
    publish(hub, read_adapter(Path(llama_modules[0])), "skill", tmp_path, base={"name": "/nowhere/tiny", "weights_fingerprint": "0" * 64})
    assert base_of(find_modules(["skill"], hub)) == str(tiny_base_dir)


def test_names_may_stand_in_any_list() -> None:
    """An array is a list too; what is no name is said to be none."""
    with pytest.raises(AdapterNotFound, match="no module 'skill'"):
        find_modules(np.array(["skill"]))
    with pytest.raises(ConfigError, match="the LoRA module 3 is int, expected a name"):
        find_modules([3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="no LoRA modules"):
        find_modules(5)  # type: ignore[arg-type]
