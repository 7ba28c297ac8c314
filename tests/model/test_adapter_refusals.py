"""model/adapter_files.py refuses everything hostile, damaged or not applied, and says which.

Adapters come from strangers. Each case here would otherwise run code, fill the memory, end in a traceback, or serve something that nobody
trained.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import decoder_of, random_adapter
from tests.conftest import tiny_model
from tests.damaged import change_config, change_header, change_tensors, refused

from atoll.errors import AdapterFormatError, UnsupportedAdapter
from atoll.model.adapter import Adapter
from atoll.model.adapter_files import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, check_adapter_files, write_adapter
from atoll.model.sites import Site, peft_key

Q0A, Q0B = peft_key(Site(0, "q_proj"), "A"), peft_key(Site(0, "q_proj"), "B")


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    """Rank 2 on q and v of three layers."""
    return random_adapter(decoder_of(tiny_model("llama")), 2, target_modules=("q_proj", "v_proj"))


@pytest.fixture
def folder(adapter: Adapter, tmp_path: Path) -> Path:
    """The adapter on disk, to damage."""
    write_adapter(tmp_path / "adapter", adapter)
    return tmp_path / "adapter"


# ---- Pickles and missing files


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pkl", "model.ckpt"])
def test_a_pickle_is_refused_by_name(name: str, folder: Path) -> None:
    """Reading a pickle runs its code."""
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"x": torch.zeros(1)}, folder / name)
    error = refused(folder, AdapterFormatError, name, "pickle", "run code")
    assert "safe_serialization=True" in error.hint


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    """Half a download."""
    (folder / name).unlink()
    assert CONFIG_FILE in refused(folder, AdapterFormatError, f"has no {name}").hint


def test_a_folder_that_is_none_is_named(folder: Path) -> None:
    """A path with a typo must not end in a traceback."""
    refused(folder / CONFIG_FILE, AdapterFormatError, "is not a folder")
    refused(folder / "nowhere", AdapterFormatError, "is not a folder")


# ---- The weights file


def cut(num_bytes: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:num_bytes])

    return damage


def pad(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * 64)


def header_length(claim: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.write_bytes(struct.pack("<Q", claim) + file.read_bytes()[8:])

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut(-1), "truncated"),
        (cut(-400), "truncated"),
        (cut(100), "ends inside its header"),
        (cut(7), "too short"),
        (cut(0), "too short"),
        (pad, "padded"),
        (header_length(2**63), f"claims {2**63} bytes"),
        (header_length(2**21 + 1), "more than the limit"),
        (header_length(3), "header is not JSON"),
    ],
    ids=["last byte", "some bytes", "in the header", "in the length", "empty", "padded", "huge header", "header over the limit", "header cut"],
)
def test_a_file_of_the_wrong_length_is_refused(damage: Callable[[Path], None], words: str, folder: Path) -> None:
    """Truncated downloads; bytes hidden behind the tensors; a header that would fill the memory before it is read."""
    damage(folder / WEIGHTS_FILE)
    refused(folder, AdapterFormatError, WEIGHTS_FILE, words)


def test_overlapping_tensors_and_gaps_are_refused(folder: Path) -> None:
    """Overlaps make one tensor change another; gaps hide data; both give a file two readings."""
    change_header(folder, lambda header: header[Q0B].update(data_offsets=header[Q0A]["data_offsets"]))
    refused(folder, AdapterFormatError, "starts at byte", "ends at")


def test_data_that_no_tensor_names_is_refused(folder: Path) -> None:
    """A gap in the middle."""
    change_header(folder, lambda header: header.pop(Q0A) and header.pop(Q0B) and None)
    refused(folder, AdapterFormatError, "starts at byte")


def test_a_tensor_named_twice_is_refused(folder: Path) -> None:
    """JSON readers disagree about which of two equal keys counts: one program would check the first and another apply the second."""

    def twice(header: dict[str, Any]) -> bytes:
        text = json.dumps(header)
        return (text[:-1] + ", " + json.dumps(Q0A) + ": " + json.dumps(header[Q0A]) + "}").encode()

    change_header(folder, twice)
    refused(folder, AdapterFormatError, "names a tensor twice")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 64]},
        {"dtype": "F32", "shape": [2, 64], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2, 64], "data_offsets": [512, 0]},
        {"dtype": "F32", "shape": [2, 64], "data_offsets": [0.0, 512]},
        {"dtype": "F32", "shape": [-2, -64], "data_offsets": [0, 512]},
        {"dtype": "F32", "shape": [True, 64], "data_offsets": [0, 512]},
        {"dtype": "F32", "shape": "ab", "data_offsets": [0, 512]},
        {"dtype": "F32", "shape": 5, "data_offsets": [0, 512]},
        ["F32"],
        None,
        7,
    ],
    ids=["no offsets", "one offset", "backwards", "floats", "negative", "bool", "text shape", "number shape", "list", "null", "number"],
)
def test_a_malformed_entry_is_refused(entry: Any, folder: Path) -> None:
    """Nothing in a stranger's header may reach Python as an exception of its own."""
    change_header(folder, lambda header: header.update({Q0A: entry}))
    refused(folder, AdapterFormatError, f"entry for {Q0A!r} is malformed")


