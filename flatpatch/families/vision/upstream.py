"""What an image method's row says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from flatpatch.families.base import Upstream


@dataclass(frozen=True, kw_only=True)
class VisionUpstream(Upstream):
    """A method whose settings stand in one JSON file per variant and benchmark.

    Attributes:
        configs: By variant and benchmark: the file.
        config_flag: What stands before the configuration's name on upstream's command line.
    """

    family: ClassVar[str] = "vision"

    configs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    config_flag: tuple[str, ...] = ()

    def config(self, variant: str, benchmark: str) -> str | None:
        """Return the shipped configuration of a variant and benchmark; empty means the first. None if none ships."""
        files = self.configs.get(variant or next(iter(self.configs)), {})
        return files.get(benchmark or next(iter(files), ""))
