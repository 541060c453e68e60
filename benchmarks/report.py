"""What the runs say: the tables of README and docs, and the plots, from the CSVs of benchmarks/results.

    python -m benchmarks.report                     print both texts
    python -m benchmarks.report --write             into README.md (between markers) and docs/evidence.md
    python -m benchmarks.report --check             exit 1 where a number there differs from the CSVs
    python -m benchmarks.report --plots             docs/figures/*.svg; needs matplotlib

What was declared before any run stands in ``benchmarks.comparisons``. Everything else is description.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean

import timm

from benchmarks.accuracy import Run, Settings
from benchmarks.comparisons import (
    BEST,
    CONTROL,
    CONVMIX,
    FEW_PAIRS,
    FORMERS,
    LAST,
    LEVEL,
    NAMES,
    TESTS,
    Candidate,
    Condition,
    Difference,
    Series,
    Tuning,
    alike,
    all_runs,
    at_best_rates,
    backbones,
    candidates,
    conditions_of,
    former_conditions,
    former_rows,
    is_proof,
    named,
    paired,
    proofs,
    proving,
    rows_at_best_rates,
    series_of,
    shared_settings,
    standard_error,
    title,
    tuned_candidates,
    tunings_of,
    unsettled,
    verdicts,
)
from benchmarks.figures import DIFFERENCES, FIGURES, figures, plot, stale_figures
from benchmarks.robustness import CLEAN, SEVERITIES, STRENGTHS, Robustness
from benchmarks.saliency import MEASURES, MIXED, Saliency
from benchmarks.schemes import CHANGES, PEERS
from benchmarks.timing import README, RESULTS, ROOT, markdown, read_rows_of, show_tables

DOCUMENT = ROOT / "docs" / "evidence.md"
COMPARED = (LAST, CONTROL, CONVMIX)
DEFAULTS = [scheme for scheme, change in CHANGES.items() if change.keys() == {"base"}]
"""The mixers that were the default before."""
FEW_IMAGES = 50
"""Of a class: half of what most settings have."""
SMALL_SIZE = 64
"""Of a picture, in pixels: that of most settings."""
DIVISIONS = {"--seeds", "--schemes", "--lr", "--save", "--results"}
"""Options by which several processes share a table; its lines say which schemes and rates were run."""


JUDGED = "By interval and uncorrected sign-flip test"

# Numbers as text ------------------------------------------------------------------------------------------------------


def show_mean(values: Sequence[float]) -> str:
    """Mean and standard error."""
    error = standard_error(values)
    return f"{mean(values):.2f}" + ("" if error is None else f" ± {error:.2f}")


def show_difference(difference: Difference | None) -> str:
    """Mean difference and interval."""
    if difference is None:
        return ""
    interval = difference.interval()
    return f"{difference.mean:+.2f}" + (f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else "")


def show_p(p: float) -> str:
    """A p value."""
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def recipe(settings: Settings) -> str:
    """How a setting was trained."""
    return (
        f"{settings.images} training images, {settings.opt}, momentum {settings.momentum:g}, weight decay"
        f" {settings.weight_decay:g}, batch {settings.batch}, warm-up {settings.warmup:g}, label smoothing"
        f" {settings.smoothing:g}, crop padding {settings.padding}, {settings.mode}"
    )


def provenance(runs: Sequence[Run]) -> str:
    """One sentence of conditions for a table; what differs between its rows is listed."""

    def values(name: str) -> str:
        return ", ".join(sorted({str(getattr(run, name)) for run in runs}))

    hours = sum(run.seconds for run in runs) / 3600
    return (
        f"{values('device')}; torch {values('torch')}, timm {values('timm')}, timm-convmix {values('timm_convmix')},"
        f" Python {values('python')}, {values('date')}; {len(runs)} runs, {hours:.1f} hours."
    )


def commands(rows: Sequence[Run] | Sequence[Robustness] | Sequence[Saliency]) -> str:
    """The commands that made some rows, each once, without what only divides the work."""
    return ", ".join(f"`{command}`" for command in sorted({whole_command(row.argv) for row in rows}))


def whole_command(argv: str) -> str:
    """A command without ``DIVISIONS`` and their values; MODELS stands for files of nets."""
    kept, dropping = [], False
    for word in shlex.split(argv):
        if word.startswith("--"):
            dropping = word in DIVISIONS
        shown = "MODELS" if word.endswith(".safetensors") else word
        if not dropping and (shown == word or shown not in kept):
            kept.append(shown)
    return shlex.join(kept)


# Answers: a sentence and a table a question ---------------------------------------------------------------------------


def count_words(found: Sequence[int | None]) -> str:
    """Signs, counted: 'higher in 2, not shown to differ in 1 of 3'."""
    words = {1: "higher", -1: "lower", 0: "not shown to differ", None: "not tested (too few seeds)"}
    counts = [f"{word} in {found.count(sign)}" for sign, word in words.items() if sign in found]
    return f"{', '.join(counts)} of {len(found)}"


def chosen(found: Sequence[Candidate], at: str, conditions: Sequence[Condition] = ()) -> str:
    """Whether a candidate does better than the default, in words.

    Args:
        found: The candidates.
        at: At which learning rate.
        conditions: All, where each has a rate of its own.
    """
    if not found:
        return ""
    better = [one.scheme for one in found if one.error is not None and one.mean > 2 * one.error]
    worse = sum(one.error is not None and one.mean < -2 * one.error for one in found)
    few = ", ".join(f"`{one.scheme}`" for one in found if one.error is None)
    beyond = ", ".join(f"`{scheme}`" for scheme in unsettled(tunings_of(conditions)))
    text = (
        f"Of {len(found)} variants beside the default, on the hold-out, {at}, {worse} are more than two standard errors"
        f" worse; more than two standard errors better: {', '.join(f'`{scheme}`' for scheme in better) or 'none'}"
        f"{f'; of fewer than {FEW_PAIRS} pairs of runs, so not judged: {few}' * bool(few)}"
        f"{f'; best at the end of the rates tried, so not judged: {beyond}' * bool(beyond)}."
    )
    if not conditions:
        return text
    counted, few_pairs = below_plain(conditions, CONVMIX)
    text += f" Where {FEW_PAIRS} pairs or more were run, the default's mean is below the plain backbone's on"
    text += f" {counted or 'none'}{f' (with fewer, on {few_pairs})' * bool(few_pairs)}"
    below = {scheme: below_plain(conditions, scheme)[0] for scheme in dict.fromkeys([*DEFAULTS, *better])}
    return text + "".join(f"; that of `{scheme}` on {names}" for scheme, names in below.items() if names) + "."


def below_plain(conditions: Sequence[Condition], scheme: str) -> tuple[str, str]:
    """On which hold-outs a scheme's mean is below the plain backbone's, and by how much, or ''.

    Returns:
        Those of enough pairs, and the others.
    """
    found: dict[bool, list[str]] = {True: [], False: []}
    for tuning in tunings_of(conditions, scheme):
        difference = tuning.difference(LAST, scheme)
        if difference and difference.mean < 0:
            enough = len(difference.values) >= FEW_PAIRS
            found[enough].append(f"{named(tuning.settings)}: {show_difference(difference)}")
    return " and ".join(found[True]), " and ".join(found[False])


def choice(found: Sequence[Candidate]) -> str:
    """A line a candidate."""
    lines = []
    for one in found:
        text = f"{one.mean:+.2f}" + ("" if one.error is None else f" ± {one.error:.2f}")
        lines.append([one.scheme, text, str(len(one.differences)), str(one.pairs)])
    return markdown(["", "top-1 to ConvMix, points", "settings", "pairs of runs"], lines)


def answers(conditions: Sequence[Condition]) -> str:
    """The two declared tests over all settings, in words: each scheme at its best learning rate, then all at one."""
    sentences = []
    for at, own in ((OWN, True), (SAME, False)):
        for base in TESTS:
            tested = [condition for condition in conditions if (condition.settings.lr == BEST) is own]
            made = [verdict for condition in tested if (verdict := verdicts(condition).get(base))]
            found = [None if verdict.p is None else verdict.claim for verdict in made]
            if found:
                words = f"{count_words(found)} setting{'s' * (len(found) > 1)}"
                sentences.append(f"Against the {NAMES[base]}, {at}, ConvMix's accuracy is {words}.")
                if base == CONTROL and -1 in found:
                    sentences.append(
                        "Where it is lower, a further layer on the deepest stage does more than mixing stages."
                    )
    return " ".join(sentences)


def claims(conditions: Sequence[Condition]) -> str:
    """The two declared tests, a line a setting; means over the seeds that ConvMix was run with."""
    header = ["", "seeds", *(f"{NAMES[scheme]}, %" for scheme in COMPARED)]
    header += ["to last stage, points", "p", "to control, points", "p", "error reduction, %"]
    lines = []
    for condition in conditions:
        texts = verdicts(condition)
        if not texts:
            continue
        cells = [named(condition.settings), str(max(verdict.seeds for verdict in texts.values()))]
        for scheme in COMPARED:
            if seeds := condition.seeds(scheme, CONVMIX):
                runs = [condition.runs[scheme][seed] for seed in seeds]
                cells.append(f"{show_mean([run.top1 for run in runs])} at lr {runs[0].lr:g}")
            else:
                cells.append("")
        for base in TESTS:
            cells += [
                show_difference(condition.difference(base, CONVMIX) if base in texts else None),
                str(texts.get(base, "")),
            ]
        reductions = list(condition.reductions(LAST, CONVMIX).values())
        lines.append([*cells, f"{mean(reductions):.1f}" if reductions else ""])
    return markdown(header, lines)


def tuned(tunings: Sequence[Tuning]) -> str:
    """What is left of the difference where each scheme has the learning rate that suits it best, in words."""
    found = {named(t.settings): d.mean for t in tunings if (d := t.difference(LAST, CONVMIX))}
    if not found:
        return ""
    ends = dict.fromkeys((min(found, key=found.__getitem__), max(found, key=found.__getitem__)))
    span = " to ".join(f"{found[name]:+.2f} points ({name})" for name in ends)
    ahead = sum(points > 0 for points in found.values())
    return (
        f"Each at the best of the learning rates tried, on the hold-out, ConvMix's mean accuracy is above the last"
        f" stage's in {ahead} of {len(found)} settings; the difference is {span}."
        " A lead at the recipe's rate that does not show here was speed, not quality."
    )


def tuned_table(tunings: Sequence[Tuning]) -> str:
    """Both schemes at the best of the learning rates tried, a line a setting."""
    lines = []
    for tuning in tunings:
        cells = [named(tuning.settings)]
        for scheme in (LAST, CONVMIX):
            best = tuning.best(scheme)
            cells.append(f"{show_mean(best.values(scheme))} at lr {best.settings.lr:g} (n = {len(best.runs[scheme])})")
        lines.append([*cells, show_difference(tuning.difference(LAST, CONVMIX))])
    return markdown(["", "last stage, %", "ConvMix, %", "to last stage, points"], lines)


def against(conditions: Sequence[Condition], whom: str, schemes: Iterable[str]) -> str:
    """ConvMix against some schemes, in words; '' without runs."""
    counts = []
    for scheme in schemes:
        differences = filter(None, (condition.difference(scheme, CONVMIX) for condition in conditions))
        if found := [sign for difference in differences if (sign := difference.sign()) is not None]:
            counts.append(f"`{scheme}`: {count_words(found)}")
    if not counts:
        return ""
    return f"ConvMix's accuracy against the {whom}, {JUDGED.lower()}: {'; '.join(counts)} settings."


def against_table(conditions: Iterable[Condition], schemes: Sequence[str]) -> str:
    """ConvMix against some schemes, a line a setting and scheme."""
    lines = []
    for condition in conditions:
        for scheme in schemes:
            if difference := condition.difference(scheme, CONVMIX):
                cells = [named(condition.settings), scheme, str(len(difference.values))]
                for one in (scheme, CONVMIX):
                    runs = [condition.runs[one][seed] for seed in condition.seeds(scheme, CONVMIX)]
                    cells.append(f"{show_mean([run.top1 for run in runs])} at lr {runs[0].lr:g}")
                lines.append([*cells, show_difference(difference), show_p(difference.p_value())])
    header = ["", "scheme", "seeds", "top-1, %", "ConvMix, %", "ConvMix to it, points", "p, uncorrected"]
    return markdown(header, lines)


def grows(series: Sequence[Series]) -> str:
    """Whether the gain grows, in words."""
    names: dict[str, list[str]] = {}
    for one in series:
        p, rise = one.p_value(), one.rise()
        if p is not None:
            falls = (one.p_value(falls=True) or 1) < LEVEL
            word = "grows" if p < LEVEL else "falls" if falls else "is not shown to grow"
            names.setdefault(f"It {word} with", []).append(f"{one.what} ({one.images})")
        elif rise and (sign := rise.sign()) is not None:
            (first, _), *_, (last, _) = one.table()
            word = {1: "larger", -1: "smaller", 0: "not shown to be another"}[sign]
            told = f"{one.what} ({one.images}: {word} at {last:,.0f} than at {first:,.0f})"
            names.setdefault("Of two settings only, so a description, with", []).append(told)
        else:
            names.setdefault("Not tested (too few) with", []).append(f"{one.what} ({one.images})")
    return " ".join(f"{words}: {', '.join(those)}." for words, those in names.items())


def trends(series: Sequence[Series]) -> str:
    """A line a series."""
    lines = []
    for one in series:
        p = one.p_value()
        cells = [f"{position:,.0f}: {mean(reductions.values()):.1f}" for position, reductions in one.table()]
        falls = one.p_value(falls=True)
        lines.append([f"{one.what}, {one.images}", "; ".join(cells), show_difference(one.rise()), str(len(one.seeds))])
        lines[-1] += ["too few" if value is None else show_p(value) for value in (p, falls)]
    return markdown(
        ["", "error reduction, %", "last to first, points", "common seeds", "it grows (Page), p", "it falls, p"], lines
    )


def smaller(conditions: Sequence[Condition]) -> str:
    """Whether ConvMix does more than taking the next larger backbone, in words; '' without two backbones."""
    neighbours = [
        (smaller, larger, seeds)
        for group in backbones(conditions)
        for smaller, larger in pairwise(sorted(group, key=lambda c: (family(c), mean(c.values(LAST, "macs")))))
        if family(smaller) == family(larger)
        and (seeds := sorted({*smaller.seeds(LAST, CONVMIX)} & {*larger.seeds(LAST)}))
    ]
    if not neighbours:
        return ""

    def score(condition: Condition, scheme: str, seeds: Sequence[int]) -> float:
        return mean(condition.runs[scheme][seed].top1 for seed in seeds)

    pays = [pair for pair in neighbours if score(pair[1], LAST, pair[2]) > score(pair[0], LAST, pair[2])]
    ahead = sum(score(smaller, CONVMIX, seeds) > score(larger, LAST, seeds) for smaller, larger, seeds in pays)
    return (
        f"Of pairs of backbones of one family that follow each other in MACs, the larger is alone more accurate"
        f" than the smaller alone in {len(pays)} of {len(neighbours)}; there the smaller with ConvMix is ahead of"
        f" the larger alone in {ahead}, by the means over the seeds that both have."
    )


def family(condition: Condition) -> str:
    """Of its backbone: the module of timm that it, or what it was made from for small images, is from."""
    arch = condition.settings.arch
    large = arch.removesuffix("_cifar")
    return timm.models.model_entrypoint(large if timm.is_model(large) else arch).__module__


def price(conditions: Sequence[Condition]) -> str:
    """Accuracy and cost of each backbone, alone and with ConvMix, where settings differ in the backbone only."""
    lines = []
    for group in backbones(conditions):
        for condition in sorted(group, key=lambda c: c.params):
            for scheme in (LAST, CONVMIX):
                if runs := condition.runs.get(scheme):
                    run = next(iter(runs.values()))
                    cells = [title(condition.settings), NAMES[scheme], str(len(runs))]
                    cells += [f"{run.params / 1e6:.2f}", f"{run.macs / 1e6:.1f}", show_mean(condition.values(scheme))]
                    lines.append(cells)
    header = ["", "scheme", "seeds", "million parameters", "million MACs", "top-1, %"]
    return markdown(header, lines)


def fit(conditions: Sequence[Condition]) -> str:
    """Whether ConvMix acts as a regulariser, in words: its training loss, and the gap from there to the test loss.

    '' where every setting has too few seeds.
    """
    loss, gap = (list(signs_of(conditions, name)) for name in ("train_loss", "gap"))
    if not loss:
        return ""
    return (
        f"A regulariser fits the training images less and narrows the gap to the test loss. {JUDGED} of the paired"
        f" difference to the last stage's, ConvMix's training loss in the last epoch is higher in {loss.count(1)} and"
        f" lower in {loss.count(-1)} of {len(loss)} settings, and the gap is narrower in {gap.count(-1)} and wider in"
        f" {gap.count(1)}. Where a training is too short to overfit, a lower training loss is but faster fitting."
        f"{'' if gap.count(-1) > gap.count(1) else ' These runs do not show the regulariser that the paper reports.'}"
    )


def calibration(conditions: Sequence[Condition]) -> str:
    """Whether ConvMix's confidence is nearer to its accuracy than the last stage's, in words; '' without runs."""
    found = list(signs_of(conditions, "ece"))
    if not found:
        return ""
    return f"{JUDGED}, the expected calibration error is {count_words(found)} settings (lower is better)."


def signs_of(conditions: Iterable[Condition], name: str) -> Iterator[int]:
    """Of ConvMix's difference to the last stage in a column, a setting with enough seeds after the other."""
    for condition in conditions:
        difference = condition.difference(LAST, CONVMIX, name)
        if difference and (sign := difference.sign()) is not None:
            yield sign


