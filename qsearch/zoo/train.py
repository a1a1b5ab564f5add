"""`python -m qsearch.zoo.train NAME`: trains a part of the zoo from nothing, and resumes where it
stopped.

One loop for all: AdamW, warm-up, constant rate and a linear decay over the last fifth, an
exponential moving average, a checkpoint every few minutes (written atomically, so that a killed run
goes on from its last one), a log of one line a hundred steps. Randomness at step n depends on the
seed and n alone, so a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.artifacts import versions
from . import painters, recipes, video_painters

EMA_DECAY = 0.999


@dataclass(frozen=True)
class Run:
    """Where and how long: `folder` holds checkpoint and log, `device` is a torch device, `steps`
    the whole length.
    """

    folder: Path
    device: torch.device
    steps: int
    rate: float
    seed: int = 0
    autocast: bool = False
    save_seconds: float = 120.0
    until: int | None = None  # where to stop before `steps`, which the rate goes by


def rate_at(step: int, steps: int, rate: float, warmup: int = 200) -> float:
    """Learning rate: linear warm-up, constant, linear to a fiftieth over the last fifth."""
    decay = max(1, steps // 5)
    return rate * min(1.0, (step + 1) / warmup) * max(0.02, min(1.0, (steps - step) / decay))


def fit(module: nn.Module, loss: Callable[[torch.Generator], Tensor], run: Run) -> nn.Module:
    """Minimise `loss(generator)` over the parameters of `module`; returns the averaged module."""
    run.folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = run.folder / "checkpoint.pt", run.folder / "loss.csv"
    if any(
        p.ndim == 5 for p in module.parameters()
    ):  # channels_last is a layout of four dimensions
        module.to(run.device).train()
    else:
        module.to(run.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = copy.deepcopy(module).requires_grad_(False).eval()
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=run.rate,
        betas=(0.9, 0.98),
    )
    start, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=run.device, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        start, spent = state["step"], state["seconds"]
        if (
            log.exists() and start < run.steps
        ):  # what was logged after the checkpoint is trained, and logged, again
            head, *rows = log.read_text(encoding="utf-8").splitlines(keepends=True)
            log.write_text(
                "".join([head, *(row for row in rows if int(row.split(",")[0]) <= start)]),
                encoding="utf-8",
            )
        print(f"resumes at step {start} of {run.steps}", flush=True)

    def save(step: int, seconds: float) -> None:
        whole = {
            "module": module.state_dict(),
            "average": average.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        torch.save(whole | {"step": step, "seconds": seconds}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    began, saved, losses = time.monotonic() - spent, time.monotonic(), []
    last = min(run.steps, run.steps if run.until is None else run.until)
    for step in range(start, last):
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        torch.manual_seed(run.seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, run.steps, run.rate)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.autocast):
            value = loss(generator)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():  # or the average would drag along the history of all steps
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
        losses.append(value.item())
        if (step + 1) % 100 == 0 or step + 1 == last:
            row = [
                step + 1,
                f"{sum(losses) / len(losses):.5f}",
                f"{rate_at(step, run.steps, run.rate):.2e}",
                f"{time.monotonic() - began:.0f}",
            ]
            new = not log.exists()
            with log.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", "loss", "rate", "seconds"])
                writer.writerow(row)
            print("step {} loss {} rate {} after {} s".format(*row), flush=True)
            losses = []
        if time.monotonic() - saved > run.save_seconds or step + 1 == last:
            save(step + 1, time.monotonic() - began)
            saved = time.monotonic()
    return average


def main(argv: list[str] | None = None) -> None:
    """Train one part of the zoo, in this order: vae, judge, then NAME-text and NAME for scenes-unet
    and scenes-dit.
    """
    parser = argparse.ArgumentParser(prog="python -m qsearch.zoo.train", description=main.__doc__)
    parser.add_argument("name", choices=sorted(recipes.RECIPES))
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/zoo"),
        help="checkpoints and logs (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, help="length of the whole training (default: the recipe's)"
    )
    parser.add_argument("--batch", type=int, help="scenes a step (default: the recipe's)")
    parser.add_argument("--rate", type=float, help="learning rate (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="where the finished weights go (default: the package)",
    )
    parser.add_argument(
        "--warm", type=Path, help="saved pipeline whose weights a denoiser's training starts from"
    )
    parser.add_argument(
        "--save-seconds",
        type=float,
        default=Run.save_seconds,
        help="time between checkpoints (default: %(default)s)",
    )
    parser.add_argument(
        "--until",
        type=int,
        help="stop there with a checkpoint and write no weights; --steps still says the rate",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="mixed precision on a CPU too (twice as fast where it has AVX512-BF16)",
    )
    parser.add_argument(
        "--export-only",
        action="store_true",
        help="write the weights of the last checkpoint and stop",
    )
    options = parser.parse_args(argv)

    recipe = recipes.RECIPES[options.name]
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    if options.warm is not None and options.name == "scenes-video":
        video_painters.begin_from(options.runs, options.warm)
    module, loss, export = recipe.make(options.runs, device, options.batch or recipe.batch)
    if options.warm is not None:
        if options.name in recipes.ECAR:
            recipes.warm_ecar(module, options.warm)
        elif isinstance(module, painters.Painter):
            painters.warm_start(module, options.warm)
        else:
            parser.error(f"--warm starts a denoiser, {options.name} is none")
    run = Run(
        folder=options.runs / options.name,
        device=device,
        steps=0 if options.export_only else options.steps or recipe.steps,
        rate=options.rate or recipe.rate,
        seed=options.seed,
        autocast=recipe.bf16 or options.bf16 or device.type == "cuda",
        save_seconds=options.save_seconds,
        until=options.until,
    )
    if not options.export_only:
        run.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "name": options.name,
            **{k: getattr(run, k) for k in ("steps", "rate", "seed")},
            "batch": options.batch or recipe.batch,
            "parameters": sum(p.numel() for p in module.parameters()),
            "device": str(device),
            "bf16": run.autocast,
            "warm": str(options.warm or ""),
            "versions": versions(),
        }
        (run.folder / "recipe.json").write_text(
            json.dumps(record, indent=2) + "\n", encoding="utf-8"
        )
    average = fit(module, loss, run)
    if run.until is None:
        export(average, options.out, run.folder)


if __name__ == "__main__":
    main()
