"""The command `headscope experiment`: questions that training answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headscope.commands.outputs import Force
from headscope.errors import MissingExtra
from headscope.files import kind_by_start, output_path
from headscope.training import Stopped, head_counts
from headscope.views.terminal import console as terminal

app = typer.Typer(rich_markup_mode=None)
experiment = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(experiment, name="experiment")

_ONE_OR_MANY = """Do several heads beat one? Models of equal size, trained equally long, differ in their heads alone.

Models with 1, 2, 4 and 8 heads (each head as much smaller as there are more of them) are trained with five seeds each
on two tasks: "lookups", where each position must look at four places at once, and "bytes", Python source. The table
gives the mean over seeds and its 95 % interval of the loss on unseen rows, and how differently the heads look.

Finished runs are saved: the same command goes on where it was stopped. It takes up to 20 minutes on 2 slow cores;
--quick takes less than two, with 1 and 4 heads, three seeds and fewer steps.

\b
Examples:
  headscope experiment one-or-many --quick
  headscope experiment one-or-many --out out/one-or-many
"""

Quick = Annotated[bool, typer.Option("--quick", help="Smaller: a first impression in less than two minutes.")]
ExperimentOut = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="The results; out/one-or-many (-quick) by default."),
]


@experiment.callback(help="Questions that training answers.")
def _start() -> None:  # so that the experiment's name is a word of its own while there is only one
    pass


@experiment.command(name="one-or-many", help=_ONE_OR_MANY)
def one_or_many(quick: Quick = False, out: ExperimentOut = None, force: Force = False) -> None:
    """Do several heads beat one? The help text is above."""
    folder = out or Path("out") / ("one-or-many-quick" if quick else "one-or-many")
    chart = folder / "one-or-many.png"
    if chart.exists():
        output_path(chart, kind_by_start("a .png figure", b"\x89PNG"), force=force)
    with terminal.running("one or many") as on_progress:
        try:
            plan = head_counts.QUICK if quick else head_counts.FULL
            report = head_counts.compare_head_counts(folder, plan, force=force, on_progress=on_progress)
        except Stopped:
            terminal.print_line(
                f"Stopped. Finished runs are in {folder / 'runs'}; the same command goes on.", error=True
            )
            raise typer.Exit(130) from None
    terminal.print_line(report.markdown())
    written = ["one-or-many.md", "one-or-many.json", "one-or-many.csv"]
    try:
        from headscope.views.figures import experiment as charts
    except MissingExtra as missing:
        terminal.print_line(str(missing), error=True)
    else:
        charts.draw_report(report, chart, force=force)
        written.append(chart.name)
    terminal.print_line(f"In {folder}: {', '.join(written)}")
