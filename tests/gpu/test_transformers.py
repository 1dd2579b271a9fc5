"""transformers with attn_implementation="flash_attention_2" gives what its own attention gives.

Small random models, so that nothing is downloaded: Llama with grouped heads, and Gemma 2, whose
layers have windows and whose scores are capped.
"""

import importlib

import pytest
import torch

BF16 = torch.bfloat16
SIZES = {
    "vocab_size": 101,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


GEMMA2 = {
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 20,
    "attn_logit_softcapping": 2.0,
}

# Options, and the implementation to compare with: sdpa cannot cap scores.
MODELS = {"Llama": ({}, "sdpa"), "Gemma2": (GEMMA2, "eager")}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name, attention):
    transformers = importlib.import_module("transformers")  # takes seconds: not to collect tests
    config, model = (getattr(transformers, name + kind) for kind in ("Config", "ForCausalLM"))
    made = config(**SIZES, **MODELS[name][0], attn_implementation=attention)
    with torch.device("cpu"):
        return model._from_config(made, dtype=BF16).cuda()


def pair(name):
    """The model with this package, with transformers' own attention, and that in float32."""
    peer = MODELS[name][-1]
    ours, plain = build(name, "flash_attention_2"), build(name, peer)
    assert ours.config._attn_implementation == "flash_attention_2"
    exact = build(name, peer).float()
    for model in (plain, exact):
        model.load_state_dict(ours.state_dict())
    return ours, plain, exact


def assert_as_good(ours, plain, exact, what):
    """No further from float32 than twice the other implementation of the same dtype."""
    error, allowed = ((x.double() - exact.double()).abs().max() for x in (ours, plain))
    assert error <= 2 * allowed + 1e-2 * exact.abs().max(), f"{what}: {error} above {allowed}"


def tokens(batch, length):
    return torch.randint(2, SIZES["vocab_size"], (batch, length))


@every_model
def test_prefill_and_gradients(name):
    ids = tokens(2, 100)
    results = []
    for model in pair(name):
        model.zero_grad()
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad
        results.append((out.logits.detach(), gradient))
    for what, ours, plain, exact in zip(("logits", "gradient"), *results, strict=True):
        assert_as_good(ours, plain, exact, what)


@every_model
@pytest.mark.parametrize("side", ("left", "right"))
def test_padded_batches(name, side):
    ids, lengths = tokens(3, 60), (60, 13, 41)
    place = torch.arange(60)
    mask = torch.stack([place >= 60 - n if side == "left" else place < n for n in lengths]).long()
    logits = [
        model(ids * mask, attention_mask=mask, use_cache=False).logits.detach()[mask.bool()]
        for model in pair(name)
    ]
    assert_as_good(*logits, "logits")


@every_model
def test_generation_with_a_cache(name):
    """Step by step gives the logits of the whole sequence, and generate() runs, padded too."""
    ours, _, _ = pair(name)
    ids = tokens(2, 40)
    with torch.no_grad():
        whole = ours(ids, use_cache=False).logits
        cache, steps = None, []
        for begin, end in [(0, 25), *((i, i + 1) for i in range(25, 40))]:
            out = ours(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=5e-2, atol=5e-2)
        mask = torch.ones_like(ids)
        mask[1, :17] = 0
        made = ours.generate(
            ids * mask, attention_mask=mask, max_new_tokens=20, do_sample=False, use_cache=True
        )
        assert made.shape == (2, 60)
        # A padded prompt continues as it does by itself.
        alone = ours.generate(ids[1:, 17:], max_new_tokens=5, do_sample=False)
        assert (made[1, 40:43] == alone[0, 23:26]).float().mean() >= 0.6


@every_model
def test_packed_training_with_position_ids(name):
    """Sequences side by side in one row, told apart by their position ids alone."""
    lengths = (30, 1, 47)
    parts = [tokens(1, n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ours, plain, exact = pair(name)
    packed = ours(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
    by_part = [
        torch.cat([model(part, use_cache=False).logits for part in parts], 1)
        for model in (plain, exact)
    ]
    assert_as_good(packed.detach(), *(x.detach() for x in by_part), "logits")
    packed.float().square().mean().backward()
    gradient = ours.model.layers[0].self_attn.v_proj.weight.grad
    by_part[1].float().square().mean().backward()
    expected = exact.model.layers[0].self_attn.v_proj.weight.grad
    assert torch.cosine_similarity(gradient.float().flatten(), expected.flatten(), 0) > 0.99
