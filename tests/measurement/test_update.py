"""A task's update as it is measured in a run, against dense matrices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flatpatch.families.sample import Sample
from flatpatch.flatness import Problem, find_scope, supervised_loss
from flatpatch.measurement.in_run import Measurer
from flatpatch.measuring import Request
from tests import flatness_lora

MSE = supervised_loss(nn.functional.mse_loss)


def measure_task(folder: Path, index: int, before: nn.Module, after: nn.Module, batches: Any) -> dict[str, Any]:
    request = Request(("loss", "update"), ("adapter", "merged", "tangent"), samples=6, batch=6, rho=0.1)
    made = Measurer({"measure": {"request": request.as_dict(), "folder": str(folder)}})
    for when, model in (("before", before), ("after", after)):
        made.at(when, task_index=index, task="a b", model=model, sample=Sample(batches, 6), loss=MSE)
    content: dict[str, Any] = json.loads((folder / f"{index + 1}-a_b-after.json").read_text())
    # Directions of before are not those of after, so over these no update is asked for, nor missed.
    assert content["scopes"]["tangent"]["values"] == {}
    assert content["error"] is None and all(not found["errors"] for found in content["scopes"].values())
    return content["scopes"]


def test_update_is_that_of_the_dense_matrices_and_its_angles_those_to_earlier_updates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64))]
    start, first, second = (flatness_lora.make_model(seed=seed) for seed in (0, 1, 2))
    scopes = measure_task(tmp_path, 0, start, first, batches)
    # Dense: M = W + s B A of both layers, in float64; the weights before are kept in float32.
    matrices = [[v.detach() for v in find_scope(model, "merged").variables] for model in (start, first, second)]
    updates = [b - a for a, b in zip(*matrices[:2], strict=True)]
    problem = Problem(first, batches, MSE, scope="merged")
    u = torch.cat([U.reshape(-1) for U in updates])
    n = problem.size
    H = torch.autograd.functional.hessian(lambda w: loss_at(problem, w), problem.flatten(problem.variables))
    assert H.shape == (n, n)
    values = scopes["merged"]["values"]
    assert values["update_curvature"] == pytest.approx(float(u @ H @ u / (u @ u)), rel=1e-5)
    assert values["distance_moved"] == pytest.approx(float(u.norm()), rel=1e-6)
    sigmas = [torch.linalg.svdvals(U) for U in updates]
    stable = [float((s / s[0]).square().sum()) for s in sigmas]
    entropy = [float(torch.exp(torch.special.entr(s / s.sum()).sum())) for s in sigmas]
    assert values["update_stable_rank"] == pytest.approx(sum(stable) / 2, rel=1e-5)
    assert values["update_entropy_rank"] == pytest.approx(sum(entropy) / 2, rel=1e-3)  # of zeros float32 leaves a trace
    assert "update_column_overlap" not in values  # there is no earlier task
    factors = scopes["adapter"]["values"]
    assert factors["update_curvature"] != values["update_curvature"] and "update_stable_rank" not in factors
    with np.load(tmp_path / "1-a_b-after-merged.npz") as arrays:
        assert arrays["update_left_0"].shape == (6, 4) and arrays["update_right_1"].shape == (6, 3)

    # The same update again, from another place: one space. Then another one, by the dense projections.
    same = measure_task(tmp_path, 1, start, first, batches)["merged"]["values"]
    assert (same["update_row_overlap"], same["update_column_overlap"]) == pytest.approx((1, 1))
    content = measure_task(tmp_path, 2, first, second, batches)["merged"]
    later = [b - a for a, b in zip(*matrices[1:], strict=True)]
    cosines = [
        float(c) ** 2
        for U, V in zip(updates, later, strict=True)
        for c in torch.linalg.svdvals(columns(U).T @ columns(V))
    ]
    assert content["values"]["update_column_overlap"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)
    assert list(content["results"]["update"]["cosines"]) == ["1", "2"]


def test_each_matrix_is_decomposed_once_and_the_time_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[torch.Size] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(A: torch.Tensor, **options: Any) -> Any:
            if A.dtype == torch.float64:
                sizes.append(A.shape)
            return function(A, **options)

        return call

    request = Request(("loss", "update"), ("merged",), samples=6, batch=6, rho=0.1)
    made = Measurer({"measure": {"request": request.as_dict(), "folder": str(tmp_path)}})
    batches = [(torch.ones(6, 5, dtype=torch.float64), torch.ones(6, 3, dtype=torch.float64))]
    for name in ("svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, noted(getattr(torch.linalg, name)))
    for when, seed in (("before", 0), ("after", 1)):
        model = flatness_lora.make_model(seed=seed)
        made.at(when, task_index=0, task="a", model=model, sample=Sample(batches, 6), loss=MSE)
    assert sizes == [(6, 5), (3, 6)]
    assert "singular values of 2 matrices, about " in capsys.readouterr().err


def columns(U: torch.Tensor) -> torch.Tensor:
    rank = int(torch.linalg.matrix_rank(U, rtol=1e-6))
    return torch.linalg.svd(U).U[:, :rank]


def loss_at(problem: Problem, w: torch.Tensor) -> torch.Tensor:
    """The loss of the two layers with other matrices, written out."""
    (x, y), (first, norm, _, second) = problem.batches[0], problem.model
    M, N = problem.unflatten(w)
    hidden = torch.tanh(norm(x @ M.T + first.bias))
    return nn.functional.mse_loss(hidden @ N.T + second.bias, y)


def test_update_of_a_training_that_moved_nothing_is_said_to_have_no_direction(tmp_path: Path, capsys: Any) -> None:
    model = flatness_lora.make_model()
    batches = [(torch.ones(6, 5, dtype=torch.float64), torch.ones(6, 3, dtype=torch.float64))]
    with pytest.raises(AssertionError):
        measure_task(tmp_path, 0, model, model, batches)
    assert "update: ValueError: the update has length" in capsys.readouterr().err
