"""Continuous batching in process: any adapter in any row of one batch, prompts and single tokens side by side.

The one idea: a step is schedule, run, finish. The scheduler chooses rows in plain Python, the runner packs them and calls the shared forward, the
sampler turns hidden states into tokens, and the engine joins them and owns who holds what.

    config.py     EngineConfig: the limits
    request.py    what a user asks and gets: Request, SamplingParams, ScoreRequest, Completion, TokenEvent
    sequence.py   the engine's state for one request
    scheduler.py  which sequences run in the next step, and which waiting ones may start
    stops.py      tokens to text while they come: no half characters, nothing that may become a stop string
    pool.py       registered and resident adapters: load, pin, evict by bytes
    runner.py     one forward over rows of the KV cache
    sampler.py    logits to tokens and log-probabilities
    step.py       a step's work to outcomes, tried again adapter by adapter where the forward raises
    scoring.py    log-probabilities of given continuations
    engine.py     Engine

The modules above pool.py import no torch, and neither does this one: `from atoll.engine.engine import Engine`.
"""
