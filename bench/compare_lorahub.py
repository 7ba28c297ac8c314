"""Is it the same as LoraHub? lorahub_learning with compatible=True against lorahub 0.1.0.

    .venv/bin/python bench/compare_lorahub.py --lorahub VENV

VENV is a virtual environment with lorahub 0.1.0 (whose own pins are older than they need be) and the libraries that Atoll is tested with:

    python -m venv VENV && VENV/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 nevergrad==1.0.12 datasets pandas tqdm
    VENV/bin/pip install --no-deps lorahub==0.1.0

Both search on the same tiny random T5 in float32 with five modules that share nothing but their shape, and five examples. Compared are the weights,
every evaluation on the way (candidate and loss), the merged parameters and the answers; these one input at a time, since lorahub gives no mask and
transformers 5 then reads the padding of a batch too. Beside them stands the true mean loss, regulariser included, that lorahub's weights have, and
that Atoll's own search reaches with as many steps. A table goes to stderr, one JSON line to stdout; the exit code is 1 where weights differ by 1e-4
or an answer differs.
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
from peers.random_t5 import TINY, write_base, write_modules
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from atoll.lorahub import default_get_loss, default_l1_regularization, lorahub_inference, lorahub_learning
from atoll.lorahub.examples import encode_pairs

LIMIT = 1e-4
EXAMPLES = [
    ("add 2 and 3", "5"),
    ("what is red", "a colour"),
    ("the opposite of hot", "cold"),
    ("spell cat", "c a t"),
    ("capital of france", "paris"),
]
INPUTS, OUTPUTS = [given for given, _ in EXAMPLES], [wanted for _, wanted in EXAMPLES]
STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lorahub", type=Path, required=True, help="virtual environment with lorahub 0.1.0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="atoll-lorahub-") as name:
        folder = Path(name)
        os.environ["ATOLL_HOME"] = str(folder / "home")
        write_base(folder / "base", TINY, spread=0.15)
        equal = five_modules(folder, "equal")
        unequal = five_modules(folder, "unequal", alphas=(8.0, 4.0, 16.0, 8.0, 32.0))
        every = five_modules(folder, "every", targets=("q", "k", "v", "o", "wi_0", "wi_1", "wo"))
        cases = [
            case("one_batch", equal),
            case("batches_of_2", equal, batch_size=2),
            case("batches_of_1", equal, batch_size=1),
            case("unequal_alphas", unequal),
            case("all_linears", every),
            case("another_seed", equal, seed=7),
            case("one_module_twice", [*equal[:3], equal[1]]),
        ]
        job = {"out": str(folder), "inputs": INPUTS, "outputs": OUTPUTS, "cases": cases}
        run_reference(arguments.lorahub, job)
        found = {asked["name"]: compare(folder, asked) for asked in cases}
        values = {"lorahub": found["one_batch"]["true_value"], **{form: own_value(equal, form) for form in ("product", "cat")}}
    worst = max(result["weights"] for result in found.values())
    ok = worst < LIMIT and all(result["answers_equal"] for result in found.values())
    say(f"largest difference of weights: {worst:.1e}; true mean losses with the first case's modules: {values}")
    print(json.dumps({"max_abs_diff": worst, "cases": found, "true_values": values, "ok": ok}))
    sys.exit(0 if ok else 1)


def case(name: str, modules: list[str], *, steps: int = STEPS, batch_size: int | None = None, seed: int = 42) -> dict[str, Any]:
    """One search for both sides."""
    return {"name": name, "modules": modules, "steps": steps, "batch_size": batch_size, "seed": seed}


def five_modules(folder: Path, name: str, alphas: tuple[float, ...] = (8.0,) * 5, targets: tuple[str, ...] = ("q", "v")) -> list[str]:
    """Five modules of rank 4."""
    return write_modules(folder, folder / "base", [f"{name}{number}" for number in range(5)], rank=4, alphas=alphas, targets=targets)


def run_reference(venv: Path, job: dict[str, Any]) -> None:
    """The other side's half, in its own environment."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    program = [str(venv / "bin" / "python"), str(Path(__file__).resolve().parent / "peers" / "lorahub_reference.py")]
    done = subprocess.run(program, input=json.dumps(job), text=True, capture_output=True, env=environment, cwd=job["out"], check=False)
    if done.returncode:
        sys.exit(f"the comparison in {venv} failed:\n{done.stderr[-4000:]}")


def compare(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The same search here, and the largest differences."""
    theirs, parameters = json.loads((folder / f"{asked['name']}.json").read_text()), load_file(folder / f"{asked['name']}.safetensors")
    trace: list[list[Any]] = []

    def loss(dataset: Any, model: Any, batch_size: int | None) -> float:
        trace.append([default_get_loss(dataset, model, batch_size)])
        return float(trace[-1][0])

    def regular(weights: Any) -> float:
        trace[-1].append([float(weight) for weight in weights])
        return default_l1_regularization(weights)

    weights, model, tokenizer = lorahub_learning(
        asked["modules"],
        INPUTS,
        OUTPUTS,
        asked["steps"],
        batch_size=asked["batch_size"],
        get_loss=loss,
        get_regular=regular,
        seed=asked["seed"],
        compatible=True,
    )
    answers, accuracy = lorahub_inference(INPUTS, model, tokenizer, 1, OUTPUTS)
    mine = dict(model.named_parameters())
    found = {
        "weights": largest(weights, theirs["weights"]),
        "evaluations": len(trace),
        "candidates": max(largest(ours[1], other[1]) for ours, other in zip(trace, theirs["trace"], strict=True)),
        "losses": max(largest([ours[0]], [other[0]]) for ours, other in zip(trace, theirs["trace"], strict=True)),
        "merged": max(float((mine[name].detach() - tensor).abs().max()) for name, tensor in parameters.items()),
        "true_value": true_value(weights, model, tokenizer),
        "answers_equal": answers == theirs["answers"] and accuracy == theirs["accuracy"],
    }
    numbers = " ".join(f"{name} {found[name]:.1e}" for name in ("weights", "candidates", "losses", "merged"))
    say(f"{asked['name']:<28} {found['evaluations']:>4} evaluations: {numbers}  answers {'equal' if found['answers_equal'] else 'DIFFER'}")
    return found


def own_value(modules: list[str], form: str) -> float:
    """What Atoll's own search reaches."""
    weights, model, tokenizer = lorahub_learning(modules, INPUTS, OUTPUTS, STEPS, form=form)
    return true_value(weights, model, tokenizer)


def true_value(weights: Any, model: Any, tokenizer: Any) -> float:
    """The mean of the examples' mean losses, and the regulariser."""
    alone = [encode_pairs(tokenizer, [given], [wanted]) for given, wanted in EXAMPLES]
    losses = [default_get_loss(example, model, 1) for example in alone]
    return round(float(sum(losses) / len(losses) + default_l1_regularization(weights)), 4)


def largest(ours: Any, theirs: Any) -> float:
    return max(abs(float(one) - float(other)) for one, other in zip(ours, theirs, strict=True))


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
