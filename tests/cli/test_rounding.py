"""QLoRA through the command line: the rounding is recorded, everything after it takes the same base, and a mismatch is refused with the way out."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")


def test_train_generate_and_evaluate_take_the_same_rounded_base(atoll, job, tmp_path):
    """Training on NF4 and asking on other weights is the mistake that nobody sees; so nobody has to remember a flag."""
    config = json.loads(job.read_text())
    job.write_text(json.dumps({**config, "quantization": {"bits": 4, "resident": "nf4"}}))
    assert "linears rounded to nf4, held as blocks: " in atoll("train", job, "--dry-run").out
    trained = atoll("train", job, "--out", "run")
    assert trained.code == 0, trained.err
    assert "costs time" in trained.err
    manifest = json.loads((tmp_path / "run/adapter/manifest.json").read_text())
    assert manifest["quantization"] == {"bits": 4, "quant_type": "nf4", "double_quant": True}
    assert manifest["base"]["quantization"] == "nf4"

    ask = ("generate", "--adapter", "colours", "--dtype", "float32", "-n", 4, "--json", "a red thing")
    rounded = atoll(*ask)
    assert rounded.code == 0, rounded.err
    assert "rounded to nf4, as it was when colours was trained" in rounded.err
    assert atoll(*ask, "--quantized-memory").json()["text"] == rounded.json()["text"]

    refused = atoll(*ask, "--quantization", "none")
    assert refused.code == 1
    assert "was trained on the base rounded to nf4, but this is the base as it is" in refused.err
    assert "--quantization nf4" in refused.err
    assert atoll(*ask, "--quantization", "none", "--ignore-quantization").code == 0
    assert "did you mean nf4" in atoll(*ask, "--quantization", "nf5").err

    measure = ["eval", "rows.jsonl", "--model", "colours", "--template", "{text} is", "--target", "colour", "--rows", 2, "--dtype", "float32"]
    measure += ["--set", "generation.max_new_tokens=2", "--out", "board"]
    measured = atoll(*measure)
    assert measured.code == 0, measured.err
    board = json.loads((tmp_path / "board/leaderboard.json").read_text())
    assert board["base"]["name"].endswith("(nf4)")
    files = {path.name for path in (tmp_path / "board/scores").rglob("*.json")}
    assert atoll(*measure, "--quantization", "none", "--ignore-quantization").code == 0
    plain = json.loads((tmp_path / "board/leaderboard.json").read_text())
    assert plain["base"]["fingerprint"] != board["base"]["fingerprint"]
    assert len({path.name for path in (tmp_path / "board/scores").rglob("*.json")}) == 2 * len(files)


def test_a_land_rounds_its_base_once_and_says_so(atoll, tiny_base_dir, tmp_path, monkeypatch):
    """One key of the file, for every task and for the measuring."""
    config = {
        "base": str(tiny_base_dir),
        "quantization": {"bits": 8},
        "defaults": {
            "data": {"max_train_rows": 6, "max_validation_rows": 2, "max_test_rows": 2},
            "adapter": {"r": 2},
            "trainer": {"dtype": "float32", "max_steps": 1, "batch_size": 3},
            "generation": {"max_new_tokens": 2},
        },
        "tasks": ["builtin:date_format"],
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(json.dumps(config))
    result = atoll("land", "small.yaml", "--out", "out", "--json")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "out/leaderboard.json").read_text())["base"]["name"].endswith("(int8)")
    assert atoll("hub", "show", "date_format", "--json").code == 0


def test_holding_blocks_of_a_base_that_is_not_rounded_is_refused(atoll, trained):
    """It would do nothing, and look as if it saved memory."""
    refused = atoll("generate", "--quantized-memory", "--adapter", "colours", "x")
    assert refused.code == 1
    assert "the base is not rounded" in refused.err
