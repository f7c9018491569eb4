"""Loads a model and a toy of its first layers with Transformers: nothing missing, nothing unexpected, the same hidden states.

Usage: toy.py WHOLE TOY [WHOLE TOY ...]. Float32. The last hidden state of a model comes behind the final norm, so it is left out.
"""
import sys

import torch
from transformers import AutoModelForCausalLM


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    assert not wrong, (folder, wrong)
    return model.eval()


for whole, toy in zip(sys.argv[1::2], sys.argv[2::2]):
    a, b = load(whole), load(toy)
    layers = b.config.num_hidden_layers
    assert layers < a.config.num_hidden_layers, (whole, layers)
    ids = torch.arange(12).reshape(1, 12) % a.config.vocab_size
    with torch.no_grad():
        x = a(ids, output_hidden_states=True).hidden_states
        y = b(ids, output_hidden_states=True)
    for i in range(layers):
        assert torch.equal(x[i], y.hidden_states[i]), (whole, i)
    assert torch.isfinite(y.logits).all()
    print(f"same: {toy}")
