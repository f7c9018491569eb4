"""Routers of Transformers on random tokens: weights by expert, gradients of a random sum of them, and the balance loss, as one JSON line a case.

Arguments: seed.
"""

import json
import sys
from types import SimpleNamespace

import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

T, H, E = 11, 6, 8


def config(k, **more):
    base = dict(hidden_size=H, num_experts=E, num_local_experts=E, n_routed_experts=E, num_experts_per_tok=k, router_jitter_noise=0.0,
                norm_topk_prob=True, routed_scaling_factor=1.0, n_group=1, topk_group=1)
    return SimpleNamespace(**{**base, **more})


CASES = {
    "Qwen3-MoE": (Qwen3MoeTopKRouter, config(3)),
    "Qwen3-MoE without normalisation": (Qwen3MoeTopKRouter, config(3, norm_topk_prob=False)),
    "OLMoE": (OlmoeTopKRouter, config(2, norm_topk_prob=False)),
    "Mixtral": (MixtralTopKRouter, config(2)),
    "DeepSeek V3": (DeepseekV3TopkRouter, config(4, n_group=4, topk_group=2, routed_scaling_factor=2.5)),
    "GLM-4.5": (Glm4MoeTopkRouter, config(3, routed_scaling_factor=1.5)),
    "GPT-OSS": (GptOssTopKRouter, config(3)),
}


def main(seed):
    torch.manual_seed(seed)
    for name, (kind, cfg) in CASES.items():
        router = kind(cfg).float()
        with torch.no_grad():
            router.weight.copy_(torch.randn(E, H))
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            bias.copy_(0.2 * torch.randn(E))
        x = torch.randn(T, H, requires_grad=True)
        logits, weights, experts = router(x)
        dense = torch.zeros(T, E).scatter(1, experts, weights.float())
        seeds = torch.randn(T, E)
        (dense * seeds).sum().backward()
        # Of raw logits: the function takes their softmax itself.
        raw = torch.nn.functional.linear(x, router.weight).detach()
        balance = load_balancing_loss_func((raw,), E, cfg.num_experts_per_tok)
        print(json.dumps(dict(
            name=name, sizes=[T, H, E, cfg.num_experts_per_tok], groups=cfg.n_group, group_topk=cfg.topk_group,
            scaling=cfg.routed_scaling_factor, normalize=cfg.norm_topk_prob,
            x=x.tolist(), weight=router.weight.tolist(), bias=None if bias is None else bias.tolist(), seeds=seeds.tolist(),
            dense=dense.tolist(), dx=x.grad.tolist(), dw=router.weight.grad.tolist(), balance=balance.item(),
        )))


main(int(sys.argv[1]))
