"""Names, tags and references: what is refused, and that a reference means one thing."""

from __future__ import annotations

import pytest

from atoll.errors import HubError, NameRefused
from atoll.hub.names import Reference, check_name, check_tag, nearest, parse_reference


@pytest.mark.parametrize("name", ["a", "acme/support-intents", "A.b_c-1/x", "x" * 96])
def test_ordinary_names_are_accepted(name):
    """If this failed, people could not publish."""
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "/", "a/", "/a", "a/b/c", "../x", "a/..", "a..b", "a--b", "-a", "a-", ".a", "a.", "x" * 97, "repo.git", "a/REPO.GIT"),
        *("base", "acme/Latest", "default", "__base_model__", "sha256", "a b", "a\n", "naïve", "a\x00", "a\\b", "C:x", "a@1", "<script>"),
    ],
)
def test_hostile_reserved_and_odd_names_are_refused_with_the_pattern(name):
    """A name ends up in URLs, prompts and pages: outside the pattern nothing is promised."""
    with pytest.raises(NameRefused) as caught:
        check_name(name)
    assert "owner/name" in caught.value.hint


@pytest.mark.parametrize("tag", ["1", "v2", "1.0", "latest", "deadbeef00", "", "-x", "a b", "a/b", "x" * 65])
def test_a_tag_that_looks_like_a_version_is_refused(tag):
    """Tags move and versions don't: a tag named `2` would make `name:2` lie."""
    with pytest.raises(NameRefused):
        check_tag(tag)


def test_every_form_of_reference_is_read():
    """The grammar users type; a form read wrongly would serve another adapter."""
    digest = "0123abcd"
    assert parse_reference("a/b") == parse_reference("a/b@latest") == parse_reference("a/b:latest") == Reference("a/b")
    assert parse_reference("a/b@3") == Reference("a/b", number=3)
    assert parse_reference(f"a/b@sha256:{digest}") == Reference("a/b", digest=digest)
    assert parse_reference(f"sha256:{digest}") == Reference(None, digest=digest)
    assert parse_reference("a/b:stable") == Reference("a/b", tag="stable")


@pytest.mark.parametrize("text", ["a@", "a@0", "a@-1", "a@x", "a@1:t", "a:t@1", "sha256:12", "sha256:XYZ", "a@sha256:12", "", "a:", "a@1@2", "../a"])
def test_anything_else_is_refused_not_guessed(text):
    """A guessed reference is a wrong adapter served without a word."""
    with pytest.raises(HubError):
        parse_reference(text)


def test_the_nearest_names_are_the_likely_ones():
    """A typing error costs one look at the hint, not a search."""
    names = ["acme/support-intents", "acme/sql", "other"]
    assert nearest("acme/suport-intents", names)[0] == "acme/support-intents"
    assert nearest("sql", names)[0] == "acme/sql"
    assert nearest("zzzz", names) == ()
