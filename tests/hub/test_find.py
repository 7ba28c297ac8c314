"""Resolving, listing, searching, labelling, yanking, deleting: a reference means one content, for ever or until it is gone."""

from __future__ import annotations

import pytest

from atoll.errors import AdapterNotFound, HubError, NameRefused
from atoll.hub import Hub


def test_every_reference_resolves_to_the_content_it_was_given_for(hub, make):
    """Names move on with new versions; numbers, digests and tags don't follow."""
    one, two = hub.publish(make(1), "acme/a", tags=("stable",)), hub.publish(make(2), "acme/a")
    assert hub.resolve("acme/a").digest == hub.resolve("acme/a@latest").digest == two.digest
    for ref in ("acme/a@1", "acme/a:stable", f"acme/a@sha256:{one.digest}", f"acme/a@sha256:{one.digest[:8]}", f"sha256:{one.digest[:12]}", one.ref):
        assert hub.resolve(ref).digest == one.digest


def test_what_is_not_there_is_refused_with_the_nearest(hub, make):
    """A silent answer by the base or by another adapter is the failure users report most."""
    hub.publish(make(1), "acme/support-intents", tags=("stable",))
    with pytest.raises(AdapterNotFound, match="suport") as caught:
        hub.resolve("acme/suport-intents")
    assert "acme/support-intents" in caught.value.hint
    for ref in ("acme/support-intents@2", "acme/support-intents:beta", "acme/support-intents@sha256:00000000"):
        with pytest.raises(AdapterNotFound) as caught:
            hub.resolve(ref)
        assert "version 1" in caught.value.hint and "stable" in caught.value.hint
    with pytest.raises(AdapterNotFound):
        hub.resolve("sha256:00000000")


def test_a_digest_prefix_that_fits_two_versions_is_refused(hub, make):
    """Guessing one of two adapters is the wrong kind of help. The index is edited, since real digests don't collide at will."""
    from atoll.hub.records import VersionRow

    hub.publish(make(1), "a")
    hub.publish(make(2), "a")
    with hub._database.write() as session:
        for row in session.query(VersionRow):
            row.digest = "abcdef01" + row.digest[8:]
    for ref in ("sha256:abcdef01", "a@sha256:abcdef01"):
        with pytest.raises(HubError, match="more than one"):
            hub.resolve(ref)


def test_listing_filters_by_owner_base_kind_and_tag(hub, make):
    """Finding the right one among hundreds is what a hub is for."""
    hub.publish(make(1, manifest={}), "acme/a", tags=("stable",))
    hub.publish(make(2, manifest={"kind": "composed"}), "acme/b")
    hub.publish(make(3), "other")
    hub.publish(make(4, manifest={}), "acme/a")

    def names(**filters):
        return [version.ref for version in hub.list(**filters)]

    assert names() == ["acme/a@2", "acme/b@1", "other@1"]
    assert names(name="acme/") == ["acme/a@2", "acme/b@1"]
    assert names(name="acme/a") == ["acme/a@2", "acme/a@1"]
    assert names(all_versions=True) == ["acme/a@2", "acme/a@1", "acme/b@1", "other@1"]
    assert names(kind="composed") == ["acme/b@1"] and names(tag="stable") == ["acme/a@1"]
    assert names(base="TOY/base") == names() and names(base="d" * 64) == ["acme/a@2", "acme/b@1"] and names(base="none") == []


def test_search_wants_every_word_and_takes_signs_literally(hub, make):
    """`%` and `_` mean something to a database and nothing to a user."""
    hub.publish(make(1, manifest={"description": "Sorts 100% of support tickets", "task": "intents", "licence": "MIT"}), "acme/a", tags=("good",))
    hub.publish(make(2, manifest={"description": "writes SQL"}), "acme/sql", message="better joins")
    texts = ("SUPPORT mit", "100%", "100_", "joins", "good", "acme", "sql intents", "'; drop")
    found = {text: [version.name for version in hub.search(text)] for text in texts}
    assert found["SUPPORT mit"] == found["100%"] == found["good"] == ["acme/a"] and found["joins"] == ["acme/sql"]
    assert found["acme"] == ["acme/a", "acme/sql"] and found["100_"] == found["sql intents"] == found["'; drop"] == []