def columns_table(conditions: Iterable[Condition], columns: Mapping[str, str]) -> str:
    """Columns of the runs for the last stage and ConvMix, over the seeds that both have, a line a setting.

    Args:
        conditions: The settings.
        columns: A column's name -> how it is shown.
    """
    header, lines = ["", "seeds"], []
    for text in columns.values():
        header += [f"{text}: last stage", "ConvMix", "difference"]
    for condition in conditions:
        if seeds := condition.seeds(LAST, CONVMIX):
            cells = [named(condition.settings), str(len(seeds))]
            for name in columns:
                arms = [condition.runs[scheme] for scheme in (LAST, CONVMIX)]
                cells += [show_mean([getattr(runs[seed], name) for seed in seeds]) for runs in arms]
                cells.append(show_difference(condition.difference(LAST, CONVMIX, name)))
            lines.append(cells)
    return markdown(header, lines)


def by_corruption(rows: Sequence[Robustness]) -> dict[Settings, dict[str, dict[str, dict[int, float]]]]:
    """Setting -> corruption -> scheme -> seed -> accuracy, the mean over severities; of two nets of a seed the last."""
    scores: dict[Settings, dict[str, dict[str, dict[int, dict[int, float]]]]] = {}
    for row in rows:
        by_scheme = scores.setdefault(shared_settings(row), {}).setdefault(row.corruption, {})
        by_scheme.setdefault(row.scheme, {}).setdefault(row.seed, {})[row.severity] = row.top1
    return {
        settings: {
            corruption: {
                scheme: {seed: mean(by_severity.values()) for seed, by_severity in by_seed.items()}
                for scheme, by_seed in by_scheme.items()
            }
            for corruption, by_scheme in corruptions.items()
        }
        for settings, corruptions in scores.items()
    }


