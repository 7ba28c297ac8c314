"""One model on one task, end to end through a scripted engine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from atoll.data.prompt import PromptFormat
from atoll.errors import EngineError, TaskError
from atoll.eval.baseline import constant_answer, majority_baseline
from atoll.eval.evaluate import (
    Contestant,
    choose_examples,
    evaluate,
    generation_limits,
    option_requests,
    plan_run,
    prompt_styles,
    requests_for,
    score_completions,
    with_options,
)

BASE = Contestant("tiny", "base", "b" * 64)
ADAPTER = Contestant("toy-lora", "lora", "a" * 64, adapter="a" * 64)
LABELS = ("no", "yes")
PAIRS = [("is fire hot?", "yes"), ("is ice hot?", "no"), ("is tea wet?", "yes"), ("is sand wet?", "no")]


def test_importing_evaluation_imports_no_torch():
    """The command line and a server start with it; torch would cost them seconds."""
    code = "import sys, atoll.eval.evaluate, atoll.eval.leaderboard, atoll.eval.row_metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_evaluation_scores_every_row_and_keeps_what_produced_it(make_data, tokenizer, scripted):
    """The score must say on what, by what and how it was measured, or it cannot be trusted later."""
    data = make_data(PAIRS, label_set=LABELS)
    engine = scripted(lambda prompt, adapter: " yes", lambda prompt, text, tokens: float(text == " yes"))
    score, outputs = evaluate(engine, data, ADAPTER, tokenizer)
    assert (score.value, score.n, score.failures, score.metric, score.metric_version) == (0.5, 4, 0, "accuracy", 1)
    assert score.stderr == pytest.approx(0.2887, abs=1e-4)
    assert (score.task, score.task_version, score.model, score.kind, score.digest) == ("toy", data.test_version, "toy-lora", "lora", "a" * 64)
    assert score.values == (1.0, 0.0, 1.0, 0.0) and score.evidence == ((1.0,), (0.0,), (1.0,), (0.0,))
    assert score.seconds > 0 and score.options_value == 0.5
    assert [(output.where, output.prediction, output.gold, output.value) for output in outputs][:2] == [
        ("test.jsonl:1", " yes", "yes", 1.0), ("test.jsonl:2", " yes", "no", 0.0)
    ]  # fmt: skip
    assert {request.adapter for request in engine.requests} == {"a" * 64} == {item.adapter for item in engine.items}
    assert engine.requests[0].sampling.temperature == 0.0 and engine.requests[0].sampling.stop == ("\n",)


def test_failures_are_counted_and_wrong(make_data, tokenizer, scripted):
    """LoRA Land's harness dropped failed requests from its means; a model must not gain by failing."""
    answers = {"fire": "", "ice": "maybe", "tea": ("yes", "length"), "sand": ("no", "error")}
    engine = scripted(lambda prompt, adapter: next(answer for word, answer in answers.items() if word in prompt))
    score, outputs = evaluate(engine, make_data(PAIRS, label_set=LABELS), BASE, tokenizer, max_options=0)
    assert (score.value, score.failures, score.n) == (0.0, 4, 4)
    assert all(output.failed and output.value == 0.0 for output in outputs)
    assert outputs[2].prediction == "yes" and outputs[2].finish_reason == "length"  # the raw text is kept all the same


def test_a_cut_text_still_overlaps(make_data, tokenizer, scripted):
    """A summary that runs past the limit is long, not absent: scoring it 0 would make a wordy base look worse than it is."""
    data = make_data([("say it", "the cat sat down")], metric="rouge_l")
    score, _ = evaluate(scripted(lambda prompt, adapter: ("the cat sat down and then it", "length")), data, BASE, tokenizer)
    assert score.failures == 0 and score.value == pytest.approx(2 * 4 / 11)


def test_a_marked_answer_survives_a_run_on(make_data, tokenizer, scripted):
    """A base that never stops has answered if it wrote its answer line."""
    data = make_data([("2+2?", "a\n#### 4"), ("1+1?", "b\n#### 2")], metric="exact_match", match="number_after_####")
    engine = scripted(lambda prompt, adapter: ("so\n#### 4\nNext" if "2+2" in prompt else "so\n#### 2", "length"))
    score, _ = evaluate(engine, data, BASE, tokenizer)
    assert (score.value, score.failures) == (0.5, 1)


