"""The lab: profiles, counts, models loaded once, and every error with its message."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from decodelab.lab import lab as module
from decodelab.lab.lab import Lab, chosen_profile, current_lab, read_settings, resolve_device, set_threads

SETTINGS = """
[DEFAULT]
seed = 7
device = cpu
dtype = float32
target = tales
draft = tales-draft
featuriser = tales
tasks = tasks
diffusion = tales-mdm
diffusion_tasks = tasks-mdm
vision = shapes-vlm
max_new_tokens = 16
revision = main
[tiny]
[gpu]
dtype = bfloat16
target = owner/big
[paper]
[mine]
max_new_tokens = 5
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("DECODELAB_PROFILE", raising=False)
    monkeypatch.delenv("DECODELAB_THREADS", raising=False)
    monkeypatch.setattr(Lab, "_latest", None)


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "settings.ini"
    path.write_text(SETTINGS)
    return path


@pytest.fixture
def loads(monkeypatch):
    calls = []

    def load(name, **kwargs):
        calls.append((name, kwargs))
        return object(), object()

    monkeypatch.setattr(module, "load", load)
    return calls


def test_default_profile_and_its_inheritance(settings):
    lab = Lab("a/b", settings=settings)
    assert (lab.profile, lab.seed, lab.device, lab.dtype, lab.max_new_tokens) == ("tiny", 7, "cpu", torch.float32, 16)
    texts = {"target": "tales", "draft": "tales-draft", "featuriser": "tales", "diffusion": "tales-mdm"}
    assert lab.names == texts | {"tasks": "tasks", "diffusion_tasks": "tasks-mdm", "vision": "shapes-vlm"}
    assert repr(lab).startswith("Lab('a/b', profile tiny, cpu, float32, seed 7; target tales")


def test_profile_from_the_environment(settings, monkeypatch):
    monkeypatch.setenv("DECODELAB_PROFILE", "gpu")
    assert Lab(settings=settings).dtype == torch.bfloat16
    assert Lab(settings=settings, profile="mine").max_new_tokens == 5


def test_unknown_profile(settings, monkeypatch):
    with pytest.raises(ValueError, match="unknown profile 'huge': set DECODELAB_PROFILE to one of tiny, gpu, paper, mine"):
        Lab(profile="huge", settings=settings)
    monkeypatch.setenv("DECODELAB_PROFILE", "DEFAULT")
    with pytest.raises(ValueError, match="unknown profile 'DEFAULT'"):
        chosen_profile(read_settings(settings))


def test_shipped_settings_hold_every_profile(monkeypatch, tmp_path):
    assert read_settings().sections() == ["tiny", "small", "gpu", "paper"]
    for profile in read_settings().sections():
        names = Lab(profile=profile).names
        assert names["target"]
        # questions with a right answer are for models that were taught them, whatever the profile
        assert (names["tasks"], names["diffusion_tasks"]) == ("tasks", "tasks-mdm")
    (tmp_path / "settings.ini").write_text("[installed]\n")
    monkeypatch.setattr(module, "checkout_root", lambda: None)
    monkeypatch.setattr(module.resources, "files", lambda _: tmp_path)
    assert read_settings().sections() == ["installed"]


def test_missing_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no settings file at .*: reinstall decodelab, or name an existing file"):
        read_settings(tmp_path / "none.ini")


def test_missing_or_wrong_setting(settings):
    settings.write_text(SETTINGS.replace("seed = 7", "seed = seven"))
    with pytest.raises(ValueError, match=r"seed = 'seven' of profile 'tiny' is no whole number: correct it in settings\.ini"):
        Lab(settings=settings)
    settings.write_text(SETTINGS.replace("draft = tales-draft", ""))
    with pytest.raises(ValueError, match=r"settings\.ini gives no 'draft' for profile 'tiny': add it to \[tiny\] or \[DEFAULT\]"):
        Lab(settings=settings)
    settings.write_text(SETTINGS.replace("float32", "float31"))
    with pytest.raises(ValueError, match="unknown dtype 'float31'"):
        _ = Lab(settings=settings).dtype


def test_a_profile_may_lack_a_model():
    lab = Lab(profile="small")
    assert not lab.has("draft")
    assert lab.has("target")
    with pytest.raises(ValueError, match=r"profile 'small' has no draft model: name one in settings\.ini, or use another profile"):
        lab.draft()
    assert lab.n(tiny=3, gpu=9) == 3
    assert lab.n(tiny=3, small=5) == 5


def test_models_are_loaded_once(settings, loads):
    lab = Lab(settings=settings)
    assert lab.target() is lab.target()
    assert lab.load("featuriser") is lab.target()
    assert lab.draft() is not lab.target()
    options = {"device": "cpu", "dtype": torch.float32, "revision": "main", "cls": None}
    assert loads == [("tales", options), ("tales-draft", options)]
    Lab(settings=settings).target()
    assert len(loads) == 3


def test_every_role_loads_its_model(settings, loads):
    lab = Lab(settings=settings)
    assert lab.diffusion() is lab.load("diffusion")
    for role in ("diffusion_tasks", "tasks"):
        lab.load(role)
    assert [name for name, _ in loads] == ["tales-mdm", "tasks-mdm", "tasks"]


def test_unknown_role(settings):
    with pytest.raises(ValueError, match="unknown role 'judge': use one of target, draft, featuriser, tasks, diffusion, diffusion_tasks"):
        Lab(settings=settings).load("judge")


@pytest.mark.parametrize(("profile", "count"), [("tiny", 32), ("gpu", 500), ("paper", 500)])
def test_counts(settings, profile, count):
    assert Lab(profile=profile, settings=settings).n(tiny=32, gpu=500) == count
    assert Lab(profile="paper", settings=settings).n(tiny=32, gpu=500, paper=9) == 9
    assert Lab(profile="tiny", settings=settings).n(tiny=0) == 0


def test_missing_count(settings):
    for profile in ("gpu", "paper", "mine"):
        with pytest.raises(ValueError, match=rf"no count for profile '{profile}': pass lab\.n\({profile}=\.\.\.\)"):
            Lab(profile=profile, settings=settings).n(tiny=3)


def test_seed_everything(settings):
    lab = Lab(settings=settings)

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    assert lab.seed_everything() == 7
    first = draw()
    assert lab.seed_everything(8) == 8
    other = draw()
    lab.seed_everything()
    assert draw() == first
    assert all(a != b for a, b in zip(first, other))


def test_current_lab(settings):
    lab = Lab("a", settings=settings)
    assert current_lab() is lab
    Lab._latest = None
    fresh = current_lab()
    assert fresh.notebook == ""
    assert Lab.current() is fresh


def test_claims_go_to_the_results(settings):
    lab = Lab("family/paper", settings=settings)
    lab.claim("it works", holds=True, value=1)
    assert (lab.results.notebook, lab.results.profile, lab.results.seed) == ("family/paper", "tiny", 7)
    assert [c.text for c in lab.results.claims] == ["it works"]


def test_device():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_threads(settings, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    Lab(settings=settings)
    assert asked == []
    monkeypatch.setenv("DECODELAB_THREADS", "2")
    Lab(settings=settings)
    assert asked == [2]
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("DECODELAB_THREADS", wrong)
        with pytest.raises(ValueError, match=f"DECODELAB_THREADS='{wrong}' is no number of threads"):
            set_threads()


def test_a_lab_does_not_import_torch_before_it_must(settings):
    code = f"import sys; from decodelab.lab.lab import Lab; Lab(settings={str(settings)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
