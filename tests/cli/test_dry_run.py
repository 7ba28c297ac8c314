"""`atoll train --dry-run`: all that can be known before the first step, and not a file written."""

from __future__ import annotations

import json

from atoll.cli.dry_run import preview_of
from atoll.config_file import load_config
from atoll.data.encode import EncodedRow
from atoll.model.base import load_tokenizer


def test_it_shows_config_prompts_counts_and_cost(atoll, job, tmp_path):
    """Each of these has cost somebody a night: a wrong default, a wrong template, labels cut off, not enough memory."""
    shown = atoll("train", job, "--dry-run", "--set", "adapter.r=8").out
    config, _, rest = shown.partition("\n# 2 of 32 training rows")
    (tmp_path / "again.yaml").write_text(config)
    assert load_config(tmp_path / "again.yaml", "train").config == load_config(job, "train", {"adapter.r": 8}).config
    assert "rows.jsonl:1: 16 tokens masked, 5 learned\na red thing 0 is⟦ red</s>⟧\n" in rest
    assert "| prompt tokens" in rest
    assert "trainable parameters  22,272\n" in rest
    assert "measured just now" in rest


def test_nothing_is_written(atoll, job, tmp_path, atoll_home):
    """A dry run is tried before one is sure of anything, the output folder included."""
    before = sorted(path.name for path in tmp_path.iterdir())
    assert atoll("train", job, "--dry-run", "--out", "run").code == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path != atoll_home) == before
    assert not (atoll_home / "hub").exists()


def test_rows_that_are_cut_are_counted_and_named(atoll, job, tmp_path):
    """A prompt without its beginning may have lost the instruction."""
    result = atoll("train", job, "--dry-run", "--set", "trainer.max_length=20")
    assert "cut in train: rows.jsonl:1, " in result.out.replace(f"{tmp_path}/", "")
    assert "and 27 more" in result.out
    assert "32 training rows (100%) lose the beginning of their prompt at 20 tokens" in result.err


def test_json_holds_the_same(atoll, job):
    """For whoever plans many jobs."""
    plan = atoll("train", job, "--dry-run", "--json").json()
    assert plan["rows"]["train"]["rows"] == 32
    assert plan["prompts"][0]["segments"] == [{"text": "a red thing 0 is", "learned": False}, {"text": " red</s>", "learned": True}]
    assert plan["steps"] == 2
    assert plan["estimate"]["memory_bytes"] > 0
    assert plan["warnings"] == ["2 steps of 4 rows reach 8 of the 32 training rows"]


def test_keys_without_effect_are_warned_of_by_name(atoll, job, tmp_path):
    """A setting that does nothing must not look as if it did."""
    config = json.loads(job.read_text())
    job.write_text(json.dumps({**config, "trainer": {**config["trainer"], "reft_weight_decay": 0.1}}))
    for arguments in (["--dry-run"], ["--out", "run"]):
        assert "warning: trainer.reft_weight_decay has no effect" in atoll("train", job, *arguments).err


def test_a_long_prompt_is_shown_without_its_middle(tiny_base_dir):
    """Two prompts of eight thousand characters would hide everything else; what could take over a terminal is written out."""
    tokenizer = load_tokenizer(tiny_base_dir)
    token_ids = tokenizer("\x1b" + "x" * 8000, add_special_tokens=False)["input_ids"]
    [(masked, _), (learned, is_learned)] = preview_of(EncodedRow([*token_ids, 2], len(token_ids), "rows.jsonl:1"), tokenizer)
    assert masked.startswith("\\x1bxxx")
    assert "characters…]" in masked
    assert len(masked) < 1600
    assert (learned, is_learned) == ("</s>", True)


def test_a_reft_job_shows_which_tokens_are_edited(atoll, job):
    """Positions are the setting that goes wrong unseen: off by one, or on tokens that every prompt shares."""
    config = json.loads(job.read_text())
    job.write_text(json.dumps({**config, "adapter": {"type": "loreft", "positions": "f2+l3", "tied": False, "layers": [0, -1]}}))
    shown = atoll("train", job, "--dry-run").out
    assert "edited: tokens 0 to 1 'a ', 13 to 15 ' is'\na red thing 0 is⟦ red</s>⟧\n" in shown
    assert "loreft of rank 4 at block_output of 2 of 3 blocks, positions f2+l3, each side with its own tensors\n" in shown
    assert "trainable parameters  2,064\n" in shown
    plan = atoll("train", job, "--dry-run", "--json").json()
    assert plan["kind"] == "reft"
    assert plan["prompts"][0]["edited"] == [{"first": 0, "last": 1, "text": "a "}, {"first": 13, "last": 15, "text": " is"}]
    job.write_text(json.dumps({**config, "adapter": {"r": 2, "reft": {"positions": [200]}}}))
    shown = atoll("train", job, "--dry-run").out
    assert "edited: no token\n" in shown
    assert "LoRA of rank 2 on 21 linears and loreft of rank 4 at block_output of 3 of 3 blocks, positions [200]\n" in shown
    job.write_text(json.dumps({**config, "adapter": {"type": "loreft", "positions": [200]}}))
    assert "32 of 32 training rows have no token at positions [200]" in atoll("train", job, "--dry-run").err
    job.write_text(json.dumps({**config, "adapter": {"type": "loreft", "layers": "last", "positions": "f1"}}))
    assert "training will be refused: no answer depends on the tokens at f1" in atoll("train", job, "--dry-run").err