def test_runs_share_one_batch(make_data, tokenizer, scripted):
    """Many models and tasks go through the engine at once; each run must find its own completions among all."""
    data = make_data(PAIRS)
    runs = [plan_run(data, BASE, tokenizer), plan_run(data, BASE, tokenizer, style="chat"), plan_run(data, ADAPTER, tokenizer)]
    engine = scripted(lambda prompt, adapter: "yes" if adapter else "no" if "<user>" in prompt else "?")
    requests = [request for run in runs for request in requests_for(run)]
    assert len({request.request_id for request in requests}) == len(requests)
    completions = engine.generate(requests)
    assert [score_completions(run, completions)[0].values for run in runs] == [(0.0,) * 4, (0.0, 1.0, 0.0, 1.0), (1.0, 0.0, 1.0, 0.0)]
    with pytest.raises(EngineError, match=r"no completion for test.jsonl:1"):
        score_completions(runs[0], [])


def test_the_base_is_asked_plain_and_inside_its_chat_template(make_data, tokenizer, scripted):
    """An instruct base answers far better inside its template; comparing only the plain prompt would flatter every adapter."""
    data = make_data(PAIRS[:1])
    assert prompt_styles(data.task, tokenizer) == ("plain", "chat")
    assert prompt_styles(replace(data.task, chat=True), tokenizer) == ("chat",)
    seen = []
    engine = scripted(lambda prompt, adapter: seen.append(prompt) or "yes")
    for style in ("plain", "chat"):
        score, _ = evaluate(engine, data, BASE, tokenizer, style=style)
        assert score.prompt_style == style
    assert seen == ["is fire hot? A:", "<user>is fire hot? A:</><assistant>"]
    assert engine.requests[0].prompt_ids[0] == tokenizer.bos_token_id != engine.requests[1].prompt_ids[0]


def test_an_adapters_own_prompt_and_stops_are_used(make_data, tokenizer, scripted):
    """The prompt travels with the adapter: asked in other words than it was trained on, it would lose for no fault of its own."""
    form = PromptFormat("Q: {question}", "Say yes or no.", "answer", chat=True, stop=("END",))
    seen = []
    engine = scripted(lambda prompt, adapter: seen.append(prompt) or "yes")
    score, _ = evaluate(engine, make_data(PAIRS[:1]), ADAPTER, tokenizer, prompt_format=form, style="plain")
    assert seen == ["<user>Say yes or no.\n\nQ: is fire hot?</><assistant>"] and score.prompt_style == "chat"
    assert engine.requests[0].sampling.stop == ("\n", "END")


def test_a_long_prompt_loses_its_beginning_and_is_counted(make_data, tokenizer, scripted):
    """What is cut must be the far end of the prompt, never the question, and must be visible."""
    run = plan_run(make_data([("x" * 100 + "is fire hot?", "yes"), ("hm?", "no")]), BASE, tokenizer, max_new_tokens=10, context_length=30)
    assert [len(prompt) for prompt in run.prompts] == [20, 7] and run.prompts_cut == 1
    assert run.prompts[0][0] == tokenizer.bos_token_id and tokenizer.decode(run.prompts[0]).endswith("fire hot? A:")
    with pytest.raises(TaskError, match="no room"):
        plan_run(make_data(PAIRS), BASE, tokenizer, max_new_tokens=30, context_length=30)


def test_options_are_written_as_training_writes_them(make_data, tokenizer):
    """ " yes" after "A:" and "yes" in a chat are different tokens; the wrong ones would compare noise."""
    data = make_data(PAIRS[:1], label_set=LABELS)
    for style, expected in (("plain", [" no", " yes"]), ("chat", ["no", "yes"])):
        items = option_requests(plan_run(data, BASE, tokenizer, style=style), tokenizer)
        assert [tokenizer.decode(tokens) for tokens in items[0].continuations] == expected
        assert not any(2 in tokens for tokens in items[0].continuations)
    line = make_data(PAIRS[:1], label_set=LABELS, template="{question}\n")
    assert tokenizer.decode(option_requests(plan_run(line, BASE, tokenizer), tokenizer)[0].continuations[0]) == "no"


