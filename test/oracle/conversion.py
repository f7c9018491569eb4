"""Tiny models of every family that converts: `draw SEED FOLDER` makes FOLDER/<family>, `check MADE EXPORTED CUT` looks at exports.

What was drawn is printed as JSON lines. A check loads the export with Transformers and with safetensors and holds it against what
was made: EXPORTED/<family> has the source's files, CUT/<family> is cut into smaller ones.
"""

import json
import os
import random
import sys

import torch
import transformers
from safetensors import safe_open

EXPERTS = dict(num_experts_per_tok=2)
FAMILIES = {
    "llama": (transformers.LlamaConfig, dict(head_dim=12, attention_bias=True, mlp_bias=True)),
    "qwen3_moe": (transformers.Qwen3MoeConfig, dict(EXPERTS, head_dim=12, moe_intermediate_size=16, num_experts=8, mlp_only_layers=[1])),
    "qwen2_moe": (transformers.Qwen2MoeConfig, dict(EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=8, mlp_only_layers=[1])),
    "olmoe": (transformers.OlmoeConfig, dict(EXPERTS, num_experts=8)),
    "mixtral": (transformers.MixtralConfig, dict(EXPERTS, num_local_experts=8)),
}


def draw(seed, folder):
    random.seed(seed)
    torch.manual_seed(seed)
    kv_heads = random.sample([2, 2, 4, 4, 8], len(FAMILIES))  # of 8: some are fewer than the ranks that share them
    for (family, (kind, fields)), kv in zip(FAMILIES.items(), kv_heads):
        dtype = random.choice([torch.bfloat16, torch.float32, torch.float16])
        sizes = dict(
            hidden_size=8 * random.choice([4, 6, 10]), intermediate_size=8 * random.choice([3, 4, 5]), num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=kv, vocab_size=random.choice([67, 101, 131]),
            max_position_embeddings=64, tie_word_embeddings=random.random() < 0.5, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        )
        saved = dict(max_shard_size=random.choice(["20KB", "60KB", "5GB"]), save_original_format=random.random() < 0.5)
        model = transformers.AutoModelForCausalLM.from_config(kind(**sizes, **fields), dtype=dtype)
        with torch.no_grad():
            for key, p in sorted(model.named_parameters()):
                p.copy_(1.0 + 0.3 * torch.randn_like(p) if "norm" in key else torch.randn_like(p) / p.shape[-1] ** 0.5)
        model.save_pretrained(os.path.join(folder, family), **saved)
        print(json.dumps(dict(family=family, dtype=str(dtype), **sizes, **saved)), flush=True)


def tensors_of(folder):
    """Name to dtype, shape, bytes and file, as the safetensors package sees them."""
    tensors = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), "pt") as f:
                for key in f.keys():
                    assert key not in tensors, (folder, key)
                    t = f.get_tensor(key)
                    tensors[key] = (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes(), name)
    return tensors


def logits_of(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    problems = {k: v for k, v in info.items() if v}
    assert not problems, (folder, problems)
    # Where a tensor lies depends on the files that it came from, and on that the order of PyTorch's sums.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    ids = torch.arange(24).reshape(2, 12) * 5 % 67
    with torch.no_grad():
        return model.eval()(ids).logits


def check(made, exported, cut):
    for family in FAMILIES:
        source = os.path.join(made, family)
        theirs, logits = tensors_of(source), logits_of(source)
        assert torch.isfinite(logits).all() and logits.abs().max() > 0
        for home in (exported, cut):
            folder = os.path.join(home, family)
            ours = tensors_of(folder)
            assert {k: v[:3] for k, v in ours.items()} == {k: v[:3] for k, v in theirs.items()}, (folder, "tensors")
            files = {key: value[3] for key, value in ours.items()}
            if home == exported:
                assert files == {key: value[3] for key, value in theirs.items()}, (folder, "files")
            index = os.path.join(folder, "model.safetensors.index.json")
            assert os.path.exists(index) == (len(set(files.values())) > 1), folder
            if os.path.exists(index):
                with open(index) as file:
                    assert json.load(file)["weight_map"] == files, (folder, "index")
            assert torch.equal(logits_of(folder), logits), (folder, "logits")
    print(f"equal: {', '.join(FAMILIES)}")


if __name__ == "__main__":
    command, *args = sys.argv[1:]
    draw(int(args[0]), args[1]) if command == "draw" else check(*args)
