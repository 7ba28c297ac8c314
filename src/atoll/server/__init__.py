"""The server: all routes joined into one app, management, uploads, compositions, and the process that runs it.

The one idea: `create_app(service)` in app.py is everything that answers HTTP; `atoll serve` runs it and drains it.

Nothing here is imported by the command line before a server starts.
"""
