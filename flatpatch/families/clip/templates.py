"""The prompts of each data set, in our own wording; ``{}`` stands for the class.

How many a data set has is the protocol's (2, 34, 18 and 8); what they say is ours, so that zero-shot accuracies
differ a little from published ones. Training uses the first alone.
"""

from __future__ import annotations

AIRCRAFT = (
    "a photo of the {} aeroplane.",
    "an aircraft of the type {}, photographed.",
)

CALTECH101 = tuple(
    form.format(what)
    for form in ("a photo of {}.", "{}.")
    for what in (
        "one {}",
        "this {}",
        "a small {}",
        "a large {}",
        "a {} in plain view",
        "a {} with nothing around it",
        "a {} seen from nearby",
        "a {} seen from far away",
        "a {} in bright light",
        "a {} in dim light",
        "a {} in black and white",
        "a {} as a drawing",
        "a {} as a painting",
        "a {} as a cartoon",
        "a {} as a toy",
        "many of the kind {}",
        "something known as {}",
    )
)

CIFAR100 = tuple(
    form.format(what)
    for form in ("a {} photo of a {{}}.", "a {} photo of the {{}}.")
    for what in (
        "tiny",
        "coarse",
        "blurred",
        "pixelated",
        "low-resolution",
        "pale",
        "colourful",
        "badly lit",
        "plain",
    )
)

DTD = (
    "a photo of a {} texture.",
    "a photo of a {} surface.",
    "a photo of a {} pattern.",
    "a photo of a {} material.",
    "a {} texture seen from nearby.",
    "a {} surface seen from nearby.",
    "a {} pattern that fills the picture.",
    "something {}, of which only the texture shows.",
)