def test_a_tag_moves_and_stays_within_its_name(hub, make):
    """`name:stable` must change hands in one step, and never point at another name's version."""
    hub.publish(make(1), "a", tags=("stable",))
    hub.publish(make(2), "a")
    assert hub.tag("a@2", "stable").tags == ("stable",) and hub.resolve("a:stable").number == 2 and hub.resolve("a@1").tags == ()
    assert hub.publish(make(3), "a", tags=("stable", "beta")).tags == ("beta", "stable")
    assert hub.publish(make(3), "b").tags == ()
    with pytest.raises(HubError, match="2 names"):
        hub.tag(f"sha256:{hub.resolve('b').digest}", "stable")
    with pytest.raises(NameRefused):
        hub.tag("a", "v3")
    assert hub.untag("a:stable").tags == ("beta",)
    with pytest.raises(AdapterNotFound):
        hub.resolve("a:stable")
    with pytest.raises(HubError, match="names no tag"):
        hub.untag("a")


def test_a_yanked_version_is_out_of_sight_but_not_out_of_reach(hub, make):
    """Who pinned it keeps working; nobody new gets it; publishing it again is a change of mind."""
    hub.publish(make(1), "a")
    hub.publish(make(2), "a")
    assert hub.yank("a@2").yanked and hub.resolve("a").number == 1 and hub.resolve("a@2").yanked
    assert [version.number for version in hub.list()] == [1] and hub.search("a")[0].number == 1
    hub.yank("a@1")
    with pytest.raises(AdapterNotFound, match="yanked"):
        hub.resolve("a")
    assert not hub.yank("a@1", undo=True).yanked and hub.resolve("a").number == 1
    assert not hub.publish(make(2), "a").yanked and hub.resolve("a").number == 2


def test_delete_and_gc_remove_only_what_nobody_uses(hub, make):
    """Two names may share content, and two versions a config file: deleting one must not harm the other."""
    one, two = hub.publish(make(1), "a"), hub.publish(make(2), "a")
    hub.publish(make(1), "b")
    with pytest.raises(HubError, match="2 versions"):
        hub.delete("a")
    assert [version.ref for version in hub.delete("a@1")] == ["a@1"]
    assert hub.gc().num_blobs == 0 and hub.verify() == () and hub.resolve(f"sha256:{one.digest}").name == "b"
    assert hub.delete("a")[0].digest == two.digest
    report = hub.gc()
    assert (report.num_blobs, report.num_folders) == (1, 1) and report.freed_bytes > 100 and hub.verify() == ()
    assert not two.path.exists() and one.path.exists()
    assert hub.publish(make(2), "a").number == 3  # 2 meant something once
    with pytest.raises(AdapterNotFound):
        hub.delete("zzz")


def test_deleting_a_whole_name_frees_its_spelling_but_not_its_numbers(hub, make):
    """name@1 in somebody's notes must never come to mean another adapter."""
    hub.publish(make(1), "Thing", tags=("x",))
    hub.publish(make(2), "Thing")
    assert len(hub.delete("Thing", all_versions=True)) == 2 and hub.list() == ()
    with pytest.raises(AdapterNotFound):
        hub.resolve("Thing:x")
    assert hub.publish(make(1), "thing").ref == "thing@3"


def test_a_path_of_a_version_that_lost_its_files_says_so(hub, make):
    """A version held by a caller may have been deleted and collected meanwhile."""
    import shutil

    from atoll.errors import IntegrityError

    version = hub.publish(make(1), "a")
    shutil.rmtree(version.path)
    shutil.rmtree(hub.root / "blobs")
    with pytest.raises(IntegrityError, match="a@1"):
        hub.path(version)
    assert {problem.found for problem in hub.verify()} == {None}


def test_the_hub_lives_in_the_atoll_home_unless_told_otherwise(atoll_home):
    """One place by default, so that every command finds what the others published."""
    assert Hub().root == atoll_home / "hub"
