"""The other side of `npm run bench:cuda`: PyTorch and Transformers on a GPU, on the CPU in the rehearsal.

peer.py calls these functions. PEER_DEVICE says where, PEER_COMPILE what compiles: inductor, eager (traces only) or none.
"""

import gc
import os
import time

import torch
import torch._dynamo
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

DEVICE = os.environ.get("PEER_DEVICE", "cuda")
COMPILE = os.environ.get("PEER_COMPILE", "inductor")


class Loaded:
    model = None
    step = None
    optimizer = None
    pure = False


def sync():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def gpu_about():
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "compile": COMPILE, "device": DEVICE}
    if DEVICE == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = str(torch.backends.cudnn.version())
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["name"] = torch.cuda.get_device_name()
    return facts


def seconds_of(call, least):
    """Seconds a call, over as many calls as take `least` seconds together, one at least; as ours."""

    def timed(calls):
        sync()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        sync()
        return time.perf_counter() - start

    timed(2)
    one = timed(1)
    calls = min(1000, max(1, int(least / one + 1)))
    return timed(calls) / calls


def gpu_matmul(shape, dtype, leastSeconds):
    """y = a . b^T; float32 without TF32, tf32 with it."""
    m, n, k = shape
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    a = torch.randn(m, k, device=DEVICE, dtype=kind)
    b = torch.randn(n, k, device=DEVICE, dtype=kind)
    y = torch.empty(m, n, device=DEVICE, dtype=kind)
    seconds = seconds_of(lambda: torch.mm(a, b.t(), out=y), leastSeconds)
    torch.backends.cuda.matmul.allow_tf32 = False
    del a, b, y
    return {"seconds": seconds, **gpu_unload()}


def gpu_copy(bytes, leastSeconds):
    x = torch.randn(bytes // 4, device=DEVICE)
    y = torch.empty_like(x)
    seconds = seconds_of(lambda: y.copy_(x), leastSeconds)
    del x, y
    return {"seconds": seconds, **gpu_unload()}


def gpu_attention(sizes, backward, leastSeconds):
    """Causal scaled_dot_product_attention with grouped queries, bfloat16."""
    b, s, g, r, d = (sizes[name] for name in ("batch", "seqLength", "groups", "headsPerGroup", "channels"))

    def heads(n):
        return torch.randn(b, n, s, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=backward)

    q, k, v = heads(g * r), heads(g), heads(g)

    def forward():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    if not backward:
        seconds = seconds_of(forward, leastSeconds)
    else:
        out = forward()
        d_out = torch.randn_like(out)
        seconds = seconds_of(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True), leastSeconds)
        del out, d_out
    del q, k, v
    return {"seconds": seconds, **gpu_unload()}


def gpu_unload():
    """Frees the model and gives its memory back to the driver: the other side needs it."""
    Loaded.model = Loaded.step = Loaded.optimizer = None
    if COMPILE != "none":
        torch._dynamo.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return {}


def read(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(DEVICE)


def gpu_load(folder, train, pure=False):
    """Training: float32 weights with autocast to bfloat16, or `pure` bfloat16; else bfloat16."""
    gpu_unload()
    Loaded.model = read(folder, torch.bfloat16 if pure or not train else torch.float32)
    Loaded.model.train(train)
    if not train:
        Loaded.model.generation_config.eos_token_id = None  # both sides give as many tokens as they are asked for
        return {}
    Loaded.model.config.use_cache = False
    Loaded.pure = pure
    Loaded.step = Loaded.model if COMPILE == "none" else torch.compile(Loaded.model, backend=COMPILE)
    # As ours: matrices decay, norms do not.
    groups = [
        {"params": [p for p in Loaded.model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in Loaded.model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    Loaded.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    return {}


def peaks():
    if DEVICE != "cuda":
        return {}
    return {"peakBytes": torch.cuda.max_memory_allocated(), "reservedBytes": torch.cuda.max_memory_reserved()}


def gpu_train(tokens, steps, warm):
    """A window of steps: forward, loss, backward, clipping, AdamW; as ours each step's loss is read."""
    ids = torch.tensor(tokens, dtype=torch.long, device=DEVICE)
    losses = []

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=not Loaded.pure):
            loss = Loaded.step(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(Loaded.model.parameters(), 1.0)
        Loaded.optimizer.step()
        Loaded.optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    for _ in range(warm):
        step()
    sync()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    sync()
    return {"seconds": time.perf_counter() - start, "losses": losses, **peaks()}


def gpu_import(folder):
    """Seconds from a folder to its weights on the GPU."""
    gpu_unload()
    start = time.perf_counter()
    Loaded.model = read(folder, torch.bfloat16)
    sync()
    return {"seconds": time.perf_counter() - start, **gpu_unload()}


def gpu_generate(tokens, newTokens):
    """Greedy tokens behind prompts; on a GPU with a static cache, whose steps Transformers compiles."""
    ids = torch.tensor(tokens, dtype=torch.long, device=DEVICE)
    static = {"cache_implementation": "static"} if DEVICE == "cuda" and COMPILE != "none" else {}
    sync()
    start = time.perf_counter()
    with torch.inference_mode():
        out = Loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=newTokens, do_sample=False,
            pad_token_id=0, **static,
        )
    sync()
    return {"seconds": time.perf_counter() - start, "tokens": out[:, ids.shape[1]:].tolist(), **peaks()}
