"""`atoll chat`: turns, commands, and Ctrl-C."""

from __future__ import annotations

import os
import signal

import pytest

from atoll.cli.chat import Conversation
from atoll.cli.session import open_session
from atoll.engine.request import SamplingParams


@pytest.fixture
def talk(tiny_base_dir, trained):
    """A conversation with the bare tiny base, of short answers."""
    return Conversation(open_session([], str(tiny_base_dir), "float32"), SamplingParams(), 6)


def test_lines_of_stdin_are_turns_and_the_answers_go_to_stdout(atoll, trained, tiny_base_dir):
    """A chat can be scripted; what is not an answer goes to stderr, and the end of the input is not an error."""
    asked = ["chat", "--base", tiny_base_dir, "--dtype", "float32", "-n", 4]
    result = atoll(*asked, stdin="hello\n\n/adapter colours\nhello\n/nonsense\n/exit\nnever said\n")
    assert result.code == 0
    assert len(result.out.splitlines()) == 2
    assert "(now colours@1 answers)" in result.err
    assert "/adapter NAME" in result.err
    assert atoll(*asked, stdin="hello").out == result.out.splitlines()[0] + "\n"


def test_the_history_grows_by_a_turn_and_its_answer_and_reset_forgets_it(talk, capsys):
    """Without its history a conversation is a row of first questions."""
    talk.take("hello")
    talk.take("and then?")
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant", "user", "assistant"]
    assert talk.turns[1]["content"] + "\n" + talk.turns[3]["content"] + "\n" == capsys.readouterr().out
    talk.take("/reset")
    assert talk.turns == []


def test_an_unknown_adapter_is_told_and_the_conversation_goes_on(talk, capsys):
    """A slip must not end an hour's conversation."""
    assert talk.take("/adapter nothing")
    assert "error: no adapter 'nothing'" in capsys.readouterr().err
    assert talk.adapter is None
    talk.take("/adapter colours")
    assert talk.adapter.version.ref == "colours@1"
    talk.take("/adapter base")
    assert talk.adapter is None
    assert not talk.take("/exit")


def test_ctrl_c_ends_the_answer_and_not_the_program(talk, capsys, monkeypatch):
    """What was said until then is kept; the engine has no row left behind, and takes the next turn."""
    engine = talk._session.start(1, 512)
    stream = engine.stream

    def interrupted(request):
        for place, event in enumerate(stream(request)):
            if place == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield event

    monkeypatch.setattr(engine, "stream", interrupted)
    assert talk.take("hello")
    assert "(stopped)" in capsys.readouterr().err
    assert (engine.stats()["running"], engine.stats()["finished_cancelled"]) == (0, 1)
    engine.check()
    monkeypatch.setattr(engine, "stream", stream)
    assert talk.take("go on")
    assert talk.turns[-1]["role"] == "assistant"


def test_a_conversation_that_no_longer_fits_is_told_how_to_go_on(talk, capsys):
    """The context is finite; the turn that did not fit is not kept."""
    talk.take("x" * 600)
    assert "hint: /reset" in capsys.readouterr().err
    assert talk.turns == []


def test_a_base_without_a_chat_template_is_refused(atoll, tiny_base_dir, tmp_path):
    """It would answer in no form that it knows."""
    import shutil

    folder = shutil.copytree(tiny_base_dir, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    result = atoll("chat", "--base", folder, stdin="")
    assert result.code == 1
    assert "no chat template" in result.err
