"""The evidence: arms x seeds from the same cold starts, and the tables and plots that compare them.

    python launch.py --config=configs/evidence.py --workdir=runs/evidence

runs what is not done yet, most important arms first, two runs side by side, and writes
``evidence.json``, ``tables.md`` and plots into the folder. What was stopped, killed or failed goes
on with the same command. ``--config.only=srpo,grpo`` runs these arms and what they need. On an
accelerator set ``--config.workers=1``.

Humans gave every training pair its label and annotated steps: every one for the arms that have
``ALL`` among their settings, the main ones, none with a coverage of 0, a fifth for the others. The
examiner, one for all seeds, knows a fifth of the steps of the first seed's pairs.

Every arm begins with the cold start of its seed and takes 240 updates of 64 rows, or 60: so many
take the runs on which rates are chosen, and the variants. All draw their prompts from the same
split, sixteen an update, in the same order, and sample four rollouts of each. Exceptions: full SHE
and SFT in rounds choose their prompts, no more of them, by how the ones before went; written chains
(the teacher's, or gold ones) are not sampled; and of the teacher's there is a new pair for every
row.

An arm's learning rate is the one of ``rates`` that does best on the first seed's validation split,
or that of the arm it is a variant of: the three in the middle are tried, and the next one as long
as the outermost is best. Nothing is chosen on a test split.

On 2 cores of an Intel Xeon, jax 0.10.2, it takes 2 h 26 min from nothing, added up over three
sittings (2026-11-29 and 30): macro F1 0.56 after the cold start, 0.76 after GRPO, 0.87 after SRPO
with every step annotated (docs/results.md).

    python launch.py --config=configs/evidence.py:model=smollm2,data=esci \\
        --config.recipe.data.path=DIR

compares SFT on own right chains, DPO, GRPO and SRPO on other pairs, of the sizes that
``configs/stage1.py`` has for that argument, from three cold starts. SmolLM2 wants an accelerator.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import reward_model, scalar_reward, stage1

# Beside ``recipe.reward.model`` and ``.scalar``: the reward models trained for an arm's cold start.
EXAMINER, SCALAR = "{examiner}", "{scalar}"
# An examiner's scores are never quite equal: what deviates less teaches nothing.
TOL = {"rl.tol": 0.05}
HYBRID = {"reward.model": EXAMINER} | TOL  # it speaks of the steps that humans did not annotate
ALL = {"shopworld.coverage": 1.0}  # every step is annotated
# Conditions a query besides the recipe's, and the room that prompts and chains of them take.
CHECKS = {2: (36, 92), 8: (56, 188)}
COVERAGE = 0.2  # share of the steps that humans annotated
SHORT = {"rl.steps": 60, "rl.eval_every": 30}
STAGE = {"rl.steps": 80, "rl.eval_every": 80}  # of three: no more judgings than other arms have
REPLAY = 1.0  # advantage of what is imitated in the places of silent groups
# SRPO moves towards what did better than its group and leaves alone what did worse: that was better
# on the validation splits of other seeds. GRPO and the other estimators take both, as published.
SRPO = {"rl.estimator": "srpo", "rl.negative": 0.0}
GRPO = {"rl.estimator": "grpo"}
# Compared over and over: title and settings.
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("GRPO", GRPO),
    "srpo": ("SRPO", SRPO),
    "sft": ("SFT, own right chains", {"method": "sft", "offline.chains": "rejection"}),
}
ALL_FOUR = COMPARED | {"dpo": ("DPO", {"method": "dpo"})}


def get_config(arg: str = "") -> Any:
    """The recipe of one run, those of the reward models, and what each arm changes.

    Raises:
      ValueError: for an argument that ``configs/stage1.py`` does not take.
    """
    config: Any = ConfigDict()
    config.kind = "evidence"
    # On the first one the rates are chosen; with 0 to 7 this plan was made. They are added to
    # those of the reward models: examiner.seed=1 is another examiner, of the same pairs.
    config.seeds = (10, 11, 12, 13, 14)
    config.workers = 2  # runs side by side, each with its share of the CPUs
    config.cpu_devices = 1  # of each of them
    config.only = ""  # these arms alone, with commas between them; "" for all
    # Learning rates to choose from, rl.learning_rate.
    config.rates = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)

    config.recipe = _recipe(arg) if arg else _sized(_recipe(arg))
    config.recipe.cpu_devices = config.get_ref("cpu_devices")
    config.examiner = _examiner()
    config.examiner.cpu_devices = config.get_ref("cpu_devices")
    config.scalar = _scalar()
    config.scalar.cpu_devices = config.get_ref("cpu_devices")

    # Worlds and chains that need a cold start of their own: what they change in the recipe.
    starts: dict[str, Any] = {"main": {}, "label_first": {"chain.label_first": True}}
    starts |= {
        f"checks_{n}": {
            "chain.checks": n,
            "model.prompt_length": prompt,
            "model.completion_length": chain,
        }
        for n, (prompt, chain) in CHECKS.items()
    }
    config.starts = ConfigDict({name: _nested(own) for name, own in starts.items()})
    arms = _own_pairs() if arg else _arms()
    config.arms = ConfigDict(arms)
    config.order = tuple(arms)  # in which they are run; a ConfigDict keeps none
    config.plots = ConfigDict(_own_plots() if arg else _plots())
    return config.lock()


# -------------------------------------------------------------------------- sizes


def _recipe(arg: str) -> Any:
    """Prompts as they come: what chooses them gives each arm others."""
    config = stage1.get_config(arg).unlock()
    config.update_from_flattened_dict(
        {"filter.pairs": 0, "rl.aim": "even", "rl.refill": 0, "eval.pass_k": 0}
    )
    return config


def _sized(config: Any) -> Any:
    """For ShopWorld with checks, from scratch."""
    config.update_from_flattened_dict(
        {
            "chain.checks": 4,
            "model.prompt_length": 44,
            "model.completion_length": 120,
            "shopworld.pairs": (40_000, 1_024, 2_048, 1_024),
            "shopworld.coverage": COVERAGE,
            "sft.steps": 1_500,
            "sft.micro_batches": 4,
            "sft.checkpoint_every": 500,
            "rl.prompts": 16,
            "rl.group_size": 4,
            "rl.loss.micro_batches": 16,  # of a group each
            "rl.steps": 240,
            "rl.eval_every": 60,
            "eval.batch_size": 64,  # small enough for the cache: on CPU faster than 256
        }
    )
    return config


def _examiner() -> Any:
    config = reward_model.get_config().unlock()
    config.update_from_flattened_dict(
        {
            "solve.steps": 0,  # 20 minutes that an evidence run does not have
            "sft.steps": 1_200,  # its F1 on wrong steps of the policy is 0.77 then
            "examiner.pairs": 40_000,  # each with a fifth of its steps
            "examiner.room": 80,  # the least; a fifth of the answers find none
            "examiner.policy_pairs": 20_000,
            "examiner.eval_pairs": 256,
            "examiner.votes": 0,
        }
    )
    return config


def _scalar() -> Any:
    config = scalar_reward.get_config().unlock()
    config.update_from_flattened_dict(
        {"sft.steps": 400, "scalar.pairs": 2_000, "scalar.eval_pairs": 256}
    )
    return config


def _rounds(count: int) -> dict[str, dict[str, Any]]:
    """SFT on own right rollouts, a third of the updates a round: the prompts of a round are first
    those that had no right rollout yet, then new ones, and the policy that samples them is better.
    """
    return {
        f"stage{n}": {"method": "sft", "rl.missed": float(n > 1)} | STAGE
        for n in range(1, count + 1)
    }


def _stages() -> dict[str, dict[str, Any]]:
    """Of full SHE: first imitate what goes right, then practise what does not.

    Two rounds of imitation, then SRPO with replay, half of it on the prompts that are left, as far
    as there are so many, the rest on new ones: as many updates and rollouts as the other arms have,
    and no more prompts. The rate is that of SFT, and a third of it for SRPO.
    """
    last = {"rl.missed": 0.5, "rl.learning_rate": 1e-4, "rl.replay": REPLAY}
    alone = {"reward.model": "", "rl.tol": 1e-6}  # the verifier's word, without an examiner's
    return _rounds(2) | {"stage3": SRPO | last | alone | STAGE}


# -------------------------------------------------------------------------- arms


def _arm(
    title: str,
    table: str,
    settings: dict[str, Any],
    *,
    start: str = "main",
    seeds: int = 5,
    tuned: bool | str = True,
    against: tuple[str, ...] = (),
    trained: bool = True,
    stages: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    return {
        "title": title,  # in tables and plots
        "table": table,  # in which it is a row
        "start": start,  # one of ``starts``
        # It is run with the first so many: 0, only where --config.arms.NAME.seeds asks for more.
        "seeds": seeds,
        "tuned": tuned,  # over ``rates``; or the arm whose rate it takes; or False, the recipe's
        "against": against,  # the arms that are compared with it
        "trained": trained,  # False: the cold start itself is the row
        "settings": _nested(settings),  # what it changes in the recipe
        # Of a curriculum, what each stage changes besides. A learning rate of its own stands in the
        # same proportion to the rate that is chosen as to the recipe's.
        "stages": {name: _nested(own) for name, own in (stages or {}).items()},
    }


def _arms() -> dict[str, dict[str, Any]]:
    """In the order in which they are run, after what they need."""
    first = _main() | _fifth() | _short()
    rest = _coverages() | _checks() | _ablations()
    return first | rest | _both("label_first", "label first", "label first") | _estimators()


def _own_pairs() -> dict[str, dict[str, Any]]:
    """On pairs of any other kind: what humans said of them is all that there is."""
    start = _arm("cold start", "main", {}, seeds=3, tuned=False, trained=False, against=("srpo",))
    return {"cold_start": start} | {
        name: _arm(title, "main", own, seeds=3, against=() if name == "srpo" else ("srpo",))
        for name, (title, own) in ALL_FOUR.items()
    }


def _own_plots() -> dict[str, Any]:
    every = tuple(ALL_FOUR)
    return {"curves": every, "confusion": ("cold_start", *every), "checks": (), "coverage": ()}


def _main() -> dict[str, dict[str, Any]]:
    """Every step is annotated, for those that read steps; an examiner would have nothing to add."""
    chains = {"method": "sft", "offline.chains": "written"}
    gold = chains | {"shopworld.chains": "gold"}
    teacher = chains | {"offline.pairs": 15_360}  # a new chain for every row
    srpo, grpo, sft = (COMPARED[name] for name in ("srpo", "grpo", "sft"))

    def arm(title: str, settings: Any, tuned: str, **own: Any) -> Any:
        usual: dict[str, Any] = {"against": ("annotated_srpo", "annotated_she", "she")}
        return _arm(title, "main", settings, tuned=tuned, **usual | own)

    # GRPO reads labels alone, and so is what those with a fifth of the steps are compared with too.
    few = ("srpo", "srpo_hybrid", "she", "she_verifier")
    own = {"against": ("annotated_srpo", "annotated_she", *few)}
    start = {"tuned": False, "trained": False, "against": ("annotated_srpo",)}
    return {
        "cold_start": _arm("cold start", "main", {}, **start),
        "grpo": arm(*grpo, "short_grpo", **own),
        "annotated_srpo": arm(
            srpo[0], srpo[1] | ALL, "short_all_srpo", against=("annotated_she", "she", "srpo")
        ),
        "annotated_she": arm(
            "full SHE", ALL, "short_all_sft", seeds=0, against=("she",), stages=_stages()
        ),
        "annotated_sft": arm(sft[0], sft[1] | ALL, "short_all_sft", seeds=3),
        # Like for like: with SRPO's one sign.
        "long_grpo_one_sign": arm(
            "GRPO, one sign", GRPO | {"rl.negative": 0.0}, "grpo_one_sign", seeds=0, **own
        ),
        # Full SHE with a third round of imitation in the place of SRPO.
        "annotated_rounds": arm(
            "SFT, three rounds", ALL, "short_all_sft", seeds=0, stages=_rounds(3)
        ),
        "dpo": arm("DPO", {"method": "dpo"}, "short_dpo", seeds=1),
        "sft_teacher": arm("SFT, teacher's chains", teacher, "short_all_sft", seeds=1),
        "sft_gold": arm("SFT, gold chains (ceiling)", gold, "short_all_sft", seeds=1),
    }


def _fifth() -> dict[str, dict[str, Any]]:
    """The same where a fifth of the steps are annotated, with and without an examiner."""

    def arm(title: str, settings: Any, tuned: str, **own: Any) -> Any:
        usual: dict[str, Any] = {"seeds": 1, "against": ("srpo", "she", "she_verifier")}
        return _arm(f"{title}, a fifth", "a fifth annotated", settings, tuned=tuned, **usual | own)

    title = "SFT, right by the hybrid, three rounds"
    return {
        "srpo": arm(*COMPARED["srpo"], "short_all_srpo", seeds=0, against=("she", "she_verifier")),
        "srpo_hybrid": arm(
            "SRPO, hybrid", SRPO | HYBRID, "short_all_srpo", seeds=0, against=("she",)
        ),
        "sft": arm(*COMPARED["sft"], "short_all_sft", seeds=0),
        "she": arm("full SHE", HYBRID, "short_all_sft", against=(), stages=_stages()),
        # No examiner, which has read the annotation of more pairs than an arm meets.
        "she_verifier": arm(
            "full SHE, verifier only",
            {},
            "short_all_sft",
            seeds=0,
            against=("she",),
            stages=_stages(),
        ),
        "sft_rounds": arm(title, HYBRID, "short_all_sft", seeds=0, stages=_rounds(3)),
    }


def _short() -> dict[str, dict[str, Any]]:
    """The arms on which rates are chosen, and others; SRPO is what its variants are compared with.

    Where steps are read, rates are chosen with every step annotated, as the main table has them.
    """
    every = "every step annotated, a quarter of the updates"
    whole = {
        f"short_all_{name}": _variant(
            f"{COMPARED[name][0]}, every step",
            every,
            COMPARED[name][1] | ALL,
            tuned=True,
            against=() if name == "srpo" else ("short_all_srpo",),
        )
        for name in ("srpo", "sft")  # they read steps
    }
    return whole | {
        f"short_{name}": _variant(
            title,
            "a quarter of the updates",
            settings,
            tuned=f"short_all_{name}" if f"short_all_{name}" in whole else True,
            against=() if name == "srpo" else ("short_srpo", "short_all_srpo"),
        )
        for name, (title, settings) in ALL_FOUR.items()
    }


def _checks() -> dict[str, dict[str, Any]]:
    """SRPO and GRPO from starts with fewer and more checks, all of their steps annotated."""
    table, every = "checks, a quarter of the updates", {}
    for n in CHECKS:
        start, what = f"checks_{n}", f"{n} checks"
        every |= _both(start, what, table)
        every |= _both(start, what, "checks", kind="long_", updates={}, seeds=0)
    return every


def _both(
    start: str,
    what: str,
    table: str,
    *,
    kind: str = "",
    updates: dict[str, Any] = SHORT,
    seeds: int = 1,
) -> dict[str, dict[str, Any]]:
    """A start of their own, and SRPO and GRPO from it, every step annotated; GRPO reads labels."""
    own: dict[str, Any] = {"start": start, "seeds": seeds}
    (ours, srpo), (theirs, grpo) = COMPARED["srpo"], COMPARED["grpo"]
    srpo, first = srpo | ALL | updates, f"{start}_{kind}srpo"
    tuned = {"tuned": "short_grpo", "against": (first,)}
    untrained: dict[str, Any] = {"tuned": False, "trained": False}
    return {
        f"{start}_{kind}start": _arm(f"cold start, {what}", table, {}, **untrained, **own),
        first: _arm(f"{ours}, {what}", table, srpo, tuned="short_all_srpo", **own),
        f"{start}_{kind}grpo": _arm(f"{theirs}, {what}", table, grpo | updates, **tuned, **own),
    }


def _coverages() -> dict[str, dict[str, Any]]:
    """With and without an examiner, and of labels alone, beside the short arms; SFT's on demand."""
    table, none = "coverage, a quarter of the updates", {"shopworld.coverage": 0.0}
    srpo, sft, (_, imitated) = "short_all_srpo", "short_all_sft", COMPARED["sft"]
    own = {
        f"hybrid_coverage_{100 * COVERAGE:.0f}": ("SRPO, hybrid", SRPO | HYBRID, srpo),
        "verifier_coverage_0": ("SRPO, labels alone", SRPO | none, srpo),
        "sft_coverage_0": ("SFT, own right labels", imitated | none, sft),
        # The rejection of full SHE by itself: the examiner finds wrong steps in chains to imitate.
        "sft_hybrid": ("SFT, right by the hybrid", imitated | HYBRID, sft),
    }
    return {
        name: _variant(title, table, settings, seeds=0 if tuned == sft else 1, tuned=tuned)
        for name, (title, settings, tuned) in own.items()
    }


