"""Local data folders that are empty, damaged or not UTF-8: one line that names the file."""

import json

import pytest

from decodelab.lab.data import load_data

MANIFEST = [{"gutenberg_id": 1, "title": "A", "file": "tales/a.txt"}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DECODELAB_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales/manifest.json").write_text(json.dumps(MANIFEST), encoding="utf-8")
    (tmp_path / "tales/a.txt").write_text("Once upon a time", encoding="utf-8")
    return tmp_path


def test_a_whole_folder(folder):
    assert load_data("tales")[0] == {"id": 1, "title": "A", "split": "train", "text": "Once upon a time"}


def test_an_empty_folder(folder):
    (folder / "tales/manifest.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"data set 'tales' not found: put tales/manifest.json below a folder named by DECODELAB_DATA"
    ):
        load_data("tales")


DAMAGE = {
    "a.txt is no UTF-8 text": ("a.txt", b"Andr\xe9"),
    "manifest.json is no UTF-8 text": ("manifest.json", b"\xff\xfe"),
    "Expecting value": ("manifest.json", b""),
    "no 'file'": ("manifest.json", b'[{"gutenberg_id": 1}]'),
    "string indices": ("manifest.json", b'{"file": "a"}'),
    "No such file": ("manifest.json", b'[{"gutenberg_id": 1, "title": "A", "file": "tales/b.txt"}]'),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_damaged_files(said, folder):
    name, content = DAMAGE[said]
    (folder / "tales" / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"data set 'tales' in .* cannot be read \(.*{said}.*\): put its files there again, in UTF-8"):
        load_data("tales")
