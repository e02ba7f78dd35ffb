"""Claims and results: verdicts, files, provenance, and every error with its message."""

import json
import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from decodelab.lab import claims as claims_module
from decodelab.lab import provenance as provenance_module
from decodelab.lab.claims import Claim, Claims, load_result, results_folder, store_result
from decodelab.lab.provenance import prompt_fingerprint, provenance, to_plain, tree_state, write_json


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("DECODELAB_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv("DECODELAB_PROFILE", raising=False)
    return tmp_path / "results"


def git(root, *arguments):
    who = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


def notebook(code, output=""):
    return json.dumps({"cells": [{"cell_type": "code", "source": [code], "outputs": [output]}, {"cell_type": "markdown", "source": ["x"]}]})


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "nbs").mkdir(parents=True)
    (root / "code.py").write_text("x = 1\n")
    (root / "nbs" / "a.ipynb").write_text(notebook("x = 1"))
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    for module in (claims_module, provenance_module):
        monkeypatch.setattr(module, "checkout_root", lambda: root)
    return root


# verdicts


def test_a_claim_that_held():
    claims = Claims("a/b")
    claim = claims.claim("it works", holds=np.bool_(True), value=torch.tensor(0.5), expected=np.int64(1), why="not needed")
    assert (claim.verdict, claim.value, claim.expected, claim.mark, claim.why) == ("held", 0.5, 1, "✔ held", "")
    assert claims.claim("it works", holds=torch.tensor(True)).verdict == "held"


@pytest.mark.parametrize("verdict", ["refuted", "inconclusive", "not testable"])
def test_a_reason_is_needed(verdict):
    with pytest.raises(ValueError, match=f"claim 'it works' is {verdict}: say why in one sentence"):
        Claim("it works", verdict, why=" " if verdict == "not testable" else "because")
    assert Claim("it works", verdict, why="Measured: because").verdict == verdict


@pytest.mark.parametrize(("text", "verdict", "kind"), [(" ", "held", "paper"), ("it works", "maybe", "paper"), ("it works", "held", "x")])
def test_text_verdict_and_kind_are_needed(text, verdict, kind):
    with pytest.raises(ValueError, match="a claim needs a text" if not text.strip() else "verdict must be one of held, refuted, "):
        Claim(text, verdict, kind)


@pytest.mark.parametrize(
    ("interval", "bounds", "verdict"),
    [
        ((1.1, 1.4), {"above": 1.0}, "held"),
        ((0.9, 1.4), {"above": 1.0}, "inconclusive"),
        ((1.0, 1.4), {"above": 1.0}, "inconclusive"),  # touching is not clearing
        ((0.5, 0.9), {"above": 1.0}, "refuted"),
        ((0.5, 0.9), {"below": 1.0}, "held"),
        ((1.1, 1.4), {"below": 1.0}, "refuted"),
        ((-0.1, 0.1), {"above": -0.2, "below": 0.2}, "held"),
        ((-0.3, 0.1), {"above": -0.2, "below": 0.2}, "inconclusive"),
        ((-0.5, -0.3), {"above": -0.2, "below": 0.2}, "refuted"),
        ((0.3, 0.5), {"above": -0.2, "below": 0.2}, "refuted"),
    ],
)
def test_the_interval_decides(interval, bounds, verdict):
    claim = Claims("a/b").claim("it works", value=sum(interval) / 2, interval=interval, why="Measured: so", **bounds)
    assert (claim.verdict, claim.interval) == (verdict, interval)


