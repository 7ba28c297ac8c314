"""Is it the same as PyReFT? Its interventions, its saved folders and its places, against the real thing.

    .venv/bin/python bench/compare_pyreft.py --pyreft VENV

VENV is a virtual environment with pyreft 0.1.0, pyvene, torch and transformers 5:

    python -m venv VENV && VENV/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate datasets matplotlib seaborn pandas
    VENV/bin/pip install --no-deps pyreft==0.1.0 pyvene==0.1.8

There, every kind of intervention is trained a little on a tiny random Llama in float32, run and saved; here, its folder is loaded twice: as a
ReftModel over transformers, and as an adapter of the shared forward. Printed are the largest differences of logits, and whether losses and greedy
tokens agree; where places differ, some are shown beside PyReFT's. Tables go to stderr, one JSON line to stdout; the exit code is 1 where a difference
reaches 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from atoll.model.apply_edits import edit_rows
from atoll.model.batch import AdapterBatch, PackedBatch
from atoll.model.decoder import Decoder
from atoll.reft import ReftModel, get_intervention_locations
from atoll.reft.convert import import_adapter, to_adapter
from atoll.reft.positions import NO_EDIT

LIMIT = 1e-5  # float32 logits of spread 0.6; a sum in another order moves them by about 1e-6
POSITIONS = "f2+l3"
KINDS = ("Loreft", "Noreft", "Consreft", "Lobireft", "Direft", "Nodireft")
COMPONENTS = ("block_input", "attention_input", "attention_output", "mlp_input", "mlp_output", "block_output")
LAYERS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pyreft", type=Path, required=True, help="virtual environment with pyreft 0.1.0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="atoll-pyreft-") as name:
        folder = Path(name)
        rows, cases, asked = write_base(folder / "base"), all_cases(), all_locations()
        for case in cases:
            case["locations"] = [places_of(len(row), case) for row in rows]
        job = {"base": str(folder / "base"), "out": str(folder), "rows": rows, "cases": cases, "locations": asked}
        run_reference(arguments.pyreft, job)
        logits = {case["name"]: compare(folder, case, rows) for case in cases}
        places = compare_locations(asked, json.loads((folder / "locations.json").read_text()))
    worst = max(max(found["reft_model"], found["adapter"]) for found in logits.values())
    agree = all(found["tokens_equal"] for found in logits.values()) and places["untruncated_equal"]
    print(json.dumps({"max_abs_diff": worst, "cases": logits, "locations": places, "ok": worst < LIMIT and agree}))
    sys.exit(0 if worst < LIMIT and agree else 1)


def all_cases() -> list[dict[str, Any]]:
    """Every kind, every place of the shared forward, untied sides and activations."""
    cases = [case(kind, [(layer, "block_output") for layer in LAYERS]) for kind in KINDS]
    cases += [case("Loreft", [(layer, component) for layer in LAYERS], component=component) for component in COMPONENTS]
    cases += [case(kind, [(layer, "block_output") for layer in (*LAYERS, *LAYERS)], tied=False) for kind in KINDS]
    cases += [case(kind, [(1, "block_output")], act_fn=act_fn) for kind in ("Loreft", "Noreft", "Direft", "Nodireft") for act_fn in ("gelu", "silu")]
    return cases


def case(kind: str, places: list[tuple[int, str]], tied: bool = True, act_fn: str | None = None, component: str | None = None) -> dict[str, Any]:
    """One model to build there: its name, its class, its places, its keywords."""
    what = [kind.lower(), *([component] if component else []), *([] if tied else ["untied"]), *([act_fn] if act_fn else [])]
    options = {"act_fn": act_fn} if act_fn else {}
    return {"name": "-".join(what), "kind": f"{kind}Intervention", "rank": 4, "places": places, "tied": tied, "options": options}


def write_base(folder: Path) -> list[list[int]]:
    """A tiny random Llama on disk; returns rows of tokens for it, each long enough for all positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": len(LAYERS), "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, eos_token_id=2, **shape)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)
    return [torch.randint(5, 320, (length,)).tolist() for length in (5, 6, 12, 31)]


def places_of(length: int, case: dict[str, Any]) -> list[list[int]]:
    """Ours for a row that is all prompt, without padding, as PyReFT's model can take it."""
    found = get_intervention_locations(last_position=length, positions=POSITIONS, num_interventions=len(case["places"]), share_weights=case["tied"])
    return [[place for place in places if place != NO_EDIT] for places in found]


