"""A drafter cut out of the target: which weights it shares, what its head leaves out, and that no head changes a text or a distribution."""

import copy

import pytest
import torch
from toys import added, exact_probs, fit, left_pad, plain, random_prompts, sample_counts, small_model
from transformers import AutoModelForCausalLM

from decodelab.speculative.drafters import DraftModel
from decodelab.speculative.layer_drafter import FrequentHead, export_llama, frequent_tokens, layer_drafter, merge_adapter
from decodelab.speculative.rsd import RSDC, RSDS

DECODERS = {
    "draft_model": lambda d: DraftModel(d, gamma=3),
    "auto": lambda d: DraftModel(d, gamma="auto"),
    "rsd_c": lambda d: RSDC(d, b=(2, 2)),
    "rsd_s": lambda d: RSDS(d, W=2, L=2),
}
every_decoder = pytest.mark.parametrize("name", list(DECODERS))


@every_decoder
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_greedy_text_is_that_of_plain_decoding(name, kind):
    model = small_model(kind)
    drafter = layer_drafter(model, (0,), torch.arange(0, model.config.vocab_size, 3))
    prompts = random_prompts(3, seed=2)
    out = DECODERS[name](drafter).generate(model, **left_pad(prompts), max_new_tokens=20, do_sample=False)
    assert added(out) == [plain(model, ids, 20) for ids in prompts]


@every_decoder
def test_joint_distribution_with_a_head_for_few_tokens(name, toy):
    torch.manual_seed(0)
    drafter = layer_drafter(toy, (0,), torch.tensor([1, 3]))
    assert fit(sample_counts(DECODERS[name](drafter), toy, 20_000), exact_probs(toy, [])) > 1e-3


def test_all_layers_are_the_target(llama):
    drafter = layer_drafter(llama, range(2))
    ids = random_prompts(1)[0]
    assert drafter(ids).logits.equal(llama(ids).logits)
    out = DraftModel(drafter, gamma=4).generate(llama, ids, max_new_tokens=21, do_sample=False)
    assert out.stats.tokens_per_forward == 21 / 5  # the prompt's forward gives one token, four rounds give five each


def test_layers_in_another_order_and_twice(llama):
    ids = random_prompts(1)[0]
    swapped = layer_drafter(llama, (1, 0, 1))
    by_hand = copy.deepcopy(llama)
    by_hand.config.num_hidden_layers = 3
    by_hand.model.layers = torch.nn.ModuleList([llama.model.layers[1], llama.model.layers[0], copy.deepcopy(llama.model.layers[1])])
    assert torch.allclose(swapped(ids, use_cache=False).logits, by_hand(ids, use_cache=False).logits, atol=1e-5)
    swapped.model.layers[0].mlp.up_proj.weight.data.zero_()  # a copy of its own
    assert swapped.model.layers[2].mlp.up_proj.weight.abs().sum() > 0
    assert llama.model.layers[1].mlp.up_proj.weight.abs().sum() > 0


def test_the_target_stays_as_it_is(llama):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    drafter = layer_drafter(llama, (1,), torch.arange(5))
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB"]
    width = llama.config.hidden_size
    merge_adapter(drafter, {names[0]: torch.ones(1, width), names[1]: torch.ones(width, 1)}, 2.0)
    change = drafter.model.layers[0].self_attn.q_proj.weight - llama.model.layers[1].self_attn.q_proj.weight
    assert torch.allclose(change, torch.full_like(change, 2.0), atol=1e-5)
    assert llama.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in llama.model.layers] == [0, 1]
    assert all(before[k].equal(v) for k, v in llama.state_dict().items())
    assert drafter.get_input_embeddings().weight.data_ptr() == llama.get_input_embeddings().weight.data_ptr()


def test_tokens_that_are_not_kept_have_no_probability():
    head = FrequentHead(torch.randn(6, 3), torch.tensor([0, 4]))
    probs = head(torch.randn(5, 3)).softmax(-1)
    assert probs[:, [1, 2, 3, 5]].eq(0).all()
    assert torch.allclose(probs.sum(-1), torch.ones(5))


@pytest.mark.parametrize(("size", "always", "kept"), [(2, [], [7, 9]), (3, [1], [1, 7, 9]), (4, [], [0, 5, 7, 9]), (1, [2], [2])])
def test_frequent_tokens(size, always, kept):
    assert frequent_tokens([[7, 9, 7], [9, 7, 5]], size, always).tolist() == kept


@pytest.mark.parametrize("tied", [False, True])
def test_an_ordinary_folder_is_the_same_drafter(tied, llama, tmp_path):
    target = copy.deepcopy(llama)
    target.config.tie_word_embeddings = tied
    if tied:
        target.lm_head.weight = target.model.embed_tokens.weight
    drafter = layer_drafter(target, (1, 0), torch.arange(0, 90, 3))
    names = [f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight" for x in "AB"]
    A, B = torch.randn(2, target.config.hidden_size), torch.randn(target.config.intermediate_size, 2)
    merge_adapter(drafter, dict(zip(names, (A, B))), 1.0)
    export_llama(drafter, target, tmp_path)
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_prompts(1)[0]
    kept = drafter(ids).logits.isfinite()
    assert kept.sum(-1).eq(30).all()
    assert torch.allclose(ordinary(ids).logits[kept], drafter(ids).logits[kept], atol=1e-6)
    whole = layer_drafter(target, (1, 0))  # with the target's head, as it is written
    merge_adapter(whole, dict(zip(names, (A, B))), 1.0)
    assert torch.allclose(ordinary(ids).logits, whole(ids).logits, atol=1e-6)
    out = DraftModel(ordinary, gamma=3).generate(target, ids, max_new_tokens=12, do_sample=False)
    assert added(out) == [plain(target, ids, 12)]


def test_only_llamas_are_written(tmp_path):
    model = small_model("gpt2")
    with pytest.raises(ValueError, match="GPT2LMHeadModel is no LlamaForCausalLM"):
        export_llama(layer_drafter(model, (0,)), model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [(), (2,), (-1,)])
def test_layers_that_are_not_there(layers, llama):
    with pytest.raises(ValueError, match="layers must be numbers from 0 to 1, at least one"):
        layer_drafter(llama, layers)


def test_an_adapter_of_gpt2_is_merged_the_other_way_round():
    peft = pytest.importorskip("peft")
    model = small_model("gpt2")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(layer_drafter(model, (0,)), config)
    ids = random_prompts(1)[0]
    expected = adapted(ids).logits
    merged = layer_drafter(model, (0,))
    merge_adapter(merged, peft.get_peft_model_state_dict(adapted), 2.0)
    assert torch.allclose(merged(ids).logits, expected, atol=1e-4)


def test_what_cannot_be_cut(llama):
    from transformers import T5Config, T5ForConditionalGeneration

    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 32, "decoder_start_token_id": 0}
    with pytest.raises(ValueError, match="must be a decoder-only model without adapters"):
        layer_drafter(T5ForConditionalGeneration(T5Config(**small)), (0,))
    for tokens in ([3, 1], [0, 97], []):
        with pytest.raises(ValueError, match="tokens must be ascending ids from 0 to 96"):
            layer_drafter(llama, (0,), torch.tensor(tokens, dtype=torch.long))
