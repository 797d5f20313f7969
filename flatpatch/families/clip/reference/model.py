"""CLIP as a classifier: an image's class is the one whose name, in a prompt, lies nearest to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.families.clip.arguments import Arguments

ADAPTER = "new"
SCALE = 100.0  # of the cosines in a test; no answer depends on it
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_TOWERS = {"vision": "vision_model", "text": "text_model", "both": "(vision_model|text_model)"}


class PromptClassifier(nn.Module):
    """CLIP with LoRA factors on its attentions, and the prompts of one task's classes.

    ``model(images)`` gives the logits ``(n, classes)`` of these: the cosine between an image and the first prompt of
    each class, times the model's own fixed scale. The prompts are embedded anew in each call.

    Args:
        clip: transformers' ``CLIPModel``; its weights are frozen and factors are attached to it.
        tokenizer: Its tokenizer.
        arguments: Rank, alpha, projections and encoders.
    """

    def __init__(self, clip: Any, tokenizer: Any, arguments: Arguments) -> None:
        super().__init__()
        attach(clip, arguments)
        self.clip = clip
        self.tokenizer = tokenizer
        self.size = int(clip.config.vision_config.image_size)
        self.words: Tensor
        self.mask: Tensor
        self.register_buffer("words", torch.zeros(0, 0, dtype=torch.long), persistent=False)
        self.register_buffer("mask", torch.zeros(0, 0, dtype=torch.long), persistent=False)

    @property
    def layers(self) -> dict[str, lora.Linear]:
        """The adapted projections by name, in the model's order."""
        return {name: module for name, module in self.clip.named_modules() if isinstance(module, lora.Linear)}

    def factors(self, which: str) -> list[nn.Parameter]:
        """Return every layer's A ``(rank, in)`` or B ``(out, rank)``."""
        return [factor(layer, which) for layer in self.layers.values()]

    def train_only(self, which: Sequence[str]) -> dict[str, list[nn.Parameter]]:
        """Let gradients reach the named factors alone, and return these by group."""
        self.requires_grad_(False)
        groups = {name: self.factors(name) for name in which}
        for parameter in (p for group in groups.values() for p in group):
            parameter.requires_grad_(True)
        return groups

    def restart(self) -> None:
        """Start new factors, as peft does: A at random, B at zero."""
        for layer in self.layers.values():
            layer.reset_lora_parameters(ADAPTER)

    @torch.no_grad()
    def fold(self) -> None:
        """Count the present update among the frozen weights, and start another from B = 0."""
        for layer in self.layers.values():
            layer.weight += layer.scaling[ADAPTER] * (factor(layer, "B") @ factor(layer, "A"))
            factor(layer, "B").zero_()

    def ask(self, classes: Sequence[str], template: str) -> None:
        """Let the model sort images into these classes from now on."""
        self.words, self.mask = self._tokens([template.format(name) for name in classes])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the classes asked for: images ``(n, 3, size, size)`` to ``(n, classes)``."""
        found = F.normalize(self.clip.get_image_features(pixel_values=images), dim=-1)
        prompts = F.normalize(self.clip.get_text_features(input_ids=self.words, attention_mask=self.mask), dim=-1)
        logits: Tensor = self.clip.logit_scale.exp() * found @ prompts.T
        return logits

    @torch.no_grad()
    def embed(self, classes: Sequence[str], templates: Sequence[str], batch: int) -> Tensor:
        """Return a unit vector for each class: the mean of its prompts' directions, ``(classes, d)``."""
        prompts = [template.format(name) for name in classes for template in templates]
        parts = []
        for start in range(0, len(prompts), batch):
            words, mask = self._tokens(prompts[start : start + batch])
            parts.append(F.normalize(self.clip.get_text_features(input_ids=words, attention_mask=mask), dim=-1))
        directions = torch.cat(parts).reshape(len(classes), len(templates), -1)
        return F.normalize(directions.mean(dim=1), dim=-1)

    @torch.no_grad()
    def predict(self, images: Tensor, embedded: Tensor) -> Tensor:
        """Return the class of each image among those embedded: ``(n,)``."""
        found = F.normalize(self.clip.get_image_features(pixel_values=images), dim=-1)
        return (SCALE * found @ embedded.T).argmax(dim=1)

    def _tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        # What stands behind the closing word changes nothing, so the longest prompt says how long all are.
        made = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        device = self.clip.logit_scale.device
        return made["input_ids"].to(device), made["attention_mask"].to(device)


def factor(layer: lora.Linear, which: str) -> nn.Parameter:
    """Return a layer's A ``(rank, in)`` or B ``(out, rank)``."""
    found: nn.Parameter = getattr(layer, f"lora_{which}")[ADAPTER].weight
    return found


def attach(clip: Any, arguments: Arguments) -> None:
    """Attach LoRA factors to a CLIP by peft: on the named projections of the named encoders' attentions."""
    places = rf"{_TOWERS[arguments.tower]}\.encoder\.layers\.\d+\.self_attn\.({'|'.join(arguments.targets)})_proj"
    config = LoraConfig(
        r=arguments.rank, lora_alpha=arguments.alpha, lora_dropout=0.0, target_modules=places, bias="none"
    )
    lora.LoraModel(clip, {ADAPTER: config}, ADAPTER)  # changes the model in place; the wrapper is not needed


def build(folder: Path, arguments: Arguments, *, seed: int, device: str) -> PromptClassifier:
    """Make the model with which the first task begins, in evaluation mode, on its device.

    Args:
        folder: Of a CLIP and its tokenizer, as transformers saves them.
        arguments: See :func:`attach`.
        seed: Of the random factors.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: If the folder's files cannot be read as such.
    """
    from transformers import AutoTokenizer, CLIPModel

    try:
        clip = CLIPModel.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for files that are damaged or another model's
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder} cannot be read as a CLIP with its tokenizer: {first}. Fetch it again.") from error
    torch.manual_seed(seed)
    return PromptClassifier(clip.float(), tokenizer, arguments).eval().to(device)


def transforms(folder: Path, size: int) -> tuple[Any, Any]:
    """Return how training images and test images are read, as CLIP's own preprocessing does.

    Args:
        folder: The model's; its ``preprocessor_config.json`` may say mean and spread of the channels.
        size: Of the model's images, in pixels.
    """
    from torchvision.transforms import v2

    mean, std = CLIP_MEAN, CLIP_STD
    told = folder / "preprocessor_config.json"
    if told.is_file():
        content = json.loads(told.read_text(encoding="utf-8"))
        mean, std = content.get("image_mean", mean), content.get("image_std", std)
    from torchvision import transforms as T

    bicubic = v2.InterpolationMode.BICUBIC
    last = [T.ToTensor(), T.Normalize(mean, std)]
    cut = T.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=bicubic)
    return T.Compose([cut, *last]), T.Compose([T.Resize(size, interpolation=bicubic), T.CenterCrop(size), *last])
