"""The report of the evidence harness, against computations of its own; and the measures of saliency, by hand."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch

from benchmarks import comparisons, report, saliency, timing
from benchmarks.accuracy import Run, Saved, Scores, Settings
from benchmarks.comparisons import Difference
from benchmarks.images import Images
from benchmarks.robustness import Robustness
from benchmarks.saliency import Saliency

DIFFERENCES = [0.5, 0.7, -0.1, 0.9, 0.4, 0.6, 0.3, 0.8]
BEST = [0.1, -0.2, 0.05, 0.15, 0.0, 0.3, -0.1, 0.2]


def run(scheme, seed, top1, **changes):
    """A run that nobody made."""
    return replace(
        Run(
            dataset="noise",
            data="ab",
            split="test",
            classes=100,
            images=500,
            fraction=1.0,
            size=32,
            arch="resnet18_cifar",
            scheme=scheme,
            seed=seed,
            epochs=3,
            batch=128,
            opt="sgd",
            lr=0.1,
            momentum=0.9,
            weight_decay=5e-4,
            warmup=0.0,
            smoothing=0.0,
            padding=4,
            init="",
            init_sha256="",
            freeze=0,
            mode="float32",
            top1=top1,
            top5=90.0,
            loss=1.0,
            ece=5.0,
            correct=int(top1 * 100),
            count=10000,
            train_loss=1.0,
            diverged=0,
            seconds=36.0,
            params=1000 if scheme == "last" else 1100,
            macs=5000 if scheme == "last" else 5001,
            form="{}",
            device="CPU",
            threads=1,
            load=0.5,
            torch="2",
            timm="1",
            timm_convmix="0",
            python="3",
            date="2026-01-01",
            argv="python -m benchmarks.accuracy x",
        ),
        **changes,
    )


def paired(gains, base=60.0, **changes):
    """Runs of last and convmix, and of a control halfway."""
    rows = []
    for seed, gain in enumerate(gains, start=3):
        own = base + seed / 10
        rows += [run("last", seed, own, **changes), run("convmix", seed, own + gain, **changes)]
        rows.append(run("control", seed, own + gain / 2, **changes))
    return rows


def test_a_command_is_told_once_whatever_part_of_it_a_process_ran():
    parts = [
        run("last", 3, 60.0, argv="python -m benchmarks.accuracy --data 'my data' --seeds 3 --epochs 3 --save M"),
        run("grid", 5, 60.0, argv="python -m benchmarks.accuracy --data 'my data' --epochs 3 --seeds 5 --schemes grid"),
    ]
    assert report.commands(parts) == "`python -m benchmarks.accuracy --data 'my data' --epochs 3`"
    measured = [run("last", 3, 60.0, argv="python -m benchmarks.saliency --data D a.safetensors b.safetensors")]
    assert report.commands(measured) == "`python -m benchmarks.saliency --data D MODELS`"


def sign_flip(values):
    """Share of all signs whose mean is at least as far from zero."""
    observed = abs(statistics.mean(values))
    flipped = [
        abs(statistics.mean(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return sum(value >= observed - 1e-12 for value in flipped) / len(flipped)


# Statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [DIFFERENCES, BEST, [0.1] * 8])
def test_the_sign_flip_test_is_exact(values):
    assert Difference(tuple(values)).p_value() == pytest.approx(sign_flip(values))


def test_the_interval_is_a_bootstrap_s():
    low, high = Difference(tuple(DIFFERENCES)).interval()
    draws = torch.tensor(DIFFERENCES)[torch.randint(8, (20000, 8))].mean(1)
    percentiles = torch.quantile(draws, torch.tensor([0.025, 0.975]))
    assert [low, high] == pytest.approx(percentiles.tolist(), abs=0.08)  # BCa corrects for the skew
    assert Difference(tuple(DIFFERENCES)).interval() == (low, high)
    assert Difference((0.1, 0.2)).interval() is None
    assert Difference((0.1,) * 4).interval() == (0.1, 0.1)


def test_holm():
    assert comparisons.holm({"a": 0.01, "b": 0.04}, 2) == {"a": 0.02, "b": 0.04}
    assert comparisons.holm({"a": 0.03, "b": 0.02}, 2) == {"b": 0.04, "a": 0.04}
    assert comparisons.holm({"a": 0.03}, 2) == {"a": 0.06}
    assert comparisons.holm({"a": 0.9, "b": 0.8}, 2) == {"a": 1.0, "b": 1.0}


def test_a_claim_needs_eight_pairs():
    gains = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]
    for pairs, claim in ((7, 0), (8, 1)):
        (condition,) = comparisons.conditions_of(paired(gains[:pairs]))
        assert [verdict.claim for verdict in comparisons.verdicts(condition).values()] == [claim, claim]


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ([1.0, 1.1, 1.2, 1.3, 1.4], None),  # all signs alike have p = 2 / 2 ** 5
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], 1),
        ([-1.0, -1.1, -1.2, -1.3, -1.4, -1.5], -1),
        ([1.0, 1.1, 1.2, 1.3, 1.4, -0.1], 0),  # the interval is above zero, p is not small
        ([1.0, -1.1, 1.2, -1.3, 1.4, -1.5], 0),
    ],
)
def test_a_sign_needs_both_interval_and_test(values, sign):
    assert Difference(tuple(values)).sign() == sign
    assert Difference(tuple(values)).interval()[0] > 0 or sign != 1


# Tables ---------------------------------------------------------------------------------------------------------------


def test_numbers_of_the_claims_equal_a_computation_of_their_own():
    text = report.claims(comparisons.conditions_of(paired(DIFFERENCES)))
    cells = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    own = [60 + seed / 10 for seed in range(3, 11)]
    mixed = [a + b for a, b in zip(own, DIFFERENCES, strict=True)]
    error = statistics.stdev(mixed) / math.sqrt(8)
    assert cells[:3] == ["noise, 100 classes, 32 px, resnet18_cifar, 3 epochs", "8", "60.65 ± 0.09 at lr 0.1"]
    assert cells[4] == f"{statistics.mean(mixed):.2f} ± {error:.2f} at lr 0.1"
    assert cells[5].startswith(f"{statistics.mean(DIFFERENCES):+.2f} (+")
    p = 2 * sign_flip(DIFFERENCES)  # the two are scaled alike, so both p are the same, and Holm doubles them
    assert cells[6] == cells[8] == f"**p = {p:.3f}**"
    reductions = [100 * gain / (100 - a) for gain, a in zip(DIFFERENCES, own, strict=True)]
    assert cells[9] == f"{statistics.mean(reductions):.1f}"


def test_no_claim_without_seeds_or_difference():
    few = report.claims(comparisons.conditions_of(paired(DIFFERENCES[:3])))
    assert few.count("n = 3: no claim") == 2
    assert "p =" not in few.splitlines()[2]
    none = report.claims(comparisons.conditions_of(paired(BEST))).splitlines()[2]
    assert none.count(": no claim") == 2
    assert "**" not in none
    alone = report.claims(comparisons.conditions_of(row for row in paired(DIFFERENCES) if row.scheme != "control"))
    assert f"**p = {2 * sign_flip(DIFFERENCES):.3f}**" in alone  # the other test counts even where it was not run
    others = report.claims(comparisons.conditions_of(row for row in paired(DIFFERENCES) if row.scheme != "last"))
    assert "| 8 |  | 60.91 ± 0.11 at lr 0.1 | 61.16 ± 0.15 at lr 0.1 |  |  | +0.26 (" in others
    one = report.claims(comparisons.conditions_of(paired([0.5])))
    assert "| 60.30 at lr 0.1 | 60.55 at lr 0.1 | 60.80 at lr 0.1 | +0.50 | n = 1: no claim |" in one


def test_answers_in_words():
    worse = [-value for value in DIFFERENCES]
    rows = paired(DIFFERENCES) + paired(worse, lr=0.2) + paired(DIFFERENCES[:3], lr=0.3) + paired(BEST, lr=0.4)
    counted = "ConvMix's accuracy is higher in 1, lower in 1, not shown to differ in 1,"
    counted += " not tested (too few seeds) in 1 of 4 settings."
    text = report.answers(comparisons.conditions_of(rows))
    lower = "Where it is lower, a further layer on the deepest stage does more than mixing stages."
    assert text == (
        f"Against the last stage, all at one learning rate, {counted} Against the control, all at one learning rate,"
        f" {counted} {lower}"
    )
    assert lower not in report.answers(comparisons.conditions_of(paired(DIFFERENCES)))
    alone = [row for row in paired(DIFFERENCES) if row.scheme != "control"]
    assert (
        "\n- **Does ConvMix beat the last stage and the control?** Against the last stage, all at one learning rate,"
        " ConvMix's accuracy is higher in 1 of 1 setting.\n"
    ) in report.summary(comparisons.conditions_of(alone))


def test_only_paired_seeds_are_compared():
    rows = [row for row in paired(DIFFERENCES) if (row.scheme, row.seed) != ("last", 3)]
    (condition,) = comparisons.conditions_of(rows)
    assert condition.difference("last", "convmix").values == pytest.approx(DIFFERENCES[1:])
    more = [*paired(DIFFERENCES), run("last", 99, 0.0)]  # a baseline that ConvMix does not have yet
    assert report.claims(comparisons.conditions_of(more)) == report.claims(
        comparisons.conditions_of(paired(DIFFERENCES))
    )


def test_settings_are_kept_apart():
    rows = paired([0.5]) + paired([0.7], lr=0.2) + paired([0.1], split="holdout") + paired([0.3], init="a", freeze=1)
    conditions = comparisons.conditions_of(rows)
    assert len(conditions) == 4
    text = report.document(conditions, [], [])
    assert text.count("\n### ") == 3  # both rates in one table
    assert "| convmix | 0.2 | 1 | " in text
    assert "linear probe from a" in text
    selection = text[text.index("## Every scheme, on the hold-out") :]
    assert "+0.10" in selection
    assert "+0.50" not in selection
    started = text[text.index("## Does it carry over") : text.index("## Every scheme, on the test")]
    assert "+0.30" in started
    assert "+0.50" not in started
    with pytest.raises(ValueError, match="Runs on noise saw different images"):
        comparisons.conditions_of([*paired([0.5]), run("last", 9, 60, data="cd")])


FORMERLY = {former: report.FORMERLY.format(former=former) for former in comparisons.FORMERS}


def formerly(rows, former="layerscale"):
    """Runs of a default before, as they are called now."""
    names = {"convmix": former, "control": f"control-{former}"}
    return [replace(row, scheme=names.get(row.scheme, row.scheme)) for row in rows]


@pytest.mark.parametrize("former", comparisons.FORMERS)
def test_what_was_claimed_with_a_default_before_stays_on_record(former):
    now = paired([-value for value in DIFFERENCES])
    before = [row for row in formerly(paired(DIFFERENCES), former) if row.scheme != "last"]  # the same setting and nets
    grid = [replace(row, scheme="grid") for row in before if row.scheme == former]
    for rows, to_control in (([*now, *before, *grid], "+0.26"), ([*now, before[0], *before[2::2]], "")):
        conditions = comparisons.conditions_of(rows)
        first = report.summary(conditions)
        assert FORMERLY[former] not in first  # the present default was run there
        assert "-0.51 (" in first.splitlines()[2]
        _, then = report.document(conditions, [], []).split(FORMERLY[former])
        then = then[: then.index("## Every scheme")]
        line = next(one for one in then.splitlines() if one.startswith("| noise, 100 classes,"))
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[6].startswith("+0.51 (")
        assert cells[8].startswith(to_control)
        assert bool(cells[4]) is bool(cells[8]) is bool(to_control)
        assert (
            "Against the last stage, all at one learning rate, ConvMix's accuracy is higher in 1 of 1 setting" in then
        )
        assert "is the default?" not in then
        assert "![" not in then


def test_answers_of_a_default_before_stand_where_the_present_one_has_none():
    rows = [*paired(DIFFERENCES), *formerly(paired(DIFFERENCES, init="a"))]
    first, then = report.summary(comparisons.conditions_of(rows)).split(FORMERLY["layerscale"])
    assert "**Does it carry over" not in first
    assert "**Does it carry over" in then
    assert "**Does ConvMix beat" not in then  # the present default answers that
    assert "![" not in then
    blurred = [robust(scheme, seed, 50.0) for scheme in ("last", "layerscale") for seed in range(3, 9)]
    first, then = report.summary(comparisons.conditions_of(rows), blurred).split(FORMERLY["layerscale"])
    assert "**Does it help on corrupted images?**" not in first
    assert "**Does it help on corrupted images?**" in then


def test_a_setting_stands_under_the_last_default_that_was_run_there():
    last, *older = comparisons.FORMERS
    both = [row for former in comparisons.FORMERS for row in formerly(paired(DIFFERENCES, init="a"), former)]
    older_alone = formerly(paired(DIFFERENCES, init="b"), older[0])
    unique = {(row.scheme, row.seed, row.init): row for row in [*paired(DIFFERENCES), *both, *older_alone]}
    _, then = report.summary(comparisons.conditions_of(list(unique.values()))).split(FORMERLY[last])
    then, oldest = then.split(FORMERLY[older[0]])
    assert ("fine-tuned from a |" in then, "fine-tuned from b |" in then) == (True, False)
    assert ("fine-tuned from a |" in oldest, "fine-tuned from b |" in oldest) == (False, True)


def test_a_title_says_what_a_setting_started_from():
    settings = comparisons.shared_settings(run("last", 3, 60.0, init="tiny/{arch}-{scheme}-{seed}.safetensors"))
    assert comparisons.title(settings).endswith(", 3 epochs, fine-tuned from the nets of tiny")
    warm = replace(settings, init="tiny/{arch}-last-{seed}.safetensors")
    assert comparisons.title(warm).endswith(", fine-tuned from the plain nets of tiny")
    assert comparisons.title(replace(warm, freeze=1, init="a/b")).endswith(", linear probe from a/b")
    assert ", 3 epochs, warm-up 0.1, fine-tuned" in comparisons.title(replace(warm, warmup=0.1))


def test_the_best_variant_of_the_selection():
    rows = [
        run(scheme, seed, 50 + gain + seed * slope, split="holdout", epochs=epochs)
        for seed in range(3)
        for scheme, gain, slope in (("convmix", 0, 0), ("grid", 1.5, 0.3), ("gem", -0.5, 0))
        for epochs in (3, 6)[: 1 + (scheme != "gem")]
    ]
    rows += [run(scheme, 0, 50, split="holdout", lr=0.2) for scheme in ("convmix", "gelu")]  # not the recipe's rate
    found = comparisons.candidates(comparisons.conditions_of(rows))
    text = report.choice(found)
    assert report.chosen(found, "so") == (
        "Of 2 variants beside the default, on the hold-out, so, 1 are more than two standard errors worse; more than"
        " two standard errors better: `grid`."
    )
    error = 0.3 / 3**0.5 / 2**0.5  # of a setting's three seeds; of two settings
    assert text.splitlines()[2:] == [f"| grid | +1.80 ± {error:.2f} | 2 | 6 |", "| gem | -0.50 ± 0.00 | 1 | 3 |"]
    found = comparisons.candidates(comparisons.conditions_of([row for row in rows if row.seed < 2]))
    assert "| grid | +1.65 | 2 | 4 |" in report.choice(found)
    assert report.chosen(found, "so").endswith(
        ", so, 0 are more than two standard errors worse; more than two standard errors better: none; of fewer"
        " than 3 pairs of runs, so not judged: `grid`, `gem`."
    )
    flat = [run("no_residual", seed, 99, split="holdout") for seed in range(3)]  # cannot start warm
    assert report.choice(comparisons.candidates(comparisons.conditions_of([*rows, *flat]))) == text
    left = [row for row in rows if (row.scheme, row.epochs) != ("grid", 6) or row.seed == 0]
    found = comparisons.candidates(comparisons.conditions_of(left))
    assert f"| grid | +1.80 ± {0.3 / 3**0.5:.2f} | 1 | 3 |" in report.choice(found)  # one pair does not count
    assert report.choice([]) == report.chosen([], "so") == ""


def test_each_scheme_at_the_learning_rate_that_suits_it():
    scores = {0.05: (50, 54), 0.1: (51, 56), 0.2: (55, 55), 0.4: (57, 20)}
    rows = [
        run(scheme, seed, score + seed / 10 * (1 + (scheme == "convmix")), split="holdout", lr=lr)
        for lr, pair in reversed(scores.items())
        for scheme, score in zip(("last", "convmix"), pair, strict=True)
        for seed in range(3)
    ]
    rows += [run("grid", seed, 60, split="holdout", lr=0.1) for seed in range(3)]
    rows += [replace(row, split="test", seed=row.seed + 3) for row in rows]
    conditions = comparisons.conditions_of(rows)
    assert sorted(comparisons.title(c.settings).endswith("learning rate 0.2") for c in conditions)[-3:] == [
        False,
        True,
        True,
    ]
    (tuning,) = comparisons.tunings_of(conditions)
    assert tuning.schemes() == ["last", "convmix"]
    assert tuning.difference("last", "convmix").values == pytest.approx([-1, -0.9, -0.8])
    text = report.tuned([tuning])
    name = "noise, 100 classes, 32 px, resnet18_cifar, 3 epochs"
    assert f"above the last stage's in 0 of 1 settings; the difference is -0.90 points ({name})." in text
    (line,) = report.tuned_table([tuning]).splitlines()[2:]
    last, own = "57.10 ± 0.06 at lr 0.4 (n = 3)", "56.20 ± 0.12 at lr 0.1 (n = 3)"
    assert line == f"| {name} | {last} | {own} | -0.90 (-1.00 to -0.80) |"
    assert report.tuned([]) == report.tuned_table([]) == ""
    better = replace(tuning, conditions=[c for c in tuning.conditions if c.settings.lr < 0.2])
    other = replace(better, conditions=[replace(c, settings=replace(c.settings, epochs=9)) for c in better.conditions])
    text = report.tuned([other, tuning])
    assert f"in 1 of 2 settings; the difference is -0.90 points ({name}) to +5.10 points (" in text
    assert comparisons.tunings_of([c for c in conditions if c.settings.lr == 0.1]) == []
    assert tuning.settled() == ["convmix"]  # the highest rate tried is the last stage's best
    ahead = [replace(row, scheme="gem", top1=row.top1 + 0.1) for row in rows if row.scheme == "convmix"]
    alone = [replace(row, scheme="gelu") for row in rows if (row.scheme, row.lr) == ("convmix", 0.1)]
    open_ended = [replace(row, scheme="gelu") for row in rows if (row.scheme, row.lr) == ("convmix", 0.05)]
    conditions = comparisons.conditions_of([*rows, *ahead, *alone, *open_ended])
    at_best = comparisons.tuned_candidates(comparisons.tunings_of(conditions))
    assert report.chosen(at_best, "so", conditions) == (
        "Of 1 variants beside the default, on the hold-out, so, 0 are more than two standard errors worse; more than"
        " two standard errors better: `gem`; best at the end of the rates tried, so not judged: `gelu`. Where 3 pairs"
        f" or more were run, the default's mean is below the plain backbone's on {name}: -0.90 (-1.00 to -0.80); that"
        f" of `gem` on {name}: -0.80 (-0.90 to -0.70)."
    )
    first = comparisons.conditions_of([row for row in rows if row.seed == 0])
    assert f"below the plain backbone's on none (with fewer, on {name}: -1.00)." in report.chosen(at_best, "so", first)
    lucky = run("convmix", 0, 55.0, split="holdout", lr=0.0125), run("convmix", 3, 99.0, split="holdout", lr=0.0125)
    (tuning,) = comparisons.tunings_of(comparisons.conditions_of([*rows, *lucky]))
    assert tuning.best("convmix").settings.lr == 0.1  # by the seed that both rates have
    given_up = run("convmix", 0, 1.0, split="holdout", lr=0.8)
    first = [row for row in rows if (row.scheme, row.lr, row.seed) == ("convmix", 0.2, 0)]
    misled = [replace(row, top1=57.0) for row in first]  # at another rate the first seed is ahead, and it alone
    (tuning,) = comparisons.tunings_of(comparisons.conditions_of([*rows, *misled, given_up]))
    assert tuning.best("convmix").settings.lr == 0.1


def test_seeds_that_choose_prove_nothing():
    rows = paired(DIFFERENCES)
    more = [replace(row, seed=seed, top1=99.0) for seed in range(3) for row in rows[:3]]
    assert comparisons.conditions_of([*more, *rows]) == comparisons.conditions_of(rows)
    assert comparisons.conditions_of(more) == []


BEST_RATES = {"last": 0.4, "control": 0.2, "convmix": 0.1, "grid": 0.2}
SAME_SETTING = {"images": 500, "fraction": 0.2}


def tuned_runs():
    """Of every rate, on the hold-out and on the test images."""

    def held_out(scheme, lr):
        score = 50 + (scheme == "grid") - 10 * abs(math.log2(lr / BEST_RATES[scheme]))
        return [run(scheme, seed, score, split="holdout", lr=lr, images=450, fraction=0.2) for seed in range(3)]

    rows = [row for scheme in BEST_RATES for lr in (0.05, 0.1, 0.2, 0.4, 0.8) for row in held_out(scheme, lr)]
    rows = [row for row in rows if (row.scheme, row.lr) != ("control", 0.4)]  # 0.2 is then the highest of all but one
    for lr, gain in ((0.1, 3), (0.2, 2), (0.4, 1)):  # on the test images each scheme was run at all rates
        rows += [replace(row, top1=row.top1 + gain) for row in paired(DIFFERENCES, lr=lr, **SAME_SETTING)]
    return rows + paired(DIFFERENCES, lr=0.4, images=900, fraction=0.4)  # the last ones: another setting


def test_the_declared_tests_with_a_rate_for_each_scheme():
    rows = tuned_runs()
    conditions = comparisons.conditions_of(rows)
    (best,) = comparisons.at_best_rates(conditions)
    assert {scheme: {one.lr for one in by_seed.values()} for scheme, by_seed in best.runs.items()} == {
        scheme: {BEST_RATES[scheme]} for scheme in ("last", "control", "convmix")
    }
    assert (best.settings.images, best.settings.lr) == (500, 0)
    assert best.difference("last", "convmix").values == pytest.approx([value + 2 for value in DIFFERENCES])
    assert comparisons.proofs(conditions)[0] == best
    text = report.summary(conditions)
    assert (
        "- **Does ConvMix beat the last stage and the control?** Against the last stage, each at the learning rate that"
        " is best for it on the hold-out, ConvMix's accuracy is higher in 1 of 1 setting. Against the control,"
    ) in text
    first = text.splitlines()[2]
    assert first.startswith(
        "| noise, 100 classes, 500 images, 32 px, resnet18_cifar, 3 epochs | 8 | 61.65 ± 0.09 at lr 0.4 |"
    )
    (grid,) = comparisons.tuned_candidates(comparisons.tunings_of(conditions))  # the control is none
    assert grid.scheme == "grid"
    assert (grid.mean, grid.error) == (1, 0)
    assert "| grid | +1.00 ± 0.00 | 1 | 3 |" in report.document(conditions, [], [])
    other = [replace(row, scheme="control-blend") for row in rows if row.scheme == "control"]
    assert (
        "- **And controls of other forms?** ConvMix's accuracy against the other controls, by interval and uncorrected"
        " sign-flip test: `control-blend`: higher in 1 of 1 settings.\n"
    ) in report.summary(comparisons.conditions_of([*rows, *other]))
    without = [row for row in rows if (row.scheme, row.lr) != ("convmix", 0.05)]  # its best is the lowest rate tried
    assert comparisons.at_best_rates(comparisons.conditions_of(without)) == []
    part = [replace(row, images=450) for row in rows if row.split == "test" and row.scheme == "last"]
    assert comparisons.at_best_rates(comparisons.conditions_of([*rows, *part])) == comparisons.at_best_rates(conditions)
    untested = [row for row in rows if (row.split, row.scheme, row.lr) != ("test", "last", 0.4)]
    assert comparisons.at_best_rates(comparisons.conditions_of(untested)) == []


def test_what_is_compared_at_its_best_rates_is_not_counted_once_more():
    rows = [
        run(scheme, seed, 50 - 10 * abs(math.log2(lr / rate)), split="holdout", lr=lr, images=450, fraction=0.2)
        for scheme, rate in (("last", 0.2), ("convmix", 0.2), ("control", 0.4))
        for lr in (0.1, 0.2, 0.4, 0.8)
        for seed in range(3)
    ]
    for lr in (0.2, 0.4):
        rows += paired(DIFFERENCES, lr=lr, **SAME_SETTING)
    other = paired(DIFFERENCES, lr=0.4, epochs=9, **SAME_SETTING)  # never tuned
    found = comparisons.proofs(comparisons.conditions_of(rows + other))
    assert [(c.settings.lr, c.settings.epochs, list(c.runs)) for c in found] == [
        (comparisons.BEST, 3, ["last", "convmix", "control"]),
        (0.4, 9, ["last", "convmix", "control"]),
    ]


def test_saved_nets_are_paired_across_their_best_rates_too():
    (best,) = comparisons.at_best_rates(comparisons.conditions_of(tuned_runs()))
    rows = [
        replace(robust(scheme, seed, 10 * lr), lr=lr, **SAME_SETTING)
        for scheme in ("last", "convmix")
        for seed in (3, 4)
        for lr in (0.1, 0.4)
    ]
    found = comparisons.rows_at_best_rates(rows, [best])
    assert [(row.scheme, row.seed, row.top1, row.lr) for row in found] == [
        ("last", 3, 4.0, comparisons.BEST),
        ("last", 4, 4.0, comparisons.BEST),
        ("convmix", 3, 1.0, comparisons.BEST),
        ("convmix", 4, 1.0, comparisons.BEST),
        ("last", 3, 1.0, 0.1),  # what is left stands once too
        ("last", 4, 1.0, 0.1),
        ("convmix", 3, 4.0, 0.4),
        ("convmix", 4, 4.0, 0.4),
    ]
    assert comparisons.title(found[0]).endswith("3 epochs, each at its best learning rate")


def test_trends():
    growing = []
    for classes, gain in ((10, 0.1), (50, 0.5), (100, 1.0)):
        gains = [gain + noise / 10 for noise in BEST]
        growing += paired(gains, classes=classes, images=5 * classes)
    (series,) = comparisons.series_of(comparisons.conditions_of(growing))
    assert series.what == "number of classes"
    assert [position for position, _ in series.table()] == [10, 50, 100]
    assert series.p_value() < 0.001
    flat = [replace(row, top1=row.top1) for row in growing if row.classes != 50]
    (short,) = comparisons.series_of(comparisons.conditions_of(flat))
    assert short.p_value() is None
    text = report.trends([series, short])
    rise = series.rise()
    assert rise.values == pytest.approx([series.table()[2][1][s] - series.table()[0][1][s] for s in range(3, 11)])
    shown = report.show_difference(rise)
    assert f"10: 0.3; 50: 1.3; 100: 2.6 | {shown} | 8 | < 0.001 | 1.000 |" in text
    assert f"10: 0.3; 100: 2.6 | {shown} | 8 | too few | too few |" in text
    parts = [row for n in (50, 125) for row in paired(DIFFERENCES, fraction=n / 500, images=n, epochs=1500 // n)]
    longer = paired(DIFFERENCES, epochs=6) + paired(DIFFERENCES, fraction=0.5, images=250)  # more steps, and fewer
    nets = [row for arch in ("resnet34_cifar", "vgg16_bn_cifar") for row in paired(DIFFERENCES, arch=arch)]
    found = comparisons.series_of(comparisons.conditions_of(paired(DIFFERENCES) + parts + longer + nets))
    assert [(one.what, [position for position, _ in one.table()]) for one in found] == [
        ("training images", [50, 125, 500]),
        ("epochs", [3, 6]),
        ("parameters of a ResNet", [1000, 1000]),
    ]
    text = report.summary(comparisons.conditions_of(growing))
    assert text.count("docs/figures/gain-number-of-classes.svg") == 1
    assert "It grows with: number of classes (noise, resnet18_cifar)." in text
    assert "| 10: 0.3; 50: 1.3; 100: 2.6 |" in report.document(comparisons.conditions_of(growing), [], [])
    shrinking = [replace(row, classes=110 - row.classes, images=5 * (110 - row.classes)) for row in growing]
    (falling,) = comparisons.series_of(comparisons.conditions_of(shrinking))
    assert falling.p_value() > 0.999
    assert falling.p_value(falls=True) == pytest.approx(series.p_value())
    steady = [row for n in (10, 50, 100) for row in paired(DIFFERENCES, classes=n, images=5 * n)]
    (level,) = comparisons.series_of(comparisons.conditions_of(steady))
    alone = [row for row in flat if row.seed < 7]
    (few,) = comparisons.series_of(comparisons.conditions_of(alone))
    name = "number of classes (noise, resnet18_cifar"
    assert report.grows([falling, level, short, few]) == (
        f"It falls with: {name}). It is not shown to grow with: {name})."
        f" Of two settings only, so a description, with: {name}: larger at 100 than at 10)."
        f" Not tested (too few) with: {name})."
    )
    both = [replace(row, dataset=f"cifar{row.classes}", images=500) for row in flat]
    (series,) = comparisons.series_of(comparisons.conditions_of([*both, *(replace(row, init="a") for row in both)]))
    assert (series.what, series.images) == ("number of classes", "CIFAR-10 and CIFAR-100, resnet18_cifar")
    sizes = paired(DIFFERENCES, size=64, padding=8) + paired(DIFFERENCES)
    (series,) = comparisons.series_of(comparisons.conditions_of(sizes))
    assert (series.what, [position for position, _ in series.table()]) == ("image size", [32, 64])


def test_few_images_and_larger_pictures():
    few = paired(DIFFERENCES, images=5000), paired(DIFFERENCES, images=5001, base=50.0)
    large = paired([-one for one in DIFFERENCES], images=5001, size=128)
    asked = {
        q.text: q.sentence
        for q in report.questions(comparisons.conditions_of([*few[0], *few[1], *large]), [], [], None)
    }
    assert "is higher in 1 of 1 setting." in asked["Does it help with few images?"]
    assert "is lower in 1 of 1 setting." in asked["Does it help on larger pictures?"]


def test_what_nets_were_trained_on():
    rows = [replace(row, argv="python -m benchmarks.accuracy --save M --epochs 3") for row in paired(DIFFERENCES)]
    started = paired(DIFFERENCES, dataset="other", init="M/{arch}-{scheme}-{seed}.safetensors")
    conditions = comparisons.conditions_of([*rows, *started])
    proof = [condition for condition in conditions if condition.settings.init]
    assert report.nets(proof, conditions) == "The nets of M: noise, 100 classes, 32 px, resnet18_cifar, 3 epochs."


def test_a_larger_backbone():
    nets = {"resnet18": (1000, 60.0), "resnet34": (2000, 60.4), "resnet50": (3000, 62.0)}
    rows = [
        replace(row, params=size, macs=size * (1 + (row.scheme == "convmix") / 1000))
        for arch, (size, base) in reversed(nets.items())
        for row in paired([0.6, 0.5], base, arch=arch)
    ]
    conditions = comparisons.conditions_of(rows)
    told = (
        "Of pairs of backbones of one family that follow each other in MACs, the larger is alone more accurate than the"
        " smaller alone in {} of 2; there the smaller with ConvMix is ahead of the larger alone in {}, by the means"
        " over the seeds that both have."
    )
    assert report.smaller(conditions) == told.format(2, 1)
    more = [*rows, run("last", 7, 90.0, arch="resnet18", macs=1000)]  # a seed that the larger one has not
    assert report.smaller(comparisons.conditions_of(more)) == told.format(2, 1)
    others = [replace(row, arch="vgg11") if row.arch == "resnet34" else row for row in rows]
    assert "in 1 of 1; there the smaller with" in report.smaller(comparisons.conditions_of(others))
    small = [replace(row, arch=f"{row.arch}_cifar") for row in others]
    assert "in 1 of 1; there the smaller with" in report.smaller(
        comparisons.conditions_of(replace(row, arch=row.arch.replace("vgg11", "vgg16_bn")) for row in small)
    )
    worse = [replace(row, top1=row.top1 - 9) if row.arch == "resnet50" else row for row in rows]
    assert report.smaller(comparisons.conditions_of(worse)) == told.format(1, 1)
    lines = report.price(conditions).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["last stage", "ConvMix"] * 3
    assert ", resnet18, " in lines[0]
    assert ", resnet50, " in lines[-1]
    assert report.smaller(conditions[:1]) == report.price(conditions[:1]) == ""


def test_a_warm_start_stands_beside_the_plain_net_from_the_same_file():
    own, plain = "M/{arch}-{scheme}-{seed}.safetensors", "M/{arch}-last-{seed}.safetensors"
    rows = paired(DIFFERENCES, init=own)
    warm = [replace(row, init=plain) for row in rows if row.scheme == "convmix"]
    first, second = comparisons.conditions_of(rows + warm)
    assert set(first.runs) == {"last", "control", "convmix"}
    assert set(second.runs) == {"last", "convmix"}
    assert second.difference("last", "convmix") == first.difference("last", "convmix")
    assert comparisons.all_runs([first, second]) == comparisons.all_runs(comparisons.conditions_of(rows + warm))
    assert len(comparisons.all_runs([first, second])) == len(rows + warm)
    again = [replace(row, init=plain, top1=row.top1 + 1) for row in rows if row.scheme == "last"]
    assert comparisons.conditions_of(rows + warm + again)[1].values("last")[0] == first.values("last")[0] + 1


def test_peers_and_calibration():
    peers = [
        run(peer, seed, 60.0 + seed / 10 + add) for seed in range(3, 9) for peer, add in (("dag", 9), ("concat", -9))
    ]
    rows = [replace(row, ece=4.0 if row.scheme == "convmix" else 5.0 + row.seed / 10) for row in paired(DIFFERENCES)]
    conditions = comparisons.conditions_of(rows + peers)
    assert report.against(conditions, "peers", ["concat", "scalar", "dag"]) == (
        "ConvMix's accuracy against the peers, by interval and uncorrected sign-flip test: `concat`: higher in 1 of 1;"
        " `dag`: lower in 1 of 1 settings."
    )
    concat, dag = report.against_table(conditions, ["concat", "scalar", "dag"]).splitlines()[2:]
    assert concat.startswith(
        "| noise, 100 classes, 32 px, resnet18_cifar, 3 epochs | concat | 6 | 51.55 ± 0.08 at lr 0.1 |"
    )
    assert concat.endswith(" | 0.031 |")
    assert " | dag | 6 | 69.55 ± 0.08 at lr 0.1 | 61.05 ± " in dag
    assert "calibration error is lower in 1 of 1 settings" in report.calibration(conditions)
    (line,) = report.columns_table(conditions, report.CALIBRATION).splitlines()[2:]
    assert " | 8 | 5.65 ± 0.09 | 4.00 ± 0.00 | -1.65 (" in line
    text = report.document(conditions, [], [])
    assert concat in text
    assert line in text
    few = comparisons.conditions_of(paired([0.5, 0.6]))
    assert report.against(few, "peers", ["dag"]) == report.calibration(few) == ""


def test_whether_it_regularises_in_words():
    def losses(setting, own, base):
        """Pairs of (training, test) loss, with a little noise."""
        return [
            run(scheme, seed, 60.0, lr=setting, train_loss=train + seed / 100, loss=test + seed / 50)
            for seed in range(3, 9)
            for scheme, (train, test) in (("last", base), ("convmix", own))
        ]

    fits_more = losses(0.1, (0.5, 1.0), (0.8, 1.1))
    regularises = losses(0.2, (1.0, 1.1), (0.8, 1.1)) + losses(0.3, (0.9, 1.0), (0.8, 1.1))
    text = report.fit(comparisons.conditions_of(fits_more + regularises))
    assert "higher in 2 and lower in 1 of 3 settings, and the gap is narrower in 2 and wider in 1." in text
    assert text.endswith(
        "wider in 1. Where a training is too short to overfit, a lower training loss is but faster fitting."
    )
    text = report.fit(comparisons.conditions_of(fits_more))
    assert text.endswith("fitting. These runs do not show the regulariser that the paper reports.")
    assert text in report.summary(comparisons.conditions_of(fits_more))
    (line,) = report.columns_table(comparisons.conditions_of(fits_more), report.FIT).splitlines()[2:]
    assert "| 6 | 0.86 ± 0.01 | 0.56 ± 0.01 | -0.30 (-0.30 to -0.30) | 0.36 ± 0.01 | 0.56 ± 0.01 | +0.20 (" in line
    assert report.fit(comparisons.conditions_of(paired([0.5, 0.6]))) == report.fit([]) == ""


def test_an_empty_report_says_so():
    assert report.summary([]) == "No run is recorded yet."
    assert report.document([], [], []).endswith("\n\nNo run is recorded yet.\n")


def test_a_run_that_diverged_is_shown():
    rows = [run("last", 3, 60.0), run("grid", 3, 1.0, diverged=2, loss=math.nan, train_loss=math.nan)]
    assert "| grid | 0.1 | 1 | 1.00 | 90.00 | nan | nan | 5.00 | -59.00 | 1.1000 | 1.0002 | 1 |" in report.document(
        comparisons.conditions_of(rows), [], []
    )
    again = run("grid", 4, 1.0, loss=1.0)
    assert "| grid | 0.1 | 2 | 1.00 ± 0.00 | 90.00 ± 0.00 | nan ± nan | nan ± nan | 5.00" in report.document(
        comparisons.conditions_of([*rows, again]), [], []
    )


# Command --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Rows on disk, a README with markers, and the options that point there."""
    timing.append_rows(tmp_path / "accuracy.csv", paired(DIFFERENCES))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- evidence:begin -->\nold\n<!-- evidence:end -->\nafter\n")
    options = ["--results", tmp_path, "--readme", readme, "--document", tmp_path / "docs" / "evidence.md"]
    return tmp_path, [*map(str, options), "--figures", str(tmp_path / "figures")]


