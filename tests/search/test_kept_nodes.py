"""What the cache keeps when branches of a search are dropped."""

from dataclasses import dataclass

import torch

from decodelab.search.base import SearchDecoder


@dataclass
class Peeks(SearchDecoder):
    "Takes the better of two tokens and looks three tokens beyond each of them."

    keeps: bool = False  # the look-ahead stays in the cache

    def judges(self):
        return lambda prompt, texts: [sum(ids) % 7 for ids in texts]

    def expand(self, search, frontier):
        return search.top(frontier, 2)[0]

    def score(self, search, new):
        ahead = [p.fork() for p in new]
        search.grow(ahead, limit=3, sample=False)
        for p, far, value in zip(new, ahead, search.judge(ahead)):
            p.score, p.info["ahead"] = value, far.node

    def choose(self, search, frontier, new):
        return super().choose(search, frontier, [max(new, key=lambda p: p.score)])

    def nodes_kept(self, search, frontier):
        return [p.info["ahead"] for p in frontier] if self.keeps else super().nodes_kept(search, frontier)


def test_kept_nodes_change_no_text_and_save_tokens(llama):
    prompt = torch.tensor([[5, 9, 14, 33]])
    plain, saving = (Peeks(keeps=keeps).generate(llama, prompt, max_new_tokens=16, do_sample=False) for keeps in (False, True))
    assert saving.sequences.equal(plain.sequences)
    assert plain.stats.target_tokens > saving.stats.target_tokens
    assert saving.stats.target_forwards == plain.stats.target_forwards


def test_nothing_else_is_kept(llama):
    prompt = torch.tensor([[5, 9, 14, 33]])
    out = Peeks().generate(llama, prompt, max_new_tokens=16, do_sample=False)
    # the path, two candidates and their look-aheads
    assert out.stats.search[0]["stored"] <= 16 + 2 * 4
