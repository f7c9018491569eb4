"""Draws tiny random mixtures of experts with Transformers and writes what it computes from them. Arguments: SEED FOLDER [COUNT]; the committed
fixtures are those of `PYTHON test/oracle/draw_moe.py 7 test/fixtures/moe_parity 2`, those of qwen2_moe of seed 11.

FOLDER/<family><i>: a Hugging Face folder, in.safetensors, and expected.safetensors with logits, loss, gradients
and the greedy continuation of the first 8 tokens, in float32.
Models are drawn until no token's choice of experts is decided by less than 1e-4. What was drawn is printed as JSON lines.
"""

import json
import os
import random
import sys

import torch
import transformers
from safetensors.torch import save_file

MARGIN = 1e-4


def common(kv, heads):
    return dict(hidden_size=heads * random.choice([8, 10]), num_hidden_layers=random.choice([2, 3]), num_attention_heads=heads,
                num_key_value_heads=kv, vocab_size=random.choice([67, 101]), max_position_embeddings=64, bos_token_id=1,
                eos_token_id=2, pad_token_id=None, attention_dropout=0.0, tie_word_embeddings=random.random() < 0.3,
                rms_norm_eps=random.choice([1e-5, 1e-6]), router_aux_loss_coef=0.01)


def qwen3_moe(i):
    kv = random.choice([2, 4])
    heads = kv * random.choice([1, 2])
    experts = random.choice([4, 6])
    return transformers.Qwen3MoeConfig(
        **common(kv, heads), head_dim=random.choice([8, 16]), intermediate_size=48, moe_intermediate_size=random.choice([16, 24]),
        num_experts=experts, num_experts_per_tok=random.choice([1, 2, 3]), norm_topk_prob=i % 2 == 0,
        mlp_only_layers=[1] if i % 3 == 0 else [], attention_bias=i % 2 == 1)


def qwen2_moe(i):
    kv = random.choice([2, 4])
    heads = kv * random.choice([1, 2])
    # One normalised choice weighs 1 whatever the router says: its gradient would be rounding alone.
    chosen = [2, 3] if i % 2 == 1 else [1, 2, 3]
    return transformers.Qwen2MoeConfig(
        **common(kv, heads), intermediate_size=48, moe_intermediate_size=random.choice([16, 24]), qkv_bias=i % 2 == 0,
        shared_expert_intermediate_size=random.choice([32, 40]), num_experts=random.choice([4, 6]),
        num_experts_per_tok=random.choice(chosen), norm_topk_prob=i % 2 == 1, mlp_only_layers=[1] if i % 3 == 1 else [])


def olmoe(i):
    heads = random.choice([2, 4])
    return transformers.OlmoeConfig(
        **common(heads, heads), intermediate_size=random.choice([16, 24]), num_experts=random.choice([4, 6]),
        num_experts_per_tok=random.choice([1, 2, 3]), norm_topk_prob=i % 2 == 1, clip_qkv=[None, 1.5][i % 2])


def mixtral(i):
    kv = random.choice([2, 4])
    return transformers.MixtralConfig(
        **common(kv, kv * random.choice([1, 2])), intermediate_size=random.choice([16, 24]), num_local_experts=random.choice([4, 6]),
        num_experts_per_tok=2, sliding_window=[None, 5][i % 2])


FAMILIES = dict(qwen3_moe=qwen3_moe, olmoe=olmoe, mixtral=mixtral, qwen2_moe=qwen2_moe)


def model_of(config):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, p in sorted(model.named_parameters()):
            if "norm" in key:
                p.copy_(1.0 + 0.3 * torch.randn_like(p))
            elif key.endswith("bias"):
                p.copy_(0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.2 if "embed" in key else 1.3 / p.shape[-1] ** 0.5))
    return model


def margins(model, inputs):
    """The least difference between the last chosen expert's probability and the next one's."""
    with torch.no_grad():
        logits = model(**inputs, output_router_logits=True).router_logits
    k = model.config.num_experts_per_tok
    least = 1.0
    for layer in logits:
        top = torch.softmax(layer.float(), -1).sort(-1, descending=True).values
        if k < top.shape[-1]:
            least = min(least, (top[:, k - 1] - top[:, k]).min().item())
    return least


def draw(family, i, folder):
    config = FAMILIES[family](i)
    while True:
        model = model_of(config)
        batch, length = random.choice([1, 2, 3]), random.choice([9, 14, 20])
        ids = torch.randint(0, config.vocab_size, (batch, length))
        inputs = dict(input_ids=ids)
        if margins(model, inputs) > MARGIN:
            break
    labels = ids.clone()
    labels[torch.rand(batch, length) < 0.15] = -100
    labels[0, -1] = ids[0, -1]
    out = model(**inputs, labels=labels)
    out.loss.backward()
    model.save_pretrained(folder, save_original_format=True)
    gradients = {k: p.grad.detach() for k, p in model.named_parameters()}
    expected = dict(logits=out.logits.detach().contiguous(), loss=out.loss.detach().reshape(1))
    model.generation_config.eos_token_id = None
    greedy = model.generate(ids[:1, :8], max_new_tokens=20, do_sample=False, pad_token_id=0)[0, 8:]
    expected["greedy"] = greedy.float()
    expected.update({"grad." + k: v.contiguous() for k, v in unstacked(gradients, config).items()})
    save_file({**inputs, "labels": labels}, os.path.join(folder, "in.safetensors"))
    save_file(expected, os.path.join(folder, "expected.safetensors"))
    fields = ["num_attention_heads", "num_key_value_heads", "num_experts_per_tok"]
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    print(json.dumps(dict(family=family, folder=folder, width=width, **{f: getattr(config, f) for f in fields})), flush=True)


def unstacked(gradients, config):
    """Gradients under the names of the hub's checkpoints: experts one by one, gate and up apart."""
    names = ("w1", "w3", "w2") if config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for key, g in gradients.items():
        head, _, tail = key.rpartition(".mlp.")
        block = "block_sparse_moe" if config.model_type == "mixtral" else "mlp"
        if tail == "experts.gate_up_proj":
            for e in range(g.shape[0]):
                gate, up = g[e].chunk(2, dim=0)
                found[f"{head}.{block}.experts.{e}.{names[0]}.weight"] = gate.clone()
                found[f"{head}.{block}.experts.{e}.{names[1]}.weight"] = up.clone()
        elif tail == "experts.down_proj":
            for e in range(g.shape[0]):
                found[f"{head}.{block}.experts.{e}.{names[2]}.weight"] = g[e].clone()
        elif tail == "gate.weight":
            found[f"{head}.{block}.gate.weight"] = g
        else:
            found[key] = g
    return found


if __name__ == "__main__":
    seed, target = int(sys.argv[1]), sys.argv[2]
    random.seed(seed)
    torch.manual_seed(seed)
    for index in range(int(sys.argv[3]) if len(sys.argv) > 3 else 4):
        for name in FAMILIES:
            draw(name, index, os.path.join(target, f"{name}{index}"))
