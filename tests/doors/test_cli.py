"""The command line, the demo page, the exported repositories and the README."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from decodelab.cli import app, full_experiments
from decodelab.cli_generate import generate
from decodelab.core.contract import decoders
from decodelab.core.output import TraceStep
from decodelab.core.zoo import load
from decodelab.demo import masked_decoders, masked_table
from decodelab.demo_page import DemoRow, DemoTable, comparison_page, demo_table, draft_svg
from decodelab.hub import export_hub
from decodelab.lab.frontier import compared_policies
from decodelab.lab.provenance import write_whole
from decodelab.reading import recipe_names, typed_settings
from decodelab.shell import make_decoder, show_table

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Once upon a time there was a king who"


@pytest.fixture(autouse=True)
def _in_peace(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("DECODELAB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("DECODELAB_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("DECODELAB_PROFILE", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tales():
    return load("tales")


@pytest.fixture(scope="module")
def masked():
    return load("tales-mdm")


def run(*arguments, code=0, stdin=None):
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    return result


def refused(*arguments):
    "The error line of a command that must fail with exit code 2, nothing on stdout and one line on stderr."
    result = run(*arguments, code=2)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def process(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", "from decodelab.cli import app; app()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


# the whole


def test_help_does_not_import_torch():
    code = "import sys; from decodelab.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "methods", "generate", "bench", "train", "lab", "experiment", "export"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["demo", "methods", "generate", "bench", "train", "lab", "experiment", "export", "export hub"])
def test_every_command_has_help(command):
    assert "Usage" in run(*command.split(), "--help").stdout


def test_version():
    assert re.fullmatch(r"decodelab \d+\.\d+\.\d+\n", run("--version").stdout)


def test_unknown_command_and_option():
    assert "magic" in run("magic", code=2).stderr
    assert run("methods", "--magic", code=2).stdout == ""


def test_traceback_on_request():
    result = CliRunner().invoke(app, ["--traceback", "methods", "--family", "magic"])
    assert isinstance(result.exception, ValueError)


WRONG = [
    ["methods", "--family", "magic"],
    ["generate"],
    ["generate", "x", "-m", "magic"],
    ["generate", "x", "-m", "momentum", "--set", "k=2.5"],
    ["generate", "x", "-m", "token_recycling", "--set", "update_prompt=maybe"],
    ["generate", "x", "-m", "momentum", "--set", "magic=1"],
    ["generate", "x", "-m", "momentum", "--draft", "tales-draft"],
    ["generate", "x", "--top-p", "2"],
    ["generate", "x", "--temperature", "0"],
    ["generate", "x", "--model", "./nowhere"],
    ["generate", "x", "--trace", "nowhere/page.html"],
    ["generate", "--prompts", "nowhere.txt"],
    ["bench", "-m", "magic"],
    ["bench", "--prompts", "nowhere.jsonl"],
    ["bench", "--out", "settings.ini"],
    ["demo", "--model", "./nowhere"],
    ["demo", "--out", "nowhere/demo.html"],
    ["experiment", "sampling/momentum", "--set", "magic=1", "--allow-dirty"],
    ["experiment", "magic"],
    ["train", "dop"],
    ["train", "dpo", "--set", "lerning_rate=1"],
    ["train", "tasks", "--set", "steps=two"],
    ["export", "hub", "momentum", "x", "--set", "k=2.5"],
]


def test_a_wrong_argument_is_answered_before_torch_is_imported():
    code = f"""
import sys, time
from typer.testing import CliRunner
from decodelab.cli import app
for command in {WRONG!r}:
    begun = time.process_time()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("error: ") == 1, (command, result)
    assert not {{"torch", "transformers", "pandas"}} & set(sys.modules), command
    assert time.process_time() - begun < 2, command
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_letter_that_the_terminal_cannot_show_loses_nothing():
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    code = "from decodelab.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code, "generate", "Ä", "-m", "Ö"], capture_output=True, env=env)
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, b"error: unknown decoder '?': known: " + ", ".join(decoders()).encode())


def test_a_reader_that_goes_away_is_no_fault():
    code = "from decodelab.cli import app; app()"
    running = subprocess.Popen([sys.executable, "-c", code, "lab", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    assert b"Traceback" not in running.stderr.read()
    running.wait()


# tables


@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 120, 300])
def test_a_table_shows_whole_cells_or_says_what_it_left_out(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    names = ("method", "ratio", "95 %", "tokens / forward", "lossless", "paper")
    values = [("prompt lookup (hf)", 1.25, "0.98-1.52", 12345.0, True, "A long title " * 6), ("ngram", 0.5, "", 2.5, None, "Short")]
    show_table([dict(zip(names, row)) for row in values], "how fast they are")
    shown, said = capsys.readouterr()
    assert max(map(len, shown.splitlines())) <= width
    left_out = re.fullmatch(rf"left out, as {width} columns are too few: (.*) \(a wider window or --json shows them\)\n", said)
    kept = [name for name in names if name not in (left_out[1].split(", ") if left_out else [])]
    assert kept == list(names[: len(kept)])
    assert (len(kept) == len(names)) == (width >= 120)
    if width >= 20:
        for name in kept:
            assert name in shown
        for text in ("prompt lookup (hf)", "1.25", "0.98-1.52", "12,345", "yes", "Short")[: len(kept)]:
            assert text in shown


def test_a_pipe_has_no_edge(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    show_table([{f"column {i}": "x" * 20 for i in range(12)}])
    shown, said = capsys.readouterr()
    assert shown.count("column") == 12
    assert shown.count("x" * 20) == 12
    assert said == ""
    show_table([])


# settings


def test_settings_are_data_not_code(tmp_path):
    value = f"__import__('os').mkdir('{tmp_path / 'made'}')"
    assert typed_settings(lambda k: None, [f"k={value}"]) == {"k": value}
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("momemtum", {}, "did you mean 'momentum'"),
        ("xyzzy", {}, "known: .*momentum"),
        ("momentum", {"q": 1}, "has no hyper-parameter 'q'; it has: "),
        ("momentum", {"k": 0}, "k must be at least 1"),
        ("momentum", {"k": "many"}, "cannot be made with these settings"),
        ("caad", {}, "caad needs space, which no text can name: use it from Python, see https://.*/sampling/caad.html"),
    ],
)
def test_make_decoder_refuses(name, settings, message, tales):
    for model in (None, tales[0]):
        with pytest.raises(ValueError, match=message):
            make_decoder(name, settings, model)


# methods


def test_methods():
    known = json.loads(run("methods", "--json").stdout)
    assert {m["name"] for m in known} == set(decoders())
    assert all(m["paper"] and "trace" in m["hyper_parameters"] for m in known)
    family = json.loads(run("methods", "--family", "speculative", "--json").stdout)
    assert {m["family"] for m in family} == {"speculative"}
    assert "momentum" in run("methods").stdout
    assert "unknown family 'magic'" in refused("methods", "--family", "magic")