def robust(rows: Sequence[Robustness]) -> str:
    """Whether ConvMix is ahead on corrupted images, and whether it loses less than the last stage, in words."""
    ahead: list[int] = []
    losses: list[int] = []
    for corruptions in by_corruption(rows).values():
        clean = corruptions.get(CLEAN, {})
        for by_scheme in (by_scheme for corruption, by_scheme in corruptions.items() if corruption != CLEAN):
            base, own = by_scheme.get(LAST, {}), by_scheme.get(CONVMIX, {})
            lost = (
                {seed: whole[seed] - top1 for seed, top1 in left.items() if seed in whole}
                for whole, left in ((clean.get(LAST, {}), base), (clean.get(CONVMIX, {}), own))
            )
            for found, difference in ((ahead, paired(base, own)), (losses, paired(*lost))):
                if difference and (sign := difference.sign()) is not None:
                    found.append(sign)
    if not ahead:
        return ""
    return (
        f"{JUDGED}, ConvMix's accuracy on corrupted images is {count_words(ahead)} kinds of corruption, and the"
        f" accuracy that it loses against clean images, in points, is {count_words(losses)}."
    )


def robustness_table(rows: Sequence[Robustness]) -> str:
    """Accuracy under each corruption, the mean over severities, and the paired difference to the last stage."""
    lines = []
    for settings, corruptions in by_corruption(rows).items():
        for corruption, by_scheme in corruptions.items():
            base = by_scheme.get(LAST, {})
            name = "clean" if corruption == CLEAN else corruption
            for scheme, by_seed in by_scheme.items():
                difference = show_difference(paired(base, by_seed)) if scheme != LAST else ""
                cells = [scheme, str(len(by_seed)), show_mean(list(by_seed.values())), difference]
                lines.append([f"{title(settings)}: {name}", *cells])
    return markdown(["", "scheme", "seeds", "top-1, %", "to last stage, points"], lines)


