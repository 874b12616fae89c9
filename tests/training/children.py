"""What the tests start in processes of their own: a share of a batch, and a whole small training.

The processes are forked from a server that has imported everything already, so that each starts in a moment.
"""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import train
from clip_medical.config import Config
from clip_medical.data.batches import Pairs
from clip_medical.evaluation.report import encode
from clip_medical.evaluation.retrieval import retrieval_report
from clip_medical.training import distributed
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.trainer import Job
from clip_medical.training.optimizer import Learner
from lora import adapter_parameters
from tests.training.test_contrastive import gradients, pairs, small_clip

fresh = multiprocessing.get_context("forkserver")
fresh.set_forkserver_preload(["tests.training.children"])


def start(action: Callable[..., Any], *arguments: Any, world: int = 1) -> list[Any]:
    """`action(*arguments)` in `world` new processes that know of each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = fresh.Process(target=_child, args=(place if world > 1 else {}, action, arguments), daemon=True)
        process.start()
        started.append(process)
    return started


def finish(started: list[Any]) -> list[int]:
    """Exit codes."""
    for process in started:
        process.join(timeout=120)
    return [process.exitcode for process in started]


def _child(place: dict[str, Any], action: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.update({name: str(value) for name, value in place.items()})
    with distributed.processes():
        action(*arguments)


def data() -> Pairs:
    """22 pairs, with the same caption in both halves of the batch."""
    made = pairs()
    made.caption_ids[15] = made.caption_ids[2]
    return made


def batch_gradient(folder: Path, chunk_size: int) -> None:
    """Each process writes the loss and the gradients that it ends with."""
    clip = small_clip()
    loss = contrastive_backward(clip, data(), torch.arange(22), chunk_size)
    torch.save(
        (loss, gradients(clip)), folder / f"{distributed.rank()}-of-{distributed.world_size()}-by-{chunk_size}.pt"
    )


def measured_training(folder: Path, config: Config) -> None:
    """`training`, and after it the recall report that train.py makes."""
    job = training(folder, config)
    if distributed.rank() == 0:
        made = job.held_out
        features = encode(job.clip, made)
        report = retrieval_report(*features, made.caption_ids, made.image_ids, ks=(1, 5, 10))
        (folder / "recall.json").write_text(json.dumps(report))


def training(folder: Path, config: Config) -> Job:
    """A run of the loop of train.py on random pixels, resumed where there is something to resume."""
    config = replace(config, resume=(folder / "config.json").is_file())
    clip = small_clip(config.dropout)
    learner = Learner(adapter_parameters(clip.model), clip.model.logit_scale, config, config.steps or 1, scaled=False)
    torch.manual_seed(config.seed + distributed.rank())
    names = [f"picture {row}" for row in range(22)]
    job = Job(folder, config, clip, data(), data(), learner, config.steps or 1, names)
    train.learn(job, "small")
    return job
