"""The results, tables and plots of the study, from a folder written by hand."""

import json

import pytest
from scipy import stats
from small_study import ARMS, PLOTS, scored, small_config, write_run, write_study

from benchmarks.evidence.plan import best_score
from benchmarks.evidence.plots import COLORS, make_figures, save_plots
from benchmarks.evidence.report import (
    markdown_table,
    mean_and_deviation,
    render_tables,
    write_report,
)
from benchmarks.evidence.summarize import (
    UPDATES,
    PairedComparison,
    by_seed,
    collect,
    paired_comparison,
    plot_leads,
    plot_lines,
    read_run,
)


@pytest.fixture
def study(tmp_path):
    """Config and folder of a whole study."""
    return write_study(tmp_path), tmp_path


@pytest.mark.parametrize("phase", UPDATES)
def test_the_metrics_of_a_run(tmp_path, phase):
    write_run(tmp_path / "run", 0.8, phase=phase)
    run = read_run(tmp_path / "run")
    assert run["test"]["macro_f1"] == 0.8
    assert run["test"]["steps"] == pytest.approx(0.85)
    assert run["longtail"]["right_for_wrong_reason"] == pytest.approx(0.4)
    assert run["entropy"] == pytest.approx(7.5)  # the mean of 3 to 12
    assert (run["sampled_tokens"], run["trained_tokens"], run["seconds"]) == (5_000, 1_200, 8.0)
    assert run["curve"] == [[0, 0.5], [4, pytest.approx(0.72)], [8, pytest.approx(0.76)], [12, 0.8]]
    assert run["entropies"][0] == [1, 1.0]


def test_the_score_of_a_rate_does_not_count_the_start(tmp_path):
    write_run(tmp_path / "run", 0.3)  # below the 0.5 that it began with
    assert best_score(tmp_path / "run") == 0.3


def test_a_cold_start_has_costs_and_no_curve(tmp_path):
    write_run(tmp_path / "run", 0.5, phase="sft")
    run = read_run(tmp_path / "run")
    assert (run["entropy"], run["sampled_tokens"], run["curve"]) == (None, None, [])
    assert (run["trained_tokens"], run["seconds"]) == (1_200, 6.0)


def test_the_updates_of_a_curriculum_are_counted_on(tmp_path):
    stages = {
        name: write_run(tmp_path / "run" / name, score, phase=phase, updates=4, sampled=sampled)
        for name, phase, score, sampled in (("stage1", "rft", 0.7, 300), ("stage2", "rl", 0.8, 500))
    }
    summary = scored(0.8) | {"stages": stages}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    run = read_run(tmp_path / "run")
    assert run["curve"] == [[0, 0.5], [4, 0.7], [8, 0.8]]
    assert (run["sampled_tokens"], run["trained_tokens"], run["seconds"]) == (800, 800, 8.0)
    assert [step for step, _ in run["entropies"]] == list(range(1, 9))
    assert run["longtail"] is None


def test_paired_differences_by_hand():
    """d = .1, .2, .3: mean .2, sd .1, se .1/sqrt(3), t(.975, 2) = 4.3027."""
    ours, theirs = {"0": 0.8, "1": 0.9, "2": 1.0}, {"2": 0.7, "1": 0.7, "0": 0.7, "7": 0.0}
    gap = paired_comparison(ours, theirs)
    assert gap is not None
    assert gap.n == 3
    assert gap.mean == pytest.approx(0.2)
    assert gap.low == pytest.approx(0.2 - 4.302653 * 0.1 / 3**0.5)
    assert gap.high == pytest.approx(0.2 + 4.302653 * 0.1 / 3**0.5)
    other = stats.ttest_rel([0.8, 0.9, 1.0], [0.7, 0.7, 0.7])
    assert gap.p == pytest.approx(other.pvalue)


def test_what_cannot_be_compared():
    assert paired_comparison({"0": 0.5}, {"1": 0.5}) is None
    assert paired_comparison({"0": 0.75}, {"0": 0.5}) == PairedComparison(1, 0.25, None, None, None)
    gap = paired_comparison({"0": 0.75, "1": 0.75}, {"0": 0.5, "1": 0.5})
    assert gap == PairedComparison(2, 0.25, 0.25, 0.25, None)


def test_a_mean_and_its_deviation():
    """sd of .8 and .9 with n - 1 is .1 / sqrt(2)."""
    assert mean_and_deviation([0.8, 0.9]) == "0.850 ± 0.071"
    assert mean_and_deviation([0.8]) == "0.800 ± -"
    assert mean_and_deviation([12_000.0, 13_000.0]) == "12,500 ± 707"
    assert mean_and_deviation([]) == "-"


def test_a_table_keeps_its_columns():
    assert markdown_table(("", "a|b"), [("x", "1")]) == "|  | a\\|b |\n| --- | --- |\n| x | 1 |"


def test_the_tables_say_what_is_there(study):
    text = render_tables(collect(*study))
    assert "| srpo | 2 of 2 | 0.0003 |" in text
    assert "| base | 2 of 2 | - |" in text
    labels = "|  | macro F1, test | macro F1, long tail | accuracy, test | accuracy, long tail |"
    assert labels in text  # no run has a good F1, so it has no column
    row = "| srpo | 0.850 ± 0.071 | 0.650 ± 0.071 | 0.860 ± 0.071 | 0.660 ± 0.071 |"
    assert row in text
    assert "| half | 0.750 ± - |" in text
    assert "| srpo | 7.500 ± 0.000 | 5,000 ± 0 | 1,200 ± 0 | 8.000 ± 0.000 |" in text
    assert "| base | - | - | 1,200 ± 0 | 6.000 ± 0.000 |" in text
    assert "|  | class 1 | class 2 | class 4 |" in text  # none has class 3
    assert max(line.count("|") for line in text.splitlines()) <= 8
    assert "### srpo less ... (main)" in text
    # d = .1 and .14: mean .12, se .02, t(.975, 1) = 12.706
    assert "| grpo | +0.120 [-0.134, +0.374], p=0.11, n=2 |" in text
    assert "### few less ... (main)" in text
    assert "| few_grpo | +0.005 [-0.059, +0.069], p=0.5, n=2 |" in text
    assert "| few |" not in text[text.index("## One arm less") : text.index("## The lead")]
    assert "Not there yet" not in text
    assert "Not to be read" not in text