def by_layer(rows: Sequence[Saliency]) -> dict[tuple[Settings, str], dict[str, dict[int, Saliency]]]:
    """Setting and layer -> scheme -> seed -> row."""
    groups: dict[tuple[Settings, str], dict[str, dict[int, Saliency]]] = {}
    for row in rows:
        groups.setdefault((shared_settings(row), row.layer), {}).setdefault(row.scheme, {})[row.seed] = row
    return groups


def view(rows: Sequence[Saliency]) -> str:
    """Whether ConvMix's maps are wider and rest more on the object than the last stage's, in words; '' without runs.

    The mixed map does not count: what is added to every cell widens it by construction.
    """
    signs: dict[str, list[int]] = {"energy": [], "area": []}
    for (_, layer), by_scheme in by_layer(rows).items():
        for name, found in signs.items() if layer != MIXED else ():
            arms = (by_scheme.get(scheme, {}) for scheme in (LAST, CONVMIX))
            if difference := paired(*({seed: getattr(row, name) for seed, row in arm.items()} for arm in arms)):
                found.append(difference.sign() or 0)
    energy, area = signs["energy"], signs["area"]
    if not energy:
        return ""
    arch = " and ".join(dict.fromkeys(row.arch for row in rows if row.scheme == CONVMIX))
    wider = sum(e > 0 and a > 0 for e, a in zip(energy, area, strict=True))
    return (
        f"Grad-CAM of ConvMix against the last stage's, at {len(energy)} stages of {arch} ({JUDGED.lower()} of the"
        f" paired difference): more of the energy falls into the object's box at {energy.count(1)}, less at"
        f" {energy.count(-1)}; the map is wider at {area.count(1)}, narrower at {area.count(-1)}. A wider view counts"
        f" only where the energy in the box rises too: at {wider}."
        f"{'' if wider else ' These runs do not show the wider view that the paper reports.'}"
    )


