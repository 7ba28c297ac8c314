"""What every HTTP route stands on: keys, body limits, errors in each protocol's shape, server-sent events, metrics.

The one idea: a route of any protocol raises errors of atoll.errors and yields bytes; status, body and stream are made here, once.

Used by lorax/, openai/ and server/. Imports FastAPI, so nothing else may import it.
"""