def test_check_fails_where_a_number_differs(files, capsys):
    pytest.importorskip("matplotlib")
    folder, options = files
    assert report.main([*options, "--check"]) == 1
    assert report.main([*options, "--write"]) == 0
    capsys.readouterr()
    assert report.main([*options, "--check"]) == 1
    assert (
        capsys.readouterr().out == "differences.svg: missing, or of other runs: python -m benchmarks.report --plots\n"
    )
    assert report.main([*options, "--plots"]) == 0
    assert report.main([*options, "--check"]) == 0
    readme, document = folder / "README.md", folder / "docs" / "evidence.md"
    assert "+0.51" in readme.read_text()
    assert readme.read_text().startswith("before\n<!-- evidence:begin -->\n|  | seeds | last stage, %")
    capsys.readouterr()
    for path in (readme, document):
        kept = path.read_text()
        path.write_text(kept.replace("+0.51", "+0.61", 1))
        assert report.main([*options, "--check"]) == 1
        assert capsys.readouterr().out == f"{path.name} differs: python -m benchmarks.report --write\n"
        path.write_text(kept)
    timing.append_rows(folder / "accuracy.csv", [run("last", 3, 61.0)])  # a number in the CSV
    assert report.main([*options, "--check"]) == 1
    assert report.main([*options, "--write"]) == 0
    assert report.main([*options, "--check"]) == 1  # the figure


