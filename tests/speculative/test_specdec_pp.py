"""SpecDec++: the head, its loss and its data, the stop rule against a rule written down by itself, and that no head changes the text."""

import copy
import itertools
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2 as chi2_test
from toys import EOS, left_pad, random_prompts, small_model

from decodelab.core.tree import Tree
from decodelab.speculative.drafters import DraftModel
from decodelab.speculative.model_drafter import example_drafter
from decodelab.speculative.specdec_pp import AcceptanceHead, AcceptanceHeadConfig, SpecDecPP, load_head

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "top_k": 0}


@pytest.fixture(scope="module")
def drafter(llama):
    return example_drafter(llama)


def sharp_head(seed=0, width=32, D=1):
    "A random head whose answers depend strongly on the text."
    torch.manual_seed(seed)
    head = AcceptanceHead(AcceptanceHeadConfig(width, D)).eval()
    with torch.no_grad():
        head.out.weight.mul_(30)
    return head


class Answers:
    "A head that gives the same answer everywhere."

    def __init__(self, answer, width=32, device="cpu"):
        self.answer, self.config, self.device = answer, AcceptanceHeadConfig(width), torch.device(device)

    def probability(self, hidden):
        return hidden.new_full(hidden.shape[:-1], self.answer, dtype=torch.float32)


def run(decoder, model, prompt, seed=0, new=24, **kwargs):
    torch.manual_seed(seed)
    return decoder.generate(model, prompt, max_new_tokens=new, **(kwargs or SAMPLED))


# the head


def test_head_by_hand():
    head = sharp_head(width=8, D=2)
    e = torch.randn(3, 8, dtype=torch.float64)
    x = e.float()
    for block in head.blocks:
        y = x @ block.weight.T + block.bias
        x = x + y * torch.sigmoid(y)
    reject, accept = (x @ head.out.weight.T + head.out.bias).unbind(-1)
    assert torch.allclose(head.probability(e), torch.sigmoid(accept - reject), atol=1e-6)


def test_shared_blocks():
    "One matrix, applied D times: equal to D blocks with the same weights."
    shared = AcceptanceHead(AcceptanceHeadConfig(8, D=3, share_blocks=True))
    assert len(shared.blocks) == 1
    apart = AcceptanceHead(AcceptanceHeadConfig(8, D=3))
    for block in apart.blocks:
        block.load_state_dict(shared.blocks[0].state_dict())
    apart.out.load_state_dict(shared.out.state_dict())
    e = torch.randn(5, 8)
    assert torch.equal(shared.probability(e), apart.probability(e))
    with torch.no_grad():
        apart.blocks[1].weight.add_(1.0)
    assert not torch.allclose(shared.probability(e), apart.probability(e))
    for share in (False, True):
        assert len(AcceptanceHead(AcceptanceHeadConfig(8, D=0, share_blocks=share)).blocks) == 0


def test_parameters():
    for width, D in ((8, 0), (16, 3)):
        head = AcceptanceHead(AcceptanceHeadConfig(width, D))
        assert sum(p.numel() for p in head.parameters()) == D * (width**2 + width) + 2 * width + 2


@pytest.mark.parametrize("bad", [{"hidden_size": 0}, {"D": -1}, {"w_rej": 0.0}])
def test_bad_config(bad):
    with pytest.raises(ValueError, match="hidden_size and w_rej must be positive and D at least 0"):
        AcceptanceHeadConfig(**bad)


def test_save_and_load(tmp_path):
    head = sharp_head()
    head.save_pretrained(tmp_path)
    again = load_head(tmp_path)
    e = torch.randn(4, 32)
    assert torch.equal(head.probability(e), again.probability(e))
    assert again.config.to_dict() == head.config.to_dict()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ValueError, match="file cut short"):
        load_head(tmp_path)


def test_an_unknown_head():
    with pytest.raises(ValueError, match="unknown zoo model 'tales-specdec'"):
        load_head("tales-specdec")


def test_example(llama, tales):
    model, _ = tales
    found, zoo = SpecDecPP.method.example(model).head, load_head("tales-specdec-pp")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), zoo.parameters()))
    assert SpecDecPP.method.example(llama).head.config.hidden_size == 32


# fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"h": -0.1}, "must be at least 0, got -0.1"),
        ({"K_min": 0}, "K_min must be positive and at most K_max, got 0 and 20"),
        ({"K_min": 5, "K_max": 4}, "K_min must be positive and at most K_max, got 5 and 4"),
        ({"head": None}, "a head is needed to stop"),
    ],
)
def test_bad_fields(drafter, fields, message):
    with pytest.raises(ValueError, match=message):
        SpecDecPP(**{"drafter": drafter, "head": Answers(0.5), **fields})


def test_a_head_of_another_width_or_device(llama, drafter):
    prompt = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="width 16, the drafter has 32"):
        run(SpecDecPP(drafter, Answers(0.5, width=16)), llama, prompt)
    with pytest.raises(ValueError, match="the head is on meta, the prompt on cpu"):
        run(SpecDecPP(drafter, Answers(0.5, device="meta")), llama, prompt)


# the stop rule


def rule(answers, most, h, K_min):
    "Candidates of a round, from the head's answers for Y_1, Y_2, ...: the rule of the paper, by itself."
    k, cum = 0, 1.0
    while True:
        if k >= 1:
            cum *= answers(k)  # the forward that gives Y_{k+1} has judged Y_k
        k += 1
        if k >= most or (k >= K_min and 1 - cum > h):
            return k


@settings(max_examples=20)
@given(seed=st.integers(0, 999), h=st.floats(0, 1), K_min=st.integers(1, 4), extra=st.integers(0, 6))
def test_candidates_follow_the_rule(llama, drafter, seed, h, K_min, extra):
    "Answers are those of the states that read the candidates, and the length is what the rule says of them."
    head, prompt = sharp_head(seed), random_prompts(1, seed=seed)[0]
    decoder = SpecDecPP(drafter, head, h=h, K_min=K_min, K_max=K_min + extra, trace=True)
    out = run(decoder, llama, prompt, seed, eos_token_id=None, **SAMPLED)
    text, left = prompt[0].tolist(), 24
    for step, length in zip(out.trace, out.stats.draft_lengths[0], strict=True):
        drafted = step.info["tokens"][1:]
        assert len(drafted) == length
        if left == 1:
            assert length == 0
            break
        with torch.no_grad():
            states = drafter(torch.tensor([text + drafted]), output_hidden_states=True).hidden_states[-1][0, len(text) :]
            answers = head.probability(states).tolist()
        assert step.info["answers"] == pytest.approx(answers[: length - 1], abs=1e-4)
        close = min((abs(1 - math.prod(answers[:k]) - h) for k in range(1, length)), default=1.0) < 1e-4
        assert close or length == rule(lambda k, a=answers: a[k - 1] if k <= len(a) else 1.0, min(decoder.K_max, left - 1), h, K_min)
        text += step.tokens
        left -= len(step.tokens)


def test_the_joint_probability_decides(llama, drafter):
    "Answers of 0.8 never reach 0.5 alone; their product does with the fifth candidate (0.8^4 = 0.41)."
    prompt = torch.tensor([[5, 6, 7]])
    decoder = SpecDecPP(drafter, Answers(0.8), h=0.5)
    assert run(decoder, llama, prompt).stats.draft_lengths[0][0] == 5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"h": 0.0}, 2),  # the first test has nothing to multiply
        ({"h": 0.0, "K_min": 1}, 2),
        ({"h": 0.0, "K_min": 1, "K_max": 1}, 1),
        ({"h": 0.0, "K_min": 4}, 4),
        ({"h": 1.0, "K_max": 7}, 7),
    ],
)
def test_a_head_that_trusts_nothing(llama, drafter, fields, expected):
    decoder = SpecDecPP(drafter, Answers(0.0), **fields)
    out = run(decoder, llama, torch.tensor([[5, 6, 7]]), eos_token_id=None, **SAMPLED)
    assert out.stats.draft_lengths[0][0] == expected


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("way", ["h = 1", "K_min = K_max", "trusts"])
def test_fixed_length_token_for_token(llama, drafter, K, way):
    fields = {"h = 1": {"h": 1.0, "K_min": 1}, "K_min = K_max": {"h": 0.0, "K_min": K}, "trusts": {"K_min": 1}}[way]
    head = Answers(1.0) if way == "trusts" else sharp_head()
    for seed, prompt in enumerate(random_prompts(5, seed=3)):
        ours = run(SpecDecPP(drafter, head, K_max=K, **fields), llama, prompt, seed)
        assert ours.sequences.equal(run(DraftModel(drafter, K), llama, prompt, seed).sequences)