# generate


def test_generate_json_is_the_decoder(tales):
    model, tokenizer = tales
    out = json.loads(run("generate", PROMPT, "-m", "momentum", "--set", "k=4", "--max-new-tokens", 12, "--json").stdout)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = make_decoder("momentum", {"k": 4}).generate(model, **inputs, max_new_tokens=12, do_sample=False)
    assert out["tokens"] == expected.continuations[0].tolist()
    assert out["text"] == expected.text(tokenizer)[0]
    assert out["stats"]["new_tokens"] == len(out["tokens"])
    assert out["hyper_parameters"] == {"k": 4}
    assert not out["interrupted"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("update_prompt=false", False), ("update_prompt=no", False), ("update_prompt=0", False), ("update_prompt=True", True), ("k=4", 4)],
)
def test_settings_have_the_type_of_their_field(setting, value):
    out = json.loads(run("generate", PROMPT, "-m", "token_recycling", "--set", setting, "--max-new-tokens", 2, "--json").stdout)
    assert list(out["hyper_parameters"].values()) == [value]
    assert type(next(iter(out["hyper_parameters"].values()))) is type(value)


def test_generate_takes_a_draft_model(tales):
    model, tokenizer = tales
    command = ["generate", PROMPT, "-m", "draft_model", "--set", "gamma=3", "--max-new-tokens", 12, "--json"]
    out = json.loads(run(*command, "--draft", "tales").stdout)
    assert out["hyper_parameters"] == {"gamma": 3, "drafter": "tales"}
    assert out["tokens"] == model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12, do_sample=False)[0, -12:].tolist()
    # the model drafts for itself: every draft token is accepted
    assert out["stats"]["tokens_per_forward"] > json.loads(run(*command).stdout)["stats"]["tokens_per_forward"]
    assert out["stats"]["target_forwards"] == 4
    trained = json.loads(run("generate", PROMPT, "-m", "specdec_pp", "--draft", "tales-draft", "--max-new-tokens", 4, "--json").stdout)
    assert len(trained["tokens"]) == 4


FORMS = {
    "p.txt": lambda texts: "\n\n".join(texts),
    "p.jsonl": lambda texts: "\n".join(json.dumps({"prompt": t} if i else {"turns": [t, "and then?"]}) for i, t in enumerate(texts)),
    "p.json": lambda texts: json.dumps([texts[0], *({"prompt": t} for t in texts[1:])]),
}
OPENINGS = ["Once upon a time", "The wolf came to the door and said to the little", "In the forest there lived"]


@pytest.mark.parametrize("name", FORMS)
def test_generate_reads_a_file_of_prompts(name, tmp_path):
    (tmp_path / name).write_text(FORMS[name](OPENINGS), encoding="utf-8")
    out = json.loads(run("generate", "--prompts", tmp_path / name, "--max-new-tokens", 8, "--json").stdout)
    assert [r["prompt"] for r in out["results"]] == OPENINGS
    assert not out["interrupted"]
    alone = [json.loads(run("generate", text, "--max-new-tokens", 8, "--json").stdout) for text in OPENINGS]
    assert [r["tokens"] for r in out["results"]] == [a["tokens"] for a in alone]
    for figure in ("new_tokens", "target_forwards"):
        assert out["stats"][figure] == sum(a["stats"][figure] for a in alone)


SHORT = {"budget_forcing": ("--set", "reserve=2")}  # what eight tokens need
OBJECTS = ("caad", "edu_sum")  # need a grounding space, or documents in units, which no text can name


PROMPTED = [n for n, m in decoders().items() if m.family != "diffusion" and n not in OBJECTS]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])  # two: the last batch is not full
@pytest.mark.parametrize("method", [pytest.param(n, marks=[pytest.mark.slow] * (n == "pg_td")) for n in PROMPTED])
def test_a_batch_equals_single_prompts(method, size, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(OPENINGS), encoding="utf-8")
    command = ["generate", "--prompts", tmp_path / "p.txt", "-m", method, "--max-new-tokens", 8, "--json", *SHORT.get(method, ())]
    one, many = (json.loads(run(*command, "--batch-size", n).stdout)["results"] for n in (1, size))
    assert one == many


def test_a_draft_that_is_never_accepted_is_told(tmp_path):
    told = "hardly a draft token was accepted"
    command = ["generate", OPENINGS[0], "--max-new-tokens", 16, "-m"]
    untrained = run(*command, "msd").stderr  # its drafter is one for another model
    assert f"{told}, so msd only adds work here: it needs a part that is trained for this model" in untrained
    (tmp_path / "p.txt").write_text("\n".join(OPENINGS[:2]), encoding="utf-8")
    assert told in run("generate", "--prompts", tmp_path / "p.txt", "--max-new-tokens", 16, "-m", "msd").stderr
    assert told not in run(*command, "longspec").stderr + run(*command, "autoregressive").stderr


def test_prompts_are_shown_with_their_continuations(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(OPENINGS), encoding="utf-8")
    result = run("generate", "--prompts", tmp_path / "p.txt", "--max-new-tokens", 4, "--batch-size", 2)
    assert [re.search(rf"^\[{i}\] {text}$", result.stdout, flags=re.M) is not None for i, text in enumerate(OPENINGS, 1)] == [True] * 3
    assert "12 new tokens" in result.stderr


