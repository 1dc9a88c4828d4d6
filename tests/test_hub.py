"""Names become local folders: what is asked of the hub, what is refused, every error with its fix. The hub is replaced."""

import io
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console

import tunesmith
from tunesmith import hub
from tunesmith.errors import DataError, ModelError
from tunesmith.hub import resolve_dataset, resolve_model

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A hub of one repository: `cloud.files` are its files, `cloud.error` what it raises, `cloud.asked` what was asked of it."""
    state = SimpleNamespace(files=[], error=None, asked=[])

    def snapshot_download(**asked):
        state.asked.append(asked)
        if state.error:
            raise state.error
        folder = Path(asked.get("local_dir") or tmp_path / "hub" / "snapshots" / SHA)
        for name in filter_repo_objects(
            state.files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked.get("ignore_patterns")
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def dataset_info(self, repo, *, revision):
        state.asked.append({"repo_id": repo, "revision": revision})
        if state.error:
            raise state.error
        return SimpleNamespace(sha=SHA, siblings=[SimpleNamespace(rfilename=f) for f in state.files])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return state


def held(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


REPO = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
        "README.md", "pytorch_model.bin", "modeling_evil.py", "consolidated.safetensors", "original/model.safetensors",
        "flax_model.msgpack", "model.gguf", "training_args.bin"]  # fmt: skip


def test_a_model_is_pinned_and_only_what_is_needed_is_taken(cloud):
    cloud.files = REPO
    found = resolve_model("owner/name")
    assert (found.name, found.revision) == ("owner/name", SHA)
    assert held(found.path) == sorted(REPO[:10])
    resolve_model("owner/name@refs/pr/3")
    assert cloud.asked[-1]["revision"] == "refs/pr/3" and cloud.asked[0]["revision"] is None


def test_without_weights_only_config_and_tokenizer_are_taken(cloud):
    cloud.files = REPO
    found = resolve_model("owner/name", weights=False)
    assert held(found.path) == [f for f in sorted(REPO[:10]) if "safetensors" not in f]
    assert resolve_model("owner/name") == found and held(found.path) == sorted(REPO[:10]), "the same folder, now with weights"
    cloud.files = ["config.json", "a.bin"]
    assert resolve_model("owner/other", weights=False).name == "owner/other"


def test_plan_and_check_download_no_weights(tiny, tmp_path, monkeypatch):
    """Of a hub id; what train would load is asked for by train alone."""
    asked = []

    def snapshot_download(**what):
        asked.append(what)
        folder = tmp_path / "snapshots" / SHA
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects([p.name for p in tiny.model.iterdir()], allow_patterns=what["allow_patterns"]):
            (folder / name).write_bytes((tiny.model / name).read_bytes())
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config = tiny.config(tmp_path / "run", model="owner/name")
    assert tunesmith.plan(config).fits and "row lengths are not known yet" in tunesmith.plan(config).notes[0]
    assert tunesmith.check(config).exit_code == 0
    assert not [p for a in asked for p in a["allow_patterns"] if "safetensors" in p]
    assert not list((tmp_path / "snapshots" / SHA).glob("*.safetensors"))
    assert "row lengths" not in "".join(tunesmith.plan(config).notes), "plan finds what check has read, in the same folder"
    tunesmith.train({**config, "train": {"max_steps": 1}, "eval": {"samples": 0}}, console=Console(file=io.StringIO()))
    assert "model*.safetensors" in asked[-1]["allow_patterns"]


def test_a_folder_wins_and_needs_a_config(tmp_path, cloud, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model("owner/name")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        resolve_model("owner/name")
    (folder / "config.json").write_text("{}")
    assert resolve_model("owner/name") == hub.ResolvedModel(Path("owner/name"), "owner/name", None)
    assert resolve_model(folder).path == folder and not cloud.asked


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "~/nowhere", "name", "a/b/c", "owner/na me", "owner/name@", "../x", "runs/first"]
)
def test_what_is_neither_a_folder_nor_a_hub_name_is_said(cloud, name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # `../x` must not depend on what lies beside the checkout
    with pytest.raises(ModelError, match="no such folder"):
        resolve_model(name)
    assert not cloud.asked


def test_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path)
    with pytest.raises(ModelError, match="no embedded model"):
        resolve_model("embedded")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("embedded").path == tmp_path


@pytest.mark.parametrize(("files", "said"), [(["config.json", "a.bin"], "pickled"), (["adapter_config.json"], r"no config\.json")])
def test_a_repository_without_safetensors_or_config_is_refused(cloud, files, said):
    cloud.files = files
    with pytest.raises(ModelError, match=said):
        resolve_model("owner/name")


RESPONSE = httpx2.Response(403, request=httpx2.Request("GET", "https://hub.invalid"))
FAULTS = [
    (errors.GatedRepoError("gated", response=RESPONSE), "gated", "terms"),
    (errors.RepositoryNotFoundError("none", response=RESPONSE), "no such", "spelling"),
    (errors.RevisionNotFoundError("none", response=RESPONSE), "no such revision", "after the @"),
    (errors.LocalEntryNotFoundError("offline"), "cannot be reached", "HF_HUB_OFFLINE"),
    (errors.OfflineModeIsEnabled("offline"), "cannot be reached", "HF_HUB_OFFLINE"),
    (errors.HfHubHTTPError("500 oh\nno", response=RESPONSE), "500 oh", "later"),
    (httpx2.ConnectError("refused"), "cannot be reached", "connection"),
    (httpx2.ReadTimeout("slow"), "cannot be reached", "connection"),
]


@pytest.mark.parametrize(("fault", "said", "fix"), FAULTS, ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "")
@pytest.mark.parametrize(("resolve", "kind"), [(resolve_model, ModelError), (resolve_dataset, DataError)])
def test_every_error_of_the_hub_has_a_fix(cloud, resolve, kind, fault, said, fix):
    cloud.error = fault
    with pytest.raises(kind) as e:
        resolve("owner/name")
    assert said in e.value.what and "owner/name" in e.value.what and fix in e.value.fix
    if kind is ModelError and said in ("no such", "cannot be reached"):
        assert e.value.what.startswith("owner/name: no such folder, and the hub"), "a folder may have been meant"


ROWS = ["README.md", "main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet",
        "socratic/train-00000-of-00001.parquet", "load.py", "dataset_infos.json", ".gitattributes"]  # fmt: skip


def test_a_dataset_gives_one_split_in_a_folder_of_its_own(cloud):
    cloud.files = ROWS
    assert held(resolve_dataset("hub:owner/name")) == [ROWS[1], ROWS[3]]  # train, without being asked
    assert held(resolve_dataset("hub:owner/name/main/train")) == [ROWS[1]]
    assert held(resolve_dataset("owner/name@main/test")) == [ROWS[2]]  # what was taken before is not in this folder
    with pytest.raises(DataError, match="validation") as e:
        resolve_dataset("owner/name/validation")
    assert "socratic" in e.value.fix and "test" in e.value.fix
    assert all(a.get("revision") in ("main", SHA) for a in cloud.asked)


def test_names_are_taken_literally_and_text_beside_rows_is_left(cloud):
    cloud.files = ["data[1].jsonl.gz", "data1.jsonl.gz", "notes.txt"]
    assert held(resolve_dataset("owner/name")) == ["data1.jsonl.gz", "data[1].jsonl.gz"]
    assert "data[[]1].jsonl.gz" in cloud.asked[-1]["allow_patterns"]
    cloud.files = ["a.txt", "LICENSE.txt"]
    assert held(resolve_dataset("owner/other")) == ["a.txt"]


def test_a_dataset_made_by_a_script_is_refused(cloud):
    cloud.files = ["README.md", "build.py"]
    with pytest.raises(DataError, match="never run"):
        resolve_dataset("owner/name")


def test_a_dataset_taken_once_is_found_without_a_network(cloud):
    cloud.files = ROWS
    first = resolve_dataset("owner/name/test")
    cloud.error = httpx2.ConnectError("no network")
    assert resolve_dataset("owner/name/test") == first == resolve_dataset(f"owner/name@{SHA}/test")
    with pytest.raises(DataError, match="cannot be reached"):
        resolve_dataset("owner/name/train")


@pytest.mark.parametrize("name", ["hub:name", "hub:", "hub:owner/name@a@b", "hub:owner/ name"])
def test_a_malformed_dataset_name_is_said(cloud, name):
    with pytest.raises(DataError, match="hub:owner/name/split"):
        resolve_dataset(name)