def test_the_repository_s_report_is_current():
    assert report.main(["--check"]) == 0


def test_plots(files):
    pytest.importorskip("matplotlib")
    folder, options = files
    timing.append_rows(folder / "accuracy.csv", paired(DIFFERENCES, classes=50, images=250))
    assert report.main([*options, "--plots"]) == 0
    assert {path.name for path in (folder / "figures").iterdir()} == {"differences.svg", "gain-number-of-classes.svg"}
    timing.append_rows(folder / "accuracy.csv", paired(DIFFERENCES, arch="resnet34_cifar", params=2000))
    assert report.main([*options, "--plots"]) == 0
    drawn = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    series = {"gain-number-of-classes.svg", "gain-parameters-of-a-ResNet.svg"}
    assert drawn.keys() == {"differences.svg", "cost-noise-1.svg"} | series
    former, foreign = folder / "figures" / "gain-epochs.svg", folder / "figures" / "logo.svg"
    former.write_text(f"<svg>runs {'0' * 64}</svg>")  # of a series that is no more
    assert report.main([*options, "--write"]) == 0
    assert report.main([*options, "--check"]) == 1
    foreign.write_text("<svg/>")
    assert report.main([*options, "--plots"]) == 0
    assert report.main([*options, "--check"]) == 0
    assert foreign.read_text() == "<svg/>"
    foreign.unlink()
    assert drawn == {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}