def _ablations() -> dict[str, dict[str, Any]]:
    """Of SRPO where every step is annotated, so that the credit alone makes the difference."""
    critical, table = "rl.srpo.critical", "ablations, a quarter of the updates"
    model = HYBRID | {"reward.combine": "model_only", "rl.srpo.w_outcome": 0.0}
    own = {
        "srpo_all": ("SRPO, all steps alike", {critical: "all"}),
        "srpo_outcome_consistent": (
            "SRPO, outcome-consistent steps",
            {critical: "outcome_consistent"},
        ),
        "srpo_half": ("SRPO, step weight 0.5", {"rl.srpo.w_step": 0.5}),
        "srpo_both_signs": ("SRPO, advantages below 0 too", {"rl.negative": 1.0}),
        "srpo_model": ("SRPO, examiner only", model),
        "srpo_steps": ("SRPO, steps alone", {"rl.srpo.w_outcome": 0.0}),
    }
    return {
        name: _variant(
            title,
            table,
            SRPO | values | ALL,
            seeds=0 if name == "srpo_steps" else 1,
            against=("short_all_srpo",),
        )
        for name, (title, values) in own.items()
    }


def _estimators() -> dict[str, dict[str, Any]]:
    # Without its dynamic sampling (rl.refill), which would sample more than the others do.
    dapo = GRPO | {"rl.kl_weight": 0.0, "rl.loss.clip_high": 0.28}
    constant = {"rl.estimator": "dr_grpo", "rl.normalisation": "constant"}
    # Sums over steps, which a clamp of 2 would make all alike; its paper has none.
    process = {"rl.estimator": "process", "rl.clamp": 100.0} | ALL
    scalar = GRPO | {"reward.scalar": SCALAR} | TOL
    own = {
        # First, since it waits for its reward model: the others are run meanwhile.
        "grpo_scalar": ("GRPO, scalar reward model", scalar, "short_grpo"),
        "grpo_one_sign": ("GRPO, no advantages below 0", GRPO | {"rl.negative": 0.0}, True),
        "dapo": ("DAPO, no resampling", dapo, "short_grpo"),
        "dr_grpo": ("Dr.GRPO", constant, "short_grpo"),
        "rloo": ("RLOO", {"rl.estimator": "rloo"}, "short_grpo"),
        "process": ("process supervision", process, "short_all_srpo"),
        "prorag": ("dual granularity (ProRAG)", {"rl.estimator": "prorag"} | ALL, "short_all_srpo"),
    }
    table = "estimators, a quarter of the updates"
    return {
        name: _variant(
            title, table, settings, tuned=tuned, against=("short_all_srpo", "short_grpo")
        )
        for name, (title, settings, tuned) in own.items()
    }