def test_what_is_no_interval():
    for bad in ((2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="is no interval"):
            Claims("a/b").claim("it works", interval=bad, above=0)
    with pytest.raises(ValueError, match="give above=..., below=..., or both"):
        Claims("a/b").claim("it works", interval=(0, 1))


def test_running_a_cell_again_replaces_its_claim():
    claims = Claims("a/b")
    claims.claim("one", holds=True)
    claims.claim("two", why="too small")
    claims.claim("one", holds=False, why="Measured: slow")
    claims.check("three", holds=True)
    assert [(c.text, c.verdict, c.kind) for c in claims.claims] == [
        ("one", "refuted", "paper"), ("two", "not testable", "paper"), ("three", "held", "check")
    ]  # fmt: skip
    assert claims.counts() == {
        "held": 0, "refuted": 1, "inconclusive": 0, "not testable": 1, "checks held": 1, "checks failed": 0, "checks undecided": 0
    }  # fmt: skip


def test_tables_are_escaped():
    claims = Claims("a/b")
    claims.claim("p(x|y) <script>", holds=False, value={"a": 1.23456, "b": [1, 2]}, expected=2.0, paper="Table 2", why="Measured: x\ny")
    claims.check("c", holds=True)
    markdown, page = claims._repr_markdown_(), claims._repr_html_()
    assert "| ✘ refuted | p(x\\|y) <script> | a 1.23, b 1, 2 | 2 | Table 2 | Measured: x y |" in markdown
    assert "**Our checks**\n\n| verdict | check |\n" in markdown  # columns in which nothing stands are left out
    assert "<script>" not in page
    assert page.count("<table") == 2
    assert "<script>" not in claims.claims[0]._repr_html_()
    assert claims.claims[0]._repr_html_().endswith("measured a 1.23, b 1, 2; Measured: x\ny")


# files


def test_saving_twice_changes_only_the_provenance(results):
    claims = Claims("family/paper", "tiny", seed=3)
    claims.claim("it works", holds=True, value=float("nan"))
    path = claims.save(prompts=["a"], command="decodelab x")
    assert path == results / "tiny" / "family" / "paper.json"
    first, second = json.loads(path.read_text()), json.loads(claims.save().read_text())
    assert first.pop("provenance")["prompts"]["count"] == 1
    assert second.pop("provenance")["seed"] == 3
    assert first == second
    assert first["claims"][0]["value"] is None  # JSON has no NaN
    assert os.listdir(path.parent) == ["paper.json"]


def test_off_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DECODELAB_RESULTS", "off")
    assert results_folder() is None
    assert Claims("a/b").save() is None
    assert store_result("a/b", 1) is None
    assert capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError, match="no stored result"):
        load_result("a/b")


def test_without_a_checkout_there_is_a_notice(monkeypatch, capsys):
    monkeypatch.delenv("DECODELAB_RESULTS")
    monkeypatch.setattr(claims_module, "checkout_root", lambda: None)
    assert Claims("a/b").save() is None
    assert "a/b: not written, as there is no checkout here (set DECODELAB_RESULTS to a folder" in capsys.readouterr().out


def test_the_checkout_is_the_default(monkeypatch, checkout):
    monkeypatch.delenv("DECODELAB_RESULTS")
    assert results_folder() == checkout / "data" / "results"


