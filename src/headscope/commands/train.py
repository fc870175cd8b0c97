"""The command `headscope train`: a small Transformer trained on a task, and what came of it."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headscope.distributed import rank
from headscope.training import TASKS, Stopped, TrainConfig, TrainingStep, TrainResult, head_counts, make_task, train
from headscope.training.logs import has_tensorboard, tensorboard
from headscope.views.terminal import console as terminal
from headscope.views.terminal.training import print_head_stats
from headscope.views.words import percent

app = typer.Typer(rich_markup_mode=None)

_PATIENCE = 3.0  # seconds that the first process has to say what is wrong, before torchrun ends it for another's sake

_HELP = """Train a small Transformer, and test it on data that it was not trained on.

The tasks need no download:

\b
{tasks}

Everything goes into --out: checkpoints (safetensors), and TensorBoard's logs of the loss and of what each head does.
The heads are measured every 50 steps: a warning names a head whose logits explode or whose entropy collapses, and a
table at the end has all of them.
A run that was stopped, by Ctrl-C or by a power cut, goes on from its last checkpoint when you give the same command
again, to the same result.

\b
Examples:
  headscope train copy                       two minutes; 100 % of unseen sequences copied
  headscope train sort --heads 1             can one head sort?
  headscope train bytes --steps 3000 --out runs/longer
  tensorboard --logdir runs                  look at the logs (pip install 'headscope[train]')
  torchrun --nproc-per-node 2 -m headscope train copy    two processes, the same result
""".format(tasks="\n".join(f"  {name:<9}{task.about}" for name, task in TASKS.items()))

TaskName = Annotated[str, typer.Argument(metavar="TASK", help=f"One of {', '.join(TASKS)}.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Checkpoints and logs; runs/TASK by default.")
]
Steps = Annotated[int, typer.Option("--steps", min=0, help="Updates of the weights; 0: the task's own number.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=0, help="Rows per step, over all processes; 0: the task's own number.")
]
Length = Annotated[int, typer.Option("--length", min=0, help="Positions per row; 0: the task's own number.")]
Rate = Annotated[float, typer.Option("--learning-rate", help="The highest; after a warm-up it falls along a cosine.")]
Warmup = Annotated[int, typer.Option("--warmup", min=0, help="Steps until the highest learning rate.")]
EmbedDim = Annotated[int, typer.Option("--embed-dim", min=0, help="The model's width; 0: the task's own.")]
Heads = Annotated[int, typer.Option("--heads", min=0, help="Heads, each of size width / heads; 0: the task's own.")]
Layers = Annotated[int, typer.Option("--layers", min=0, help="Layers; 0: the task's own.")]
Dropout = Annotated[float, typer.Option("--dropout", help="Share of the numbers dropped after each part in training.")]
QkNorm = Annotated[
    bool, typer.Option("--qk-norm", help="Norm queries and keys: logits cannot explode (arXiv 2302.05442).")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the first weights, the data and the dropout.")]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option("--precision", help="auto: bfloat16 where it is faster: on rows of 64 or more."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="auto: CUDA if there is any.")]
SaveEvery = Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints; the last two stay.")]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON, on the standard output.")]


@app.command(name="train", help=_HELP)
def train_task(
    task: TaskName,
    out: Out = None,
    steps: Steps = 0,
    batch_size: BatchSize = 0,
    length: Length = 0,
    learning_rate: Rate = TrainConfig.learning_rate,
    warmup: Warmup = TrainConfig.warmup,
    embed_dim: EmbedDim = 0,
    heads: Heads = 0,
    layers: Layers = 0,
    dropout: Dropout = 0.0,
    qk_norm: QkNorm = False,
    seed: Seed = 0,
    precision: Precision = "auto",
    device: Device = "auto",
    save_every: SaveEvery = 100,
    as_json: AsJson = False,
) -> None:
    """Train a small Transformer; the help text is above."""
    with _silent_unless_main():
        sizes: dict[str, Any] = {"embed_dim": embed_dim, "ff_dim": 4 * embed_dim, "num_heads": heads}
        sizes = {name: size for name, size in (sizes | {"num_layers": layers}).items() if size}
        config = TrainConfig(
            task,
            steps=steps,
            batch_size=batch_size,
            length=length,
            model=make_task(task, length).model_config(dropout_p=dropout, qk_norm=qk_norm, **sizes),
            learning_rate=learning_rate,
            warmup=warmup,
            seed=seed,
            precision=precision,
        )
        _train(config, out or Path("runs") / task, save_every, device, as_json)


@contextmanager
def _silent_unless_main() -> Iterator[None]:
    """Under torchrun all processes fail alike: the first one reports it, the others end without a message."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if rank() == 0:
            raise
        time.sleep(_PATIENCE)
        raise typer.Exit(1) from None


def _train(config: TrainConfig, folder: Path, save_every: int, device: str, as_json: bool) -> None:
    is_main = rank() == 0
    with ExitStack() as stack:
        show_progress = stack.enter_context(terminal.running(f"training {config.task}", shown=is_main))

        def on_progress(step: TrainingStep) -> None:
            show_progress(step.done, step.of, f"loss {step.loss:.4f}")

        log = None
        if is_main and has_tensorboard():
            log = stack.enter_context(tensorboard(folder / "tensorboard"))
        try:
            result = train(
                config,
                folder=folder,
                save_every=save_every,
                device=device,
                on_progress=on_progress,
                on_note=lambda note: terminal.print_line(note, error=True),
                log=log,
            )
        except Stopped as stop:
            stack.close()
            if is_main:
                terminal.print_line(
                    f"Stopped after step {stop.step} of {config.steps}; its state is in {stop.path}. "
                    "To go on, give the same command again.",
                    error=True,
                )
            raise typer.Exit(130) from None
    if is_main:
        _print_result(config, result, as_json)


def _print_result(config: TrainConfig, result: TrainResult, as_json: bool) -> None:
    held_out, heads, task = result.held_out, result.heads, config.make_task()
    if as_json:
        data = {
            "config": config.as_data(),
            "first_step": result.first_step,
            "loss": result.loss,
            "held_out": {"loss": held_out.loss, "bits": held_out.bits, "exact": held_out.exact, "rows": held_out.rows},
            "seconds": round(result.seconds, 1),
            "precision": result.precision,
            "checkpoint": str(result.checkpoint),
            "heads": heads and {"step": heads.step, "table": head_counts.finite_or_none(heads.table())},
        }
        sys.stdout.write(json.dumps(data, allow_nan=False, indent=1) + "\n")
        return
    if result.first_step == config.steps:
        terminal.print_line(f"All {config.steps} steps were done before; another --out or --seed begins anew.")
    elif result.first_step:
        terminal.print_line(f"Went on after step {result.first_step}.")
    guess = math.log2(task.vocab_size)
    terminal.print_line(
        f"On {held_out.rows} held-out rows, none of them in the training data: "
        f"{held_out.bits:.4f} bits per {task.unit} ({held_out.loss:.4f} nats; guessing costs {guess:.2f} bits)."
    )
    if held_out.exact is not None:
        terminal.print_line(f"Predicted without a mistake, token after token: {percent(held_out.exact, 1)} of them.")
    if heads is not None:
        print_head_stats(heads)
    terminal.print_line(f"Checkpoint: {result.checkpoint}")
    if not has_tensorboard():
        terminal.print_line("For TensorBoard's logs: pip install 'headscope[train]'", error=True)
