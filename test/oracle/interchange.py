"""Makes Llama folders with Transformers, and checks what came back: `make DIR` and `check MADE EXPORTED CHECKPOINT NEW`."""

import hashlib
import os
import sys

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

BASE = dict(vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
CASES = {
    "plain": (dict(num_key_value_heads=2), torch.bfloat16),
    "tied_biases": (dict(num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True), torch.float32),
    "head_dim": (dict(num_key_value_heads=1, head_dim=24, rope_theta=5e5), torch.float16),
    "llama3": (
        dict(
            num_key_value_heads=2,
            rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        ),
        torch.bfloat16,
    ),
}


def make(folder):
    for seed, (name, (changes, dtype)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**BASE, **changes)).to(dtype)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
        model.save_pretrained(os.path.join(folder, name), max_shard_size=100_000 if seed % 2 == 0 else "5GB")


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    problems = {k: v for k, v in info.items() if v and k != "error_msgs"}
    assert not problems and not info.get("error_msgs"), (folder, info)
    return model


def check(made, exported, checkpoints, new):
    ids = torch.arange(24).reshape(2, 12) * 5 % 131
    for name in CASES:
        ours, theirs = load(os.path.join(exported, name)), load(os.path.join(made, name))
        a, b = ours.state_dict(), theirs.state_dict()
        assert list(a) == list(b), name
        for key in a:
            assert a[key].dtype == b[key].dtype and torch.equal(a[key].view(torch.uint8), b[key].view(torch.uint8)), (name, key)
        with torch.no_grad():
            assert torch.equal(ours.float()(ids).logits, theirs.float()(ids).logits), name
        assert ours.config.to_dict() == {**theirs.config.to_dict(), "_name_or_path": ours.config._name_or_path}, name
        # Tensor by tensor, as the safetensors package sees the files.
        for file in sorted(os.listdir(os.path.join(made, name))):
            if not file.endswith(".safetensors"):
                continue
            with safe_open(os.path.join(made, name, file), "pt") as f, safe_open(os.path.join(exported, name, file), "pt") as g:
                assert list(f.keys()) == list(g.keys()) and f.metadata() == g.metadata(), (name, file)
                for key in f.keys():
                    x, y = f.get_tensor(key), g.get_tensor(key)
                    assert x.dtype == y.dtype and x.shape == y.shape, (name, key)
                    assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), (name, key)
        # The checkpoint's files are plain safetensors.
        folder = os.path.join(checkpoints, name, "iter_0000000")
        keys = []
        for file in sorted(os.listdir(folder)):
            if file.endswith(".safetensors"):
                with safe_open(os.path.join(folder, file), "pt") as f:
                    keys += [key.split("@")[0] for key in f.keys()]
                    assert all(f.get_tensor(k).numel() > 0 for k in f.keys())
        assert "decoder.layers.0.self_attention.linear_qkv.weight" in keys, keys
    model = load(new)
    digest = hashlib.sha256(model.get_input_embeddings().weight.detach().numpy().tobytes()).hexdigest()
    print(f"equal: {len(CASES)} folders; a new folder loads ({digest[:8]})")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](*sys.argv[2:])