@pytest.mark.parametrize(
    "header",
    [b"[1, 2]", b"{", b"\xff\xfe{}", b'{"x": ' + b"9" * 5000 + b"}", b"[" * 100_000],
    ids=["a list", "cut", "not UTF-8", "a number of 5000 digits", "nested"],
)
def test_a_header_that_is_no_object_is_refused(header: bytes, folder: Path) -> None:
    """Each of these makes Python's json module fail in its own way."""
    change_header(folder, lambda _: header)
    refused(folder, AdapterFormatError, "header is not")


@pytest.mark.parametrize("dtype", ["F64", "I8", "U8", "F8_E4M3", "BOOL", "f32", None, ["F32"]])
def test_another_number_format_is_refused(dtype: Any, folder: Path) -> None:
    """Integers and 8-bit floats need a scale that the file does not carry."""
    change_header(folder, lambda header: header[Q0A].update(dtype=dtype))
    refused(folder, AdapterFormatError, Q0A, f"stored as {dtype}", "F32, F16, BF16 were expected")


def test_a_shape_that_is_not_its_bytes_is_refused(folder: Path) -> None:
    """The shape would read past the tensor."""
    change_header(folder, lambda header: header[Q0A].update(shape=[2, 65]))
    refused(folder, AdapterFormatError, Q0A, "says shape (2, 65) but spans 512 bytes")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float, folder: Path) -> None:
    """One NaN makes every answer of the adapter a NaN, hours after it was published."""
    key = peft_key(Site(2, "v_proj"), "B")
    change_tensors(folder, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    refused(folder, AdapterFormatError, key, "not finite")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q0B), ("layer 0 q_proj has only factor A",)),
        (lambda t: (t.pop(Q0A), t.pop(Q0B)), ("has no factors for layer 0 q_proj",)),
        (lambda t: t.update({Q0A: torch.zeros(3, 64), Q0B: torch.zeros(64, 3)}), ("layer 0 q_proj has factors (3, 64)", "config says rank 2")),
        (lambda t: t.update({Q0A: torch.zeros(3, 64)}), ("layer 0 q_proj has A of rank 3 and B of rank 2",)),
        (lambda t: t.update({Q0A: torch.zeros(128)}), (Q0A, "shape (128,), but a matrix")),
        (lambda t: t.update({Q0A: torch.zeros(0, 64)}), (Q0A, "shape (0, 64), but a matrix")),
        (
            lambda t: t.update({peft_key(Site(0, "k_proj"), f): torch.zeros(s) for f, s in (("A", (2, 64)), ("B", (32, 2)))}),
            ("has factors, which its config does not cover, for layer 0 k_proj",),
        ),
        (lambda t: t.clear(), ("holds no tensors",)),
    ],
    ids=["one factor", "a site missing", "other rank", "ranks differ", "vector", "empty", "a site too many", "nothing"],
)
def test_tensors_that_do_not_match_the_config_are_named(
    change: Callable[[dict[str, torch.Tensor]], Any], words: tuple[str, ...], folder: Path
) -> None:
    """A file and a config of different adapters, or half an adapter."""
    change_tensors(folder, change)
    refused(folder, AdapterFormatError, *words)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
        "lora_unet_down_blocks_0",
    ],
)
def test_a_tensor_that_would_not_be_applied_is_refused(name: str, folder: Path) -> None:
    """An adapter applied without one of its tensors is another adapter."""
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(2, 64)}))
    refused(folder, UnsupportedAdapter, name)


def test_a_layer_of_the_config_that_the_file_lacks_is_named(folder: Path) -> None:
    """The config says layer 7, the file ends at layer 2: the file is incomplete, whatever base it is for."""
    change_config(folder, layers_to_transform=[0, 1, 2, 7])
    refused(folder, AdapterFormatError, "has no factors for layer 7 q_proj")


# ---- The config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("exclude_modules", ["v_proj"]),
        ("layers_pattern", "h"),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("target_parameters", ["mlp.experts"]),
        ("trainable_token_indices", [5]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("some_option_of_tomorrow", 3),
        ("some_option_of_tomorrow", {"a": 1}),
    ],
)
def test_an_option_that_is_not_applied_is_refused_by_name(key: str, value: Any, folder: Path) -> None:
    """Ignoring it would serve an adapter that nobody trained."""
    change_config(folder, **{key: value})
    error = refused(folder, UnsupportedAdapter, CONFIG_FILE, key, repr(value))
    assert "without that option" in error.hint
    converts = value in ("pissa", "pissa_niter_16", "olora", "corda")
    assert ("path_initial_model_for_weight_conversion" in error.hint) == converts, "PEFT turns these into ordinary LoRAs, and no others"


