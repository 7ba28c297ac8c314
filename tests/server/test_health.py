"""Health checks: yes or no, from the outside, whatever else is configured."""

from __future__ import annotations

import pytest

PATHS = ("/health", "/ping", "/startup")


@pytest.mark.parametrize("path", [*PATHS, "/"])
def test_a_ready_server_says_yes_with_an_empty_body(live, path):
    """What LoRAX's and SageMaker's checkers expect."""
    found = live.get(path)
    assert (found.status_code, found.content) == (200, b"")


def test_health_needs_no_key(serve):
    """A load balancer has none; but it is told nothing else."""
    server = serve(keys={"ann": {}})
    for path in PATHS:
        assert server.get(path).status_code == 200
    assert server.get("/adapters").status_code == 401


@pytest.mark.parametrize("how", ["draining", "broken"])
def test_a_server_that_drains_or_is_broken_says_no(serve, how):
    """Traffic must go elsewhere, and what comes all the same is told so, in each protocol."""
    server = serve()
    if how == "draining":
        server.loop.call_soon_threadsafe(server.service.drain)
    else:

        def die(engine):
            raise SystemExit  # not an error of ours: the thread ends

        with pytest.raises(Exception, match="does not run"):
            server.run(die)
    for path in PATHS:
        found = server.get(path)
        assert (found.status_code, found.json()) == (503, {"error": "unhealthy", "error_type": "healthcheck"})
    asked = server.post("/generate", {"inputs": "hello"})
    assert (asked.status_code, asked.json()["error_type"]) == (503, "unavailable")
    assert server.post("/v1/completions", {"model": "", "prompt": "hello"}).status_code == 503
    if how == "broken":
        assert server.post("/adapters/plain/load").status_code == 503
