"""lm-evaluation-harness scores models through /v1/completions: what it sends, what it reads, and one whole run of it.

The run needs the program: point ATOLL_LM_EVAL to `lm_eval` of an environment with lm-eval[api] and transformers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.openai_server import OpenAILive, openai_serving

from atoll.model.base import Base

QUESTIONS = [(a, b) for a in range(2, 6) for b in range(3, 8)]  # 20 sums
TASK = """
task: atoll_sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def live(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAILive]:
    with openai_serving(served_base, tmp_path_factory.mktemp("server")) as server:
        yield server


def questions() -> list[dict[str, Any]]:
    """Sums with four choices each; the answer's place moves."""
    rows = []
    for number, (a, b) in enumerate(QUESTIONS):
        choices = [str(a + b + shift) for shift in (1, 2, -1)]
        choices.insert(number % 4, str(a + b))
        rows.append({"question": f"{a} + {b} =", "choices": choices, "answer": number % 4})
    return rows


def pairs(live: OpenAILive) -> list[tuple[list[int], list[int]]]:
    """What the harness scores: each question's tokens, and those of each choice behind a space."""
    return [(live.ids(row["question"]), live.ids(" " + choice)) for row in questions() for choice in row["choices"]]


def read(choices: Sequence[dict[str, Any]], lengths: Sequence[int]) -> list[tuple[float, bool]]:
    """What the harness makes of a reply: the sum from the continuation's first token to the last but one, and whether all of it is greedy."""
    found = []
    for choice, length in zip(sorted(choices, key=lambda choice: int(choice["index"])), lengths, strict=True):
        told = choice["logprobs"]
        values, tops = told["token_logprobs"][length:-1], told["top_logprobs"][length:-1]
        found.append((sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))))
    return found


@pytest.mark.parametrize("max_tokens", [1, 0])
def test_the_harness_requests_give_the_engines_scores(live: OpenAILive, max_tokens: int):
    """A benchmark through the server must be the benchmark of the model: every log-likelihood to 1e-4, tokens in lists of eight as it sends them."""
    asked = pairs(live)[:24]
    for start in range(0, len(asked), 8):
        part = asked[start : start + 8]
        body = {"model": "plain", "prompt": [context + choice for context, choice in part], "temperature": 0, "seed": 1234}
        reply = httpx.post(
            live.url + "/v1/completions",
            json={**body, "max_tokens": max_tokens, "logprobs": 1, "echo": True},
            timeout=60,
        )
        choices = reply.json()["choices"]
        if max_tokens == 0:  # there is no generated token at the end for `read` to leave out
            for choice in choices:
                choice["logprobs"]["token_logprobs"].append(0.0)
                choice["logprobs"]["top_logprobs"].append({})
        for (context, choice), (total, _) in zip(part, read(choices, [len(context) for context, _ in part]), strict=True):
            assert total == pytest.approx(live.score(context, choice, "plain"), abs=1e-4)


def test_the_greedy_flag_is_true_for_what_greedy_decoding_writes(live: OpenAILive):
    """The harness reports an exact match by it: a likelier token that looks alike, or a rounding between two lists, would change it."""
    context = live.ids("2 + 3 =")
    greedy = list(live.generate(context, max_new_tokens=4, ignore_eos=True).token_ids)
    other = [*greedy[:-1], live.ids("q")[0]]
    body = {"model": "", "prompt": [context + greedy, context + other], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    reply = httpx.post(live.url + "/v1/completions", json=body, timeout=60).json()
    assert [flag for _, flag in read(reply["choices"], [len(context)] * 2)] == [True, False]


def test_a_text_gives_the_scores_of_its_tokens(live: OpenAILive):
    """With tokenized_requests=False the harness sends texts."""
    context, choice = live.ids("2 + 3 ="), live.ids(" 5")
    body = {"model": "", "prompt": "2 + 3 = 5", "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    reply = httpx.post(live.url + "/v1/completions", json=body, timeout=60).json()
    [(total, _)] = read(reply["choices"], [len(context)])
    assert total == pytest.approx(live.score(context, choice), abs=1e-4)


def run_harness(program: str, folder: Path, live: OpenAILive, model: str, tokenizer: Path) -> dict[str, Any]:
    """One run of lm-evaluation-harness on our sums; its results and samples."""
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions()))
    (folder / "atoll_sums.yaml").write_text(TASK.format(data=data))
    url = live.url + "/v1/completions"
    arguments = f"model={model},base_url={url},tokenizer={tokenizer},tokenizer_backend=huggingface,num_concurrent=3,max_length=256"
    command = [program, "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "atoll_sums", "--include_path", str(folder)]
    command += ["--batch_size", "8", "--output_path", str(folder / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (folder / "out").rglob("results_*.json")
    [samples] = (folder / "out").rglob("samples_*.jsonl")
    return {"results": json.loads(results.read_text())["results"], "samples": [json.loads(line) for line in samples.read_text().splitlines()]}


@pytest.mark.slow
def test_the_harness_itself_gets_the_engines_scores(live: OpenAILive, tmp_path: Path):
    """The whole way: its own requests, its own reading, its own accuracy."""
    program = os.environ.get("ATOLL_LM_EVAL", "")
    if not shutil.which(program):
        pytest.skip("ATOLL_LM_EVAL does not point to lm_eval")
    found = run_harness(program, tmp_path, live, "plain", live.base.path)
    right = 0
    for sample in found["samples"]:
        row = sample["doc"]
        scores = [live.score(live.ids(row["question"]), live.ids(" " + choice), "plain") for choice in row["choices"]]
        told = [float(response[0][0]) for response in sample["resps"]]
        assert told == pytest.approx(scores, abs=1e-4)
        right += max(range(4), key=scores.__getitem__) == row["answer"]
    assert len(found["samples"]) == 20 and math.isclose(found["results"]["atoll_sums"]["acc,none"], right / 20)