def test_a_file_of_prompts_that_ends_early_keeps_what_is_done(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("\n".join(OPENINGS), encoding="utf-8")
    import decodelab.prompting as prompting

    plain = prompting.in_batches
    for error, code in ((KeyboardInterrupt(), 130), (ValueError("only on Sundays"), 2)):

        def in_batches(*arguments, error=error, **call):
            for i, out in enumerate(plain(*arguments, **call)):
                if i == 2:
                    raise error
                yield out

        monkeypatch.setattr(prompting, "in_batches", in_batches)
        command = ["generate", "--prompts", tmp_path / "p.txt", "--max-new-tokens", 4]
        out = run(*command, "--json", code=code)
        assert [r["prompt"] for r in json.loads(out.stdout)["results"]] == OPENINGS[:2]
        assert json.loads(out.stdout)["interrupted"]
        assert "ended after 2 of 3 prompts" in out.stderr
        assert run(*command, code=code).stdout.count("[") == 2


def test_a_search_that_was_interrupted_shows_its_best_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("\n".join(OPENINGS), encoding="utf-8")
    from decodelab.search.classics import BestOfN

    plain = BestOfN.expand

    def expand(self, search, frontier):
        if (search.row == 1 and len(frontier[0].tokens) == 3) or (search.call.budget == 9 and len(frontier[0].tokens) == 5):
            raise KeyboardInterrupt
        return plain(self, search, frontier)

    monkeypatch.setattr(BestOfN, "expand", expand)
    one = json.loads(run("generate", PROMPT, "-m", "best_of_n", "--max-new-tokens", 9, "--json", code=130).stdout)
    assert (one["interrupted"], len(one["tokens"])) == (True, 5)
    command = ["generate", "--prompts", tmp_path / "p.txt", "-m", "best_of_n", "--max-new-tokens", 8, "--batch-size", 2, "--json"]
    many = json.loads(run(*command, code=130).stdout)
    assert (many["interrupted"], [len(r["tokens"]) for r in many["results"]]) == (True, [8, 3])


def chatty(folder: Path, template: str | None) -> Path:
    "A copy of the zoo's drafter whose tokenizer has this chat template."
    model, tokenizer = load("tales-draft")
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_chat(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}teller:{% endif %}"
    folder = chatty(tmp_path / "chat", template)
    command = ["--model", folder, "--max-new-tokens", 6, "--json"]
    asked = json.loads(run("generate", "Tell a tale", "--chat", *command).stdout)
    assert asked["prompt"] == "Tell a tale"
    plain = {"add_special_tokens": False, "return_tensors": "pt"}
    model, tokenizer = load(folder)
    ids = tokenizer("user: Tell a tale\nteller:", **plain).input_ids
    assert asked["tokens"] == model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    plain = chatty(tmp_path / "plain", None)
    assert "the tokenizer has no chat template: leave out --chat" in refused("generate", "Tell", "--chat", "--model", plain)
    broken = chatty(tmp_path / "broken", "{{ raise_exception('only poems') }}")
    assert "the chat template cannot be used: only poems" in refused("generate", "Tell", "--chat", "--model", broken)
    (tmp_path / "p.txt").write_text("Tell a tale", encoding="utf-8")
    out = tmp_path / "out"
    run("bench", "--prompts", tmp_path / "p.txt", "--chat", "--model", folder, "-m", "autoregressive", "--tokens", 4, "--out", out)
    assert json.loads((out / "bench.json").read_text())["provenance"]["prompts"]["count"] == 1


def test_a_page_takes_the_place_of_no_device(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    (tmp_path / "link").symlink_to(pipe)
    for place in (pipe, tmp_path / "link"):
        assert f"cannot write {place}" in refused("generate", "Once", "--max-new-tokens", 2, "--trace", place)
        assert f"cannot write {place}" in refused("demo", "--out", place)
        with pytest.raises(OSError, match="it is no plain file"):
            write_whole(place, "text")
    assert pipe.is_fifo()
    (tmp_path / "page").symlink_to(tmp_path / "real.html")
    write_whole(tmp_path / "page", "text")
    assert (tmp_path / "page").is_symlink() and (tmp_path / "real.html").read_text() == "text"


def test_closed_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        generate(prompt="-")


def test_text_that_is_not_utf_8(tmp_path):
    latin, wide = "Andrée".encode("latin-1"), "Once upon".encode("utf-16")
    for text in (latin, wide):
        result = run("generate", "-", stdin=text, code=2)
        assert re.fullmatch(r"error: standard input is no UTF-8 text \(.*\): save it as UTF-8\n", result.stderr)
        (tmp_path / "p.txt").write_bytes(text)
        assert f"{tmp_path / 'p.txt'} is no UTF-8 text" in refused("generate", "--prompts", tmp_path / "p.txt")
    assert "the prompt is no UTF-8 text" in refused("generate", "\udcff")
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfOnce\r\n")  # a byte order mark and lines of Windows are no fault
    out = json.loads(run("generate", "--prompts", tmp_path / "p.txt", "--max-new-tokens", 2, "--json").stdout)
    assert out["results"][0]["prompt"] == "Once"


def test_a_tokenizer_without_bos_and_without_padding(tmp_path):
    model, tokenizer = load("tales-draft")
    model.save_pretrained(tmp_path / "m")
    tokenizer.bos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "p.txt").write_text("\n".join(OPENINGS), encoding="utf-8")
    command = ["generate", "--prompts", tmp_path / "p.txt", "--model", tmp_path / "m", "--max-new-tokens", 4, "--json", "--batch-size"]
    assert json.loads(run(*command, 3).stdout)["results"] == json.loads(run(*command, 1).stdout)["results"]
    assert "momentum" in run("bench", "--model", tmp_path / "m", "-m", "momentum", "--number", 1, "--tokens", 4, "--out", tmp_path).stdout


def test_generate_takes_the_masked_model_for_a_diffusion_method(masked):
    model, tokenizer = masked
    settings = {"block_length": 4, "threshold": 0.5}
    flags = [a for k, v in settings.items() for a in ("--set", f"{k}={v}")]
    out = json.loads(run("generate", PROMPT, "-m", "fast_dllm", *flags, "--max-new-tokens", 8, "--json").stdout)
    expected = make_decoder("fast_dllm", settings).generate(
        model, **tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False
    )
    assert out["tokens"] == expected.continuations[0].tolist()
    assert out["stats"]["target_forwards"] == expected.stats.target_forwards


def test_generate_streams_the_same_text():
    command = ["generate", PROMPT, "-m", "token_recycling", "--max-new-tokens", 16]
    streamed, whole = run(*command), run(*command, "--no-stream")
    assert streamed.stdout == whole.stdout
    assert "tokens per forward" in streamed.stderr


def test_generate_samples_with_a_seed():
    command = ["generate", PROMPT, "--temperature", 0.9, "--top-k", 40, "--top-p", 0.9, "--max-new-tokens", 12, "--json", "--seed"]
    first, again, other = (json.loads(run(*command, seed).stdout)["tokens"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_generate_from_standard_input_and_trace(tmp_path):
    out = json.loads(run("generate", "-", "--max-new-tokens", 4, "--json", stdin=PROMPT).stdout)
    assert out["prompt"] == PROMPT
    page = tmp_path / "trace.html"
    run("generate", PROMPT, "--max-new-tokens", 4, "--trace", page)
    assert "decodelab-trace" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--json"], "empty prompt"),
        ([PROMPT, "-m", "magic"], "unknown decoder 'magic'"),
        ([PROMPT, "-m", "momentum", "--set", "k"], "write name=value"),
        ([PROMPT, "-m", "momentum", "--sample"], "deterministic"),
        ([PROMPT, "--model", "./nowhere"], "no model folder"),
        ([PROMPT, "--model", "tales-mdm"], "tales-mdm fills masked positions: choose a decoder of `decodelab methods --family diffusion`"),
        ([PROMPT, "--model", "tales", "-m", "llada"], "names no mask token"),
        ([PROMPT, "--max-new-tokens", "99999"], "exceed the model's context"),
        ([PROMPT, "--trace", "nowhere/trace.html"], "name a file in a folder that exists"),
        ([PROMPT * 300], "shorten it"),
        ([PROMPT, "--prompts", "p.txt"], "give a text to continue (- reads it from standard input), or a file of them"),
        (["--prompts", "p.txt", "--trace", "t.html"], "--trace shows a single prompt"),
        ([PROMPT, "--batch-size", 2], "--batch-size says how many prompts of a file are decoded together"),
        ([PROMPT, "--top-p", 2], "--top-p is a probability above 0 and at most 1, got 2"),
        ([PROMPT, "--top-p", 0], "--top-p is a probability above 0"),
        ([PROMPT, "--top-k", -1], "--top-k must be 0 (keep all tokens) or more, got -1"),
        ([PROMPT, "--temperature", -1], "--temperature must be above 0, got -1"),
        ([PROMPT, "--temperature", "nan"], "--temperature must be above 0, got nan"),
        ([PROMPT, "-m", "draft_model", "--set", "drafter=gpt2"], "the drafter of draft_model is a model: name it with --draft"),
        ([PROMPT, "-m", "draft_model", "--set", "gamma=2.5"], "gamma=2.5 does not fit: gamma is a whole number"),
        ([PROMPT, "-m", "specdec_pp", "--set", "head=mine"], "head is an object, which no text can name"),
        ([PROMPT, "-m", "momentum", "--draft", "tales-draft"], "momentum has no draft model: leave out --draft, or choose one of"),
        ([PROMPT, "-m", "draft_model", "--draft", "./nowhere"], "no model folder at './nowhere'"),
        ([PROMPT, "--model", "settings.ini"], "settings.ini is a file: give the folder of the model"),
    ],
)
def test_generate_refuses(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in refused("generate", *arguments)


@pytest.mark.skipif(not (ROOT / "data/zoo").is_dir(), reason="needs the zoo of the checkout")
def test_a_model_that_the_wheel_leaves_out(monkeypatch):
    monkeypatch.setattr("decodelab.core.zoo._zoo", lambda: {n: ROOT / "data/zoo" / n for n in ("tales", "tales-draft")})
    message = refused("generate", PROMPT, "-m", "llada")
    assert message.startswith("error: tales-mdm is not part of the installed package (which has: tales, tales-draft): it lies in data/zoo")


def test_ctrl_c_keeps_the_text():
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  shells have what runs in the background ignore it
    running = process("generate", PROMPT, "--max-new-tokens", 1900, preexec_fn=heard)
    seen = running.stdout.read(20)  # it has begun to write
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert len(seen) == 20
    assert "interrupted" in errors
    assert "Traceback" not in errors


# demo and bench


def check_page(page: str) -> None:
    "A page that loads nothing: addresses occur in links only."
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|srcset|action|data)\s*=\s*["']?(?:https?:)?//|url\(|@import|<link|<iframe""", page)
    without_links = re.sub(r'<a href="https://[^"]*">', "", page)
    assert "://" not in without_links


def tables_of(out: str) -> dict[str, dict]:
    return {table["title"]: table for table in json.loads(out)["tables"]}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_demo(every, tmp_path):
    started = time.perf_counter()
    page = tmp_path / "demo.html"
    shown = run("demo", *["--all"] * every, "--number", 1, "--tokens", 12, "--seconds", 1, "--out", page, "--json").stdout
    out, tables = json.loads(shown), tables_of(shown)
    assert list(tables) == ["temperature 0.7", "greedy", "questions about lists", "questions about pictures"]
    rows = {title: {r["name"]: r for r in table["rows"]} for title, table in tables.items()}
    ours = {n for n, m in decoders().items() if m.family not in ("diffusion", "vision")}
    for title, plain in (("temperature 0.7", "sampling"), ("greedy", "greedy")):
        assert set(rows[title]) - ours == {f"{m} (transformers)" for m in (plain, "prompt lookup", "assisted")}
        assert tables[title]["baseline"] == f"{plain} (transformers)"
        assert rows[title][f"{plain} (transformers)"]["ratio"] == 1
        assert all(r["cpu_ms_per_token"] > 0 and r["low"] is None for r in rows[title].values())  # one prompt has no interval
        assert not any(r["clearly_faster"] for r in rows[title].values())
    assert all(r["identical"] == 1 for r in rows["greedy"].values() if r["lossless"])
    masked = rows["questions about lists"]
    fills = {compared_policies()[name].name for name in masked}
    names = set(rows["greedy"]) & ours
    if every:
        assert names == ours - set(out["left_out"])
        assert set(rows["temperature 0.7"]) & ours == {n for n in ours - set(out["left_out"]) if decoders()[n].samples}
        assert fills == {n for n, m in decoders().items() if m.family == "diffusion"}
    else:
        families = {m.family for n, m in decoders().items() if n in names | fills | set(rows["questions about pictures"])}
        assert families == {m.family for m in decoders().values()}
        assert not {"pg_td", "self_consistency"} & names
    assert not fills & set(out["left_out"])
    assert masked["1 per step"]["ratio"] == 1
    assert tables["questions about lists"]["conditions"]["prompts_done"] >= 3
    text = page.read_text(encoding="utf-8")
    check_page(text)
    assert all(name in text for name in (*rows["greedy"], *masked) if "(transformers)" not in name)
    assert 'class="tree"' in text
    pictures = rows["questions about pictures"]
    assert {"msd", "token_recycling"} <= set(pictures) and not {"msd", "token_recycling"} & set(out["left_out"])
    assert all(r["identical"] == 1 and r["right"] >= 2 for r in pictures.values())
    print(f"demo {time.perf_counter() - started:.1f} s")


def test_demo_without_a_model_that_sees(tmp_path, monkeypatch):
    import decodelab.cli_measure as commands

    plain = commands.load_for

    def load_for(name, role, *more, **kwargs):
        if role == "vision":
            raise FileNotFoundError("unknown model 'shapes-vlm'")
        return plain(name, role, *more, **kwargs)

    monkeypatch.setattr(commands, "load_for", load_for)
    command = ["demo", "--number", 1, "--tokens", 4, "-m", "momentum", "-m", "msd", "--out", tmp_path / "demo.html", "--json"]
    out = json.loads(run(*command).stdout)
    assert [table["title"] for table in out["tables"]] == ["greedy"]
    assert out["left_out"] == {"msd": "needs a model of pictures and text: unknown model 'shapes-vlm'"}


def test_demo_tables_and_live_text(tmp_path):
    command = ["demo", "--number", 2, "--tokens", 8, "-m", "momentum", "-m", "token_recycling", "--out", tmp_path / "demo.html"]
    shown = run(*command).stdout
    assert "token_recycling, live" in shown
    sampled, greedy = shown.split("temperature 0.7: 2 prompts; ratio: speed relative to sampling (hf)")[1].split("greedy: 2 prompts")
    assert "momentum" not in sampled  # it cannot sample
    assert "momentum" in greedy
    assert "rep-4" in greedy


def test_demo_measures_on_prompts_that_no_decoder_has_seen(tmp_path, monkeypatch):
    "A decoder that learns would know the greedy text of a prompt on which it was tried."
    import decodelab.demo as demo

    seen, plain = [], demo.drop_failing

    def drop_failing(methods, prompt):
        seen.append(prompt["input_ids"].tolist())
        return plain(methods, prompt)

    monkeypatch.setattr(demo, "drop_failing", drop_failing)
    measured, turns = [], demo.measure_in_turns
    monkeypatch.setattr(demo, "measure_in_turns", lambda m, p, **k: measured.extend(x["input_ids"].tolist() for x in p) or turns(m, p, **k))
    run("demo", "--number", 3, "--tokens", 4, "-m", "ngram", "--out", tmp_path / "demo.html")
    assert len(measured) == 6
    assert not [ids for ids in seen if ids in measured]


def test_demo_takes_prompts_of_its_user(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(OPENINGS), encoding="utf-8")
    command = [
        "demo",
        "--prompts",
        tmp_path / "p.txt",
        "--number",
        2,
        "--tokens",
        4,
        "-m",
        "momentum",
        "--out",
        tmp_path / "d.html",
        "--json",
    ]
    (table,) = tables_of(run(*command).stdout).values()
    assert (table["prompt"], table["conditions"]["prompts_done"]) == (OPENINGS[0], 2)


def test_demo_refuses(tmp_path):
    assert "name a file in a folder" in refused("demo", "--out", tmp_path)
    assert "unknown decoder 'magic'" in refused("demo", "-m", "magic", "--out", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_demo_without_a_masked_model(tmp_path, monkeypatch):
    import decodelab.cli_measure as commands

    plain = commands.load_for

    def load_for(name, role, *more, **kwargs):
        if role == "diffusion_tasks":
            raise FileNotFoundError("unknown model 'tasks-mdm'")
        return plain(name, role, *more, **kwargs)

    monkeypatch.setattr(commands, "load_for", load_for)
    command = ["demo", "--number", 1, "--tokens", 4, "-m", "momentum", "-m", "llada", "--out", tmp_path / "demo.html", "--json"]
    out = json.loads(run(*command).stdout)
    assert [table["title"] for table in out["tables"]] == ["greedy"]
    assert out["left_out"] == {"llada": "needs a masked model: unknown model 'tasks-mdm'"}
    assert "questions about lists" not in (tmp_path / "demo.html").read_text(encoding="utf-8")
    lonely = refused("demo", "-m", "llada", "--out", tmp_path / "other.html")
    assert lonely == "error: no decoder can run this: llada: needs a masked model: unknown model 'tasks-mdm'"


def impatient(monkeypatch, after: int) -> None:
    "Ctrl-C comes when this many calls have been timed."
    import decodelab.demo as demo

    plain, calls = demo.timed_rows, []

    def timed_rows(*arguments, **kwargs):
        for row in plain(*arguments, **kwargs):
            if len(calls) == after:
                raise KeyboardInterrupt
            calls.append(row)
            yield row

    monkeypatch.setattr(demo, "timed_rows", timed_rows)


@pytest.mark.parametrize(
    ("after", "titles"), [(0, []), (2, ["temperature 0.7"]), (8, ["temperature 0.7"]), (9, ["temperature 0.7", "greedy"])]
)
def test_demo_ctrl_c_keeps_and_shows_what_there_is(after, titles, tmp_path, monkeypatch):
    impatient(monkeypatch, after)
    page = tmp_path / "demo.html"
    result = run("demo", "--number", 2, "--tokens", 4, "-m", "token_recycling", "--out", page, "--json", code=130)
    assert result.stderr.endswith("interrupted\n")
    if not titles:
        assert "Ctrl-C: nothing was measured yet" in result.stderr
        assert (result.stdout, page.exists()) == ("", False)
        return
    assert "Ctrl-C: this is what there is" in result.stderr
    assert list(tables_of(result.stdout)) == titles
    check_page(page.read_text(encoding="utf-8"))


def test_demo_ctrl_c_among_the_masked_decoders_keeps_the_rest(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("decodelab.demo.masked_table", stop)
    command = ["demo", "--number", 1, "--tokens", 4, "-m", "momentum", "-m", "llada", "--out", tmp_path / "demo.html", "--json"]
    assert list(tables_of(run(*command, code=130).stdout)) == ["greedy"]
    assert "momentum" in (tmp_path / "demo.html").read_text(encoding="utf-8")


def test_masked_decoders_name_what_is_wrong(masked):
    ready, left_out = masked_decoders(masked[0], ["fast_dllm"])
    assert list(ready) == ["1 per step", "threshold 0.9"]
    assert left_out == {}
    assert masked_decoders(masked[0], ["momentum"]) == ({}, {})


def test_masked_answers_are_counted_and_the_time_is_respected():
    model, tokenizer = load("tasks-mdm")
    methods, _ = masked_decoders(model, ["llada"])
    short = masked_table(methods, model, tokenizer, per_task=2, seconds=0)
    assert short.conditions["prompts_done"] == 3  # one of each task, however long it takes
    assert "of 6 prompts" in short.note
    table = masked_table(methods, model, tokenizer, per_task=2)
    assert [row.name for row in table.rows] == ["1 per step", "4 per step"]
    assert table.conditions["prompts_done"] == 6
    one, four = table.rows
    assert one.ratio == 1 < four.ratio
    assert four.tokens_per_forward == pytest.approx(4 * one.tokens_per_forward, rel=0.2)
    assert 3 <= one.right <= 6
    assert table.prompt.startswith("Write the list in any order.")
    assert sorted(one.text.split(", ")) == sorted(table.prompt.split("List: ")[1].split("\n")[0].split(", "))


CONDITIONS = {"machine": {"cpu": "c"}, "versions": {}, "date": "today", "prompts_done": 6, "prompts_asked": 6}


def made_up(name="m", ratio=1.0, low=0.9, high=1.1, clear=False, lossless=True, **more) -> DemoRow:
    return DemoRow(name, ratio, low, high, 2.0, 5.0, 4.0, lossless=lossless, clearly_faster=clear, **more)


def test_a_table_is_escaped_and_part_of_the_page(tales):
    rows = [made_up("one <b>", right=1, text="a & b"), made_up("two", 2.0, right=2, text="c")]
    table = DemoTable("lists <i>", "List: <i>", "one <b>", CONDITIONS, rows)
    shown = demo_table(table)
    assert "<b>" not in shown
    assert "<i>" not in shown
    assert "--share:50%" in shown
    assert re.findall(r">(\d of \d)<", shown) == ["1 of 6", "2 of 6"]
    page = comparison_page([table], {}, tales[1])
    check_page(page)
    assert shown in page


def test_the_headline_is_what_the_interval_carries(tales):
    base = made_up("sampling (transformers)", 1.0, 1.0, 1.0, lossless=None)
    lucky = made_up("lucky", 4.8, 0.7, 8.9)
    page = comparison_page([DemoTable("temperature 0.7", "p", base.name, CONDITIONS, [base, lucky])], {}, tales[1])
    assert "of the lossless decoders is clearly faster than sampling (transformers) here: 6 prompts, temperature 0.7" in page
    assert "4.80x" not in page
    confident, other = made_up("confident", 1.5, 1.4, 1.6, True), made_up("unlike", 3.0, 2.9, 3.1, True, lossless=False)
    page = comparison_page([DemoTable("temperature 0.7", "p", base.name, CONDITIONS, [base, lucky, confident, other])], {}, tales[1])
    assert "1.50x</b><span>speed of confident relative to sampling (transformers): 1.40 to 1.60 on 6 prompts, temperature 0.7" in page


def test_page_check_can_fail():
    for bad in ('<img src="https://x.org/a.png">', "<style>a{background:url(x)}</style>", "<script>1</script>", "see https://x.org"):
        with pytest.raises(AssertionError):
            check_page("default-src 'none'" + bad)


def test_text_of_a_page_is_escaped(tales):
    step = TraceStep(0, [5], ["accepted"], info={"tokens": [5, 6, 7, 8], "parents": [0, 0, 0, 1], "path": [0, 1, 3]})
    step.info["tokens"] = tales[1]("a <b> & c").input_ids[:4]
    svg = draft_svg(step, tales[1])
    assert svg.count('<g class="hit">') == 3
    assert svg.count('<g class="miss">') == 1
    assert "<b>" not in svg


def test_bench(tmp_path):
    command = ["bench", "--number", 2, "--tokens", 8, "-m", "token_recycling", "--out", tmp_path / "b"]
    out = json.loads(run(*command, "--json").stdout)
    names = {f"{m} (transformers)" for m in ("greedy", "prompt lookup", "assisted")} | {"token_recycling"}
    assert set(out["table"]) == names
    for line in out["table"].values():
        assert line["low"] <= line["ratio"] <= line["high"]
        assert line["cpu_low"] <= line["cpu_ratio"] <= line["cpu_high"]
        assert line["cpu_seconds_per_token"] > 0
    stored = json.loads((tmp_path / "b/bench.json").read_text())
    assert stored["baseline"] == "greedy (transformers)"
    assert {"commit", "machine", "model", "profile", "seed", "interrupted", "settings"} <= set(stored["provenance"])
    assert len(stored["rows"]) == 2 * 4
    assert (tmp_path / "b/bench.png").read_bytes().startswith(b"\x89PNG")
    shown = run(*command).stdout
    assert all(name.replace("(transformers)", "(hf)") in shown for name in names)


def test_bench_samples(tmp_path):
    command = ["bench", "--number", 2, "--tokens", 8, "--temperature", 0.7, "-m", "ngram", "-m", "momentum", "--out", tmp_path, "--json"]
    out = json.loads(run(*command).stdout)
    assert set(out["table"]) == {f"{m} (transformers)" for m in ("sampling", "prompt lookup", "assisted")} | {"ngram"}
    assert out["provenance"]["settings"] == {"do_sample": True, "temperature": 0.7}


def test_bench_on_a_model_and_prompts_of_its_user(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in OPENINGS))
    command = ["bench", "--prompts", tmp_path / "p.jsonl", "--tokens", 4, "-m", "draft_model", "--json", "--model"]
    out = json.loads(run(*command, "tales-draft", "--out", tmp_path / "a").stdout)
    assert out["provenance"]["prompts_done"] == 3
    assert out["provenance"]["model"] == "tales-draft"
    assert "assisted (transformers)" not in out["table"]  # a model of one's own has no draft model until --draft names one
    own = json.loads(run(*command, "tales", "--draft", "tales", "--number", 2, "--out", tmp_path / "b").stdout)
    assert own["provenance"]["prompts_done"] == 2
    assert own["table"]["draft_model"]["tokens_per_forward"] > 3  # the model drafts for itself
    (tmp_path / "long.txt").write_text("Once\n" + "upon a time " * 900)
    assert "prompt 2 of 2 has" in refused("bench", "--prompts", tmp_path / "long.txt", "--out", tmp_path)


def test_bench_leaves_out_what_fails_on_a_model_and_refuses_when_nothing_is_left(tmp_path, monkeypatch):
    from decodelab.sampling.momentum import Momentum

    def decode(self, call):
        raise IndexError("deep inside")

    monkeypatch.setattr(Momentum, "decode", decode)
    command = ["bench", "--number", 1, "--tokens", 4, "--out", tmp_path, "-m", "momentum"]
    assert "no decoder can run this: momentum: IndexError: deep inside" in refused(*command)
    out = json.loads(run(*command, "-m", "autoregressive", "--json").stdout)
    assert out["left_out"] == {"momentum": "IndexError: deep inside"}
    assert "no decoder can run this: llada: diffusion: needs another kind of model" in refused("bench", "-m", "llada", "--out", tmp_path)


def test_bench_tries_its_place_before_it_measures(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("bench", "--out", tmp_path / "file")
    assert "cannot write to the folder" in refused("bench", "--out", tmp_path / "file" / "x")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("decodelab.shell.os.fsync", full)
    monkeypatch.setattr("decodelab.cli_measure.load_for", lambda *_, **__: pytest.fail("it began to work"))
    folder = tmp_path / "results"
    assert refused("bench", "--out", folder) == f"error: cannot write to the folder {folder}: no space left on device"
    assert "no space left on device" in refused("demo", "--out", tmp_path / "demo.html")
    assert "no space left on device" in refused("generate", PROMPT, "--trace", tmp_path / "t.html")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_a_disk_that_fills_up_takes_no_result_with_it(command, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("decodelab.lab.provenance.os.replace", full)
    place = tmp_path / ("demo.html" if command == "demo" else "out")
    arguments = [command, "--number", 2, "--tokens", 4, "-m", "momentum", "--out", place]
    result = run(*arguments, code=2)
    assert "momentum" in result.stdout
    assert result.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
    out = json.loads(run(*arguments, "--json", code=2).stdout)
    assert out.get("files", []) == []
    assert "momentum" in json.dumps(out)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []  # no half-written file is left


def test_bench_without_a_place(monkeypatch):
    monkeypatch.setenv("DECODELAB_RESULTS", "off")
    result = run("bench", "--number", 1, "--tokens", 4, "-m", "momentum")
    assert "not written" in result.stderr
    assert "momentum" in result.stdout


def test_json_holds_null_where_there_is_no_number(tmp_path):
    command = ["bench", "--number", 1, "--tokens", 4, "-m", "momentum", "--out", tmp_path, "--json"]
    shown = run(*command).stdout
    for text in (shown, (tmp_path / "bench.json").read_text()):
        line = json.loads(text, parse_constant=lambda word: pytest.fail(word))["table"]["momentum"]
        assert (line["low"], line["high"]) == (None, None)  # one prompt has no interval
        assert '"nan"' not in text


@pytest.mark.parametrize(
    ("after", "prompts", "said"),
    [
        (4, {0}, "1 of 3 prompts; ratio: speed relative to greedy (hf), in turns; Ctrl-C in prompt 2, which is left out"),
        (6, {0}, "1 of 3 prompts; ratio: speed relative to greedy (hf), in turns; Ctrl-C in prompt 2, which is left out"),
        (
            2,
            {0},
            "0 of 3 prompts; ratio: speed relative to greedy (hf), in turns; Ctrl-C in the middle of the first prompt; not measured: ",
        ),
    ],
)
def test_bench_ctrl_c_keeps_and_shows_what_there_is(after, prompts, said, tmp_path, monkeypatch):
    impatient(monkeypatch, after)
    result = run("bench", "--number", 3, "--tokens", 4, "-m", "momentum", "--out", tmp_path, code=130)
    assert result.stderr.endswith("interrupted\n")
    assert said in " ".join(result.stdout.split())
    assert "nan" not in result.stdout
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert stored["provenance"]["interrupted"]
    assert {r["prompt"] for r in stored["rows"]} == prompts
    assert len(stored["rows"]) == min(after, 4)
    assert set(stored["table"]) == {r["method"] for r in stored["rows"]}


def test_bench_ctrl_c_before_anything_was_measured(tmp_path, monkeypatch):
    impatient(monkeypatch, 0)
    result = run("bench", "--number", 1, "--tokens", 4, "-m", "momentum", "--out", tmp_path, "--json", code=130)
    assert (result.stdout, result.stderr) == ("", "Ctrl-C: nothing was measured yet\ninterrupted\n")


def test_a_method_that_fails_late_ends_the_bench_with_what_there_is(tmp_path, monkeypatch):
    import decodelab.demo as demo

    plain, calls = demo.timed_rows, []

    def timed_rows(*arguments, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("only on Sundays")
        yield from plain(*arguments, **kwargs)

    monkeypatch.setattr(demo, "timed_rows", timed_rows)
    result = run("bench", "--number", 4, "--tokens", 4, "-m", "momentum", "--out", tmp_path, "--json", code=2)
    assert json.loads(result.stdout)["provenance"]["prompts_done"] == 2
    assert "error: the run failed (only on Sundays) in prompt 3, which is left out" in result.stderr


# train


def books(folder: Path) -> None:
    texts = {1: "Once upon a time there was a king who had a golden apple tree. " * 40, 7128: "There was an old woman and a fox. " * 20}
    (folder / "tales").mkdir(parents=True)
    for number, text in texts.items():
        (folder / f"tales/{number}.txt").write_text(text)
    manifest = [{"gutenberg_id": n, "title": f"Book {n}", "file": f"tales/{n}.txt"} for n in texts]
    (folder / "tales/manifest.json").write_text(json.dumps(manifest))


def test_train_and_resume(tmp_path):
    pytest.importorskip("accelerate")
    books(tmp_path / "books")
    small = "hidden_size=32 intermediate_size=48 layers=1 heads=2 vocab_size=300 block=16 batch_size=2 warmup=1 save_every=2 eval_every=2"
    settings = [a for s in small.split() for a in ("--set", s)]
    command = ["train", "tales-draft", "--out", tmp_path / "model", "--data-dir", tmp_path / "books", *settings, "--json", "--steps"]
    run(*command, 2)
    assert (tmp_path / "model/run/checkpoint-2").is_dir()
    done = run(*command, 4).stdout
    figures = json.loads(done[done.index("{\n") :])
    assert figures["recipe"]["steps"] == 4
    assert min(r["step"] for r in figures["curve"] if "eval_loss" in r) == 2  # from the checkpoint, not again
    assert (tmp_path / "model/run/checkpoint-4").is_dir()
    assert "## Retrain" in (tmp_path / "model/README.md").read_text()
    text = run("generate", "Once upon a", "--model", tmp_path / "model", "--max-new-tokens", 4).stdout
    assert text.endswith("\n")


@pytest.mark.parametrize("recipe", ["tasks", "tasks-mdm", "tales-mdm"])
def test_train_masked_models(recipe, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    books(tmp_path / "books")
    monkeypatch.setattr("decodelab.training.masked_diffusion.evaluation_tasks", dict)
    small = "start_from=tales-draft batch_size=2 warmup=0 eval_every=1000"
    small += " block=16" if recipe == "tales-mdm" else " examples=8"
    settings = [a for s in small.split() for a in ("--set", s)]
    command = ["train", recipe, "--out", tmp_path / "model", "--data-dir", tmp_path / "books", *settings, "--steps", 1, "--json"]
    done = run(*command).stdout
    figures = json.loads(done[done.index("{\n") :])
    assert (figures["recipe"]["name"], figures["recipe"]["causal"]) == (recipe, recipe == "tasks")
    assert ("accuracy" in figures) == (recipe != "tales-mdm")
    assert ("held_out_bits_per_byte" in figures) == (recipe == "tales-mdm")
    assert "start from those of `tales-draft`" in (tmp_path / "model/README.md").read_text()
    assert getattr(load(tmp_path / "model")[0].config, "shift_logits", False) == (recipe != "tasks")


def test_train_refuses(tmp_path, monkeypatch):
    assert "unknown recipe 'tails'" in refused("train", "tails")
    assert "recipe tales has no setting 'magic'; it has: name" in refused("train", "tales", "--set", "magic=1")
    assert "must be a multiple of heads" in refused("train", "tales", "--set", "heads=7")
    assert "there is no folder" in refused("train", "drafter", "--data-dir", tmp_path / "none", "--out", tmp_path / "model")
    (tmp_path / "empty").mkdir()
    assert "data set 'tales' not found" in refused("train", "tales", "--data-dir", tmp_path / "empty")
    twice = tmp_path / "twice.yaml"
    twice.write_text("seed: 1\nsteps: 2\nseed: 3\nsteps: 2\n")
    assert "twice.yaml names seed, steps more than once" in refused("train", "tales", "--config", twice)
    twice.write_text("name: ../../x\n")
    assert "name must be letters" in refused("train", "tales", "--config", twice)
    assert "leave out --tokenizer" in refused("train", "tasks-mdm", "--tokenizer", "tales")
    assert "data must be 'tasks' or 'tales'" in refused("train", "tales-mdm", "--set", "data=books")
    monkeypatch.setattr("decodelab.shell.find_spec", lambda name: None)
    assert "needs accelerate, filelock: pip install 'decodelab[train]'" in refused("train", "tales")


def test_train_lists_settings():
    rows = {row["setting"]: row for row in json.loads(run("train", "tales", "--list", "--set", "layers=3", "--json").stdout)}
    assert rows["layers"] == {"setting": "layers", "value": 3, "meaning": "decoder layers"}
    assert all(row["meaning"] for row in rows.values())
    for name in recipe_names():
        assert all(row["meaning"] for row in json.loads(run("train", name, "--list", "--json").stdout)), name


def test_commands_say_which_packages_they_need(monkeypatch):
    monkeypatch.setattr("decodelab.shell.find_spec", lambda name: None)
    assert "needs pandas, matplotlib: pip install 'decodelab[lab]'" in refused("bench")
    assert "needs pandas, datasets: pip install 'decodelab[lab]'" in refused("experiment", "sampling/momentum")


# lab and experiment


def test_lab(monkeypatch):
    facts = json.loads(run("lab", "--json").stdout)
    assert (facts["profile"], facts["device"]) == ("tiny", "cpu")
    assert next(m for m in facts["models"] if m["role"] == "target")["here"]
    assert not any(d["here"] for d in facts["data"])
    assert "tales-draft" in run("lab").stdout
    monkeypatch.setenv("DECODELAB_PROFILE", "huge")
    assert "unknown profile 'huge'" in refused("lab")


def test_lab_opens_the_notebooks(monkeypatch):
    started = []
    monkeypatch.setattr("decodelab.cli.subprocess.run", lambda command: started.append(command) or subprocess.CompletedProcess(command, 0))
    run("lab", "--open")
    assert started[0][1:3] == ["-m", "jupyterlab"]
    assert started[0][3].endswith("nbs")
    monkeypatch.setattr("decodelab.cli.find_spec", lambda name: None)
    assert "decodelab[lab]" in refused("lab", "--open")
    monkeypatch.setattr("decodelab.core.zoo.checkout_root", lambda: None)
    assert "clone it" in refused("lab", "--open")


def test_experiment(monkeypatch, tmp_path):
    module = importlib.import_module("decodelab.experiments.diffusion.measure")
    monkeypatch.setattr(module, "experiment", lambda n=1: {"n": n}, raising=False)
    monkeypatch.setattr("decodelab.cli.function_kinds", lambda path, name: {"n": int})
    out = run("experiment", "diffusion/measure", "--set", "n=3", "--allow-dirty", "--json")
    assert json.loads(out.stdout) == {"n": 3}
    stored = json.loads((tmp_path / "results/tiny/diffusion/measure-full.json").read_text())
    assert stored["data"] == {"n": 3}
    assert "n=3.5 does not fit: n is a whole number" in refused("experiment", "diffusion/measure", "--set", "n=3.5")
    assert "the experiment of diffusion/measure has no setting 'm'; it has: n" in refused("experiment", "diffusion/measure", "--set", "m=3")
    monkeypatch.setattr("decodelab.lab.claims.store_result", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    full = run("experiment", "diffusion/measure", "--allow-dirty", code=2)
    assert json.loads(full.stdout) == {"n": 1}  # hours of work are shown when they cannot be kept
    assert "No space left on device" in full.stderr
    monkeypatch.setattr(module, "experiment", lambda: 3)
    assert "must return a dictionary" in refused("experiment", "diffusion/measure", "--allow-dirty")


def test_experiment_refuses():
    for name in ("sampling/nothing", "nowhere/base", "../cli", "magic"):
        message = refused("experiment", name)
        assert name in message
        assert all(known in message for known in full_experiments())


# export


def exportable() -> list[str]:
    names = []
    for name, method in decoders().items():
        try:
            method.decoder()
        except (TypeError, ValueError):
            continue
        if not method.needs_training:
            names.append(name)
    return names


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "pg_td")) for n in exportable()])
def test_export_round_trip(name, tmp_path, tales, masked, monkeypatch):
    model, tokenizer = masked if decoders()[name].family == "diffusion" else tales
    folder = tmp_path / name
    assert run("export", "hub", name, folder).stdout.strip() == str(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    settings = {"max_new_tokens": 12, "do_sample": False}
    try:
        torch.manual_seed(0)  # some choose at random even when they are greedy
        expected = model.generate(**inputs, **settings, custom_generate=decoders()[name].decoder())
    except ValueError:
        pytest.skip(f"{name} does not run on a plain causal model with its defaults")
    torch.manual_seed(0)
    shared = model.generate(**inputs, **settings, custom_generate=str(folder), trust_remote_code=True)
    assert shared.sequences.tolist() == expected.sequences.tolist()
    page = (folder / "README.md").read_text()
    assert "tags: [custom_generate, decodelab]" in page
    assert decoders()[name].url in page
    assert (folder / "custom_generate/requirements.txt").read_text() == "decodelab\n"


def test_exported_settings_reach_the_decoder(tmp_path, tales):
    model, tokenizer = tales
    run("export", "hub", "momentum", tmp_path / "m", "--set", "alpha=0.9", "--set", "k=3")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    settings = {"max_new_tokens": 40, "do_sample": False}
    hub = {"custom_generate": str(tmp_path / "m"), "trust_remote_code": True}
    expected = make_decoder("momentum", {"alpha": 0.9, "k": 3}).generate(model, **inputs, **settings)
    assert model.generate(**inputs, **settings, **hub).sequences.tolist() == expected.sequences.tolist()
    greedy = model.generate(**inputs, **settings)
    assert model.generate(**inputs, **settings, **hub, alpha=0.0).sequences.tolist() == greedy.tolist()
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**inputs, **settings, custom_generate=str(tmp_path / "m"), trust_remote_code=False)


def test_export_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("export", "hub", "momentum", tmp_path / "file")
    assert "k must be" in refused("export", "hub", "momentum", tmp_path / "m", "--set", "k=0")
    assert not (tmp_path / "m").exists()
    decoder = make_decoder("momentum", {})
    decoder.alpha = torch.tensor(0.5)
    with pytest.raises(ValueError, match="only plain values"):
        export_hub(decoder, tmp_path / "m")


# the README


def test_readme_is_the_index():
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_readme_lists_every_decoder():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\[`([A-Z]\w*)`\]\(nbs/\w+/", text))
    assert listed == {m.decoder.__name__ for m in decoders().values()}, "run nbs/index.ipynb again, then tools/readme.py"


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
