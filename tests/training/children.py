"""Actions that tests run in processes of their own: the gradient of a batch, and a small training.

The processes are forked from a server that has imported everything already, so that each starts at once.
"""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from clip_medical.config import Config
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.retrieval import retrieval_report
from clip_medical.training import distributed
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.loss import info_nce
from clip_medical.training.trainer import Trainer
from tests.training.tools import small_clip, small_trainer, take_gradients, whole_batch

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["tests.training.children"])


def start(action: Callable[..., Any], *arguments: Any, world_size: int = 1) -> list[BaseProcess]:
    """Start `action(*arguments)` in `world_size` new processes, connected like those of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[BaseProcess] = []
    for rank in range(world_size):
        variables: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments_of_child = (variables if world_size > 1 else {}, action, arguments)
        process = forkserver.Process(target=_child, args=arguments_of_child, daemon=True)
        process.start()
        started.append(process)
    return started


def finish(started: Sequence[BaseProcess]) -> list[int | None]:
    """Wait for the processes and return their exit codes."""
    for process in started:
        process.join(timeout=120)
    return [process.exitcode for process in started]


def _child(variables: dict[str, Any], action: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in variables.items()})
    with distributed.processes():
        action(*arguments)


def batch_gradient(folder: Path, chunk_size: int) -> None:
    """Write the loss and the gradients that each process ends with, for captions with fragments."""
    clip, rank, world_size = small_clip(), distributed.rank(), distributed.world_size()
    loss = contrastive_backward(clip, whole_batch(2, rank, world_size), info_nce, chunk_size)
    torch.save((loss, take_gradients(clip)), folder / f"{rank}-of-{world_size}.pt")


def measured_training(folder: Path, config: Config) -> None:
    """`training`, and after it the retrieval report of rank 0."""
    trainer = training(folder, config)
    if distributed.rank() == 0:
        pairs = trainer.validation_pairs
        report = retrieval_report(*encode(trainer.clip, pairs), pairs.caption_ids, pairs.image_ids, ks=(1, 5, 10))
        (folder / "recall.json").write_text(json.dumps(report))


def training(folder: Path, config: Config) -> Trainer:
    """Train the small CLIP on random pairs, or resume where the folder holds a run."""
    config = replace(config, resume=(folder / "config.json").is_file())
    trainer = small_trainer(folder, config)
    torch.manual_seed(config.seed + distributed.rank())
    trainer.train("small")
    return trainer
