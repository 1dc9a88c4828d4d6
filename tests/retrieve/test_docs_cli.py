"""`tunesmith docs`: adds, searches, shows; faults as error and fix; nothing from a document commands the terminal."""

from pathlib import Path

import pytest

from tunesmith import cli


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("docs/pump.md").write_text("# Pump\n\nHold the [red]button[/red]. \x1b[31mloud\x07")
    return tmp_path


def test_add_search_show(here, capsys):
    Path("docs/bad.pdf").write_bytes(b"%PDF- no")
    assert cli.main(["docs", "add", "docs"]) == 0
    out = capsys.readouterr().out
    assert "added 1 document in 1 chunk, 0 unchanged, 0 removed, 1 unread" in out and "unread  docs/bad.pdf: not a whole PDF" in out
    assert Path("documents.sqlite").is_file()
    assert cli.main(["docs", "search", "red button", "-k", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("[1] docs/pump.md:0-") and "[red]button[/red]" in out and "\x1b" not in out and "\x07" not in out
    assert cli.main(["docs", "show"]) == 0
    assert "1 document, 1 chunk, model: none (by words)" in capsys.readouterr().out
    assert cli.main(["docs", "search", "zebra"]) == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("docs search pump", "documents.sqlite: no such index"),
        ("docs show --index no.sqlite", "no.sqlite: no such index"),
        ("docs add nowhere", "nowhere: no such folder"),
        ("docs add docs --index no/i.sqlite", "there is no folder no"),
        ("docs add docs --index docs/pump.md", "not an index"),
        ("docs add docs --model no/such/place/x", "no such folder"),
        ("docs add unread", "no document could be read"),
        ("docs serach x", 'Did you mean "search"?'),
    ],
)
def test_faults(here, capsys, line, told):
    Path("unread").mkdir()
    Path("unread/x.pdf").write_bytes(b"%PDF- no")
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("error: ") and "\nfix: " in err and "Traceback" not in err


def test_k_below_one(here, capsys):
    cli.main(["docs", "add", "docs"])
    assert cli.main(["docs", "search", "pump", "-k", "0"]) == 2


def test_a_bar_on_a_terminal(here, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.main(["docs", "add", "docs"]) == 0
    assert "reading" in capsys.readouterr().err
