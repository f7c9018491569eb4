"""Copying, hashing, splitting and joining folders of weights with PyTorch and the safetensors package, as scripts do.

peer.py calls these functions in a warm process; run alone, one call is the whole script:
    python peer_files.py split_folder '{"folder": "model", "target": "split", "parts": 2, "flush": true}'
"""

import hashlib
import json
import os
import subprocess
import sys
import time

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def weight_files(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


def cut_dim(key):
    """Which dim of a matrix tensor-parallel ranks share."""
    return 1 if key.endswith(("o_proj.weight", "down_proj.weight")) else 0


def flush_folder(folder):
    """Waits until every file is on disk, as a tool that promises to survive a power cut does."""
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as f:
            os.fsync(f.fileno())


def config_of(folder):
    with open(os.path.join(folder, "config.json")) as f:
        return json.load(f)


def query_groups(folder):
    return config_of(folder)["num_key_value_heads"]


def query_heads(folder):
    return config_of(folder)["num_attention_heads"]


def split_qkv(matrix, groups, heads):
    """Queries, keys and values of a matrix that holds them group by group."""
    head = matrix.shape[0] // (heads + 2 * groups)
    by_group = matrix.view(groups, -1, matrix.shape[-1])
    sizes = [heads // groups * head, head, head]
    return [x.reshape(-1, matrix.shape[-1]) for x in by_group.split(sizes, 1)]


def joined(pieces, dim):
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


class Weights:
    """Tensors of a folder by name; a tensor is pages of its file until it is changed."""

    def __init__(self, folder):
        self.files = {}
        for name in weight_files(folder):
            file = safe_open(os.path.join(folder, name), "pt")
            self.files.update((key, file) for key in file.keys())

    def keys(self):
        return list(self.files)

    def __getitem__(self, key):
        return self.files[key].get_tensor(key)


def copy_folder(folder, target):
    """cp, and every file on disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", folder, target], check=True)
    flush_folder(target)
    return {"seconds": time.perf_counter() - start}


def hash_folder(folder):
    """One SHA-256 pass over the bytes of every weight file, on one core."""
    start = time.perf_counter()
    for name in weight_files(folder):
        with open(os.path.join(folder, name), "rb", buffering=0) as f:
            digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
            while n := f.readinto(buffer):
                digest.update(buffer[:n])
    return {"seconds": time.perf_counter() - start}


def split_folder(folder, target, parts, flush):
    """The same import in a script: Megatron's fused matrices, cut for tensor parallelism, one safetensors file a rank."""
    start = time.perf_counter()
    os.makedirs(target, exist_ok=True)
    groups = query_groups(folder)
    weights = Weights(folder)
    ranks = [{} for _ in range(parts)]

    def give(key, pieces):
        for rank, piece in zip(ranks, pieces):
            rank[key] = piece.contiguous()

    for key in weights.keys():
        if key.endswith("q_proj.weight"):
            q, k, v = (weights[key.replace("q_proj", f"{name}_proj")] for name in "qkv")
            by_group = [x.view(groups, -1, x.shape[-1]) for x in (q, k, v)]
            fused = torch.cat(by_group, 1).view(-1, q.shape[-1])
            give(key.replace("q_proj", "linear_qkv"), fused.chunk(parts))
        elif key.endswith("gate_proj.weight"):
            gate, up = (weights[key.replace("gate", name)].chunk(parts) for name in ("gate", "up"))
            give(key.replace("gate_proj", "linear_fc1"), [torch.cat(pair) for pair in zip(gate, up)])
        elif not key.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            tensor = weights[key]
            give(key, tensor.chunk(parts, cut_dim(key)) if tensor.ndim == 2 else [tensor] * parts)
    for i, rank in enumerate(ranks):
        save_file(rank, os.path.join(target, f"rank{i}.safetensors"))
    if flush:
        flush_folder(target)
    return {"seconds": time.perf_counter() - start}


def merge_folder(folder, target, source, flush):
    """The way back in a script: the ranks' files become the files of `source` again."""
    start = time.perf_counter()
    os.makedirs(target, exist_ok=True)
    groups, heads = query_groups(source), query_heads(source)
    ranks = [safe_open(os.path.join(folder, name), "pt") for name in weight_files(folder)]
    tensors = {}
    for key in ranks[0].keys():
        pieces = [rank.get_tensor(key) for rank in ranks]
        if "linear_qkv" in key:
            for name, tensor in zip("qkv", split_qkv(joined(pieces, 0), groups, heads)):
                tensors[key.replace("linear_qkv", f"{name}_proj")] = tensor
        elif "linear_fc1" in key:
            for name, halves in zip(("gate", "up"), zip(*(piece.chunk(2) for piece in pieces))):
                tensors[key.replace("linear_fc1", f"{name}_proj")] = joined(halves, 0)
        else:
            tensors[key] = pieces[0] if pieces[0].ndim != 2 else joined(pieces, cut_dim(key))
    for name in weight_files(source):
        with safe_open(os.path.join(source, name), "pt") as f:
            own = {key: tensors.pop(key).contiguous() for key in f.keys()}
        save_file(own, os.path.join(target, name), metadata={"format": "pt"})
    if flush:
        flush_folder(target)
    return {"seconds": time.perf_counter() - start}


def load_tensors(folder, dtype):
    """Every tensor of the folder in memory of its own (safetensors alone hands out pages of the file, unread)."""
    wanted = getattr(torch, dtype)
    start = time.perf_counter()
    tensors = {}
    for name in weight_files(folder):
        with safe_open(os.path.join(folder, name), "pt") as f:
            for key in f.keys():
                tensors[key] = f.get_tensor(key).to(wanted, copy=True)
    return {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("PEER_THREADS", "2")))
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
