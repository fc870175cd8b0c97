"""One head or many: distances, intervals, verdicts, and resuming."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from headscope.commands import app as cli
from headscope.errors import HeadscopeError
from headscope.nn.transformer import Transformer
from headscope.training import TrainConfig, head_counts, make_task, train
from headscope.training.head_counts import (
    FULL,
    QUICK,
    ExperimentPlan,
    RunOutcome,
    SeedMean,
    compare_head_counts,
    mean_of,
)
from headscope.training.head_distances import head_distance, jensen_shannon
from headscope.watching.recording import record

ROOT = Path(__file__).parent.parent.parent


def tiny(steps: int = 3) -> ExperimentPlan:
    model = make_task("bytes", 24).model_config(embed_dim=16, num_layers=2, ff_dim=16)
    lookups = make_task("lookups", 16).model_config(embed_dim=16, ff_dim=16)
    configs = (
        TrainConfig("lookups", steps=steps, length=16, batch_size=4, model=lookups),
        TrainConfig("bytes", steps=steps, length=24, batch_size=4, model=model),
    )
    return ExperimentPlan(configs, heads=(1, 2), seeds=(0, 1))


def outcome(heads: int, seed: int, loss: float, distance: float = math.nan) -> RunOutcome:
    return RunOutcome("lookups", heads, seed, loss, distance, 1000, 1.0)


def test_jensen_shannon_of_hand_worked_rows() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.5, 0.5, 0.0]])
    q = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.0, 0.5], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    third = 2 - 0.75 * math.log2(3)  # H(3/4, 1/4) in bits
    assert jensen_shannon(p, q).tolist() == pytest.approx([1.0, math.sqrt(0.5), 0.0, math.sqrt(third - 0.5)])
    assert torch.equal(jensen_shannon(p, q), jensen_shannon(q, p))


def test_head_distance_is_the_mean_over_pairs_rows_texts_and_layers() -> None:
    model = Transformer(make_task("bytes", 16).model_config(embed_dim=12, num_heads=3, num_layers=2)).eval()
    tokens = make_task("bytes", 16).held_out(2).tokens
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    dense = torch.stack([matrix.dense() for matrix in recording])[..., 8:, :].double()  # of 16 rows all 8 are drawn
    pairs = [(0, 1), (0, 2), (1, 2)]
    wanted = torch.stack([jensen_shannon(dense[:, :, a], dense[:, :, b]) for a, b in pairs]).mean().item()
    assert head_distance(model, tokens) == pytest.approx(wanted, abs=1e-6)
    assert wanted > 0.01
    assert math.isnan(head_distance(Transformer(make_task("lookups").model_config(num_heads=1)), tokens))


def test_head_distance_of_equal_heads_is_zero() -> None:
    model = Transformer(make_task("lookups").model_config(num_heads=2)).eval()
    assert model.decoder is not None
    attention: Any = model.decoder.layers[0].self_attention
    with torch.no_grad():
        rows = attention.in_proj.weight.view(3, 2, 32, 64)
        rows[:, 1] = rows[:, 0]
    assert head_distance(model, make_task("lookups").held_out(2).tokens) == pytest.approx(0, abs=1e-3)


def test_mean_of_gives_student_t_intervals() -> None:
    interval = mean_of([1.0, 2.0, 4.0, 5.0, 8.0])  # s² = 7.5, t(4) = 2.776
    assert (interval.mean, interval.half_width) == (4.0, pytest.approx(2.776 * math.sqrt(7.5 / 5), rel=1e-6))
    assert (interval.low, interval.high) == (interval.mean - interval.half_width, interval.mean + interval.half_width)
    assert str(interval) == "4.000 ± 3.400"
    assert str(mean_of([1.5])) == "1.500"
    assert str(mean_of([])) == "–"
    assert mean_of([0.0, 1.0] * 40).half_width == pytest.approx(1.96 * math.sqrt(80 / 4 / 79 / 80), rel=1e-3)


def test_verdicts_follow_from_the_intervals() -> None:
    plan = ExperimentPlan((TrainConfig("lookups"),), heads=(1, 2, 4, 8), seeds=(0, 1, 2))
    losses = {1: (3.0, 3.2, 3.1), 2: (2.0, 2.2, 2.15), 4: (2.5, 2.7, 2.6), 8: (2.4, 2.9, 2.56)}
    report = head_counts._report(plan, [outcome(h, s, losses[h][s]) for h in losses for s in range(3)])
    better, worse, neither = report.verdicts
    assert better.startswith(
        "lookups: 2 heads do better than one head; the loss is lower by 0.983 nats (95 %: 0.912 to"
    )
    assert worse.startswith("lookups: 4 heads do worse than 2 heads; the loss is higher by 0.483 nats (95 %: 0.412 to")
    assert neither.startswith("lookups: 8 heads do no better and no worse than 4 heads as far as 3 seeds can tell;")
    assert neither.endswith("the loss differs by +0.020 nats (95 %: -0.374 to +0.414).")
    assert report.rows[3].gain.mean == pytest.approx(0.48)
    assert math.isnan(report.rows[0].gain.mean)
    assert all(verdict in report.markdown() for verdict in report.verdicts)
    assert head_counts._verdict("bytes", 2, 1, SeedMean(0.5, math.nan), 1) == (
        "bytes: one seed cannot say whether 2 heads do better than one head."
    )


def test_compare_head_counts_reports_and_writes_every_run(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    outcomes: list[RunOutcome] = []
    report = compare_head_counts(
        tmp_path, tiny(), on_progress=lambda done, of, run: progress.append((done, of)), on_outcome=outcomes.append
    )
    assert progress == [(i, 24) for i in range(1, 25)]
    assert outcomes == report.outcomes
    assert len(outcomes) == 8
    for task in ("lookups", "bytes"):
        assert len({run.parameters for run in outcomes if run.task == task}) == 1
    assert all(math.isnan(run.distance) == (run.heads == 1) for run in outcomes)
    assert all(0 < run.distance < 1 for run in outcomes if run.heads > 1)
    row = report.rows[1]
    losses = [run.loss for run in outcomes if (run.task, run.heads) == ("lookups", 2)]
    assert (row.heads, row.head_dim, row.loss) == (2, 8, mean_of(losses))
    table = (tmp_path / "one-or-many.md").read_text("utf-8")
    assert f"| 2 | 8 | {row.loss} | {row.gain} | {row.distance} |" in table
    data = json.loads((tmp_path / "one-or-many.json").read_text("utf-8"))
    assert data["rows"][0]["distance"] == {"mean": None, "half_width": None}
    assert [run["loss"] for run in data["runs"]] == [run.loss for run in outcomes]
    lines = (tmp_path / "one-or-many.csv").read_text("utf-8").splitlines()
    assert lines[0] == "task,heads,seed,loss,distance,parameters,seconds"
    assert lines[1].startswith(f"lookups,1,0,{outcomes[0].loss},,{outcomes[0].parameters},")
    assert len(lines) == 9


def test_four_heads_solve_lookups_better_than_one() -> None:
    config = replace(QUICK.configs[0], steps=120, batch_size=16, learning_rate=4e-3)
    one, four = (train(replace(config, model=replace(config.sizes, num_heads=heads))).held_out.loss for heads in (1, 4))
    assert one - four > 0.5
    assert one < math.log(81)  # guessing


@pytest.mark.long
def test_quick_plan_at_its_real_size(tmp_path: Path) -> None:
    report = compare_head_counts(tmp_path, QUICK)
    rows = {(row.task, row.heads): row for row in report.rows}
    assert set(rows) == {(task, heads) for task in ("lookups", "bytes") for heads in (1, 4)}
    assert rows["lookups", 4].gain.mean > 0.5  # one head cannot attend to four positions apart
    assert abs(rows["bytes", 4].gain.mean) < 0.2
    assert rows["bytes", 1].loss.mean < 3.5  # guessing costs 5.5 nats
    assert [verdict.split(":")[0] for verdict in report.verdicts] == ["lookups", "bytes"]


def test_compare_head_counts_resumes_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[RunOutcome] = []

    def stop(run: RunOutcome) -> None:
        first.append(run)
        if len(first) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_head_counts(tmp_path, tiny(), on_outcome=stop)
    damaged = tmp_path / "runs" / "lookups-1-heads-seed-0.json"
    damaged.write_text(damaged.read_text("utf-8")[:-20], "utf-8")
    trained: list[int] = []
    real = vars(head_counts)["train"]
    monkeypatch.setattr(head_counts, "train", lambda config, **how: trained.append(1) or real(config, **how))
    report = compare_head_counts(tmp_path, tiny())
    assert len(trained) == 8 - 4 + 1
    assert report.outcomes[2:4] == first[2:4]  # read from their files, the seconds too
    assert [run.loss for run in report.outcomes[:4]] == [run.loss for run in first]
    with pytest.raises(HeadscopeError, match=r"lookups-1-heads-seed-0.json is of another experiment \(steps 3, now 5"):
        compare_head_counts(tmp_path, tiny(steps=5))


def test_compare_head_counts_refuses_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadscopeError, match=r"Cannot write into .*file/runs: "):
        compare_head_counts(tmp_path / "file", tiny())


def test_plans_vary_only_the_number_of_heads() -> None:
    assert (FULL.heads, len(FULL.seeds), len(FULL.runs())) == ((1, 2, 4, 8), 5, 40)
    assert len(QUICK.runs()) == 12
    for plan in (FULL, QUICK):
        for config, heads in plan.runs():
            assert config.sizes == replace(config.sizes, num_heads=heads)
        for seed in plan.seeds:
            same = {replace(config, model=None) for config, _ in plan.runs() if config.seed == seed}
            assert len(same) == len(plan.configs)


def test_one_or_many_command_prints_and_writes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(head_counts, "QUICK", tiny())
    done = CliRunner().invoke(cli.app, ["experiment", "one-or-many", "--quick"])
    assert done.exit_code == 0, done.output
    assert "# One head or many" in done.stdout
    folder = Path("out/one-or-many-quick")
    assert f"In {folder}: one-or-many.md, one-or-many.json, one-or-many.csv, one-or-many.png" in done.stdout
    assert (folder / "one-or-many.png").read_bytes().startswith(b"\x89PNG")
    assert "one or many: 24/24 bytes, 2 heads, seed 1" in done.stderr
    page = (ROOT / "docs" / "one-or-many.md").read_text("utf-8")
    assert {path.name for path in folder.iterdir()} == {"runs", *re.findall(r"one-or-many\.\w+", page)}
    group = typer.main.get_command(cli.app).commands["experiment"]  # type: ignore[attr-defined]
    options = [max(p.opts, key=len) for p in group.commands["one-or-many"].params]
    assert [option for option in options if f"`{option}`" not in page] == []
