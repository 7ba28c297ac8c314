"""How fast are Atoll's training step and mixed-adapter generation against transformers with PEFT on this machine?

    .venv/bin/python bench/foundation.py [--peer-python PATH] [--rounds 3]

Both sides do the same work on the same base: 16 rows of a built-in task per training step (rank 16 on all linears, loss on the completion), and 32
prompts of 64 random tokens with 32 greedy tokens each, on the base alone and over 32 adapters. Rounds are interleaved, each side in a process of its
own, because the speed of such a machine drifts. The peer needs torch, transformers and peft; Atoll's own environment has them. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = "smollm2-135m-instruct"
STEPS, ROWS, PROMPTS, PROMPT_TOKENS, NEW_TOKENS, ADAPTERS = 6, 16, 32, 64, 32, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with transformers and peft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=("atoll", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work = json.loads(Path(arguments.work).read_text())
        print(json.dumps({"atoll": run_atoll, "peft": run_peft}[arguments.worker](work)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), arguments.peer_python, arguments.rounds)


def compare(folder: Path, peer_python: str, rounds: int) -> None:
    """Run both sides `rounds` times in turn and print medians and ratios."""
    work = folder / "work.json"
    work.write_text(json.dumps(prepare(folder)))
    found: dict[str, list[dict[str, float]]] = {"atoll": [], "peft": []}
    for number in range(rounds):
        for side, python in (("atoll", sys.executable), ("peft", peer_python)):
            command = [python, __file__, "--worker", side, "--work", str(work)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True)
            found[side].append(json.loads(result.stdout.splitlines()[-1]))
            print(f"round {number + 1} {side}: {found[side][-1]}", file=sys.stderr, flush=True)
    median = {side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()}
    ratios = {f"{key}_vs_peft": round(median["atoll"][key] / median["peft"][key], 2) for key in median["atoll"]}
    print(json.dumps({"median_tokens_per_s": median, "ratios": ratios, "rounds": rounds, "threads": os.cpu_count()}))


def prepare(folder: Path) -> dict[str, Any]:
    """Rows, prompts and adapters that both sides use, as plain files."""
    import torch

    from atoll.config import DataConfig
    from atoll.data.encode import encode_examples
    from atoll.data.task import load_task
    from atoll.model.adapter import Adapter, AdapterSpec, LoraModule, new_adapter
    from atoll.model.adapter_files import write_adapter
    from atoll.model.base import load_base

    base = load_base(BASE)
    data = load_task(DataConfig(path="builtin:support_intents", max_train_rows=ROWS * STEPS, max_validation_rows=1, max_test_rows=1))
    rows = encode_examples(data.train, base.tokenizer, None, context=base.context_length, eos_ids=base.eos_ids).rows
    generator, shape = torch.Generator().manual_seed(0), base.decoder.shape
    for number in range(ADAPTERS):
        fresh = new_adapter(AdapterSpec(BASE, 16, 32.0), shape.linears, shape.num_layers, generator)
        modules = {site: LoraModule(m.a, 0.01 * torch.randn(m.b.shape, generator=generator), m.scaling) for site, m in fresh.modules.items()}
        write_adapter(folder / f"a{number}", Adapter(fresh.spec, modules))
    prompts = torch.randint(100, shape.vocabulary, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    labelled = [{"ids": row.token_ids, "num_prompt": row.num_prompt} for row in rows]
    return {"base": str(base.path), "rows": labelled, "prompts": prompts, "adapters": [str(folder / f"a{number}") for number in range(ADAPTERS)]}


def run_atoll(work: dict[str, Any]) -> dict[str, float]:
    """Tokens per second of Atoll."""
    import torch

    from atoll.config import TrainerConfig
    from atoll.data.encode import EncodedRow
    from atoll.engine.config import EngineConfig
    from atoll.engine.engine import Engine
    from atoll.engine.request import Request, SamplingParams
    from atoll.model.adapter import AdapterSpec, new_adapter
    from atoll.model.adapter_files import read_adapter
    from atoll.model.base import load_base
    from atoll.train.job import TrainingJob

    base = load_base(work["base"])
    shape = base.decoder.shape
    rows = [EncodedRow(row["ids"], row["num_prompt"], "") for row in work["rows"]]
    adapter = new_adapter(AdapterSpec("", 16, 32.0), shape.linears, shape.num_layers, torch.Generator().manual_seed(0))
    config = TrainerConfig(epochs=1, batch_size=ROWS, checkpoint_every=None)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        job = TrainingJob(base.decoder, adapter, rows, [], config, Path(folder), "bench")
        job.run(lambda headline, step, total: times.append(time.perf_counter()))
    seconds = [after - before for before, after in itertools.pairwise(times[:-1])]  # the first warms up, the last writes the checkpoint
    out = {"train": sum(len(row.token_ids) for row in rows) / STEPS / statistics.median(seconds)}

    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    engine = Engine(base, EngineConfig(max_rows=PROMPTS))
    for path in work["adapters"]:
        engine.register(path, read_adapter(Path(path)))
    for name, keys in (("generate_base", [None] * PROMPTS), ("generate_32_adapters", work["adapters"])):
        requests = [Request(prompt, adapter=key, sampling=sampling) for prompt, key in zip(work["prompts"], keys, strict=True)]
        engine.generate(requests[:4])
        started = time.perf_counter()
        engine.generate(requests)
        out[name] = PROMPTS * NEW_TOKENS / (time.perf_counter() - started)
    return out


def run_peft(work: dict[str, Any]) -> dict[str, float]:
    """Tokens per second of transformers and PEFT in bfloat16: padded batches, all logits, one adapter trained; adapter_names for the mixed batch."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = AutoModelForCausalLM.from_pretrained(work["base"], dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    model.train()
    rows, seconds = sorted(work["rows"], key=lambda row: len(row["ids"])), []
    for step in range(STEPS):
        batch = rows[step * ROWS : (step + 1) * ROWS]
        width = max(len(row["ids"]) for row in batch)
        ids = torch.tensor([row["ids"] + [0] * (width - len(row["ids"])) for row in batch])
        mask = torch.tensor([[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in batch])
        labels = [[-100] * row["num_prompt"] + row["ids"][row["num_prompt"] :] + [-100] * (width - len(row["ids"])) for row in batch]
        started = time.perf_counter()
        model(input_ids=ids, attention_mask=mask, labels=torch.tensor(labels)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    out = {"train": sum(len(row["ids"]) for row in rows) / STEPS / statistics.median(seconds[1:])}

    plain = AutoModelForCausalLM.from_pretrained(work["base"], dtype=torch.bfloat16).eval()
    ids = torch.tensor(work["prompts"])
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    started = time.perf_counter()
    plain.generate(ids, **options)
    out["generate_base"] = PROMPTS * NEW_TOKENS / (time.perf_counter() - started)
    mixed = PeftModel.from_pretrained(plain, work["adapters"][0], adapter_name="a0")
    for number, path in enumerate(work["adapters"][1:], 1):
        mixed.load_adapter(path, adapter_name=f"a{number}")
    mixed.eval()
    started = time.perf_counter()
    mixed.generate(input_ids=ids, adapter_names=[f"a{number}" for number in range(PROMPTS)], **options)
    out["generate_32_adapters"] = PROMPTS * NEW_TOKENS / (time.perf_counter() - started)
    return out


if __name__ == "__main__":
    main()