def saliency_table(rows: Sequence[Saliency]) -> str:
    """The box measures of each layer, the mean over seeds, and the paired difference to the last stage."""
    lines = []
    for (settings, layer), by_scheme in by_layer(rows).items():
        base = by_scheme.get(LAST, {})
        for scheme, by_seed in by_scheme.items():
            cells = [
                f"{title(settings)}: {layer}",
                scheme,
                str(len(by_seed)),
                str(min(row.count for row in by_seed.values())),
            ]
            for measure in MEASURES:
                theirs, ours = ({s: 100 * getattr(row, measure) for s, row in rows.items()} for rows in (base, by_seed))
                difference = paired(theirs, ours) if scheme != LAST else None
                cells.append(
                    show_mean(list(ours.values())) + (f", {show_difference(difference)}" if difference else "")
                )
            cells.append(f"{mean(100 * row.chance for row in by_seed.values()):.1f}")
            cells.append(f"{mean(100 * row.empty / row.count for row in by_seed.values()):.1f}")
            lines.append([*cells, f"{mean(row.randomised for row in by_seed.values()):.2f}"])
    header = ["", "scheme", "seeds", "images", *(f"{text}, %" for text in MEASURES.values()), "energy by chance, %"]
    header += ["empty maps, %", "correlation with the untrained net's"]
    return markdown(header, lines)


