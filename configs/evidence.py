"""The study of the paper's claim, in a checkout: arms x seeds from the same cold starts.

    python launch.py --config=configs/evidence.py --workdir=runs/evidence

runs every job that is not done yet, the most important arms first, two jobs side by side, and
writes ``evidence.json``, ``tables.md`` and plots into the folder. The same command resumes jobs
that were stopped, killed or failed. ``--config.only=srpo,grpo`` runs these arms and what they need.
On an accelerator set ``--config.workers=1``. The code is in ``benchmarks/evidence``.

Every training pair is labeled, and its steps are annotated: all of them for arms with ``ALL`` in
their settings (the main ones), none with a coverage of 0, a fifth for the others. The process
reward model (one for all seeds) is trained on a fifth of the steps of the
first seed's pairs.

Every arm begins with the cold start of its seed and takes 240 updates of 64 rows, or 60: the runs
on which learning rates are chosen, and the variants. All arms draw their prompts from the same
split, sixteen an update, in the same order, and sample four rollouts of each. Exceptions: full SHE
and SFT in rounds choose their prompts by earlier results, without drawing more of them. Written
chains (the teacher's, or gold ones) are not sampled. Each row of the teacher's is a new pair.

An arm's learning rate is the one of ``rates`` that is best on the first seed's validation split, or
that of the arm it is a variant of. The three in the middle are tried first, then the next one as
long as the outermost is best. Nothing is chosen on a test split.

On 2 cores of an Intel Xeon, jax 0.10.2, it takes 2 h 26 min from nothing, the sum of three sittings
(2026-11-29 and 30): macro F1 0.56 after the cold start, 0.76 after GRPO, 0.87 after SRPO with every
step annotated (docs/results.md).

    python launch.py --config=configs/evidence.py:model=smollm2,data=esci \\
        --config.recipe.data.path=DIR

compares rejection-sampling SFT, DPO, GRPO and SRPO on other pairs, with the sizes that
``configs/stage1.py`` has for that argument, from three cold starts. SmolLM2 needs an accelerator.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from she_jax.recipes import reward_model, scalar_reward, stage1


def get_config(arg: str = "") -> Any:
    """The recipe of one run, those of the reward models, and what each arm changes.

    Raises:
      ValueError: for an argument that ``configs/stage1.py`` does not take.
    """
    config: Any = ConfigDict()
    config.kind = "evidence"
    # On the first one the rates are chosen. This plan was made with seeds 0 to 7. A seed is added
    # to those of the reward models: prm.seed=1 is another one, of the same pairs.
    config.seeds = (10, 11, 12, 13, 14)
    config.workers = 2  # runs side by side, each with its share of the CPUs
    config.cpu_devices = 1  # of each of them
    config.only = ""  # these arms alone, with commas between them; "" for all
    # Learning rates to choose from, rl.learning_rate.
    config.rates = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)

    config.recipe = stage1.get_config(arg).unlock()
    config.recipe.update_from_flattened_dict(PLAIN_PROMPTS | ({} if arg else SIZES))
    config.prm = reward_model.get_config().unlock()
    config.prm.update_from_flattened_dict(PRM_SIZES)
    config.orm = scalar_reward.get_config().unlock()
    config.orm.update_from_flattened_dict(ORM_SIZES)
    for part in (config.recipe, config.prm, config.orm):
        part.cpu_devices = config.get_ref("cpu_devices")

    config.starts = ConfigDict({name: nested(changes) for name, changes in STARTS.items()})
    arms = read_arms(OTHER_PAIRS if arg else ARMS)
    config.arms = ConfigDict(arms)
    config.order = tuple(arms)  # in which they are run; a ConfigDict keeps none
    config.plots = ConfigDict(OTHER_PLOTS if arg else PLOTS)
    return config.lock()


# -------------------------------------------------------------------------- the recipe

# Prompts in the order of the data: selection would give each arm other ones.
PLAIN_PROMPTS = {
    "filter.pairs": 0,
    "rl.difficulty": "even",
    "rl.dynamic_sampling_rounds": 0,
    "eval.pass_k": 0,
}
# ShopWorld with checks, a model from scratch.
SIZES = {
    "chain.checks": 4,
    "model.prompt_length": 44,
    "model.completion_length": 120,
    "shopworld.pairs": (40_000, 1_024, 2_048, 1_024),
    "shopworld.coverage": 0.2,  # share of the steps that are annotated
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
PRM_SIZES = {
    "reference_sft.steps": 0,  # 20 minutes that this study does not have
    "sft.steps": 1_200,  # its F1 on wrong steps of the policy is 0.77 then
    "prm.pairs": 40_000,  # each with a fifth of its steps
    "prm.room": 80,  # the least; a fifth of the answers do not fit
    "prm.policy_pairs": 20_000,
    "prm.eval_pairs": 256,
    "prm.votes": 0,
}
ORM_SIZES = {"sft.steps": 400, "orm.pairs": 2_000, "orm.eval_pairs": 256}
# Cold starts: what they change in the recipe. With checks, prompts and chains have other lengths.
STARTS: dict[str, dict[str, Any]] = {
    "main": {},
    "label_first": {"chain.label_first": True},
    "checks_2": {"chain.checks": 2, "model.prompt_length": 36, "model.completion_length": 92},
    "checks_8": {"chain.checks": 8, "model.prompt_length": 56, "model.completion_length": 188},
}

# -------------------------------------------------------------------------- settings of the arms

# In ``reward.prm`` and ``reward.orm``: the reward models trained for an arm's cold start.
PRM, ORM = "{prm}", "{orm}"
TOL = {"rl.min_std": 0.05}  # a model's scores are never quite equal
HYBRID = {"reward.prm": PRM} | TOL  # it scores the steps that are not annotated
ALL = {"shopworld.coverage": 1.0}  # every step is annotated
NONE = {"shopworld.coverage": 0.0}
SHORT = {"rl.steps": 60, "rl.eval_every": 30}

# SRPO moves towards what did better than its group and ignores what did worse, which was better on
# the validation splits of other seeds. GRPO and the other estimators do both, as published.
ONE_SIGN = {"rl.negative_advantage_weight": 0.0}
SRPO = {"rl.estimator": "srpo"} | ONE_SIGN
GRPO = {"rl.estimator": "grpo"}
DPO = {"method": "dpo"}
SFT = {"method": "sft", "offline.chains": "rejection"}
TEACHER = {"method": "sft", "offline.chains": "written", "offline.pairs": 15_360}  # a pair a row
GOLD = {"method": "sft", "offline.chains": "written", "shopworld.chains": "gold"}

BOTH_SIGNS = {"rl.negative_advantage_weight": 1.0}
STEPS_ALONE = {"rl.srpo.w_outcome": 0.0}
MODEL_ALONE = HYBRID | STEPS_ALONE | {"reward.combine": "model_only"}
SCORED = {"reward.orm": ORM} | TOL
# Without its dynamic sampling, which would sample more than the other arms do.
DAPO = GRPO | {"rl.kl_coef": 0.0, "rl.loss.clip_high": 0.28}
DR_GRPO = {"rl.estimator": "dr_grpo", "rl.loss_aggregation": "constant"}
# Sums over steps, which a clamp of 2 would make all alike; its paper has none.
PROCESS = {"rl.estimator": "process", "rl.advantage_clip": 100.0} | ALL
PRORAG = {"rl.estimator": "prorag"} | ALL

# Stages of a curriculum. Rejection-sampling SFT in rounds of a third of the updates: a later round
# is sampled by a better policy, its prompts are first those without a right rollout, then new ones.
STAGE = {"rl.steps": 80, "rl.eval_every": 80}  # evaluated no more often than other arms
ROUND_1 = {"method": "sft", "rl.unsolved_share": 0.0} | STAGE
ROUND_2 = ROUND_1 | {"rl.unsolved_share": 1.0}
ROUNDS = {"stage1": ROUND_1, "stage2": ROUND_2, "stage3": ROUND_2}
# Full SHE: two rounds, then SRPO with self-imitation at a third of SFT's rate, rewarded by the
# verifier alone. Half of its prompts are those left without a right rollout, as long as there are
# any, the rest new ones: as many updates and rollouts as the other arms, and no more prompts.
VERIFIER = {"reward.prm": "", "rl.min_std": 1e-6}
PRACTICE = {"rl.unsolved_share": 0.5, "rl.learning_rate": 1e-4, "rl.self_imitation": 1.0}
SHE = {"stage1": ROUND_1, "stage2": ROUND_2, "stage3": SRPO | PRACTICE | VERIFIER | STAGE}

# -------------------------------------------------------------------------- the arms

# Tables: heading, and what their rows share: cold start, end of the title, settings.
MAIN = ("main", "main", "", {})
FIFTH = ("a fifth annotated", "main", ", a fifth", {})
EVERY_STEP = ("every step annotated, a quarter of the updates", "main", ", every step", SHORT | ALL)
QUARTER = ("a quarter of the updates", "main", "", SHORT)
SHARES = ("coverage, a quarter of the updates", "main", "", SHORT)
CHECKS_2 = ("checks, a quarter of the updates", "checks_2", ", 2 checks", SHORT)
CHECKS_8 = ("checks, a quarter of the updates", "checks_8", ", 8 checks", SHORT)
LONG_2 = ("checks", "checks_2", ", 2 checks", {})
LONG_8 = ("checks", "checks_8", ", 8 checks", {})
ABLATIONS = ("ablations, a quarter of the updates", "main", "", SRPO | SHORT | ALL)
LABEL_FIRST = ("label first", "label_first", ", label first", SHORT)
ESTIMATORS = ("estimators, a quarter of the updates", "main", "", SHORT)

# The arm on whose runs with the first seed the learning rate is chosen; SELF for the arm itself.
# COLD marks a cold start, which is a row without further training.
SELF, COLD = True, False
BY_SRPO, BY_SFT, BY_GRPO = "short_all_srpo", "short_all_sft", "short_grpo"

# The arms that are compared with an arm: the tables have their figures less its figures.
FULL = ("annotated_srpo", "annotated_she", "she")
FEW = ("srpo", "she", "she_verifier")
EVERY = ("annotated_srpo", "annotated_she", "srpo", "srpo_hybrid", "she", "she_verifier")
BASE = ("short_all_srpo",)
SRPOS = ("short_srpo", "short_all_srpo")
PEERS = ("short_all_srpo", "short_grpo")

# In the order in which they are run. An arm is run with the first of the seeds, as many as it says;
# one with 0 only where --config.arms.NAME.seeds asks for more. Its settings are what it changes in
# the recipe. Its stages, if any, make it a curriculum, and are what each stage changes besides: the
# learning rate of a stage keeps its ratio to the recipe's whatever rate is chosen.
ARMS = (
    # name, table, title, seeds, rate, compared arms, settings, stages
    #
    # For arms that read steps every step is annotated: a reward model would have nothing to add.
    # GRPO reads labels alone, so those with a fifth of the steps are compared with it too.
    ("cold_start", MAIN, "cold start", 5, COLD, ("annotated_srpo",), {}),
    ("grpo", MAIN, "GRPO", 5, BY_GRPO, EVERY, GRPO),
    ("annotated_srpo", MAIN, "SRPO", 5, BY_SRPO, ("annotated_she", "she", "srpo"), SRPO | ALL),
    ("annotated_she", MAIN, "full SHE", 0, BY_SFT, ("she",), ALL, SHE),
    ("annotated_sft", MAIN, "SFT, own right chains", 3, BY_SFT, FULL, SFT | ALL),
    ("long_grpo_one_sign", MAIN, "GRPO, one sign", 0, "grpo_one_sign", EVERY, GRPO | ONE_SIGN),
    ("annotated_rounds", MAIN, "SFT, three rounds", 0, BY_SFT, FULL, ALL, ROUNDS),
    ("dpo", MAIN, "DPO", 1, "short_dpo", FULL, DPO),
    ("sft_teacher", MAIN, "SFT, teacher's chains", 1, BY_SFT, FULL, TEACHER),
    ("sft_gold", MAIN, "SFT, gold chains (ceiling)", 1, BY_SFT, FULL, GOLD),
    # The process reward model has read the annotation of more pairs than an arm meets: hence those
    # without it.
    ("srpo", FIFTH, "SRPO", 0, BY_SRPO, ("she", "she_verifier"), SRPO),
    ("srpo_hybrid", FIFTH, "SRPO, hybrid", 0, BY_SRPO, ("she",), SRPO | HYBRID),
    ("sft", FIFTH, "SFT, own right chains", 0, BY_SFT, FEW, SFT),
    ("she", FIFTH, "full SHE", 1, BY_SFT, (), HYBRID, SHE),
    ("she_verifier", FIFTH, "full SHE, verifier only", 0, BY_SFT, ("she",), {}, SHE),
    ("sft_rounds", FIFTH, "SFT, right by the hybrid, three rounds", 0, BY_SFT, FEW, HYBRID, ROUNDS),
    # Where steps are read, rates are chosen with every step annotated, as in the main table.
    ("short_all_srpo", EVERY_STEP, "SRPO", 1, SELF, (), SRPO),
    ("short_all_sft", EVERY_STEP, "SFT, own right chains", 1, SELF, BASE, SFT),
    ("short_grpo", QUARTER, "GRPO", 1, SELF, SRPOS, GRPO),
    ("short_srpo", QUARTER, "SRPO", 1, BY_SRPO, (), SRPO),
    ("short_sft", QUARTER, "SFT, own right chains", 1, BY_SFT, SRPOS, SFT),
    ("short_dpo", QUARTER, "DPO", 1, SELF, SRPOS, DPO),
    ("hybrid_coverage_20", SHARES, "SRPO, hybrid", 1, BY_SRPO, ("short_srpo",), SRPO | HYBRID),
    ("verifier_coverage_0", SHARES, "SRPO, labels alone", 1, BY_SRPO, ("short_srpo",), SRPO | NONE),
    ("sft_coverage_0", SHARES, "SFT, own right labels", 0, BY_SFT, ("short_srpo",), SFT | NONE),
    # The rejection of full SHE by itself: the process reward model finds wrong steps in chains to
    # imitate.
    ("sft_hybrid", SHARES, "SFT, right by the hybrid", 0, BY_SFT, ("short_srpo",), SFT | HYBRID),
    ("checks_2_start", CHECKS_2, "cold start", 1, COLD, (), {}),
    ("checks_2_srpo", CHECKS_2, "SRPO", 1, BY_SRPO, (), SRPO | ALL),
    ("checks_2_grpo", CHECKS_2, "GRPO", 1, BY_GRPO, ("checks_2_srpo",), GRPO),
    ("checks_2_long_start", LONG_2, "cold start", 0, COLD, (), {}),
    ("checks_2_long_srpo", LONG_2, "SRPO", 0, BY_SRPO, (), SRPO | ALL),
    ("checks_2_long_grpo", LONG_2, "GRPO", 0, BY_GRPO, ("checks_2_long_srpo",), GRPO),
    ("checks_8_start", CHECKS_8, "cold start", 1, COLD, (), {}),
    ("checks_8_srpo", CHECKS_8, "SRPO", 1, BY_SRPO, (), SRPO | ALL),
    ("checks_8_grpo", CHECKS_8, "GRPO", 1, BY_GRPO, ("checks_8_srpo",), GRPO),
    ("checks_8_long_start", LONG_8, "cold start", 0, COLD, (), {}),
    ("checks_8_long_srpo", LONG_8, "SRPO", 0, BY_SRPO, (), SRPO | ALL),
    ("checks_8_long_grpo", LONG_8, "GRPO", 0, BY_GRPO, ("checks_8_long_srpo",), GRPO),
    # Of SRPO where every step is annotated, so that the credit alone makes the difference.
    ("srpo_all", ABLATIONS, "SRPO, all steps alike", 1, BY_SRPO, BASE, {"rl.srpo.critical": "all"}),
    ("srpo_half", ABLATIONS, "SRPO, step weight 0.5", 1, BY_SRPO, BASE, {"rl.srpo.w_step": 0.5}),
    ("srpo_both_signs", ABLATIONS, "SRPO, advantages below 0 too", 1, BY_SRPO, BASE, BOTH_SIGNS),
    ("srpo_model", ABLATIONS, "SRPO, process reward model only", 1, BY_SRPO, BASE, MODEL_ALONE),
    ("srpo_steps", ABLATIONS, "SRPO, steps alone", 0, BY_SRPO, BASE, STEPS_ALONE),
    ("label_first_start", LABEL_FIRST, "cold start", 1, COLD, (), {}),
    ("label_first_srpo", LABEL_FIRST, "SRPO", 1, BY_SRPO, (), SRPO | ALL),
    ("label_first_grpo", LABEL_FIRST, "GRPO", 1, BY_GRPO, ("label_first_srpo",), GRPO),
    # The first one waits for its reward model, while the others are run.
    ("grpo_scalar", ESTIMATORS, "GRPO, outcome reward model", 1, BY_GRPO, PEERS, GRPO | SCORED),
    ("grpo_one_sign", ESTIMATORS, "GRPO, no advantages below 0", 1, SELF, PEERS, GRPO | ONE_SIGN),
    ("dapo", ESTIMATORS, "DAPO, no resampling", 1, BY_GRPO, PEERS, DAPO),
    ("dr_grpo", ESTIMATORS, "Dr.GRPO", 1, BY_GRPO, PEERS, DR_GRPO),
    ("rloo", ESTIMATORS, "RLOO", 1, BY_GRPO, PEERS, {"rl.estimator": "rloo"}),
    ("process", ESTIMATORS, "process supervision", 1, BY_SRPO, PEERS, PROCESS),
    ("prorag", ESTIMATORS, "dual granularity (ProRAG)", 1, BY_SRPO, PEERS, PRORAG),
)

# On other pairs, whose labels are all that is annotated.
OTHER_PAIRS = (
    ("cold_start", MAIN, "cold start", 3, COLD, ("srpo",), {}),
    ("grpo", MAIN, "GRPO", 3, SELF, ("srpo",), GRPO),
    ("srpo", MAIN, "SRPO", 3, SELF, (), SRPO),
    ("sft", MAIN, "SFT, own right chains", 3, SELF, ("srpo",), SFT),
    ("dpo", MAIN, "DPO", 3, SELF, ("srpo",), DPO),
)

# The arms that the plots show. In ``checks`` and ``coverage`` they are the points of lines, at the
# number of checks or the coverage of their configs; the lead is the first line's over each other.
PLOTS = {
    "curves": ("annotated_srpo", "grpo", "dpo", "annotated_sft", "she"),
    "confusion": ("cold_start", "grpo", "annotated_sft", "annotated_srpo", "she"),
    "checks": (
        ("SRPO", ("checks_2_srpo", "short_all_srpo", "checks_8_srpo")),
        ("GRPO", ("checks_2_grpo", "short_grpo", "checks_8_grpo")),
    ),
    "coverage": (
        ("SRPO, verifier only", ("verifier_coverage_0", "short_srpo", "short_all_srpo")),
        ("SRPO, hybrid", ("hybrid_coverage_20", "short_all_srpo")),
        ("SFT, own right chains", ("sft_coverage_0", "short_sft", "short_all_sft")),
        ("GRPO", ("short_grpo",)),
    ),
}
OTHER_PLOTS = {
    "curves": ("grpo", "srpo", "sft", "dpo"),
    "confusion": ("cold_start", "grpo", "srpo", "sft", "dpo"),
    "checks": (),
    "coverage": (),
}


def read_arms(rows: Iterable[tuple]) -> dict[str, dict[str, Any]]:
    """The rows of ``ARMS`` or ``OTHER_PAIRS`` as ``config.arms`` has them, by name."""
    arms = {}
    for name, (
        heading,
        start,
        end,
        shared,
    ), title, seeds, rate, compared, settings, *stages in rows:
        trained = rate is not COLD
        arms[name] = {
            "title": title + end,
            "table": heading,
            "start": start,
            "seeds": seeds,
            "tuned": rate,
            "against": compared,
            "trained": trained,
            "settings": nested(shared | settings) if trained else {},
            "stages": {stage: nested(changes) for stage, changes in dict(*stages).items()},
        }
    return arms


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``, the form that a ConfigDict takes."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
