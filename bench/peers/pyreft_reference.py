"""What pyreft 0.1.0 computes and saves on a tiny base, for compare_pyreft.py. Runs in an environment with pyreft, torch and transformers.

Reads a job as JSON from standard input: {"base", "out", "rows", "cases": [{"name", "kind", "places", "options", "locations"}], "locations": [...]}.
For each case the interventions are trained a little, so that nothing is at its initial value, saved by ReftModel.save to out/NAME, and their logits,
loss and greedy tokens written to out/NAME.safetensors. The places that get_intervention_locations gives go to out/locations.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import pyreft
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    job = json.load(sys.stdin)
    out = Path(job["out"])
    torch.set_num_threads(1)
    for case in job["cases"]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
        kind = getattr(pyreft, case["kind"])
        size = {"embed_dim": model.config.hidden_size, "low_rank_dimension": case["rank"], "dtype": torch.float32, "add_bias": True}
        entries = [
            {"layer": layer, "component": component, "low_rank_dimension": case["rank"], "intervention": kind(**size, **case["options"])}
            for layer, component in case["places"]
        ]
        reft_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=entries))
        _train(reft_model, job["rows"], case["locations"])
        results: dict[str, Any] = {}
        for number, (row, places) in enumerate(zip(job["rows"], case["locations"], strict=True)):
            base, locations = {"input_ids": torch.tensor([row])}, {"sources->base": (None, [[one] for one in places])}
            with torch.no_grad():
                _, output = reft_model(base, unit_locations=locations, labels=torch.tensor([row]))
                _, tokens = reft_model.generate(base, unit_locations=locations, intervene_on_prompt=True, max_new_tokens=8, do_sample=False)
            results |= {f"logits{number}": output.logits[0].contiguous(), f"loss{number}": output.loss, f"tokens{number}": tokens[0]}
        save_file(results, out / f"{case['name']}.safetensors")
        reft_model.save(str(out / case["name"]))
    found = [pyreft.get_intervention_locations(**asked) for asked in job["locations"]]
    (out / "locations.json").write_text(json.dumps(found))


def _train(reft_model: Any, rows: list[list[int]], locations: list[Any]) -> None:
    import torch

    optimizer = torch.optim.SGD([tensor for _, tensor in reft_model.named_parameters()], lr=0.5)
    for _ in range(3):
        for row, places in zip(rows, locations, strict=True):
            ids = torch.tensor([row])
            _, output = reft_model({"input_ids": ids}, unit_locations={"sources->base": (None, [[one] for one in places])}, labels=ids)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
