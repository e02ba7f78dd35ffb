"""Searches and sampling decoders on a real instruction model, where it was fetched: SmolLM2-135M-Instruct, float32.

At its limit setting each is plain decoding, token for token, and a padded batch gives every row the text that it gets alone.
"""

import math

import pytest
import torch
from toys import METHODS

from decodelab import load
from decodelab.core.fetched import fetched_folder
from decodelab.sampling.base import Autoregressive, ContrastiveSearch
from decodelab.sampling.caad import CAAD, GroundingSpace
from decodelab.sampling.cntp import CNTP
from decodelab.sampling.min_p import MinP
from decodelab.sampling.momentum import Momentum
from decodelab.search.a_star import AStar
from decodelab.search.classics import BeamSearch, BestOfN, BudgetForcing, ParticleFiltering, SelfConsistency
from decodelab.search.deal import DeAL, SegmentDeAL
from decodelab.search.first_finish import FirstFinish, LastFinish
from decodelab.search.pg_td import PGTD
from decodelab.search.scorers import reads
from decodelab.search.transfer_q import TransferQ

pytestmark = pytest.mark.small
QUESTIONS = ["What is 17 + 25? Think step by step.", "Name three rivers."]
NEW = 8


@reads("ids")
def varied(texts):
    "A reward in [0, 1) without structure."
    return [(sum((i + 1) * t for i, t in enumerate(ids)) % 37) / 37 for ids in texts]


def grounded(model, **fields):
    return CAAD(GroundingSpace(model, [([9, 19, 29], [[39, 49, 59]]), ([11, 21], [[31, 41]])], window=4), **fields)


# name -> the decoder at a setting at which it is greedy search
GREEDY = {
    "autoregressive": lambda model: Autoregressive(),
    "contrastive_search": lambda model: ContrastiveSearch(k=1),
    "min_p": lambda model: MinP(),
    "momentum": lambda model: Momentum(alpha=0.0),
    "caad": lambda model: grounded(model, alpha=0.0),
    "cntp": lambda model: CNTP(),
    "a_star": lambda model: AStar(step_tokens=4),
    "beam_search": lambda model: BeamSearch(beams=1),
    "best_of_n": lambda model: BestOfN(n=1),
    "self_consistency": lambda model: SelfConsistency(n=1),
    "first_finish": lambda model: FirstFinish(n=1),
    "last_finish": lambda model: LastFinish(n=1),
    "particle_filtering": lambda model: ParticleFiltering(n=1, step_tokens=4),
    "budget_forcing": lambda model: BudgetForcing(waits=0),
    "deal": lambda model: DeAL(varied, k=3, lookahead=2, lam=0.0),
    "segment_deal": lambda model: SegmentDeAL(varied, segment_len=4, n_proposals=1),
    "pg_td": lambda model: PGTD(varied, rollouts=1),
    "transfer_q": lambda model: TransferQ(scorer=varied, k=3, alpha=math.inf),
}
# and at one at which it is ancestral sampling
SAMPLING = {
    "min_p": lambda model: MinP(p_base=0.0),
    "caad": lambda model: grounded(model, tau=1.0),
    "cntp": lambda model: CNTP(n_max=1),
    "a_star": lambda model: AStar(varied, k=1, step_tokens=4),
    "best_of_n": lambda model: BestOfN(n=1),
    "self_consistency": lambda model: SelfConsistency(n=1),
    "first_finish": lambda model: FirstFinish(n=1),
    "last_finish": lambda model: LastFinish(n=1),
    "particle_filtering": lambda model: ParticleFiltering(n=1, step_tokens=4),
    "budget_forcing": lambda model: BudgetForcing(waits=0),
    "transfer_q": lambda model: TransferQ(scorer=varied, k=20, alpha=math.inf),
}
# at work, without random numbers
WORKING = {
    "contrastive_search": lambda model: ContrastiveSearch(k=3),
    "momentum": lambda model: Momentum(alpha=0.5),
    "caad": lambda model: grounded(model, tau=0.0, alpha=0.3),
    "a_star": lambda model: AStar(varied, k=2, step_tokens=4),
    "beam_search": lambda model: BeamSearch(beams=3),
    "deal": lambda model: DeAL(varied, k=3, lookahead=2, lam=4.0, beams=2),
    "segment_deal": lambda model: SegmentDeAL(varied, segment_len=4, n_proposals=3, keep=2),
    "pg_td": lambda model: PGTD(varied, rollouts=4),
    "transfer_q": lambda model: TransferQ(scorer=varied, k=3, alpha=0.1, rollout_tokens=2),
}


@pytest.fixture(scope="module")
def asked():
    "The model, each question by itself, and both as one padded batch."
    try:
        fetched_folder("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = load("smollm2")
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True) for q in QUESTIONS]
    alone = [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in texts]
    return model, alone, tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)


@pytest.fixture(scope="module")
def greedy(asked):
    model, alone, _ = asked
    return [model.generate(**inputs, max_new_tokens=NEW, do_sample=False) for inputs in alone]


def test_every_search_and_sampling_decoder_is_here():
    known = {name for name, m in METHODS.items() if m.family in ("search", "sampling") and not m.needs_training}
    assert known == set(GREEDY)
    assert set(SAMPLING) | set(WORKING) <= known


@pytest.mark.parametrize("name", list(GREEDY))
def test_at_its_limit_it_is_greedy_search(name, asked, greedy):
    model, alone, _ = asked
    assert GREEDY[name](model).generate(model, **alone[0], max_new_tokens=NEW, do_sample=False).sequences.equal(greedy[0])


@pytest.mark.parametrize("name", list(SAMPLING))
def test_at_its_limit_it_is_sampling(name, asked):
    model, alone, _ = asked
    texts = []
    for decoder in (Autoregressive(), SAMPLING[name](model)):
        torch.manual_seed(3)
        rules = {"max_new_tokens": NEW, "do_sample": True, "top_k": 20, "temperature": 1.2}
        texts.append(decoder.generate(model, **alone[0], **rules).sequences.tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", list(WORKING))
def test_a_padded_batch_gives_each_row_its_own_text(name, asked):
    model, alone, batch = asked
    decoder, rules = WORKING[name](model), {"max_new_tokens": NEW, "do_sample": False}
    singles = [decoder.generate(model, **inputs, **rules).continuations[0].tolist() for inputs in alone]
    assert [c.tolist() for c in decoder.generate(model, **batch, **rules).continuations] == singles


@pytest.mark.parametrize("name", [n for n in GREEDY if n not in WORKING])
def test_a_padded_batch_is_greedy_search_of_each_row(name, asked, greedy):
    model, alone, batch = asked
    found = GREEDY[name](model).generate(model, **batch, max_new_tokens=NEW, do_sample=False)
    expected = [text[0, inputs.input_ids.shape[1] :].tolist() for text, inputs in zip(greedy, alone)]
    assert [c.tolist() for c in found.continuations] == expected