def _variant(title: str, table: str, settings: dict[str, Any], **own: Any) -> dict[str, Any]:
    """One seed and a quarter of the updates, beside SRPO's."""
    usual = {"seeds": 1, "tuned": "short_all_srpo", "against": ("short_srpo",)}
    return _arm(title, table, settings | SHORT, **usual | own)


def _plots() -> dict[str, Any]:
    """Which arms the plots show; a line's points are arms, placed by what their config says."""
    few = f"hybrid_coverage_{100 * COVERAGE:.0f}"
    return {
        "curves": ("annotated_srpo", "grpo", "dpo", "annotated_sft", "she"),
        "confusion": ("cold_start", "grpo", "annotated_sft", "annotated_srpo", "she"),
        # The lead is that of the first line over each of the others.
        "checks": (
            ("SRPO", ("checks_2_srpo", "short_all_srpo", "checks_8_srpo")),
            ("GRPO", ("checks_2_grpo", "short_grpo", "checks_8_grpo")),
        ),
        "coverage": (
            ("SRPO, verifier only", ("verifier_coverage_0", "short_srpo", "short_all_srpo")),
            ("SRPO, hybrid", (few, "short_all_srpo")),
            ("SFT, own right chains", ("sft_coverage_0", "short_sft", "short_all_sft")),
            ("GRPO", ("short_grpo",)),
        ),
    }


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``, the form in which a ConfigDict takes it."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
