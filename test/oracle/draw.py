"""Draws tiny random Llamas with Transformers and writes what it computes from them. Arguments: SEED FOLDER.

FOLDER/parity<i>: any shape, every rope in both spellings, any storage (dtype, shards), with inputs, logits, loss and gradients in float32. FOLDER/bf16_<i>: logits of rounded
weights in bfloat16 and in float32. FOLDER/words<i>: a folder with tokenizer.json already in it gets a model, and its greedy
continuation in float32. What was drawn is printed as JSON lines.
"""

import json
import os
import random
import sys

import torch
import transformers
from safetensors.torch import save_file

ROPES = ["default", "linear", "dynamic", "llama3", "yarn"]
PROMPT = "the layout of a tensor"


def rope_of(kind):
    """Rope fields and the longest position, small enough that the scaling shows."""
    if kind == "linear":
        return dict(rope_type=kind, factor=random.choice([2.0, 2.5, 4.0])), 64
    if kind == "dynamic":
        return dict(rope_type=kind, factor=random.choice([2.0, 3.0])), 8
    if kind == "llama3":
        return dict(rope_type=kind, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32), 64
    if kind == "yarn":
        return dict(rope_type=kind, factor=random.choice([2.0, 4.0]), original_max_position_embeddings=16), 64
    return dict(rope_type="default"), 64


def config_of(kind, kv, heads, modern=True, **changes):
    """A config in the new or the old spelling of rope."""
    rope, longest = rope_of(kind)
    theta = random.choice([50.0, 10000.0, 500000.0])
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=heads * random.choice([8, 10, 14]),
        intermediate_size=random.choice([96, 104, 136]), num_hidden_layers=random.choice([1, 2, 3]), num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=random.choice([8, 16, 24]), vocab_size=random.choice([101, 131, 257]),
        max_position_embeddings=longest, rms_norm_eps=random.choice([1e-5, 1e-6]), hidden_act="silu",
        tie_word_embeddings=random.random() < 0.5, attention_bias=random.random() < 0.5, mlp_bias=random.random() < 0.5,
        bos_token_id=1, eos_token_id=2, initializer_range=0.02, attention_dropout=0.0, torch_dtype="float32", use_cache=True,
    )
    if modern:
        config["rope_parameters"] = dict(rope, rope_theta=theta)
    else:
        if random.random() < 0.5:  # as configs before 2024
            rope["type"] = rope.pop("rope_type")
        config["rope_theta"] = theta
        config["rope_scaling"] = None if kind == "default" else rope
    return {**config, **changes}


def model_of(folder, config):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=2)
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)).float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.copy_(1.0 + 0.3 * torch.randn_like(p))
            elif key.endswith("bias"):
                p.copy_(0.2 * torch.randn_like(p))
            else:  # about 1/sqrt(fan in), so that no layer drowns another
                p.copy_(torch.randn_like(p) * (0.2 if "embed" in key else 1.3 / p.shape[-1] ** 0.5))
    return model


def save_weights(folder, model, dtype, shards=1):
    tied = model.config.tie_word_embeddings
    tensors = {k: v.detach().to(dtype).clone() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    if shards == 1:
        return save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    weight_map = {k: f"model-{random.randrange(shards) + 1:05}-of-{shards:05}.safetensors" for k in tensors}
    for name in set(weight_map.values()):
        save_file({k: v for k, v in tensors.items() if weight_map[k] == name}, os.path.join(folder, name), metadata={"format": "pt"})
    size = sum(v.numel() * v.element_size() for v in tensors.values())
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        json.dump(dict(metadata=dict(total_size=size), weight_map=weight_map), file, indent=2)


def tell(**what):
    print(json.dumps(what), flush=True)


def parity(folder, index):
    kv = [1, 2, 4, 2][index % 4]
    heads = 8 if index % 4 == 3 else kv * random.choice([1, 2, 3]) if kv > 1 else random.choice([4, 6])
    stored = [torch.float32, torch.bfloat16, torch.float16][index % 3]
    name = str(stored).removeprefix("torch.")
    config = config_of(ROPES[index % len(ROPES)], kv, heads, modern=index // len(ROPES) % 2 == 0, torch_dtype=name)
    model = model_of(folder, config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(stored))
    batch, length = random.choice([1, 2, 3]), random.choice([11, 17, 24])
    ids = torch.randint(0, config["vocab_size"], (batch, length))
    labels = ids.clone()
    labels[torch.rand(batch, length) < 0.15] = -100
    labels[0, -1] = ids[0, -1]
    inputs = dict(input_ids=ids)
    side = random.choice([None, None, "left", "right"])
    if side:
        mask = torch.ones_like(ids)
        for row in range(batch):
            cut = 2 * row
            if cut:
                mask[row, slice(0, cut) if side == "left" else slice(-cut, None)] = 0
        labels[mask == 0] = -100
        inputs["attention_mask"] = mask
    if index % 2 == 1:
        inputs["position_ids"] = torch.arange(length) + torch.randint(0, 30, (batch, 1))
    out = model(**inputs, labels=labels)
    out.loss.backward()
    save_weights(folder, model, stored, shards=index % 4 + 1)
    save_file({**inputs, "labels": labels}, os.path.join(folder, "in.safetensors"))
    expected = dict(logits=out.logits.detach().contiguous(), loss=out.loss.detach().reshape(1))
    expected.update({"grad." + k: p.grad.detach() for k, p in model.named_parameters()})
    save_file(expected, os.path.join(folder, "expected.safetensors"))
    tell(kind="parity", folder=folder, kv=kv, heads=heads, config=config, mask=side)


def bf16(folder):
    config = config_of("default", 2, 4, hidden_size=64, head_dim=16, num_hidden_layers=3, vocab_size=257, torch_dtype="bfloat16", max_position_embeddings=128)
    save_weights(folder, model_of(folder, config), torch.bfloat16)
    ids = torch.randint(0, config["vocab_size"], (4, 128))
    save_file(dict(input_ids=ids), os.path.join(folder, "in.safetensors"))
    # Loaded, not cast: a cast would round the frequencies of rope too, and neither result would be the model's.
    load = transformers.LlamaForCausalLM.from_pretrained
    with torch.no_grad():
        rounded = load(folder, dtype=torch.bfloat16).eval()(input_ids=ids).logits.float()
        exact = load(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    save_file(dict(exact=exact.contiguous(), rounded=rounded.contiguous()), os.path.join(folder, "expected.safetensors"))
    tell(kind="bf16", folder=folder, config=config)


def words(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = config_of("default", 2, 4, vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=0, bos_token_id=0)
    model = model_of(folder, config)
    save_weights(folder, model, torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, eos_token_id=-1, pad_token_id=0)
    tokens = out[0, ids.shape[1]:].tolist()
    tell(kind="words", folder=folder, config=config, prompt=PROMPT, prompt_ids=ids[0].tolist(), tokens=tokens, text=tokenizer.decode(tokens, skip_special_tokens=True))


if __name__ == "__main__":
    seed, home = int(sys.argv[1]), sys.argv[2]
    random.seed(seed)
    torch.manual_seed(seed)
    for i in range(12):
        parity(os.path.join(home, f"parity{i}"), i)
    for i in range(8):
        bf16(os.path.join(home, f"bf16_{i}"))
    for i in range(4):
        words(os.path.join(home, f"words{i}"))
