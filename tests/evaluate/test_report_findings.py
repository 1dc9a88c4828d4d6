"""The report page shows the findings of account.json as a table, escaped, and bears a damaged account."""

from tunesmith.evaluate import report


def page(findings):
    return report.findings_table(report._list(findings))


def test_findings_on_the_page():
    one = {"name": "email", "count": 1234, "severity": "warning", "what": "e-mail <addresses>", "why": "w", "fix": "replace them",
           "detail": "", "examples": [["a.jsonl:3", "ja••• <b>"], ["a.jsonl:9", ""]]}  # fmt: skip
    html = page([one])
    assert "1,234" in html and "replace them" in html and "a.jsonl:3 ja••• &lt;b&gt;" in html and "e-mail &lt;addresses&gt;" in html
    assert "<b>" not in html
    assert page([]) is None
    for broken in (["x"], [{"examples": 3, "count": "many"}], [{"examples": [[1, None, 2], 5]}], "text"):
        page(broken)
