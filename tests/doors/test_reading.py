"""What a user types: texts, prompts and settings are read as they are meant, or refused in a sentence."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch

from decodelab.core.contract import decoders
from decodelab.core.fields import type_words
from decodelab.prompting import encode_prompts, in_batches, left_padded
from decodelab.reading import (
    check_decoder,
    decode_text,
    decoder_files,
    decoder_kinds,
    function_kinds,
    kinds_of,
    read_prompts,
    read_text,
    read_value,
    recipe_kinds,
    typed_settings,
)
from decodelab.sampling.base import Autoregressive
from decodelab.training.recipes import recipes

# settings


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        *((bool, text, True) for text in ("true", "True", "yes", "on", "1")),
        *((bool, text, False) for text in ("false", "FALSE", "no", "off", "0")),
        (int, " 4 ", 4),
        (int, "-3", -3),
        (float, "2", 2.0),
        (float, "1e-3", 1e-3),
        (float, "inf", float("inf")),
        (str, "none", "none"),
        (str, "'x=y'", "x=y"),
        (str, "3", "3"),
        (str, "it's", "it's"),
        (int | None, "None", None),
        (int | None, "7", 7),
        (str | None, "none", None),
        (bool | None, "false", False),
        (Literal["hot", "cold"], "cold", "cold"),
        (Literal[1, 2], "2", 2),
        (Sequence[int], "[2, 1]", [2, 1]),
        (Sequence[int], "2, 1", (2, 1)),
        (Sequence[int], "()", ()),
        (Sequence[float], "[0.5, 1]", [0.5, 1.0]),
        (Sequence[str], "['a', 'b']", ["a", "b"]),
        (str | Sequence[str], "2.2.2", "2.2.2"),
        (Mapping[int, float], "{1: 0, 2: 0.5}", {1: 0.0, 2: 0.5}),
        (str | Sequence[float] | Mapping[int, float], "[0, 1]", [0.0, 1.0]),
        (str | Sequence[float] | Mapping[int, float], "table", "table"),
    ],
)
def test_values_are_read_by_their_type(kind, text, value):
    found = read_value(text, kind)
    assert (found, type(found)) == (value, type(value))
    if isinstance(value, (list, tuple)):
        assert list(map(type, found)) == list(map(type, value))


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (bool, "maybe", "true or false"),
        (bool, "2", "true or false"),
        (bool, "", "true or false"),
        (int, "2.5", "a whole number"),
        (int, "2.0", "a whole number"),
        (int, "true", "a whole number"),
        (int, "inf", "a whole number"),
        (float, "many", "a number"),
        (float, "nan", "a number"),
        (float | None, "[1]", "a number or none"),
        (Literal["hot", "cold"], "warm", "one of 'hot', 'cold'"),
        (Sequence[int], "2", "a list such as [2, 1]"),
        (Sequence[int], "[2.5]", "a list such as [2, 1]"),
        (Sequence[float], "{1: 2}", "a list such as [0.5, 1]"),
        (Sequence[int], "(" * 5000, "a list such as [2, 1]"),
        (Mapping[int, float], "[1]", "a table such as {1: 0.5}"),
        (Any, "gpt2", "an object, which no text can name"),
        (torch.Tensor | None, "3", "an object, which no text can name or none"),
    ],
)
def test_what_does_not_fit_is_one_line(kind, text, words):
    with pytest.raises(ValueError, match="does not fit") as caught:
        typed_settings({"x": kind}, [f"x={text}"])
    assert str(caught.value) == f"x={text.strip()} does not fit: x is {words}"
    assert type_words(kind) == words


@dataclass
class Recipe:
    steps: int = 10
    causal: bool = True
    name: str = field(default="x", init=False)


def train(n: int = 1, *, where: str = "here", free=None, **more):
    pass


def test_settings_of_classes_objects_and_functions():
    for of in (Recipe, Recipe()):
        assert typed_settings(of, ["steps=3", "causal=false"]) == {"steps": 3, "causal": False}
        with pytest.raises(ValueError, match="Recipe has no setting 'name'; it has: steps, causal$"):
            typed_settings(of, ["name=y"])
    assert typed_settings(train, ["n=3", "where=3", "free=3"]) == {"n": 3, "where": "3", "free": 3}
    assert typed_settings(train, ["free=cold"]) == {"free": "cold"}
    assert typed_settings(train, None) == {}
    with pytest.raises(ValueError, match="this has no setting 'more'; it has: n, where, free$"):
        typed_settings(train, ["more=1"], "this")
    for bad in ("k", "=4", "1k=4", ""):
        with pytest.raises(ValueError, match="is no setting: write name=value, such as k=4"):
            typed_settings(train, [bad])


def test_decoders_read_from_their_source_are_those_of_the_registry():
    assert list(decoder_files()) == list(decoders())
    for name, method in decoders().items():
        assert check_decoder(name) == method.family
        read, known = decoder_kinds(name), kinds_of(method.decoder)
        assert {k: type_words(v) for k, v in read.items()} == {k: type_words(v) for k, v in known.items()}, name


def test_every_default_can_be_typed():
    "What a decoder prints as its settings can be given back, wherever a text can name it."
    for name, method in decoders().items():
        kinds = decoder_kinds(name)
        for f in method.decoder.__dataclass_fields__.values():
            if f.name in kinds and isinstance(f.default, (bool, int, float, str, tuple)):
                typed = repr(f.default) if str(f.default) != str(f.default).strip() else f.default  # space around a value needs quotes
                assert typed_settings(kinds, [f"{f.name}={typed}"]) == {f.name: f.default}, (name, f.name)


def test_functions_are_read_from_their_source(tmp_path):
    module = tmp_path / "m.py"
    module.write_text("import torch\ndef experiment(n: int = 1, x: torch.Tensor = None, *, free=2):\n    pass\n")
    assert {k: type_words(v) for k, v in function_kinds(module, "experiment").items()} == {
        "n": "a whole number",
        "x": "an object, which no text can name",
        "free": "an object, which no text can name",
    }
    assert typed_settings(function_kinds(module, "experiment"), ["free=[1]"]) == {"free": [1]}
    assert function_kinds(module, "other") is None


def test_reading_imports_nothing_heavy():
    code = "import sys; from decodelab.reading import decoder_files, decoder_kinds\nfor n in decoder_files(): decoder_kinds(n)\n"
    code += "sys.exit(bool({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# texts and prompts


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_named(encoding):
    with pytest.raises(ValueError, match=r"^a\.txt is no UTF-8 text \(.*\): save it as UTF-8$"):
        decode_text("Es war einmal ein König".encode(encoding), "a.txt")


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffKönig".encode())
    assert read_text(tmp_path / "a.txt") == "König"
    with pytest.raises(ValueError, match="is a folder: name a file"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read .*b\.txt: no such file or directory"):
        read_text(tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"cannot read .*x: not a directory"):
        read_text(tmp_path / "a.txt" / "x")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"a\.txt holds no prompt: it is empty"),
        ("a.txt", " \n\n", r"a\.txt holds no prompt: it is empty"),
        ("a.jsonl", "\n", r"a\.jsonl holds no prompt: it is empty"),
        ("a.json", "", r"a\.json holds no prompt: it is empty"),
        ("a.json", "[]", r"a\.json holds no prompt: it is empty"),
        ("a.csv", "x", r"its name must end in \.txt \(one a line\), \.jsonl or \.json"),
        ("a", "x", "its name must end in"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', r"a\.jsonl, line 2 is no JSON: "),
        ("a.jsonl", '{"prompt": "a"}\n\n{"text": "b"}', r'a\.jsonl, line 3 holds no prompt: write a text, or an object with "prompt"'),
        ("a.jsonl", '{"prompt": 3}', r"a\.jsonl, line 1 holds no prompt"),
        ("a.jsonl", '{"prompt": " "}', r"a\.jsonl, line 1 holds no prompt"),
        ("a.jsonl", '{"turns": []}', r"a\.jsonl, line 1 holds no prompt"),
        ("a.json", '{"prompt": "a"}', r"a\.json holds no list"),
        ("a.json", '["a", null]', r"a\.json, entry 2 holds no prompt"),
        ("a.json", "[" * 100_000, r"a\.json is no JSON"),
    ],
)
def test_files_of_prompts_that_cannot_be_used(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_long_file_of_prompts(tmp_path):
    texts = [f"Prompt {i}\u2028of many" for i in range(100_000)]  # a separator of lines to Python, though not in a file
    (tmp_path / "a.txt").write_text("\r\n".join(texts), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(t, ensure_ascii=False) for t in texts), encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == texts
    assert read_prompts(tmp_path / "a.jsonl") == texts


# prompts for a model


def test_prompts_are_encoded_and_checked(llama, tokenizer):
    ids = encode_prompts(llama, tokenizer, ["ab", "abc"], 8)
    assert [x.tolist() for x in ids] == [[tokenizer("ab").input_ids], [tokenizer("abc").input_ids]]
    with pytest.raises(ValueError, match="prompt 2 of 2 is empty: the tokenizer makes no token of ''"):
        encode_prompts(llama, tokenizer, ["ab", ""], 8)
    with pytest.raises(ValueError, match="the prompt has 3 tokens; with 254 new ones .* context of 256: ask for at most 253 new tokens"):
        encode_prompts(llama, tokenizer, ["abc"], 254)
    with pytest.raises(ValueError, match="prompt 2 of 2 has 300 tokens; .* exceed the model's context of 256: shorten it"):
        encode_prompts(llama, tokenizer, ["ab", "a" * 300], 8)


def test_left_padding():
    batch = left_padded([torch.tensor([[5, 6, 7]]), torch.tensor([[8]])], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_come_in_order(size, llama, tokenizer):
    ids = encode_prompts(llama, tokenizer, ["abc", "a", "longer than the others", "xy", "z"], 6)
    call = {"max_new_tokens": 6, "do_sample": False}
    outputs = list(in_batches(Autoregressive(), llama, tokenizer, ids, size, **call))
    assert [len(out.sequences) for out in outputs] == [min(size, 5 - i) for i in range(0, 5, size)]
    expected = [llama.generate(x, **call)[0, x.shape[1] :].tolist() for x in ids]
    assert [row.tolist() for out in outputs for row in out.continuations] == expected


def test_half_of_a_surrogate_pair_is_no_prompt(tmp_path):
    (tmp_path / "p.json").write_text('["a", "b\\ud800c"]')
    with pytest.raises(ValueError, match=r"entry 2 is no text: it holds half of a surrogate pair \(U\+D800\)"):
        read_prompts(tmp_path / "p.json")


def test_settings_of_recipes_are_known_without_importing_them():
    for name, found in recipes().items():
        assert recipe_kinds(name) == kinds_of(found.settings), name
    with pytest.raises(ValueError, match="unknown recipe 'dop': did you mean 'dpo'"):
        recipe_kinds("dop")
