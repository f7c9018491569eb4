"""The other side of the benchmarks: PyTorch and Transformers, driven line by line.

Reads one JSON command a line from stdin and answers with one JSON line. The harness (bench/run.ts) starts it twice: as
PyTorch comes, and tuned (kept malloc memory, huge pages, torch.compile).
"""

import json
import os
import resource
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

import peer_files
import peer_gpu

SIZES = {
    "a": dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=688, vocab_size=8192),
    "moe": dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=688,
                moe_intermediate_size=192, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, router_aux_loss_coef=0.0,
                vocab_size=8192),
    "b": dict(num_hidden_layers=8, hidden_size=512, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1376, vocab_size=32000),
}


class Peer:
    def __init__(self):
        self.model = None
        self.optimizer = None

    def make(self, folder, size, dtype="float32", seed=1):
        """Writes a random model of a size as a Hugging Face folder: both sides load it."""
        torch.manual_seed(seed)
        kind = Qwen3MoeConfig if size == "moe" else LlamaConfig
        config = kind(max_position_embeddings=4096, tie_word_embeddings=False, **SIZES[size])
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
        return {}

    def load(self, folder, mode, compile=False, train=True, lr=1e-4):
        """mode: float32, bfloat16 (pure) or autocast (float32 weights, bf16 matmuls)."""
        dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        self.mode = mode
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.train(train)
        self.step_model = torch.compile(self.model) if compile else self.model
        if train:
            # As ours: matrices decay, norms do not.
            groups = [
                {"params": [p for p in self.model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
                {"params": [p for p in self.model.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
        else:
            self.model.generation_config.eos_token_id = None  # both sides give as many tokens as they are asked for
        return {}

    def inputs(self, tokens, form):
        """Sequences of one length as a batch; of several, `padded` on the right, or one behind the other in a row (`packed`)."""
        if form == "whole":
            ids = torch.tensor(tokens, dtype=torch.long)
            return {"input_ids": ids, "labels": ids}
        if form == "padded":
            longest = max(len(row) for row in tokens)
            fill = lambda value, of: torch.tensor([of(row) + [value] * (longest - len(row)) for row in tokens])
            return {"input_ids": fill(0, list), "labels": fill(-100, list), "attention_mask": fill(0, lambda row: [1] * len(row))}
        flat = lambda of: torch.tensor([[x for row in tokens for x in of(row)]])
        # The first token of a sequence is nobody's next one.
        causal = [torch.ones(len(row), len(row), dtype=torch.bool).tril() for row in tokens]
        return {"input_ids": flat(list), "labels": flat(lambda row: [-100] + row[1:]), "position_ids": flat(lambda row: range(len(row))),
                "attention_mask": torch.block_diag(*causal).bool()[None, None]}

    def train(self, tokens, steps, form="whole"):
        """Forward, loss, backward, clipping, AdamW; seconds and loss of each step."""
        inputs = self.inputs(tokens, form)
        seconds, losses = [], []
        for _ in range(steps):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.mode == "autocast"):
                loss = self.step_model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "losses": losses}

    def generate(self, tokens, new_tokens):
        ids = torch.tensor(tokens, dtype=torch.long)
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                pad_token_id=0,
            )
        return {"seconds": time.perf_counter() - start, "tokens": out[:, ids.shape[1]:].flatten().tolist()}

    def memory(self):
        """Most memory that this process had."""
        return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}

    def versions(self):
        return {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}


def main():
    threads = int(os.environ.get("PEER_THREADS", "2"))
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    peer = Peer()
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("command")
        try:
            answer = (getattr(peer, name, None) or getattr(peer_gpu if name.startswith("gpu_") else peer_files, name))(**command)
        except Exception as error:  # the harness prints it and goes on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
