"""Continuous batching in process: any adapter in any row of one batch, prompts and single tokens side by side.

The one idea: a step is schedule, run, finish. The scheduler chooses rows in plain Python, the runner packs them and calls the shared forward, the
sampler turns hidden states into tokens, and the engine joins them and owns who holds what.

    config.py     EngineConfig: the limits
    request.py    what a user asks and gets: Request, SamplingParams, ScoreRequest, EmbedRequest, Completion, TokenEvent
    grammar.py    answers that must match a grammar, with schema.py
    sequence.py   the engine's state for one request
    pages.py      who owns which page of the KV cache, and which hold a beginning that can be used again
    waiting.py    who waits, by scope and adapter, and who comes next
    scheduler.py  which sequences run in the next step, on which pages, and which waiting ones may start
    stops.py      tokens to text while they come: no half characters, nothing that may become a stop string
    pool.py       registered and resident adapters: load, pin, evict by bytes
    runner.py     one forward over rows of the KV cache
    sampler.py    logits to tokens and log-probabilities
    step.py       a step's work to outcomes, tried again adapter by adapter where the forward raises
    jobs.py       work over given texts between the steps; scoring.py and embedding.py are its kinds
    intake.py     what may come in, checked and made into sequences and jobs
    engine.py     Engine

The modules above pool.py import no torch, and neither does this one: `from atoll.engine.engine import Engine`.
"""