# Texts ----------------------------------------------------------------------------------------------------------------

RULE = (
    "On a tenth of the training images, not trained on; the standard error is that of the seeds within the settings."
    f" Settings with fewer than {FEW_PAIRS} pairs of runs count only for those that have no others. So most variants"
    " rest on one small setting, and rank beside others that rest on many; `add+...` changes a former default. Declared"
    " before the runs: a variant replaces the default where it is the best of those that meet the cost bars and its"
    " mean difference is more than two standard errors above zero; for its cost none had to be left out. By way of"
    " exception `add+no_residual`, which cannot start warm and whose map is the same in every cell, is no candidate."
    " Added later, a judgement: the mean of a default is on no hold-out below the plain backbone's ([how it came about]"
    "(experiments.md))."
)
OWN, SAME = "each at the learning rate that is best for it on the hold-out", "all at one learning rate"
NOTHING = "No run is recorded yet."
SPEED = "All at the recipe's learning rate, which compares how fast they learn before anything else:"
RATES = "Differences are paired by seed. Every rate that was tried: below, with every scheme on the hold-out."
TREND = (
    "Page's test asks whether the relative reduction of the error grows along a series; whether it falls was not"
    " declared. Training images are varied at about equal steps: as many fewer epochs as there are more images. Along"
    " the number of Tiny-ImageNet's classes the images a class and the epochs stay, so that the steps grow; from"
    " CIFAR-10 to CIFAR-100 the images and the steps stay, so that the images a class fall."
)
FORMERLY = (
    "**With a former default, `{former}`.** Here ConvMix is this mixer, and the control is of its form; elsewhere they"
    f" are called `{{former}}` and `{CONTROL}-{{former}}`."
)
ONLY = "Only what is not shown above."
CORRUPTED = (
    f"Means over the severities {', '.join(map(str, SEVERITIES))} of Hendrycks & Dietterich 2019 for 32 pixels,"
    " whatever the size here:"
    f" {'; '.join(' '.join([name, ', '.join(map(str, values))]) for name, values in STRENGTHS.items())}."
)
MAPS = (
    "The mixed map counts nowhere: what is added to every cell of it widens it by construction. Empty maps, where no"
    " gradient is positive, are left out, so that the two schemes' means are not over quite the same images. The rank"
    " correlation is that of a map with the map of the same net before training, seeded otherwise (Adebayo et al."
    " 2018): near zero where maps depend on what was learned."
)
CALIBRATION = {"ece": "expected calibration error, %"}
FIT = {"train_loss": "training loss", "gap": "test loss minus training loss"}
WHICH = "Which variant is the default?"
EXPLANATION = (
    "Mean ± standard error over seeds, of the last epoch on the test images; differences are paired by seed, with their"
    " 95 % bootstrap interval (BCa). p: exact sign-flip test, corrected by Holm's method for the two tests declared"
    " beforehand; bold where a difference is claimed. The control is the mixer, or a branch of it, on the"
    " deepest stage alone, its linear layer a pair of matrices of such a rank that it has as many parameters (in the"
    " default's nothing stands between the two, which makes it stronger). Tiny-ImageNet's test images are its labelled"
    " validation images. In a setting all seeds train on the same images and are scored on the"
    " same ones: interval and p speak of new trainings, not of new images."
)


@dataclass(frozen=True)
class Question:
    """What is asked, and what the runs say.

    Args:
        text: The question.
        sentence: The answer in words; '' where no run gives any.
        evidence: Tables, figures and explanations, '' where there is nothing to show.
    """

    text: str
    sentence: str
    evidence: tuple[str, ...] = ()