def settings_of(row):
    return {name: getattr(row, name) for name in Settings.__dataclass_fields__}


def robust(scheme, seed, top1, severity=1):
    scores = vars(Scores(top1=top1, top5=90.0, loss=1.0, ece=1.0, correct=1, count=2))
    labels = dict(scored="ab", weights=f"{scheme}{seed}", corruption="noise", severity=severity)
    labels |= dict(device="CPU", torch="2", timm="1", python="3", date="2026-01-01", argv="x")
    return Robustness(**settings_of(run(scheme, seed, 60.0)), **scores, **labels)


def test_robustness_is_averaged_over_severities_and_paired_by_seed():
    rows = [
        robust(scheme, seed, 40 + seed + gain - severity, severity=severity)
        for seed in range(6)
        for severity in (1, 3, 5)
        for scheme, gain in (("last", 0), ("convmix", 0.5))
    ]
    lines = report.robustness_table(rows).splitlines()[2:]
    assert lines[0].startswith(
        "| noise, 100 classes, 32 px, resnet18_cifar, 3 epochs: noise | last | 6 | 39.50 ± 0.76 |  |"
    )
    assert lines[1].endswith("| 40.00 ± 0.76 | +0.50 (+0.50 to +0.50) |")
    clean = [
        replace(row, corruption="none", severity=0, top1=row.top1 + (0.7 if row.scheme == "convmix" else 0))
        for row in rows
    ]
    assert report.robust(clean + rows) == (
        "By interval and uncorrected sign-flip test, ConvMix's accuracy on corrupted images is higher in 1 of 1 kinds"
        " of corruption, and the accuracy that it loses against clean images, in points, is higher in 1 of 1."
    )
    assert report.robust(rows[:2]) == ""
    again = replace(rows[0], top1=0.0, weights="another net of this seed")
    assert report.by_corruption([again, *rows]) == report.by_corruption(rows)
    chose = [replace(rows[0], seed=3, split="holdout"), rows[0]]  # trained on a part; of a seed that chose the rate
    assert comparisons.proving([*rows, *chose]) == [row for row in rows if row.seed >= 3]


