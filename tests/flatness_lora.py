"""A small network of LoRA layers, shaped like peft's, for tests of directions, landscapes and lines."""

from __future__ import annotations

import torch
from torch import nn

from flatpatch.flatness.problem import Problem, supervised_loss


class LoraLinear(nn.Linear):
    """W x + s B A x, with the factors where peft keeps them; the base is frozen."""

    def __init__(self, width, out, rank, scaling):
        super().__init__(width, out)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})
        self.scaling = scaling
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)

    def forward(self, x):
        return super().forward(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scaling


def make_model(rank=2, *, seed=0, base_seed=100, zero_b=False, dtype=torch.float64):
    """Two LoRA layers and a frozen norm between; the base depends on base_seed, the factors on seed."""
    model = nn.Sequential(LoraLinear(5, 6, rank, 0.5), nn.LayerNorm(6), nn.Tanh(), LoraLinear(6, 3, rank, 2.0))
    named = list(model.named_parameters())
    for is_factor, chosen_seed in ((False, base_seed), (True, seed)):
        generator = torch.Generator().manual_seed(chosen_seed)
        for name, parameter in named:
            if ("lora" in name) == is_factor:
                parameter.requires_grad_(is_factor)
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    if zero_b:
        for _, B in factors(model):
            nn.init.zeros_(B)
    return model.to(dtype)


def make_problem(model, scope="adapter"):
    """Cross-entropy over three batches of unequal size."""
    generator = torch.Generator().manual_seed(9)
    dtype = model[0].weight.dtype
    batches = [
        (torch.randn(n, 5, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 3) for n in (4, 4, 2)
    ]
    return Problem(model, batches, supervised_loss(nn.functional.cross_entropy), scope=scope)


def factors(model):
    """Yield each layer's A and B."""
    for layer in (model[0], model[3]):
        yield layer.lora_A["default"].weight, layer.lora_B["default"].weight


def rescale(model, scales):
    """Change the gauge, in place: each rank index of A by its scale, of B by its inverse. The function stays."""
    with torch.no_grad():
        for A, B in factors(model):
            c = torch.tensor(scales, dtype=A.dtype)
            A.mul_(c[:, None])
            B.div_(c)
    return model


def state_of(model):
    """Copy what a measure must not change."""
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "generator": torch.get_rng_state(),
    }


def assert_same_state(model, before):
    """Compare with what ``state_of`` copied, bit for bit."""
    now = state_of(model)
    for key in ("flags", "grads", "modes"):
        assert now[key] == before[key]
    assert torch.equal(now["generator"], before["generator"])
    for name, value in before["parameters"].items():
        assert torch.equal(now["parameters"][name], value), name