@pytest.mark.parametrize(
    ("key", "value"),
    [("some_option_of_tomorrow", None), ("some_option_of_tomorrow", False), ("modules_to_save", []), ("init_lora_weights", "gaussian")],
)
def test_an_option_that_changes_nothing_is_accepted(key: str, value: Any, folder: Path) -> None:
    """New versions of PEFT write new keys with their resting value; refusing those would refuse every new file."""
    before = check_adapter_files(folder)
    change_config(folder, **{key: value})
    assert check_adapter_files(folder) == before


@pytest.mark.parametrize("kind", ["LOHA", "PREFIX_TUNING", "lora", None, 3])
def test_another_kind_of_adapter_is_refused(kind: Any, folder: Path) -> None:
    """LoHa's factors would multiply to something else."""
    change_config(folder, peft_type=kind)
    refused(folder, UnsupportedAdapter, f"peft_type is {kind!r}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ".*(q|v)_proj"}, ("'.*(q|v)_proj'", "never run")),
        ({"target_modules": ["(a+)+$"]}, ("'(a+)+$'", "pattern")),
        ({"rank_pattern": {r".*\.1\..*q_proj": 2}}, ("rank_pattern", "pattern")),
        ({"alpha_pattern": {"^model.layers": 2}}, ("alpha_pattern", "pattern")),
        ({"target_modules": ["q_proj", "lm_head"]}, ("'lm_head'", "q_proj")),
        ({"target_modules": ["Wqkv"]}, ("'Wqkv'",)),
    ],
    ids=["a regex", "a regex in the list", "rank", "alpha", "the head", "another family's"],
)
def test_a_strangers_pattern_is_never_run(changes: dict[str, Any], words: tuple[str, ...], folder: Path) -> None:
    """A regular expression from a file can take for ever; and a module we do not adapt must not be skipped."""
    change_config(folder, **changes)
    refused(folder, UnsupportedAdapter, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 0}, ("r is 0", "from 1 to 1024")),
        ({"r": -1}, ("r is -1",)),
        ({"r": 1025}, ("r is 1025",)),
        ({"r": 2.0}, ("r is 2.0",)),
        ({"r": True}, ("r is True",)),
        ({"r": None}, ("r is None",)),
        ({"lora_alpha": "16"}, ("lora_alpha is '16'", "finite number")),
        ({"lora_alpha": float("nan")}, ("lora_alpha is nan",)),
        ({"lora_alpha": float("inf")}, ("lora_alpha is inf",)),
        ({"lora_alpha": 10**400}, ("lora_alpha is 1000",)),
        ({"lora_alpha": None}, ("lora_alpha is None",)),
        ({"lora_dropout": 1.0}, ("lora_dropout is 1.0",)),
        ({"lora_dropout": -0.1}, ("lora_dropout is -0.1",)),
        ({"use_rslora": "false"}, ("use_rslora is 'false'", "true or false")),
        ({"use_dora": "yes"}, ("use_dora is 'yes'", "true or false")),
        ({"use_dora": 1}, ("use_dora is 1", "true or false")),
        ({"rank_pattern": {"q_proj": 0}}, ("rank_pattern.q_proj is 0",)),
        ({"rank_pattern": [["q_proj", 2]]}, ("rank_pattern is", "object")),
        ({"rank_pattern": {f"layers.{i}.q_proj": 2 for i in range(10_001)}}, ("rank_pattern has 10001 entries", "at most 10000")),
        ({"alpha_pattern": {"q_proj": "x"}}, ("q_proj is 'x'",)),
        ({"target_modules": None}, ("target_modules is None",)),
        ({"target_modules": []}, ("target_modules is []",)),
        ({"target_modules": [1]}, ("target_modules is [1]",)),
        ({"layers_to_transform": [-1]}, ("layers_to_transform is [-1]",)),
        ({"layers_to_transform": ["0"]}, ("layers_to_transform is ['0']",)),
        ({"layers_to_transform": True}, ("layers_to_transform is",)),
        ({"layers_to_transform": [10**9]}, ("layers_to_transform is [1000000000]",)),
    ],
)
def test_a_value_out_of_range_is_named(changes: dict[str, Any], words: tuple[str, ...], folder: Path) -> None:
    """No guessed default for a bad value, and no traceback."""
    change_config(folder, **changes)
    refused(folder, AdapterFormatError, CONFIG_FILE, *words)


@pytest.mark.parametrize(
    "text",
    [b"{", b"[]", b'"x"', b"\xff\xff", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}", b" " * (2**20 + 1)],
    ids=["cut", "a list", "a string", "not UTF-8", "nested", "a number of 5000 digits", "too large"],
)
@pytest.mark.parametrize("name", [CONFIG_FILE, MANIFEST_FILE])
def test_a_damaged_json_file_is_refused(name: str, text: bytes, folder: Path) -> None:
    """Config and manifest come from strangers too."""
    (folder / name).write_bytes(text)
    refused(folder, AdapterFormatError, name)


def test_an_empty_layer_list_means_all_as_in_peft(folder: Path) -> None:
    """PEFT reads [] like null; refusing would refuse files that it writes."""
    change_config(folder, layers_to_transform=[])
    assert check_adapter_files(folder).layers_to_transform is None