def test_a_round_is_never_shorter_for_a_larger_h(llama, drafter):
    for seed, prompt in enumerate(random_prompts(8, seed=4)):
        lengths = []
        for h in (0.0, 0.2, 0.5, 0.8, 0.95, 1.0):
            decoder = SpecDecPP(drafter, sharp_head(seed), h=h)
            out = run(decoder, llama, prompt, seed, eos_token_id=None, **SAMPLED)
            lengths.append(out.stats.draft_lengths[0][0])
        assert lengths == sorted(lengths)


def test_drafting_ends_with_the_text(llama, drafter):
    "A drafter that always writes an end of sequence submits it, and nothing behind it."
    ending = copy.deepcopy(drafter)
    with torch.no_grad():
        ending.lm_head.weight.zero_()
        ending.lm_head.weight[EOS] = ending.model.norm.weight * 0 + 1.0
    decoder = SpecDecPP(ending, Answers(1.0), K_max=6)
    out = run(decoder, llama, torch.tensor([[5, 6, 7]]), logits_processor=[Prefer(EOS, ending)], **SAMPLED)
    assert set(out.stats.draft_lengths[0]) == {1}
    assert out.continuations[0][-1] == EOS


class Prefer:
    "Leaves one token only: for drafter and target alike."

    rowwise = True

    def __init__(self, token, model):
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([self.token]), 0.0)


# exactness


@settings(max_examples=20)
@given(seed=st.integers(0, 999), h=st.sampled_from([0.0, 0.3, 0.7, 1.0]), K_max=st.integers(2, 12))
def test_no_head_changes_the_text(llama, drafter, seed, h, K_max):
    prompt = random_prompts(1, lengths=(1, 8), seed=seed)[0]
    expected = llama.generate(prompt, max_new_tokens=20, do_sample=False)
    assert run(SpecDecPP(drafter, sharp_head(seed), h=h, K_max=K_max), llama, prompt, new=20, **GREEDY).sequences.equal(expected)


def test_rows_stop_where_they_would_alone(llama, drafter):
    prompts = random_prompts(5, seed=8)
    decoder = SpecDecPP(drafter, sharp_head(2), h=0.6)
    together = decoder.generate(llama, **left_pad(prompts), max_new_tokens=20, do_sample=False)
    lengths = together.stats.draft_lengths
    assert len({n for row in lengths for n in row}) > 2  # rows do differ
    for row, prompt in enumerate(prompts):
        alone = run(decoder, llama, prompt, new=20, **GREEDY)
        assert together.continuations[row].equal(alone.continuations[0])
        assert lengths[row] == alone.stats.draft_lengths[0]


class Withdraws(SpecDecPP):
    "WRONG: takes the third candidate back after having seen that the drafter gave it little."

    def draft(self, call, roots):
        draft = super().draft(call, roots)
        if draft.probs is not None and draft.tokens.shape[1] > 3:
            given = draft.probs[:, 2].gather(1, draft.tokens[:, 3:4])[:, 0]
            parents = draft.tree.parents.expand(draft.tokens.shape).clone()
            parents[:, 3][given < 0.15] = -1
            draft.tree = Tree(parents)
        return draft


