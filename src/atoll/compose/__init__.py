"""From a few examples of a new task and the hub's adapters, one new adapter: retrieval, pool, objective, search, result, controls.

    retrieval.py    ranks a hub for the examples: by loss and slope (measuring.py) and by text (text_similarity.py)
    pool.py         the adapters that may be composed, stacked as the forward reads them
    candidates.py   weightings of a pool as blocks of one batch: mixed, merged, or LoraHub's product
    losses.py       label losses of many candidates on a few examples
    metrics.py      options and written texts as scores
    objective.py    scores, what each example counts, regulariser, held-out part
    search.py       `search` by the name of a method; run.py keeps its books
    gradient.py     quasi-Newton steps on the weights (quasi_newton.py)
    population.py   CMA-ES and nevergrad
    result.py       weights to an adapter with a manifest
    controls.py     what a composition is compared with: base_losses.py, random_adapters.py, few_shot_lora.py, in_context.py
                    cross_validation.py takes the held-out losses of them all

A whole composition:

    pool = Pool.of(adapters, base.decoder, names)
    few = FewShot(encode_examples(examples, base.tokenizer, None).rows)
    found = search(Objective(LabelLosses(base.decoder, pool, few.rows)), pool.num)
    adapter, _ = compose(pool, found.weights, record=record_of(found, examples_digest=few.digest))

Used by workflows and lorahub.
"""