def questions(
    conditions: Sequence[Condition], corrupted: Sequence[Robustness], boxes: Sequence[Saliency], folder: str | None
) -> list[Question]:
    """Those that some run answers.

    Args:
        conditions: All of them.
        corrupted: Rows of ``benchmarks.robustness``.
        boxes: Rows of ``benchmarks.saliency``.
        folder: Of the figures, from the text; None where there are none.
    """
    proof = proofs(conditions)
    best = at_best_rates(conditions)
    corrupted = rows_at_best_rates(corrupted, best)
    boxes = rows_at_best_rates(boxes, best)
    scratch = [condition for condition in proof if not condition.settings.init]
    started = [condition for condition in proof if condition.settings.init]
    tunings = tunings_of(conditions)
    at_best, at_one = tuned_candidates(tunings), candidates(conditions)
    series = series_of(proof)
    others = [peer for peer in PEERS if peer != LAST]
    controls = list(dict.fromkeys(s for c in best for s in c.runs if s.startswith(f"{CONTROL}-")))
    asked = [
        Question("Does ConvMix beat the last stage and the control?", answers(scratch), (claims(scratch), EXPLANATION)),
        Question("Is it only the learning rate?", tuned(tunings), (tuned_table(tunings), RATES)),
        Question(
            WHICH,
            chosen(at_best, OWN, conditions) or chosen(at_one, SAME),
            (RULE, choice(at_best), SPEED, choice(at_one)),
        ),
        Question(
            "And controls of other forms?", against(best, "other controls", controls), (against_table(best, controls),)
        ),
        Question("And the peers?", against(scratch, "peers", others), (against_table(scratch, others),)),
        Question(
            "And the former defaults?",
            against(best, f"former defaults, {OWN}", DEFAULTS),
            (against_table(best, DEFAULTS),),
        ),
        Question(
            "Does the gain grow with the problem, and with the model?",
            grows(series),
            (trends(series), TREND, figures(proof, folder, "gain-")),
        ),
        Question(
            "Does it help with few images?",
            answers([c for c in scratch if c.settings.images <= FEW_IMAGES * c.settings.classes]),
            (f"Settings of at most {FEW_IMAGES} training images a class, of the table above.",),
        ),
        Question(
            "Does it help on larger pictures?",
            answers([c for c in scratch if c.settings.size > SMALL_SIZE]),
            (f"Settings of more than {SMALL_SIZE} pixels, of the table above.",),
        ),
        Question(
            "Does it carry over to other images?",
            " ".join(filter(None, (answers(started), nets(filter(verdicts, started), conditions)))),
            (claims(started),),
        ),
        Question(
            "Is it worth more than a larger backbone?",
            smaller(proof),
            (price(proof), figures(proof, folder, "cost-"), "What the mixer itself costs: [cost](cost.md)."),
        ),
        Question(
            "Is the view wider, and does it rest on the object?",
            view(boxes),
            (saliency_table(boxes), MAPS, commands(boxes)),
        ),
        Question(
            "Does it help on corrupted images?",
            robust(corrupted),
            (robustness_table(corrupted), CORRUPTED, commands(corrupted)),
        ),
        Question("Is it better calibrated?", calibration(proof), (columns_table(proof, CALIBRATION),)),
        Question("Does it regularise?", fit(proof), (columns_table(proof, FIT),)),
    ]
    return [question for question in asked if question.sentence]


def nets(started: Iterable[Condition], conditions: Sequence[Condition]) -> str:
    """What the nets that trainings started from were trained on, in words."""
    saved: dict[tuple[str, str], str] = {}
    for run in all_runs(conditions):
        words = shlex.split(run.argv)
        if "--save" in words:
            saved.setdefault((words[words.index("--save") + 1], run.arch), named(shared_settings(run)))
    wanted = dict.fromkeys((str(Path(c.settings.init).parent), c.settings.arch) for c in started)
    return " ".join(f"The nets of {one[0]}: {saved[one]}." for one in wanted if one in saved)


def listed(asked: Sequence[Question]) -> str:
    """Questions with the answers in words, a line each."""
    return "\n".join(f"- **{question.text}** {question.sentence}" for question in asked)


def tested(conditions: Sequence[Condition]) -> str:
    """The table of the two declared tests, and what its runs were made with; '' without any."""
    made = [condition for condition in conditions if verdicts(condition)]
    shown = [replace(c, runs={scheme: c.runs[scheme] for scheme in COMPARED if scheme in c.runs}) for c in made]
    return f"{claims(made)}\n\n{provenance(all_runs(shown))}" if made else ""


def where(condition: Condition) -> Settings:
    """A setting, whatever the learning rate."""
    return replace(condition.settings, lr=BEST)


def run_with_convmix(conditions: Iterable[Condition]) -> set[Settings]:
    """The settings that ConvMix was run in."""
    return {where(condition) for condition in conditions if CONVMIX in condition.runs}


def summary(
    conditions: Sequence[Condition], corrupted: Sequence[Robustness] = (), boxes: Sequence[Saliency] = ()
) -> str:
    """The README's part."""
    proof = proofs(conditions)
    asked = questions(conditions, corrupted, boxes, "docs/figures")
    parts = []
    if table := tested(proof):
        parts += [table, f"{EXPLANATION} All schemes: [docs/evidence.md](docs/evidence.md)."]
        parts.append(figures(proof, "docs/figures", DIFFERENCES))
    parts.append(listed(asked))
    parts += [figures(proof, "docs/figures", start) for start in ("gain-", "cost-")]
    shown = run_with_convmix(proof)
    answered = {question.text for question in asked}
    for former in FORMERS:
        before = former_conditions(conditions, former)
        fresh = [condition for condition in proofs(before) if where(condition) not in shown]
        if table := tested(fresh):
            shown |= run_with_convmix(fresh)
            asked = questions(before, former_rows(corrupted, former), former_rows(boxes, former), None)
            rest = [question for question in asked if question.text not in answered]
            parts += [f"{FORMERLY.format(former=former)} {ONLY}", table, listed(rest)]
    return "\n\n".join(filter(None, parts)) or NOTHING


