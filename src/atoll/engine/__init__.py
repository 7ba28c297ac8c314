"""Continuous batching in process: any adapter in any row of one batch, prompts and single tokens side by side.

One step is schedule, run, finish. `scheduler` chooses rows in plain Python; `runner` packs them, calls the shared forward and gives hidden states;
`sampler` turns those into tokens; `engine` joins them and owns who holds what.

    config.py     EngineConfig: the limits
    request.py    what a user asks and gets: Request, SamplingParams, ScoreRequest, Completion, TokenEvent
    sequence.py   the engine's state for one request
    scheduler.py  which sequences run in the next step, and which waiting ones may start
    stops.py      tokens to text while they come: no half characters, nothing that may become a stop string
    pool.py       registered and resident adapters: load, pin, evict by bytes
    runner.py     one forward over rows of the KV cache
    sampler.py    logits to tokens and log-probabilities
    scoring.py    log-probabilities of given continuations
    engine.py     Engine

The modules above pool.py import no torch, and neither does this one: `from atoll.engine.engine import Engine`.
"""