@pytest.mark.parametrize("name", ["", "../x", "/x", "a//b", "a b", "a/"])
def test_names(name):
    with pytest.raises(ValueError, match="cannot name a result: use the notebook's name"):
        Claims(name).save()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_json(tmp_path / "x.json", {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(provenance_module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_plain_values():
    @dataclass
    class Point:
        x: float

    given = {1: Point(0.5), "p": Path("a") / "b", "s": {3, 1}, "t": (torch.ones(2), np.float64("-inf")), "n": None, "b": True}
    assert to_plain(given) == {"1": {"x": 0.5}, "p": "a/b", "s": [1, 3], "t": [[1.0, 1.0], "-inf"], "n": None, "b": True}
    with pytest.raises(ValueError, match="a value of type object cannot be stored: pass numbers"):
        to_plain([object()])


# provenance


def test_provenance_is_complete(checkout):
    made = provenance(seed=1, prompts=[[1, 2], torch.tensor([3])], profile="tiny", command="x")
    assert set(made) == {"seed", "profile", "command", "commit", "dirty", "versions", "machine", "date", "prompts"}
    assert set(made["versions"]) == {"python", "torch", "transformers", "decodelab"}
    assert set(made["machine"]) == {"cpu", "cores", "threads", "gpu"}
    assert made["machine"]["threads"] == torch.get_num_threads()
    assert len(made["commit"]) == 40
    assert made["dirty"] is False
    assert "prompts" not in provenance()


def test_an_uninstalled_package_has_no_version(monkeypatch):
    def missing(_):
        raise provenance_module.PackageNotFoundError

    monkeypatch.setattr(provenance_module, "version", missing)
    assert provenance()["versions"]["torch"] is None


def test_the_command_shows_no_machine_paths(monkeypatch, checkout):
    monkeypatch.setattr(
        provenance_module.sys, "argv", ["/usr/bin/decodelab", "bench", str(checkout / "nbs" / "a.ipynb"), "/etc/secret/x.txt"]
    )
    assert provenance()["command"] == "decodelab bench nbs/a.ipynb x.txt"


def test_fingerprint():
    assert prompt_fingerprint(["a", "b"]) == prompt_fingerprint(iter(["a", "b"]))
    assert prompt_fingerprint(["a", "b"]) != prompt_fingerprint(["b", "a"])
    assert prompt_fingerprint([torch.tensor([1, 2])]) == prompt_fingerprint([[1, 2]])


def test_what_makes_a_tree_dirty(checkout):
    def dirty():
        return tree_state(checkout)[1]

    (checkout / "data" / "results").mkdir(parents=True)
    (checkout / "data" / "results" / "new.json").write_text("{}")
    (checkout / "nbs" / "a.ipynb").write_text(notebook("x = 1", "another output"))
    assert dirty() is False
    (checkout / "nbs" / "a.ipynb").write_text(notebook("x = 2"))
    assert dirty() is True
    (checkout / "nbs" / "a.ipynb").unlink()
    assert dirty() is True
    git(checkout, "checkout", "-q", ".")
    (checkout / "nbs" / "new.ipynb").write_text(notebook("x = 1"))
    assert dirty() is True
    (checkout / "nbs" / "new.ipynb").unlink()
    assert dirty() is False
    (checkout / "code.py").write_text("x = 2\n")
    assert dirty() is True


def test_no_history(tmp_path):
    assert tree_state(None) == (None, None)
    assert tree_state(tmp_path) == (None, None)
    assert tree_state(tmp_path / "missing") == (None, None)


# stored results


def test_store_and_load(checkout, monkeypatch):
    path = store_result("a/b-full", {"x": [1.5]}, seed=0, prompts=["p"])
    stored = load_result("a/b-full")
    assert path.parts[-3:] == ("tiny", "a", "b-full.json")
    assert (stored["name"], stored["data"]) == ("a/b-full", {"x": [1.5]})
    assert stored["provenance"]["dirty"] is False
    assert stored["provenance"]["allow_dirty"] is False
    monkeypatch.setenv("DECODELAB_PROFILE", "gpu")
    with pytest.raises(FileNotFoundError, match="no stored result 'a/b-full' for profile 'gpu': make it with `decodelab experiment b`"):
        load_result("a/b-full")
    assert load_result("a/b-full", profile="tiny") == stored


def test_stored_results_are_read_where_nothing_is_written(checkout, monkeypatch):
    (checkout / "data" / "results" / "tiny").mkdir(parents=True)
    (checkout / "data" / "results" / "tiny" / "x.json").write_text('{"data": 1}')
    assert load_result("x") == {"data": 1}
    monkeypatch.setenv("DECODELAB_RESULTS", "off")
    assert load_result("x") == {"data": 1}
    with pytest.raises(ValueError, match="cannot name a result"):
        load_result("../x")


def test_a_dirty_tree_is_refused(checkout, results):
    (checkout / "code.py").write_text("x = 2\n")
    with pytest.raises(ValueError, match=r"a/b: the tree has uncommitted changes, .*commit first, or pass allow_dirty=True"):
        store_result("a/b", 1)
    assert not results.exists()
    store_result("a/b", 1, allow_dirty=True)
    assert load_result("a/b")["provenance"]["dirty"] is True
    assert load_result("a/b")["provenance"]["allow_dirty"] is True


def test_a_tree_without_a_commit_is_refused(checkout):
    shutil.rmtree(checkout / ".git")
    with pytest.raises(ValueError, match="the tree has no commit"):
        store_result("a/b", 1)


def test_lists_of_numbers_stand_on_one_line(tmp_path):
    content = {"rows": [[1, 2.5, None], []], "text": ["a [1,\n 2] b", "[ 3 ]"], "[\n4 ]": {"deep": [1, [2, 3]]}}
    text = write_json(tmp_path / "a.json", content).read_text()
    assert json.loads(text) == content
    assert "[1, 2.5, null]" in text
    assert "[2, 3]" in text


def test_checks_with_an_interval_are_decided_by_the_rule_of_claims():
    claims = Claims("sampling/example")
    for interval, verdict in (((0.1, 0.4), "held"), ((-0.1, 0.4), "inconclusive"), ((-0.4, -0.1), "refuted")):
        check = claims.check(f"gain {interval}", value=0.0, interval=interval, above=0, why="Measured: as shown")
        assert (check.kind, check.verdict, check.expected, check.why != "") == ("check", verdict, "> 0", verdict != "held")
    assert [claims.counts()[f"checks {name}"] for name in ("held", "failed", "undecided")] == [1, 1, 1]
    assert "? inconclusive" in claims._repr_markdown_()
    for wrong in ({}, {"holds": True, "interval": (0.0, 1.0), "above": 0}):
        with pytest.raises(ValueError, match=r"either holds=\.\.\. or interval"):
            claims.check("both or none", **wrong)
    with pytest.raises(ValueError, match="say why"):
        claims.check("no reason", interval=(-1, 1), above=0)