def document(conditions: Sequence[Condition], corrupted: Sequence[Robustness], boxes: Sequence[Saliency]) -> str:
    """The whole of docs/evidence.md."""
    parts = ["# Evidence", "Written by `python -m benchmarks.report --write` from the CSVs in benchmarks/results."]
    parts.append(figures(proofs(conditions), "figures", DIFFERENCES))
    for question in questions(conditions, corrupted, boxes, "figures"):
        parts += [f"## {question.text}", question.sentence, *question.evidence]
    for former in FORMERS:
        before = former_conditions(conditions, former)
        if tested(proofs(before)):
            parts += [f"## A former default: {former}", FORMERLY.format(former=former)]
            for question in questions(before, former_rows(corrupted, former), former_rows(boxes, former), None):
                if question.text != WHICH:
                    parts += [f"### {question.text}", question.sentence, *question.evidence]
    for heading, explanation, chosen_conditions in (
        (
            "Every scheme, on the test images",
            "Descriptive: only the two tests above were declared.",
            list(filter(is_proof, conditions)),
        ),
        (
            "Every scheme, on the hold-out",
            "A tenth of the training images, not trained on; nothing is claimed.",
            [condition for condition in conditions if not is_proof(condition)],
        ),
    ):
        if chosen_conditions:
            parts += [f"## {heading}", explanation, *described(chosen_conditions)]
    return "\n\n".join(filter(None, parts if conditions else [*parts, NOTHING])) + "\n"


def described(conditions: Sequence[Condition]) -> list[str]:
    """The paragraphs of every scheme's table, a setting after the other."""
    parts = []
    for group in alike(conditions, partial(replace, lr=BEST)):
        runs, settings = all_runs(group), group[0].settings
        parts += [f"### {named(settings)}", schemes_table(group)]
        parts.append(f"{recipe(settings)}. {provenance(runs)} {commands(runs)}")
    return parts


def schemes_table(conditions: Sequence[Condition]) -> str:
    """Every scheme of one setting at every rate, described: differences to the last stage at that rate, and cost."""
    base = next((run for condition in conditions for run in condition.runs.get(LAST, {}).values()), None)
    lines = []
    for condition in conditions:
        for scheme, runs in condition.runs.items():
            run = next(iter(runs.values()))
            difference = condition.difference(LAST, scheme) if scheme != LAST else None
            cells = [
                scheme,
                f"{condition.settings.lr:g}",
                str(len(runs)),
                *(show_mean(condition.values(scheme, name)) for name in ("top1", "top5", "loss", "train_loss", "ece")),
                show_difference(difference),
                *(f"{getattr(run, name) / getattr(base, name):.4f}" if base else "" for name in ("params", "macs")),
                str(sum(run.diverged > 0 for run in runs.values()) or ""),
            ]
            lines.append((mean(condition.values(scheme)), cells))
    header = ["", "learning rate", "seeds", "top-1, %", "top-5, %", "loss", "training loss", "calibration error, %"]
    header += ["top-1 to last stage, points", "parameters", "MACs", "diverged"]
    return markdown(header, [cells for _, cells in sorted(lines, key=lambda line: -line[0])])


# Command line ---------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into the README and the document")
    parser.add_argument("--check", action="store_true", help="exit 1 where these or the figures differ from the CSVs")
    parser.add_argument("--plots", action="store_true", help="draw the figures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the markers evidence:begin and :end")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print, write, check or draw; the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        conditions = conditions_of(read_rows_of(Run, args.results / "accuracy.csv"))
    except ValueError as error:
        parser.error(str(error))
    corrupted = proving(read_rows_of(Robustness, args.results / "robustness.csv"))
    boxes = proving(read_rows_of(Saliency, args.results / "saliency.csv"))
    if args.plots:
        for path in plot(conditions, args.figures):
            print(path.name)
        return 0
    text = document(conditions, corrupted, boxes)
    status = show_tables(
        [(args.readme, summary(conditions, corrupted, boxes))],
        name="evidence",
        write=args.write,
        check=args.check,
        command="benchmarks.report --write",
    )
    if args.write:
        args.document.parent.mkdir(parents=True, exist_ok=True)
        args.document.write_text(text)
    if args.check and (not args.document.is_file() or args.document.read_text() != text):
        print(f"{args.document.name} differs: python -m benchmarks.report --write")
        return 1
    if args.check and (stale := stale_figures(conditions, args.figures)):
        print(f"{', '.join(stale)}: missing, or of other runs: python -m benchmarks.report --plots")
        return 1
    if not args.write and not args.check:
        print(f"\n{text}")
    return status


if __name__ == "__main__":
    sys.exit(main())
