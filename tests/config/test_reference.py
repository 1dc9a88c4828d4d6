"""The pages made from the schema are current, and the editor's schema accepts what load() accepts."""

import json
from pathlib import Path

import pytest

from tunesmith.config import explain, reference


def test_the_generated_pages_are_current(capsys):
    assert reference.stale() == [], "run: python -m tunesmith.config.reference"
    assert reference.main(["--check"]) == 0 and reference.main(["--chekc"]) == 2


def test_a_stale_page_is_named(tmp_path):
    for name, text in reference.generated().items():
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "reference.md").write_text("old", "utf-8")
    assert reference.stale(tmp_path) == ["reference.md"]


def test_the_page_has_every_key_and_the_links_lead_somewhere():
    page = reference.markdown()
    for key in explain.keys().values():
        assert f"### `{key.name}`" in page
    anchors = {
        "".join(c for c in line[5:-1].lower() if c.isalnum() or c in "-_") for line in page.splitlines() if line.startswith("### ")
    }
    assert {part.split(")")[0] for part in page.split("](#")[1:]} == anchors


def accepts(schema: dict, value, root: dict) -> bool:
    """As much of JSON Schema as ours uses; an unknown word fails, so that this cannot go quiet."""
    known = "description title default $schema $defs $ref anyOf type enum const properties required additionalProperties items"
    bounds = "prefixItems minItems maxItems minimum maximum exclusiveMinimum exclusiveMaximum format propertyNames"
    assert set(schema) <= set(known.split()) | set(bounds.split()), schema
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root)
    if "anyOf" in schema and not any(accepts(s, value, root) for s in schema["anyOf"]):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    types = {"string": str, "array": list, "object": dict, "boolean": bool, "integer": int, "number": (int, float)}
    if "type" in schema and (
        not isinstance(value, types[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean")
    ):
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value) and schema.get(
            "exclusiveMinimum", value - 1
        ) < value < schema.get("exclusiveMaximum", value + 1)
    if isinstance(value, list):
        items = schema.get("prefixItems", []) + [schema.get("items", {})] * len(value)
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return fits and all(accepts(s, v, root) for s, v in zip(items, value, strict=False))
    if isinstance(value, dict) and "properties" in schema:
        names = schema["properties"]
        return set(schema.get("required", ())) <= set(value) <= set(names) and all(
            accepts(names[k], v, root) for k, v in value.items()
        )
    return True


FOUR = {"model": "embedded", "data": "chats.jsonl", "method": "lora", "output": "runs/a"}


@pytest.mark.parametrize(
    ("changed", "good"),
    [
        ({}, True),
        ({"data": ["a.jsonl", {"path": "b", "weight": 2}]}, True),
        ({"data": {"train": "a.jsonl", "held_out": "b.jsonl"}}, True),
        ({"lora": {"rank": 8, "targets": ["q_proj"]}, "train": {"learning_rate": "auto", "betas": [0.9, 0.95]}}, True),
        ({"lora": {"rankk": 8}}, False),
        ({"lora": {"rank": 0}}, False),
        ({"train": {"learning_rate": 2e4}}, False),
        ({"data": {"train": []}}, False),
        ({"method": "qlra"}, False),
        ({"seed": True}, False),
    ],
)
def test_the_editors_schema_says_what_load_says(changed, good):
    schema = json.loads((reference.DOCS / "run.schema.json").read_text("utf-8"))
    assert accepts(schema, FOUR | changed, schema) is good
    assert not accepts(schema, {k: v for k, v in FOUR.items() if k != "model"}, schema)


def test_examples_name_the_schema_where_it_is():
    for example in sorted((Path(reference.DOCS).parent / "examples").glob("*.yaml")):
        first = example.read_text("utf-8").splitlines()[0]
        assert (
            example.parent / first.removeprefix("# yaml-language-server: $schema=")
        ).resolve() == reference.DOCS / "run.schema.json"
