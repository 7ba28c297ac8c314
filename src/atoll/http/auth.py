"""Who asks, and may they: one table of routes and the scope each needs, read before a body is.

A route that is not in the table needs the scope admin, and create_app refuses to start with one, so a new route cannot be open by forgetting. The
key is taken from `Authorization: Bearer KEY` or `x-api-key: KEY`. Which adapters a caller may use is the registry's to say, not this file's.

A server without keys answers everybody on this machine, so web pages must not reach it through the user's browser: a page cannot send our content
type without asking first (CORS), and a name that points to 127.0.0.1 is refused here by its Host header.

Used by app (the middleware) and by every route (caller_of).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

from starlette.requests import Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from atoll.errors import AtollError, NotAllowed
from atoll.http.body import reply
from atoll.http.errors import protocol_of, refusal_of
from atoll.serving.keys import Caller, Keys, Scope

PREDIBASE = "/{tenant}/deployments/v2/llms/{deployment}"

# A scope, or one for each method. None: no key needed.
Rule = Scope | Mapping[str, Scope | None] | None

RULES: Mapping[str, Rule] = {
    "/health": None,
    "/ping": None,
    "/startup": None,
    "/": {"GET": None, "POST": "infer"},  # GET is a health check
    "/invocations": "infer",
    "/generate": "infer",
    "/generate_stream": "infer",
    PREDIBASE: "infer",
    PREDIBASE + "/generate": "infer",
    PREDIBASE + "/generate_stream": "infer",
    "/embed": "infer",
    "/classify": "infer",
    "/classify_batch": "infer",
    "/tokenize": "infer",
    "/info": "infer",
    "/metrics": "infer",
    "/docs": "infer",
    "/openapi.json": "infer",
    "/api-doc/openapi.json": "infer",
    "/v1/models": "infer",
    "/v1/models/{model:path}": "infer",
    "/v1/chat/completions": "infer",
    "/v1/completions": "infer",
    "/v1/embeddings": "infer",
    "/compose": "publish",
    "/compose/{job}": "publish",
    "/compose/{job}/events": "publish",
}

_CALLER = "atoll.caller"
_LOCAL_NAMES = ("localhost", "local", "internal")
_PATTERNS = "{"


def caller_of(request: Request) -> Caller:
    """Who sent the request."""
    caller: Caller = request.scope[_CALLER]
    return caller


def key_of(connection: Connection) -> str | None:
    """The key that a request brings, or None."""
    other = None
    for name, value in connection["headers"]:
        if name == b"x-api-key":
            other = value.decode("latin-1").strip() or None
    return _bearer(connection) or other


def _bearer(connection: Connection) -> str | None:
    bearer = None
    for name, value in connection["headers"]:
        if name == b"authorization":
            scheme, _, rest = value.decode("latin-1").partition(" ")
            bearer = rest.strip() or None if scheme.lower() == "bearer" else None
    return bearer


def source_token(request: Request, has_keys: bool) -> str | None:
    """A token of the Hugging Face hub that stands where a key would, as LoRAX's clients send it.

    Nothing else goes there: a client's key of some other service is not for strangers; nor are the keys of a server that has some.
    """
    bearer = _bearer(request.scope)
    return bearer if bearer is not None and bearer.startswith("hf_") and not has_keys else None


class Rules:
    """The table, ready to be asked."""

    def __init__(self, table: Mapping[str, Rule] = RULES) -> None:
        self._table = table
        self._patterns = [(compile_path(path)[0], path) for path in table if _PATTERNS in path]

    def has(self, path: str, method: str) -> bool:
        """Whether the table says what a route (its path as declared) needs."""
        rule = self._table.get(path, {})
        return not isinstance(rule, Mapping) or method in rule

    def scope_for(self, path: str, method: str) -> Scope | None:
        """What a request needs: a scope, or None for nothing at all. What the table does not know needs admin."""
        declared = path if path in self._table else next((name for pattern, name in self._patterns if pattern.match(path)), None)
        if declared is None:
            return "admin"
        rule = self._table[declared]
        if not isinstance(rule, Mapping):
            return rule
        return rule.get("GET" if method == "HEAD" else method, "admin")

    def knows(self, path: str) -> bool:
        return path in self._table or any(pattern.match(path) for pattern, _ in self._patterns)


class Authentication:
    """ASGI middleware: finds the caller, refuses who may not, and leaves the caller for caller_of."""

    def __init__(self, app: ASGIApp, keys: Keys, rules: Rules, *, guard_host: bool) -> None:
        """guard_host: refuse Host headers that name another machine; for a server that asks nobody for a key."""
        self._app, self._keys, self._rules, self._guard_host = app, keys, rules, guard_host

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope[_CALLER] = self._admit(scope)
        except AtollError as error:
            await reply(refusal_of(error, protocol_of(scope["path"])), send)
            return
        await self._app(scope, receive, send)

    def _admit(self, scope: Connection) -> Caller:
        """The caller. Raises KeyRefused or NotAllowed. A path that does not exist needs a key and no scope: the answer is 404."""
        path, method = scope["path"], scope["method"]
        if self._guard_host:
            _check_host(scope)
        needed = self._rules.scope_for(path, method)
        if needed is None:
            return Caller(scopes=frozenset())
        caller = self._keys.caller(key_of(scope))
        if self._rules.knows(path) and method != "OPTIONS":
            caller.require(needed)
        return caller


def _check_host(scope: Connection) -> None:
    """Raise NotAllowed for a Host that is a public name: whoever owns the name could point it at this machine and use the server from a web page."""
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    name = re.sub(r":\d*$", "", host).strip("[]").rstrip(".").casefold()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if "." in name and name.rsplit(".", 1)[1] not in _LOCAL_NAMES:
            raise NotAllowed(
                f"this server answers this machine only, but was asked as {name[:80]!r}",
                hint="use http://127.0.0.1, or configure keys (atoll keys add) to serve it under a name",
            ) from None