def test_rows_of_a_default_before_are_of_settings_that_it_was_measured_in():
    rows = [robust("last", 3, 60.0), replace(robust("add", 3, 61.0), lr=0.2), replace(robust("last", 3, 5.0), epochs=9)]
    assert comparisons.former_rows(rows, "add") == [rows[0], replace(rows[1], scheme="convmix")]


# Saliency -------------------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    maps = torch.zeros(4, 64, 64)
    boxes = torch.tensor([[0, 0, 31, 63], [0, 0, 31, 63], [10, 10, 19, 19], [0, 0, 3, 3]])
    maps[0] = 1  # uniform
    maps[1, 20, 35] = 2  # four columns right of the box: within 15 / 224 * 64 = 4.29
    maps[1, 20, 30] = 1.5
    maps[1, 40, 60] = 0.5
    maps[2, 10:15, 10:20] = 1  # half of the box
    maps[2, 50, 50] = 4  # away from it
    assert saliency.box_masks(boxes, 64).sum((1, 2)).tolist() == [2048, 2048, 100, 16]
    measures = saliency.measure_maps(maps, boxes)
    assert measures["energy"][:3].tolist() == pytest.approx([0.5, 1.5 / 4, 50 / 54])
    assert measures["pointing"][:3].tolist() == [1, 1, 0]
    assert measures["area"][:3].tolist() == pytest.approx([1, 2 / 4096, 1 / 4096])
    assert measures["recall"][:3].tolist() == pytest.approx([1, 1 / 2048, 0])
    assert all(math.isnan(values[3]) for values in measures.values())  # an empty map
    corner = torch.zeros(2, 64, 64)
    corner[0, 23, 23] = corner[1, 22, 22] = 1  # 4 down and right of the box: 5.66 away; 3 and 3: 4.24
    assert saliency.measure_maps(corner, boxes[[2, 2]])["pointing"].tolist() == [0, 1]