def test_the_sampled_distribution():
    "Joint distribution of three tokens, where the head decides between two and three candidates in the first round."
    target, drafter = small_model(vocab=6, hidden=16, seed=1), small_model(vocab=6, hidden=16, seed=4)
    drafter.generation_config.eos_token_id = target.generation_config.eos_token_id = None
    start, joint = torch.tensor([[2, 3]]), torch.ones(1)
    with torch.no_grad():
        for m in (target, drafter):
            m.lm_head.weight[:] = 0.12 * torch.randn_like(m.lm_head.weight)
        for n in range(3):
            texts = torch.tensor([*itertools.product(range(6), repeat=n)], dtype=torch.long)
            joint = (joint[:, None] * target(torch.cat([start.expand(6**n, -1), texts], 1)).logits[:, -1].softmax(-1)).flatten()
    draws = 20_000
    assert float(draws * joint.min()) > 5  # for the chi-square test

    def tail(cls):
        decoder, counts, lengths = cls(drafter, sharp_head(3, width=16), h=0.5, K_max=3), 0, Counter()
        torch.manual_seed(0)
        for _ in range(10):
            out = decoder.generate(target, start.expand(draws // 10, -1), max_new_tokens=4, eos_token_id=None, **SAMPLED)
            counts += torch.bincount(out.sequences[:, 2:5] @ torch.tensor([36, 6, 1]), minlength=216).double()
            lengths.update(row[0] for row in out.stats.draft_lengths)
        assert set(lengths) == {2, 3} and min(lengths.values()) > draws / 20, lengths  # the head was asked, and gave both answers
        expected = draws * joint.double()
        return chi2_test.sf(float(((counts - expected) ** 2 / expected).sum()), 215)

    assert tail(SpecDecPP) > 0.01
    assert tail(Withdraws) < 1e-6


# training

training = pytest.importorskip("decodelab.training.specdec_pp", exc_type=ImportError)


@given(a=st.floats(0, 1), w=st.floats(0.1, 20))
def test_calibration_is_an_inverse(a, w):
    answer = training.pessimistic(a, w)
    assert training.calibrated(answer, w) == pytest.approx(a, abs=1e-9)
    assert 0 <= answer <= 1
    assert w < 1 or answer <= a + 1e-12


@pytest.mark.parametrize("w", [1.0, 6.0])
def test_the_loss_is_least_at_the_pessimistic_answer(w):
    a = torch.tensor([0.1, 0.5, 0.63, 0.95, torch.nan], dtype=torch.float64)

    def slope(answer):
        logits = torch.stack([torch.zeros_like(answer), (answer / (1 - answer)).log()], -1).requires_grad_()
        training.acceptance_loss(logits, a, w).backward()
        return logits.grad

    best = training.pessimistic(a.nan_to_num(0.5), w)
    assert slope(best)[:4].abs().max() < 1e-6
    assert slope(a.nan_to_num(0.5)).abs().max() > 1e-3 or w == 1.0
    assert slope(best)[4].abs().max() == 0  # no label, no loss


def test_the_loss_by_hand():
    logits, a = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0.7, 0.2])
    P = logits.softmax(-1)[:, 1]
    terms = 6 * (1 - a) * -(1 - P).log() + a * -P.log()
    assert training.acceptance_loss(logits, a, 6.0) == pytest.approx(float(terms.sum() / (6 * (1 - a) + a).sum()), rel=1e-5)
    assert training.acceptance_loss(logits, torch.full((2,), torch.nan)) == 0


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_labels_by_force(llama, drafter, temperature):
    texts, starts = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]], [2, 1]
    torch.manual_seed(0)
    mixed, labels = training.label_batch(llama, drafter, texts, starts, r=0.3, temperature=temperature)
    labelled = 0
    for row, (text, start) in enumerate(zip(texts, starts)):
        assert labels[row, :start].isnan().all()
        assert labels[row, len(text) :].isnan().all()
        for i in range(start, len(text)):
            if labels[row, i].isnan():
                assert mixed[row, i] == text[i]
                continue
            with torch.no_grad():
                raw = [m(torch.tensor([text[:i]])).logits[0, -1] for m in (llama, drafter)]
            token = int(mixed[row, i])
            if temperature == 0:
                assert token == raw[1].argmax()
                assert labels[row, i] == float(token == raw[0].argmax())
            else:
                p, q = ((x / temperature).softmax(-1)[token] for x in raw)
                assert float(labels[row, i]) == pytest.approx(min(1.0, float(p / q)), rel=1e-3)
            labelled += 1
    assert labelled > 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 1.0}, r"r must lie in \[0, 1\)"),
        ({"temperature": -1.0}, "temperature be at least 0"),
        ({"steps": 0}, "must be positive"),
    ],
)
def test_bad_recipes(fields, message):
    with pytest.raises(ValueError, match=message):
        training.AcceptanceHeadRecipe(**fields)


