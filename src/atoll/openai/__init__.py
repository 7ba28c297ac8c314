"""OpenAI's HTTP API: models, chat completions with tools, completions that can score, embeddings.

The one idea: bodies and replies are what OpenAI's own client sends and reads; `model` is an adapter's name. What a request does is serving's.

Used by server/app.py.
"""