def test_rank_correlation():
    maps = torch.rand(3, 4, 4)
    others = torch.stack([maps[0] ** 3, 1 - maps[1], torch.ones(4, 4)])
    found = saliency.rank_correlations(maps, others)
    assert found[:2].tolist() == pytest.approx([1, -1])
    assert math.isnan(found[2])
    ties = torch.tensor([[[0.0, 0.0], [1.0, 2.0]]])
    other = torch.tensor([[[3.0, 1.0], [2.0, 4.0]]])
    a, b = [1.5, 1.5, 3, 4], [3, 1, 2, 4]  # ranks
    assert saliency.rank_correlations(ties, other).item() == pytest.approx(statistics.correlation(a, b))


def test_mean_and_error():
    assert saliency.mean_and_error(torch.tensor([1.0, 2.0, math.nan, 3.0])) == (2.0, round(1 / math.sqrt(3), 6))


def test_boxes_are_read_by_name(tmp_path):
    path = tmp_path / "val_annotations.txt"
    path.write_text("val_1.JPEG\tn02\t0\t32\t44\t62\nval_0.JPEG\tn01\t1\t2\t3\t4\n")
    assert saliency.read_boxes(path, ["n01/val_0.JPEG", "n02/val_1.JPEG"]).tolist() == [[1, 2, 3, 4], [0, 32, 44, 62]]
    with pytest.raises(ValueError, match=r"val_annotations.txt has no box for n03/a.JPEG and 0 more images"):
        saliency.read_boxes(path, ["n03/a.JPEG"])