def test_prompts(monkeypatch):
    monkeypatch.setenv("DECODELAB_DATA", "")
    from decodelab.lab.prompts import tale_prompts
    from decodelab.training import target_texts

    chosen = target_texts.training_prompts(300, seed=2)
    assert len(set(chosen)) == 300
    assert not set(chosen) & set(tale_prompts(500, seed=0))
    assert chosen == target_texts.training_prompts(300, seed=2)
    with pytest.raises(ValueError, match="different prompts: ask for fewer"):
        target_texts.training_prompts(40_000)


@pytest.fixture
def small_recipe():
    return training.AcceptanceHeadRecipe(
        "small", D=1, prompts=6, held_out=4, new_tokens=6, batch_size=2, steps=8, save_every=4, eval_every=4, learning_rate=1e-2
    )


def test_a_killed_run_ends_like_a_whole_one(tales, tmp_path, monkeypatch, small_recipe):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("DECODELAB_DATA", "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    model, tokenizer = tales
    trio = (model, example_drafter(model), tokenizer)
    whole = training.train_acceptance_head(small_recipe, tmp_path / "whole", trio)

    class Killed(Exception):
        pass

    def save_then_die(self, *args, **kwargs):
        kept(self, *args, **kwargs)
        raise Killed

    kept = training.HeadTrainer._save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(training.HeadTrainer, "_save_checkpoint", save_then_die)
        with pytest.raises(Killed):
            training.train_acceptance_head(small_recipe, tmp_path / "killed", trio)
    with monkeypatch.context() as patch:  # the target need not write again
        patch.setattr(training, "build_data", None)
        again = training.train_acceptance_head(small_recipe, tmp_path / "killed", trio)
    assert again["held_out"] == whole["held_out"]
    a, b = (load_head(tmp_path / n) for n in ("whole", "killed"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), small_recipe.head(64).parameters()))
    card = training.head_card(tmp_path / "whole")
    assert "decodelab train specdec-pp --set " in card and " --set D=1" in card
    assert (tmp_path / "whole/README.md").read_text() == card
    assert json.loads((tmp_path / "whole/training.json").read_text())["recipe"]["w_rej"] == 6.0


def test_data_of_another_recipe_are_built_anew(tales, tmp_path, monkeypatch, small_recipe):
    monkeypatch.setenv("DECODELAB_DATA", "")
    model, tokenizer = tales
    drafter, path = example_drafter(model), tmp_path / "data.safetensors"
    train, test = training.cached_data(model, drafter, tokenizer, small_recipe, path)
    assert (len(train), len(test)) == (6, 4)
    same, _ = training.cached_data(model, drafter, tokenizer, small_recipe, path)
    assert torch.equal(same.input_ids, train.input_ids)
    small_recipe.new_tokens = 3
    other, _ = training.cached_data(model, drafter, tokenizer, small_recipe, path)
    assert int((~other.labels.isnan()).sum()) < int((~train.labels.isnan()).sum())
    assert set(other[0]) == {"input_ids", "labels"}


def test_continuations_end_with_the_text(tales, small_recipe):
    model, tokenizer = tales
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = [2, int(model.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=1)[0, -1])]
    small_recipe.temperature = 0.0
    data = training.build_data(ending, example_drafter(model), tokenizer, ["Once upon"], small_recipe)
    assert int((~data.labels.isnan()).sum()) <= 1


def test_no_card_without_figures(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no training\.json"):
        training.head_card(tmp_path)


def test_the_command(monkeypatch, tmp_path):
    from decodelab.cli import _recipe

    recipe, train = _recipe("specdec-pp", ["w_rej=1", "D=0"])
    assert (recipe.w_rej, recipe.D) == (1.0, 0)
    assert train is training.train_head
    with pytest.raises(ValueError, match="recipe specdec-pp has no setting 'w'"):
        _recipe("specdec-pp", ["w=1.0"])