def test_a_label_that_begins_another_gets_the_end_token(make_data, tokenizer):
    """ "New" can never be less likely than "New York"; with the end of text after both, it can."""
    data = make_data([("where?", "New York")], label_set=("New York", "Rome", "New"))
    items = option_requests(plan_run(data, BASE, tokenizer), tokenizer)
    assert all(tokens[-1] == tokenizer.eos_token_id for tokens in items[0].continuations)


def test_options_are_scored_for_closed_sets_of_fitting_size_only(make_data, tokenizer, scripted):
    """A hundred and fifty labels a row would cost more than everything else."""
    data = make_data(PAIRS, label_set=LABELS)
    assert option_requests(plan_run(data, BASE, tokenizer, max_options=1), tokenizer) == []
    assert option_requests(plan_run(make_data(PAIRS), BASE, tokenizer), tokenizer) == []
    run = plan_run(data, BASE, tokenizer)
    score, outputs = score_completions(run, scripted(lambda prompt, adapter: "").generate(requests_for(run)))
    found, named = with_options(score, outputs, run, [[-1.0, -2.0], [-1.0, -2.0], [-9.0, -1.0], [-1.0, -1.0]])
    assert [output.option for output in named] == ["no", "no", "yes", "no"]
    assert found.options_value == 0.75 and found.options_stderr == pytest.approx(0.25) and found.value == 0.0
    assert with_options(score, outputs, run, []) == (score, outputs)
    with pytest.raises(EngineError, match="scored 1 rows"):
        with_options(score, outputs, run, [[0.0, 0.0]])


def test_limits_come_from_the_training_answers(make_data, tokenizer):
    """A limit below the longest answer would cut right answers; a stop inside answers would too."""
    one_line = generation_limits(make_data(PAIRS, train=[("q", "a" * 39)]), tokenizer)
    assert one_line == (58, ("\n",))
    assert generation_limits(make_data(PAIRS, train=[("q", "a\nb")]), tokenizer)[1] == ("\n\n",)
    assert generation_limits(make_data(PAIRS, train=[("q", "a\n\nb")]), tokenizer)[1] == ()


def test_a_draw_of_rows_is_stable_and_nested(make_data):
    """The first rows of a file are no sample; and a quick look at 10 must be part of the look at 20."""
    data = make_data([(f"question {number}?", "yes") for number in range(50)])
    ten, twenty = choose_examples(data, 10), choose_examples(data, 20)
    assert len(ten) == 10 and set(map(id, ten)) <= set(map(id, twenty)) and choose_examples(data, 500) == data.test
    assert ten != data.test[:10] and [row.where for row in ten] == sorted((row.where for row in ten), key=lambda where: int(where.split(":")[1]))
    with pytest.raises(TaskError, match="0 test rows"):
        choose_examples(data, 0)
    with pytest.raises(TaskError, match="no validation rows"):
        choose_examples(data, None, "validation")


def test_the_majority_answer_comes_from_training(make_data):
    """Taking it from the test labels would be a better guess than anybody can make."""
    data = make_data([("a", "no"), ("b", "no"), ("c", "no"), ("d", "yes")], label_set=LABELS)
    baseline = majority_baseline(data)
    assert (baseline.answer, baseline.value, baseline.n) == ("yes", 0.25, 4) and baseline.share == pytest.approx(2 / 3)
    assert majority_baseline(data, data.test[:3]).value == 0.0
    assert majority_baseline(data, metric="macro_f1").value == pytest.approx((0 + 2 * 1 / 5) / 2)


def test_equally_common_answers_are_taken_in_the_order_of_the_labels(make_data):
    """A tie that fell by hash order would change the page from run to run; without a repeated answer there is no majority."""
    train = [("1", "yes"), ("2", "yes"), ("3", "no"), ("4", "no")]
    assert constant_answer(make_data(PAIRS, train=train, label_set=("yes", "no")))[0] == "yes"
    assert constant_answer(make_data(PAIRS, train=train))[0] == "no"
    assert majority_baseline(make_data(PAIRS, train=[("1", "a"), ("2", "b")])) is None