@pytest.mark.parametrize("scheme", ["last", "convmix"])
def test_rows_of_a_model(scheme, tmp_path):
    settings = run(scheme, 3, 60.0, arch="test_resnet", classes=5)
    model = saliency.schemes.build("test_resnet", scheme, num_classes=5, seed=3).eval()
    saved = Saved(model, Settings(**settings_of(settings)), [0.5] * 3, [0.25] * 3, "ef")
    images = Images(torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8), torch.arange(6) % 5)
    boxes = torch.tensor([[0, 0, 31, 63]] * 6)
    record = dict(scored="ab", device="CPU", torch="2", timm="1", python="3", date="2026-01-01", argv="x")
    rows = saliency.measure(saved, images, boxes, cams=saliency.package_cams, device="cpu", record=record)
    assert [row.layer for row in rows] == ["layer1", "layer2", "layer3", "mixer"]
    assert all((row.count, row.chance, row.scheme) == (6, 0.5, scheme) for row in rows)
    assert all(0 <= row.energy <= 1 or row.empty == 6 for row in rows)
    timing.append_rows(tmp_path / "saliency.csv", rows)
    assert [row.key for row in timing.read_rows_of(Saliency, tmp_path / "saliency.csv")] == [row.key for row in rows]

    halves = {"half": torch.cat([torch.ones(6, 64, 32), torch.zeros(6, 64, 32)], dim=2)}
    (row,) = saliency.measure(saved, images, boxes, cams=lambda *_: halves, device="cpu", record=record)
    assert (row.energy, row.pointing, row.area, row.recall, row.randomised) == (1, 1, 0.5, 1, 1)


