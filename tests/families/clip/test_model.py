"""CLIP as a classifier by prompts: against transformers' own forward, dense sums, and where the factors are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPModel

from flatpatch.errors import UserError
from flatpatch.families.clip.reference.model import CLIP_MEAN, CLIP_STD, PromptClassifier, build, factor, transforms
from tests.clip_cases import SIZES, SMALL, make_clip

NAMES = ("disc", "red", "zigzag")
TEMPLATES = ("a picture of {}", "{}", "one drawing of {}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def model(folder: Path) -> PromptClassifier:
    found = build(folder, SMALL, seed=0, device="cpu").double()
    found.ask(NAMES, TEMPLATES[0])
    return found


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)


def fill(model: PromptClassifier) -> None:
    for parameter in model.factors("B"):
        parameter.data.normal_(0, 0.3)


def test_fresh_factors_leave_the_logits_as_transformers_computes_them(folder: Path, model: PromptClassifier) -> None:
    clip = CLIPModel.from_pretrained(folder).double().eval()
    words = AutoTokenizer.from_pretrained(folder)([f"a picture of {name}" for name in NAMES], return_tensors="pt")
    pixels = images()
    expected = clip(pixel_values=pixels, **words).logits_per_image
    torch.testing.assert_close(model(pixels), expected, rtol=1e-12, atol=1e-12)


def test_a_prompt_behind_longer_ones_means_the_same(model: PromptClassifier) -> None:
    pixels = images()
    alone = model(pixels)
    model.ask((*NAMES, "purple here we see this one"), TEMPLATES[0])
    torch.testing.assert_close(model(pixels)[:, :3], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_embedded_class_is_the_direction_of_the_mean_of_its_prompts_directions(
    model: PromptClassifier, batch: int
) -> None:
    found = model.embed(NAMES, TEMPLATES, batch)
    for row, name in zip(found, NAMES, strict=True):
        made = model.tokenizer([t.format(name) for t in TEMPLATES], padding=True, return_tensors="pt")
        directions = model.clip.get_text_features(**made)
        directions = directions / directions.norm(dim=1, keepdim=True)
        mean = directions.mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-10, atol=1e-10)


def test_answer_is_the_nearest_class(model: PromptClassifier) -> None:
    pixels = images(8)
    embedded = model.embed(NAMES, TEMPLATES, 10)
    features = F.normalize(model.clip.get_image_features(pixel_values=pixels), dim=1)
    distances = torch.cdist(features, embedded)
    assert torch.equal(model.predict(pixels, embedded), distances.argmin(1))


@pytest.mark.parametrize(
    ("tower", "targets", "count"),
    [("vision", ("q", "v"), 4), ("text", ("q",), 2), ("both", ("q", "k", "v", "out"), 16)],
)
def test_factors_are_where_they_were_asked_for(folder: Path, tower: str, targets: tuple[str, ...], count: int) -> None:
    model = build(folder, replace(SMALL, tower=tower, targets=targets), seed=0, device="cpu")
    assert len(model.layers) == count
    assert {name.split(".")[-1] for name in model.layers} == {f"{target}_proj" for target in targets}
    towers = {name.split(".")[0] for name in model.layers}
    assert towers == {"vision": {"vision_model"}, "text": {"text_model"}}.get(tower, {"vision_model", "text_model"})
    groups = model.train_only(("B",))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"clip.{name}.lora_B.new.weight" for name in model.layers
    }
    assert sum(p.numel() for p in groups["B"]) == count * SMALL.rank * SIZES["hidden_size"]


def test_update_is_the_scaled_product_of_the_factors(model: PromptClassifier) -> None:
    fill(model)
    layer = next(iter(model.layers.values()))
    x = torch.randn(3, 16, dtype=torch.float64)
    scale = SMALL.alpha / SMALL.rank
    weight = layer.weight + scale * factor(layer, "B") @ factor(layer, "A")
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias), rtol=1e-12, atol=1e-12)


def test_folding_changes_no_logit_and_starts_from_zero_again(model: PromptClassifier) -> None:
    fill(model)
    pixels = images()
    before = model(pixels)
    model.fold()
    torch.testing.assert_close(model(pixels), before, rtol=1e-10, atol=1e-10)
    assert not any(parameter.any() for parameter in model.factors("B"))


def test_restarting_brings_the_pretrained_model_back_and_draws_other_factors(model: PromptClassifier) -> None:
    pixels = images()
    before, first = model(pixels), [parameter.clone() for parameter in model.factors("A")]
    fill(model)
    assert not torch.allclose(model(pixels), before)
    model.restart()
    assert torch.equal(model(pixels), before)
    assert not any(torch.equal(*pair) for pair in zip(first, model.factors("A"), strict=True))


def test_seed_draws_the_factors(folder: Path) -> None:
    one, same, other = (build(folder, SMALL, seed=seed, device="cpu").factors("A")[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_channels_are_clips_own_unless_the_folder_says_otherwise(folder: Path, tmp_path: Path) -> None:
    for place, mean, std in ((folder, CLIP_MEAN, CLIP_STD), (tmp_path, (0.5,) * 3, (0.25,) * 3)):
        if place is tmp_path:
            told = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}'
            (place / "preprocessor_config.json").write_text(told)
        from PIL import Image

        pixels = transforms(place, 8)[1](Image.new("RGB", (20, 10), (255, 0, 51)))
        assert pixels.shape == (3, 8, 8)
        expected = [(value - m) / s for value, m, s in zip((1.0, 0.0, 0.2), mean, std, strict=True)]
        assert pixels[:, 4, 4].tolist() == pytest.approx(expected, abs=1e-5)


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a CLIP with its tokenizer"):
        build(tmp_path, SMALL, seed=0, device="cpu")
