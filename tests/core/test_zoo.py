"""The zoo: listing without torch, loading by name, path or hub id, and every error with its message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decodelab.core import zoo


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "mini"
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    config = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def own_zoo(folder, monkeypatch):
    monkeypatch.setattr(zoo, "zoo_folders", lambda: [folder.parent])
    return folder


def test_names_resolve_to_the_zoo(own_zoo):
    assert zoo.zoo_path("mini") == own_zoo
    model, tokenizer = zoo.load("mini")
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.eos_token_id == 1


def test_progress_bars_come_back(own_zoo):
    from transformers.utils import logging

    logging.enable_progress_bar()  # another test may have turned them off
    zoo.load("mini")
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    zoo.load("mini")
    assert not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()


def test_the_checkout_wins_over_the_wheel(folder, tmp_path, monkeypatch):
    second = tmp_path / "wheel" / "mini"
    second.mkdir(parents=True)
    (second / "config.json").write_text("{}")
    monkeypatch.setattr(zoo, "zoo_folders", lambda: [folder.parent, second.parent])
    assert zoo.zoo_path("mini") == folder


def test_folders_of_a_checkout_and_of_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "data" / "zoo").mkdir(parents=True)
    (tmp_path / "wheel" / "zoo").mkdir(parents=True)
    monkeypatch.setattr(zoo.resources, "files", lambda _: tmp_path / "wheel")
    monkeypatch.setattr(zoo, "checkout_root", lambda: tmp_path)
    assert zoo.zoo_folders() == [tmp_path / "data" / "zoo", tmp_path / "wheel" / "zoo"]
    monkeypatch.setattr(zoo, "checkout_root", lambda: None)
    assert zoo.zoo_folders() == [tmp_path / "wheel" / "zoo"]


def test_listing_counts_parameters_from_the_header(own_zoo):
    (own_zoo.parent / "unfinished").mkdir()
    (own_zoo.parent / "unfinished" / "config.json").write_text("{}")
    (entry,) = zoo.zoo_models()
    assert entry.name == "mini"
    assert entry.architecture == "LlamaForCausalLM"
    assert entry.parameters == sum(p.numel() for p in zoo.load("mini")[0].parameters())
    assert entry.bytes == (own_zoo / "model.safetensors").stat().st_size


def test_listing_does_not_import_torch():
    code = "import sys; from decodelab.core.zoo import zoo_models; zoo_models(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_path_a_dtype_and_a_class(folder):
    assert zoo.load(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    config = BertConfig(
        vocab_size=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=8
    )
    BertForMaskedLM(config).save_pretrained(folder)
    assert isinstance(zoo.load(str(folder), cls=AutoModelForMaskedLM)[0], BertForMaskedLM)


def test_the_configuration_says_which_class_fits(folder):
    assert isinstance(zoo.load(folder)[0], LlamaForCausalLM)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert isinstance(zoo.load(folder)[0], LlamaForCausalLM)
    config = BertConfig(
        vocab_size=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=8
    )
    BertForMaskedLM(config).save_pretrained(folder)
    assert isinstance(zoo.load(folder)[0], BertForMaskedLM)


def test_revision_goes_to_the_hub_only(folder, monkeypatch):
    asked = []

    class Recorder:
        @staticmethod
        def from_pretrained(place, **kwargs):
            asked.append((str(place), kwargs))
            shape = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
            return LlamaForCausalLM(shape), {"missing_keys": set(), "unexpected_keys": set()}

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", Recorder.from_pretrained)
    zoo.load("owner/name", revision="v1", cls=Recorder)
    settings = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True, "revision": "v1"}
    assert asked[-1] == ("owner/name", settings)
    zoo.load(folder, revision="v1", cls=Recorder)
    assert "revision" not in asked[-1][1]


def test_unknown_zoo_name(own_zoo):
    with pytest.raises(ValueError, match=r"unknown zoo model 'tails'; known: mini\. `load` also takes a Hugging Face hub id or the path"):
        zoo.zoo_path("tails")


def test_hub_unreachable(own_zoo, monkeypatch):
    def fail(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"unknown model 'tails': no zoo model \(known: mini\).*cannot be reached \(offline\).*hub id"
    ):
        zoo.load("tails")


def test_hub_says_no(monkeypatch):
    def fail(*_, **__):
        raise OSError("owner/x is not a valid model identifier\nmore")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(FileNotFoundError, match="the hub answered: owner/x is not a valid model identifier"):
        zoo.load("owner/x")


def test_remote_code_is_refused(monkeypatch):
    def fail(*_, **__):
        raise ValueError("set the option `trust_remote_code=True` to remove this error")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(ValueError, match="owner/x needs code from its own repository, which is never run here"):
        zoo.load("owner/x")


def test_other_errors_of_a_loader_are_not_hidden(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model_type"):
        zoo.load(folder)

    class Stumbles:
        @staticmethod
        def from_pretrained(*_, **__):
            raise OSError("disk on fire")

    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(OSError, match="disk on fire"):
        zoo.load(folder, cls=Stumbles)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"config\.json of .*mini does not fit its weights: they lack model\.layers\.2\.\S+ and 8 others"),
        ({"num_hidden_layers": 1}, r"does not fit its weights: they hold more than it describes: model\.layers\.1\.\S+ and 8 others"),
        ({"vocab_size": 5}, "does not fit its weights: some tensors have other shapes than it says"),
        ({"model_type": "gpt2"}, r"does not fit its weights: they lack \S+ and"),
        ({"num_attention_heads": 3}, "mini cannot be loaded: .*not a multiple of the number of attention heads"),
        ({"hidden_size": "many"}, "mini cannot be loaded: .*hidden_size"),
    ],
)
def test_a_configuration_that_disagrees_with_its_weights(folder, change, message):
    shape = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(shape).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as caught:
        zoo.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "mixtral"])
def test_whole_models_of_other_shapes_are_not_refused(folder, kind):
    from transformers import BertForPreTraining, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=3, n_embd=8, n_layer=2, n_head=2)),
        # weights for more tasks than one: what is left over is no fault
        "bert": lambda: BertForPreTraining(BertConfig(vocab_size=3, max_position_embeddings=8, architectures=["BertForMaskedLM"], **shape)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(vocab_size=3, num_key_value_heads=1, num_local_experts=2, **shape)),
    }[kind]()
    model.save_pretrained(folder)
    if kind == "bert":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    loaded, _ = zoo.load(folder)
    assert all(torch.equal(p, model.state_dict()[n]) for n, p in loaded.state_dict().items() if n in model.state_dict())


def test_other_kinds_of_models_are_named_in_one_line(folder):
    from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

    T5ForConditionalGeneration(T5Config(vocab_size=3, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(folder)
    assert isinstance(zoo.load(folder)[0], T5ForConditionalGeneration)  # an encoder-decoder language model
    ViTModel(ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"mini is a vit model, which transformers has no causal language model of: choose another model$"):
        zoo.load(folder)


def test_files_in_another_encoding_or_place(folder):
    with pytest.raises(ValueError, match=r"config\.json is a file: give the folder of the model, .*mini$"):
        zoo.load(folder / "config.json")
    config = (folder / "config.json").read_text()
    for damaged in (config.encode("utf-16"), b"{", b""):
        (folder / "config.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"config\.json is no JSON text in UTF-8 .*; fetch it again"):
            zoo.load(folder)
    (folder / "config.json").write_text(config)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(tokenizer[:40])
    with pytest.raises(ValueError, match=r"tokenizer\.json is no JSON text in UTF-8"):
        zoo.load(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="mini cannot be loaded: "):
        zoo.load(folder)


def test_a_model_that_only_the_checkout_has(own_zoo):
    for name in ("tales-mdm", "tasks-mdm"):
        for find in (zoo.load, zoo.zoo_path):
            with pytest.raises(FileNotFoundError, match=f"{name} is not part of the installed package .*git clone https://github.com/"):
                find(name)


@pytest.mark.skipif(zoo.checkout_root() is None, reason="the whole zoo is in the checkout only")
def test_the_list_of_models_outside_the_wheel_is_right():
    import tomllib

    root = zoo.checkout_root()
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    shipped = {path.split("/")[-1] for path in wheel if path.startswith("data/zoo/")}
    assert set(zoo._CHECKOUT_ONLY) == {p.name for p in (root / "data/zoo").iterdir()} - shipped


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", " "])
def test_missing_folder_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        zoo.load(name)


def test_device_and_dtype(folder):
    with pytest.raises(ValueError, match="unknown device 'abacus': use 'cpu'"):
        zoo.load(folder, device="abacus")
    with pytest.raises(ValueError, match="unknown dtype 'float31': use 'float32'"):
        zoo.load(folder, dtype="float31")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU here: use device='cpu'"):
            zoo.load(folder, device="cuda")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (-100, r"file cut short: expected \d+ bytes, found \d+; fetch it again"),
        (40, r"file cut short: expected \d+ bytes or more, found 40; fetch it again"),
        (5, "file cut short: expected .* bytes or more, found 5"),
        (0, "file cut short: expected 8 bytes or more, found 0"),
    ],
)
def test_cut_short(folder, keep, message):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=message):
        zoo.load(folder)


def test_other_damage(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ValueError, match="file too long"):
        zoo.load(folder)
    file.write_bytes((4).to_bytes(8, "little") + b"junk")
    with pytest.raises(ValueError, match="not a safetensors file"):
        zoo.load(folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git-lfs pointer, not the weights: run `git lfs pull`"):
        zoo.load(folder)


def test_header_leaves_metadata_out(tmp_path):
    save_file({"w": torch.zeros(2, 3)}, tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert list(zoo.safetensors_header(tmp_path / "w.safetensors")) == ["w"]


def test_missing_parts(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json: it is not a Hugging Face model folder"):
        zoo.check_model_folder(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors of its weights"):
        zoo.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer .*tokenizer\.save_pretrained"):
        zoo.load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors weights \(pickled weights are never read"):
        zoo.load(folder)


CARDS = sorted(Path(zoo.checkout_root() or ".").glob("data/zoo/*/README.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_what_a_card_says_of_its_use_works(card):
    text = card.read_text(encoding="utf-8")
    code = text.split("## Use\n\n```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code, names)
    assert f'"{card.parent.name}"' in code and any(name in names for name in ("decoder", "model", "planner"))


def test_card(tmp_path):
    curve = [{"step": s, k: 1.0 + (k == "eval_loss")} for s in range(10, 210, 10) for k in ("loss", "eval_loss")] + [{"step": 200}]
    figures = {
        "recipe": {"name": "toy", "layers": 1},
        "parameters": 1234,
        "tokens_seen": 2000,
        "train_tokens": 900,
        "curve": curve,
        "held_out_bits_per_byte": 1.79,
        "held_out_tokens": 5000,
    }
    (tmp_path / "training.json").write_text(json.dumps(figures))
    text = zoo.model_card(tmp_path, samples="Once upon a time")
    assert (tmp_path / "README.md").read_text() == text
    for part in (
        "1,234 parameters",
        "| 200 | 2,000 | 1.000 | 2.000 |",
        "bits per byte: 1.790",
        "tokens scored: 5,000",
        "decodelab train toy",
    ):
        assert part in text
    assert text.endswith("## Samples\n\nOnce upon a time\n")
    assert text.count("2.000 |") <= 9
    assert "Samples" not in zoo.model_card(tmp_path)


def test_card_of_a_model_that_answers_questions(tmp_path):
    figures = {
        "recipe": {"name": "solver"},
        "parameters": 10,
        "tokens_seen": 2000,
        "train_tokens": 900,
        "machine": "a small GPU",
        "seconds_this_run": 1358,
        "remarks": ["It was stopped twice.", "It rained."],
        "curve": [{"step": 20, "loss": 1.0}, {"step": 20, "eval_loss": 1.5}],
        "accuracy": {"list_copy": 1.0, "countdown": 0.546},
        "examples_a_task": 50,
    }
    (tmp_path / "training.json").write_text(json.dumps(figures))
    text = zoo.model_card(tmp_path, data="Questions", data_licence="ours")
    for part in (
        "2,000 tokens seen, out of 900 in the data, in 1,358 seconds on a small GPU.\n\nIt was stopped twice.\n\nIt rained.\n\n| step |",
        "## Right answers\n\nShare of right answers to 50 new examples of each task.\n\n| task | right |\n|---|---:|\n| list_copy | 1.00 |\n| countdown | 0.55 |\n",
        "Questions. Data: ours.",
    ):
        assert part in text
    assert "held-out text" not in text


@pytest.mark.skipif(zoo.checkout_root() is None, reason="the whole zoo is in the checkout only")
def test_the_zoo_is_small_and_every_model_has_its_card():
    folder = zoo.checkout_root() / "data/zoo"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 90e6
    for model in folder.iterdir():
        assert (model / "README.md").is_file(), model.name
        assert (model / "training.json").is_file(), model.name


def test_card_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no training\.json: train the model with a recipe"):
        zoo.model_card(tmp_path)
