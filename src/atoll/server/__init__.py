"""HTTP over serving: LoRAX's API, OpenAI's, management, health and metrics. What a request means is decided here, what it does in serving/.

The one idea: each routes file turns a body into serving's requests and completions into a reply of its protocol; errors, keys, body limits and
server-sent events are shared. `create_app(service)` in app.py joins them; `atoll serve` runs it.

Nothing here is imported by the command line before a server starts.
"""
