"""What lorahub 0.1.0 finds on a tiny base, for compare_lorahub.py. Runs in an environment with lorahub, torch, transformers, peft and nevergrad.

Reads a job as JSON from standard input: {"out", "inputs", "outputs", "cases": [{"name", "modules", "steps", "batch_size", "seed"}]}. For each case
the weights, every evaluation on the way, and the answers of the merged model go to out/NAME.json, its parameters to out/NAME.safetensors. lorahub is
called as it is; its own loss and regulariser are passed to it inside functions that write down what they return.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import torch
    from lorahub.algorithm import default_get_loss, default_l1_regularization, lorahub_inference, lorahub_learning
    from safetensors.torch import save_file

    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    for case in job["cases"]:
        trace: list[list[Any]] = []

        def loss(dataset: Any, model: Any, batch_size: int | None, trace: list[list[Any]] = trace) -> float:
            trace.append([default_get_loss(dataset, model, batch_size)])
            return float(trace[-1][0])

        def regular(weights: Any, trace: list[list[Any]] = trace) -> float:
            trace[-1].append([float(weight) for weight in weights])
            return float(default_l1_regularization(weights))

        weights, model, tokenizer = lorahub_learning(
            lora_module_list=case["modules"],
            example_inputs=job["inputs"],
            example_outputs=job["outputs"],
            max_inference_step=case["steps"],
            batch_size=case["batch_size"],
            get_loss=loss,
            get_regular=regular,
            seed=case["seed"],
        )
        answers, accuracy = lorahub_inference(job["inputs"], model, tokenizer, 1, job["outputs"])
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.named_parameters()}
        save_file(tensors, Path(job["out"]) / f"{case['name']}.safetensors")
        found = {"weights": [float(weight) for weight in weights], "trace": trace, "answers": answers, "accuracy": accuracy}
        (Path(job["out"]) / f"{case['name']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
