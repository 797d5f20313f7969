"""SAM in a Trainer under the launchers people use: two processes of DDP, and DeepSpeed's ZeRO 0 to 2 on CPU."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests import sam_training
from tests.sam_training import assert_same
from tests.warm import TEXT

ZERO = {
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 1000,
}


def zero(stage, **more):
    return ZERO | {"zero_optimization": {"stage": stage}} | more


# To compare with one process: the same examples in the same batches, and no dropout.
COMPARED = {"dropout": 0.0, "shuffled": False}
# In a step of two micro-batches each adds the penalty, undivided; here it would only blur the comparison.
LOCAL = COMPARED | {"penalty": 0.0, "sam": {"rho": 0.5, "sync": "local"}}
GLOBAL = COMPARED | {"sam": {"rho": 0.5, "sync": "global"}}

TWO_RANKS = {
    "ddp": {},
    "ddp, rho 0": {"sam": {"rho": 0.0}},
    "ddp, accumulating": {"gas": 2},
    "ddp, accumulating, rho 0": {"gas": 2, "sam": {"rho": 0.0}},
    "ddp, global": GLOBAL,
    "ddp, local": LOCAL,
    "zero 2": {"deepspeed": zero(2)},
    "zero 2, rho 0": {"deepspeed": zero(2), "sam": {"rho": 0.0}},
    "zero 2, accumulating": {"deepspeed": zero(2), "gas": 2},
    "zero 2, accumulating, rho 0": {"deepspeed": zero(2), "gas": 2, "sam": {"rho": 0.0}},
    "zero 2, global": GLOBAL | {"deepspeed": zero(2)},
    "zero 2, local": LOCAL | {"deepspeed": zero(2)},
    "ddp, random, global": COMPARED | {"sam": {"rho": 0.5, "sync": "global", "random_seed": 1}},
    "ddp, random, local": COMPARED | {"sam": {"rho": 0.5, "sync": "local", "random_seed": 1}},
}
# Kinds of SAM that descend along a combination of gradients.
COMBINED = LOCAL | {"sam": {"rho": 0.5, "kind": "gsam"}}
TWO_RANKS |= {
    "ddp, combined": COMBINED,
    "zero 2, combined": COMBINED | {"deepspeed": zero(2)},
    "ddp, accumulating, combined, rho 0": {"gas": 2, "sam": {"rho": 0.0, "kind": "looksam"}},
    "zero 2, accumulating, combined, rho 0": {"deepspeed": zero(2), "gas": 2, "sam": {"rho": 0.0, "kind": "cflat"}},
}
# Pairs that climb beside LoRA's.
CLIMBING = COMPARED | {"steps": 4, "learning_rate": 0.05}
TWO_RANKS |= {
    f"ddp, bilora, {sync}": CLIMBING | {"sam": {"rho": 0.5, "sync": sync, "kind": "bilora"}}
    for sync in ("global", "local")
}

# After the others, which start the processes' communication.
TWO_RANKS |= {
    "closure, global": {"closure": {"sam": {"sync": "global"}, "share_model": True}},
    "closure, local": {"closure": {"sam": {"sync": "local"}, "share_model": True}},
    "closure, model not given": {"closure": {"sam": {"sync": "local"}}},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(warm, tmp_path_factory):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    return sam_training.run_ranks(tmp_path_factory.mktemp("two"), 2, TWO_RANKS, python=warm(TEXT))


@pytest.mark.parametrize("launcher", ["ddp", "zero 2"])
@pytest.mark.parametrize("accumulating", ["", ", accumulating"])
def test_rho_zero_equals_the_plain_step_on_two_ranks_with_dropout(two_ranks, launcher, accumulating):
    plain, wrapped = two_ranks[launcher + accumulating], two_ranks[f"{launcher}{accumulating}, rho 0"]
    for rank in range(2):
        assert_same(wrapped[rank], plain[rank])


@pytest.mark.parametrize("launcher", ["ddp", "zero 2"])
def test_synchronised_ranks_equal_one_process_with_the_full_batch(two_ranks, launcher, tmp_path):
    whole = sam_training.train(tmp_path, batch=8, **GLOBAL)
    assert_close_weights(two_ranks[f"{launcher}, global"], whole)


@pytest.mark.parametrize("launcher", ["ddp", "zero 2"])
def test_local_ranks_equal_one_process_with_as_many_micro_batches(two_ranks, launcher, tmp_path):
    accumulated = sam_training.train(tmp_path, gas=2, **LOCAL)
    assert_close_weights(two_ranks[f"{launcher}, local"], accumulated)


@pytest.mark.parametrize("launcher", ["ddp", "zero 2"])
def test_a_combined_gradient_is_reduced_like_any_other(two_ranks, launcher, tmp_path):
    accumulated = sam_training.train(tmp_path, gas=2, **COMBINED)
    assert_close_weights(two_ranks[f"{launcher}, combined"], accumulated)
    plain = two_ranks[f"{launcher}, local"][0]["weights"]
    assert not all(
        torch.allclose(w, plain[name]) for name, w in two_ranks[f"{launcher}, combined"][0]["weights"].items()
    )
    for rank in range(2):
        ours, theirs = two_ranks[f"{launcher}, accumulating, combined, rho 0"], two_ranks[f"{launcher}, accumulating"]
        assert_same(ours[rank], theirs[rank])


def test_local_and_global_perturbations_differ(two_ranks):
    local, together = two_ranks["ddp, local"], two_ranks["ddp, global"]
    assert local[0]["report"]["grad_norm"] != local[1]["report"]["grad_norm"]
    assert together[0]["report"] == together[1]["report"]
    assert local[0]["losses"] != together[0]["losses"]


def test_random_direction_is_one_for_synchronised_ranks_and_each_ranks_own_otherwise(two_ranks, tmp_path):
    whole = sam_training.train(tmp_path, batch=8, **COMPARED, sam={"rho": 0.5, "sync": "global", "random_seed": 1})
    assert_close_weights(two_ranks["ddp, random, global"], whole)
    local = two_ranks["ddp, random, local"]
    assert not torch.allclose(
        *(next(iter(ranks[0]["weights"].values())) for ranks in (local, two_ranks["ddp, random, global"])), rtol=1e-4
    )
    for rank in local:
        assert rank["report"]["perturbation_norm"] == pytest.approx(0.5, rel=1e-6)


def test_auxiliary_pairs_are_one_for_synchronised_ranks_and_each_ranks_own_otherwise(two_ranks, tmp_path):
    whole = sam_training.train(tmp_path, batch=8, **CLIMBING, sam={"rho": 0.5, "kind": "bilora"})
    together, local = (two_ranks[f"ddp, bilora, {sync}"] for sync in ("global", "local"))
    assert_close_weights(together, whole)
    norms = [[rank["report"]["perturbation_norm"] for rank in ranks] for ranks in (together, local)]
    assert norms[0] == pytest.approx([whole["report"]["perturbation_norm"]] * 2, rel=1e-3)
    assert norms[1][0] != norms[1][1]
    assert min(map(min, norms)) > 0
    weights = [ranks[0]["weights"] for ranks in (together, local)]
    assert not all(torch.allclose(w, weights[1][name], rtol=1e-4) for name, w in weights[0].items())


@pytest.mark.parametrize("name", ["closure, global", "closure, model not given"])
def test_closure_on_synchronised_ranks_equals_one_process_with_the_full_batch(two_ranks, name):
    # Without the model, DistributedDataParallel averages the ascent gradient before SAM sees it.
    whole = sam_training.train_with_closure(sam={}, whole_batch=True)
    for rank in two_ranks[name]:
        torch.testing.assert_close(rank["weights"], whole["weights"], rtol=1e-10, atol=1e-12)
        assert rank["norms"] == pytest.approx(whole["norms"], rel=1e-10)


def test_closure_keeps_the_ascent_of_a_rank_to_itself_when_given_the_model(two_ranks):
    first, second = two_ranks["closure, local"]
    together = two_ranks["closure, global"][0]
    assert first["norms"][0] != second["norms"][0]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert not torch.allclose(first["weights"][0], together["weights"][0], rtol=1e-6)


def assert_close_weights(ranks, reference):
    # AdamW divides by the gradient's own size, so rounding of near-zero gradients shows at about lr * 1e-3.
    for rank in ranks:
        for name, weight in rank["weights"].items():
            torch.testing.assert_close(weight, reference["weights"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["zero 2, local", "zero 2, accumulating, rho 0"])
def test_ascent_pass_fires_no_hook_of_zero(two_ranks, name):
    for rank in two_ranks[name]:
        assert_ascent_passes_left_no_trace(rank["passes"])


def assert_ascent_passes_left_no_trace(passes):
    assert len(passes) >= 6
    for before, after in zip(passes[::2], passes[1::2], strict=True):
        assert not any(after["grads"])
        assert before.keys() == after.keys()
        for key in before.keys() - {"draw"}:
            assert_equal(before[key], after[key])
        assert torch.equal(before["draw"], after["draw"])


def assert_equal(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        assert ours == theirs


ONE_RANK = {
    f"zero {stage}{more}": {"deepspeed": config, "gas": gas} | sam
    for stage, config in (
        (0, zero(0)),
        (1, zero(1)),
        (2, zero(2)),
        (
            "2 offload",
            ZERO
            | {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}}
            | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        ),
    )
    for gas in (1, 4)
    for more, sam in ((f" gas {gas}", {}), (f" gas {gas}, rho 0", {"sam": {"rho": 0.0}}))
}
ONE_RANK |= {
    "bf16": {"deepspeed": zero(2, bfloat16={"enabled": "auto"}), "sam": {"rho": 0.05}},
    "bf16, fp32 adapters": {
        "deepspeed": zero(2, bfloat16={"enabled": "auto"}),
        "sam": {"rho": 0.05},
        "adapters": "fp32",
    },
    "fp32": {"sam": {"rho": 0.05}, "deepspeed": zero(2)},
}


@pytest.fixture(scope="module")
def one_rank(warm, tmp_path_factory):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    for program in ("g++", "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"DeepSpeed compiles its CPU optimizer with {program}, which is not installed")
    return sam_training.run_ranks(tmp_path_factory.mktemp("one"), 1, ONE_RANK, python=warm(TEXT))


@pytest.mark.parametrize("stage", [0, 1, 2, "2 offload"])
@pytest.mark.parametrize("gas", [1, 4])
def test_rho_zero_equals_the_plain_step_under_zero_with_dropout(one_rank, stage, gas):
    assert_same(one_rank[f"zero {stage} gas {gas}, rho 0"][0], one_rank[f"zero {stage} gas {gas}"][0])


def test_ascent_pass_fires_no_hook_of_zero_with_offload(one_rank):
    assert_ascent_passes_left_no_trace(one_rank["zero 2 offload gas 1, rho 0"][0]["passes"])


def test_bfloat16_weights_lose_part_of_the_perturbation(one_rank):
    result = one_rank["bf16"][0]
    assert {weight.dtype for weight in result["weights"].values()} == {torch.bfloat16}
    assert result["report"]["perturbation_norm"] == pytest.approx(0.05, rel=1e-6)
    assert result["report"]["perturbation_cosine"] < 0.9999


def test_adapters_can_stay_in_float32_in_a_bfloat16_engine(one_rank):
    result = one_rank["bf16, fp32 adapters"][0]
    assert {weight.dtype for weight in result["weights"].values()} == {torch.float32}
    assert result["report"]["perturbation_cosine"] == pytest.approx(1.0, abs=1e-9)
    # bfloat16 keeps 8 bits, so the losses of the frozen bfloat16 model agree to about 2^-8.
    assert result["losses"] == pytest.approx(one_rank["fp32"][0]["losses"], rel=2**-7)
