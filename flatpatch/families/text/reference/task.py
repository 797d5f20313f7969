"""What one task of a reference run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReferenceTask:
    """Arguments of one task; names and defaults are upstream's where upstream has them."""

    method: str
    """nlora, olora, inclora or seqlora."""
    model: Path
    """Folder of the pretrained model and its tokenizer: a T5, or a BERT, which gets a head for each task."""
    data_dir: Path
    """Folder of the benchmark."""
    task: tuple[str, str]
    """What is learned: (task type, dataset)."""
    eval_tasks: tuple[tuple[str, str], ...]
    """What is predicted afterwards, in this order."""
    output_dir: Path
    """Where the adapter, the predictions and all_results.json go."""
    previous: Path | None = None
    """The ``adapter`` folder of the task before, with all that it left; None for the first task."""
    tuning: str = "lora"
    """What is trained: "lora", or "full": every weight of the model, and no adapter."""
    num_train_epochs: int = 1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    optim: str = "adamw_hf"
    """adamw_hf, or sgd without momentum: what transformers' Trainer makes of these names."""
    lamda_1: float = 0.5
    lamda_2: float = 0.0
    max_grad_norm: float = 1.0
    lora_r: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    max_source_length: int = 512
    max_target_length: int = 50
    """Longest answer in tokens, in training and in prediction."""
    seed: int = 42
    device: str = "cpu"
    instruction_file: Path | None = None
    """Wording of the prompts, in the format of upstream's instruction_config.json; None: our own."""
    max_train_samples: int | None = None
    """Keep only the first of the training instances."""
    max_predict_samples: int | None = None
    """Keep only the first of the instances to predict."""
    max_test_samples: int | None = None
    """Keep only the first of each test set."""