def test_leads_compare_the_arms_of_one_x(study):
    results = collect(*study)
    leads = plot_leads(results, "checks")
    gaps = {(x, title): measured["macro F1, test"] for x, title, measured in leads}
    assert list(gaps) == [(2, "GRPO"), (4, "GRPO")]
    assert gaps[2, "GRPO"].mean == pytest.approx(0.005)
    assert gaps[4, "GRPO"].mean == pytest.approx(0.12)
    leads = plot_leads(results, "coverage")
    gaps = {x: measured["macro F1, test"] for x, _, measured in leads}
    assert gaps[0.5].mean == pytest.approx(0.05)  # a line of one arm has it at every x
    assert gaps[1.0].mean == pytest.approx(0.12)
    (_, ours), (_, theirs) = plot_lines(results, "coverage")
    assert list(ours) == list(theirs) == [0.5, 1.0]


def test_what_cannot_be_read_is_named_and_stops_nothing(study):
    config, folder = study
    path = folder / "seed1/grpo-0.0003/summary.json"
    path.write_text(path.read_text()[:40])
    (folder / "seed0/few-0.0003/metrics.jsonl").write_text('{"phase": "rl"')
    (folder / "seed0/half-0.0003/summary.json").write_text('["no run"]')
    results = write_report(config, folder)
    assert list(results["bad"]) == [
        "seed1/grpo-0.0003",
        "seed0/few-0.0003",
        "seed0/half-0.0003",
    ]
    assert by_seed(results["arms"]["grpo"], "test", "macro_f1") == {"0": 0.7}
    text = (folder / "tables.md").read_text()
    assert "- grpo: 1 of 2 seeds\n" in text
    assert "- half: 1 of 1 seeds\n" in text
    assert "- seed1/grpo-0.0003: JSONDecodeError" in text
    assert "metrics.jsonl, line 1" in text
    written = json.loads((folder / "evidence.json").read_text())
    assert written["paired"]["srpo less grpo"]["macro F1, test"]["n"] == 1


def test_a_chosen_rate_is_shown_with_all_that_were_tried(tmp_path):
    config = small_config({"srpo": {"seeds": 2}})
    for rate, macro_f1 in ((1e-4, 0.6), (3e-4, 0.7)):
        write_run(tmp_path / f"seed0/srpo-{rate:g}", macro_f1)
    write_run(tmp_path / "seed1/srpo-0.0003", 0.9)
    write_run(tmp_path / "seed1/srpo-0.0001", 0.1)  # not of the rate that was chosen
    results = collect(config, tmp_path)
    arm = results["arms"]["srpo"]
    assert (arm["rate"], arm["tried"]) == (3e-4, {"0.0001": 0.6, "0.0003": 0.7})
    assert by_seed(arm, "test", "macro_f1") == {"0": 0.7, "1": 0.9}
    assert "| srpo | 0.600 | 0.700 | 0.0003 (at the edge) |" in render_tables(results)
    (tmp_path / "seed0/srpo-0.0001/summary.json").unlink()
    assert "- srpo: its rate is chosen among 1 of 2\n" in render_tables(collect(config, tmp_path))


def test_nothing_done_is_a_report_too(tmp_path):
    config = small_config(ARMS).unlock()
    config.plots = PLOTS
    results = write_report(config.lock(), tmp_path)
    assert "- srpo: 2 of 2 seeds\n" in (tmp_path / "tables.md").read_text()
    assert save_plots(results, tmp_path) == []


def test_the_plots_are_drawn_of_what_is_there(study):
    config, folder = study
    results = collect(config, folder)
    written = save_plots(results, folder)
    names = ["curves", "entropy", "confusion", "checks", "coverage"]
    assert [path.name for path in written] == [f"{name}.png" for name in names]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
    for arm in results["arms"].values():
        arm["seeds"] = {}
    assert save_plots(results, folder) == []
    assert not any(path.exists() for path in written)  # none that would show something older


def test_an_arm_keeps_its_color_when_another_is_missing(study):
    results = collect(*study)
    results["arms"]["srpo"]["seeds"] = {}
    (line,) = make_figures(results)["curves"].axes[0].lines
    assert (line.get_label(), line.get_color()) == ("grpo", COLORS[1])


def test_error_bars_of_one_x_are_side_by_side(study):
    axis = make_figures(collect(*study))["coverage"].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["50%", "100%"]
    ours, theirs = (bars.lines[0].get_xdata() for bars in axis.containers)
    assert list(theirs - ours) == pytest.approx([0.012, 0.012])
    assert list((theirs + ours) / 2) == pytest.approx([0.5, 1.0])


def test_the_results_survive_json(study):
    """A notebook draws the plots from evidence.json alone."""
    config, folder = study
    write_report(config, folder)
    results = json.loads((folder / "evidence.json").read_text())
    assert len(save_plots(results, folder)) == 5
    assert render_tables(results) == (folder / "tables.md").read_text()
