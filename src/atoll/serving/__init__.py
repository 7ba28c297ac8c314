"""Serving without HTTP: one engine on its own thread, every adapter that requests may name, who may use what, and what survives a restart.

The one idea: requests are coroutines on an event loop, the engine is one thread, and between them go commands one way and one batch of events a step
the other way. Whatever may take long (reading adapters, downloads) happens in worker threads and holds up nothing but its own adapter.

    config.py         ServeConfig: what a server may take in and hold
    keys.py           API keys: Caller, scopes, allow-lists
    service.py        Service: open, generate, stream, score, embed; admission, cancelling, draining
    tickets.py        one request between the event loop and the engine, and the stream of its tokens
    engine_thread.py  the thread that owns the engine
    grammars.py       grammars compiled beside it; vitals.py: whether it works; background.py: coroutines that nobody waits for
    admission.py      how many requests there may be
    registry.py       from names to adapters that the engine can run
    lookups.py        what a name means now, and who may know it
    entries.py        what is known of one adapter
    sources.py        our hub and local folders; far_sources.py: Hugging Face and object stores
    loading.py        from a folder to a checked adapter
    merging.py        merged adapters
    listing.py        what is told of adapters; base_names.py: what the base may be called
    operator.py       load, unload, pin, reload, publish
    state.py          pins and names that survive a restart
    observer.py       what metrics are told
    workers.py        blocking work in bounded threads

Used by server/ (HTTP) and `atoll serve`. Importing this brings in neither torch nor FastAPI.
"""