def run_reference(venv: Path, job: dict[str, Any]) -> None:
    """The other side's half, in its own environment."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    program = [str(venv / "bin" / "python"), str(Path(__file__).parent / "peers" / "pyreft_reference.py")]
    done = subprocess.run(program, input=json.dumps(job), text=True, capture_output=True, env=environment, cwd=job["out"], check=False)
    if done.returncode:
        sys.exit(f"the comparison in {venv} failed:\n{done.stderr[-4000:]}")


def compare(folder: Path, case: dict[str, Any], rows: list[list[int]]) -> dict[str, Any]:
    """The largest differences over all rows, of the model over transformers and of the shared forward."""
    from transformers import AutoModelForCausalLM

    theirs = load_file(folder / f"{case['name']}.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    act_fn = case["options"].get("act_fn")
    model = ReftModel.load(str(folder / case["name"]), base, act_fn=act_fn)
    decoder = Decoder.from_state_dict(base.config, base.state_dict(), torch.float32)
    straight = case["name"] in (kind.lower() for kind in KINDS)  # the others come by way of the model, which saves reading the folder again
    adapter = import_adapter(folder / case["name"], "tiny", POSITIONS) if straight else to_adapter(model, "tiny", POSITIONS)
    slot = decoder.new_bank().load(adapter)
    found = {"reft_model": 0.0, "adapter": 0.0, "loss": 0.0, "moved": 0.0, "tokens_equal": True}
    for number, (row, places) in enumerate(zip(rows, case["locations"], strict=True)):
        ids, locations = torch.tensor([row]), {"sources->base": (None, [[one] for one in places])}
        expected = theirs[f"logits{number}"]
        with torch.no_grad():
            _, output = model({"input_ids": ids}, unit_locations=locations, labels=ids)
            _, tokens = model.generate({"input_ids": ids}, unit_locations=locations, intervene_on_prompt=True, max_new_tokens=8, do_sample=False)
            batch = PackedBatch.of([row])
            edits = edit_rows([(0, 0, len(row), len(row), slot.parts)])
            native = decoder.logits(decoder.forward(batch, AdapterBatch((), edits=edits)))
            plain = base(ids).logits[0]
        for name, difference in (
            ("reft_model", output.logits[0] - expected),
            ("adapter", native - expected),
            ("loss", output.loss - theirs[f"loss{number}"]),
            ("moved", plain - expected),
        ):
            found[name] = max(found[name], float(difference.abs().max()))
        found["tokens_equal"] = found["tokens_equal"] and torch.equal(tokens[0], theirs[f"tokens{number}"])
    numbers = " ".join(f"{name} {found[name]:.1e}" for name in ("reft_model", "adapter", "loss", "moved"))
    say(f"{case['name']:<28} {numbers}  tokens {'equal' if found['tokens_equal'] else 'DIFFER'}")
    return found


def all_locations() -> list[dict[str, Any]]:
    """Calls of get_intervention_locations: prompts short and long, tied and untied, one side and both."""
    return [
        {"last_position": length, "positions": positions, "num_interventions": number, "share_weights": tied, "pad_mode": mode}
        for length in (1, 2, 3, 4, 5, 9, 14, 40)
        for positions in ("l1", "f1", "f1+l1", "f2+l3", "f7+l7")
        for number, tied in ((4, True), (4, False), (1, True), (1, False))
        for mode in ("first", "last")
    ]


def compare_locations(asked: list[dict[str, Any]], theirs: list[list[list[int]]]) -> dict[str, Any]:
    """How many calls agree; all must, where the prompt is long enough for every position and the interventions can be shared out."""
    equal, different, must = 0, 0, True
    for call, their in zip(asked, theirs, strict=True):
        ours = get_intervention_locations(**call)
        sides = [int(part[1:]) for part in call["positions"].split("+")]
        lone = call["num_interventions"] == 1 and not call["share_weights"] and len(sides) == 2  # PyReFT answers [] there
        uneven = not call["share_weights"] and len(set(sides)) == 2 and call["pad_mode"] == "last"  # its padding is the first token of the answer
        if ours == their:
            equal += 1
            continue
        different += 1
        must = must and (call["last_position"] < 2 * max(sides) or lone or uneven)
        if call["last_position"] == 5 and call["num_interventions"] == 1 and call["positions"] in ("f1+l1", "f2+l3"):
            say(f"  places of a {call['last_position']}-token prompt, {call['positions']}, pad_mode {call['pad_mode']}: {ours}, PyReFT {their}")
    say(f"places: {equal} calls agree, {different} differ (short prompts, padding, one untied intervention); long prompts all agree: {must}")
    return {"equal": equal, "different": different, "untruncated_equal": must}


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