def seen(scheme, seed, layer="layer3", **shares):
    """A row of saliency.csv that nobody measured."""
    shares = {name: 0.5 for measure in saliency.MEASURES for name in (measure, f"{measure}_se")} | shares
    labels = dict(scored="ab", weights="x", layer=layer, count=1000, empty=20, chance=0.3, randomised=0.05)
    labels |= dict(device="CPU", torch="2", timm="1", python="3", date="2026-01-01", argv="x")
    return Saliency(**settings_of(run(scheme, seed, 60.0)), **shares, **labels)


def test_saliency_is_paired_by_seed():
    rows = [seen("last", seed, energy=0.4 + seed / 100) for seed in range(3)]
    rows += [seen("convmix", seed, energy=0.42 + seed / 100) for seed in range(3)]
    lines = report.saliency_table(rows).splitlines()[2:]
    assert lines[0].endswith(
        " 3 epochs: layer3 | last | 3 | 1000 | 41.00 ± 0.58 | {even} | {even} | {even} | 30.0 | 2.0 | 0.05 |".format(
            even="50.00 ± 0.00"
        )
    )
    assert "| 43.00 ± 0.58, +2.00 (+2.00 to +2.00) | 50.00 ± 0.00, +0.00 (+0.00 to +0.00) |" in lines[1]


def test_the_view_in_words():
    rows = []
    for layer, energy, area in (("a", 0.1, 0.1), ("b", -0.1, 0.1), ("c", 0.0, -0.1), ("d", 0.1, 0.0)):
        for seed in range(6):
            noise = seed / 100 - 0.025
            rows.append(seen("last", seed, layer, energy=0.4, area=0.3))
            rows.append(seen("convmix", seed, layer, energy=0.4 + energy + noise, area=0.3 + area - noise))
    text = report.view(rows)
    assert "at 4 stages of resnet18_cifar (by interval" in text
    assert "the object's box at 2, less at 1; the map is wider at 2, narrower at 1." in text
    assert text.endswith("only where the energy in the box rises too: at 1.")
    mixed = [replace(row, layer="mixer") for row in rows if row.layer == "a"]
    assert report.view([*rows, *mixed]) == text
    assert text in report.summary([], [], rows)
    assert report.view([row for row in rows if row.scheme == "last"]) == ""
    narrower = report.view([row for row in rows if row.layer != "a"])
    assert narrower.endswith("at 0. These runs do not show the wider view that the paper reports.")
