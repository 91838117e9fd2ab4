"""The evidence: arms x seeds from the same cold starts, and the tables and plots that compare them.

    python launch.py --config=configs/evidence.py --workdir=runs/evidence

runs what is not done yet, most important arms first, two runs side by side, and writes
``evidence.json``, ``tables.md`` and plots into the folder. What was stopped, killed or failed goes
on with the same command. ``--config.only=srpo,grpo`` runs these arms alone. On an accelerator set
``--config.workers=1``.

Every arm begins with the cold start of its seed, meets the same prompts, samples as many rollouts
and takes ``recipe.rl.steps`` updates, or a third of them: so many go to the choice of the rates and
to the variants. Exceptions: of what is learnt in stages, each takes up the prompts that the one
before missed; of the teacher's chains there is a new one for every row; and the gold ones, like
these, are not sampled. An arm's learning rate is the one of ``rates`` that does best on the first
seed's validation split, or that of the arm it is a variant of: the three in the middle are tried,
and the next one as long as the outermost is best. Nothing is chosen on a test split.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import reward_model, scalar_reward, stage1

# Beside ``recipe.reward.model`` and ``.scalar``: the reward models trained for an arm's cold start.
EXAMINER, SCALAR = "{examiner}", "{scalar}"
# A model's scores are never quite equal: what deviates less teaches nothing.
EXAMINED = {"reward.model": EXAMINER, "rl.tol": 0.05}
# Conditions a query besides the recipe's, and the room that prompts and chains of them take.
CHECKS = {2: (36, 92), 8: (56, 188)}
COVERAGES = (0.2, 0.0)  # share of the steps that humans annotated, besides the recipe's
SHORT = {"rl.steps": 80, "rl.eval_every": 40}
REPLAY = 1.0  # advantage of what is imitated in the places of silent groups
# Compared from starts of several numbers of checks: title and settings.
COMPARED = {
    "grpo": ("GRPO", {"rl.estimator": "grpo"}),
    "srpo": ("SRPO", {"rl.estimator": "srpo"}),
    "sft": ("SFT, own right chains", {"method": "sft", "offline.chains": "rejection"}),
}


def get_config() -> Any:
    """The recipe of one run, those of the reward models, and what each arm changes."""
    config: Any = ConfigDict()
    config.kind = "evidence"
    config.seeds = (0, 1, 2, 3, 4)  # on the first one the rates are chosen
    config.workers = 2  # runs side by side, each with its share of the CPUs
    config.cpu_devices = 1  # of each of them
    config.only = ""  # these arms alone, with commas between them; "" for all
    config.rates = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # of learning to choose from, rl.learning_rate

    config.recipe = _recipe()
    config.recipe.cpu_devices = config.get_ref("cpu_devices")
    config.examiner = _examiner()
    config.examiner.cpu_devices = config.get_ref("cpu_devices")
    config.scalar = _scalar()
    config.scalar.cpu_devices = config.get_ref("cpu_devices")

    # Worlds and chains that need a cold start of their own: what they change in the recipe.
    starts = {"main": {}, "label_first": {"chain.label_first": True}}
    starts |= {
        f"checks_{n}": {
            "chain.checks": n,
            "model.prompt_length": prompt,
            "model.completion_length": chain,
        }
        for n, (prompt, chain) in CHECKS.items()
    }
    config.starts = ConfigDict({name: _nested(own) for name, own in starts.items()})
    arms = _arms()
    config.arms = ConfigDict(arms)
    config.order = tuple(arms)  # in which they are run; a ConfigDict keeps none
    config.plots = ConfigDict(_plots())
    return config.lock()


# -------------------------------------------------------------------------- sizes


def _recipe() -> Any:
    config = stage1.get_config().unlock()
    config.update_from_flattened_dict(
        {
            "chain.checks": 4,
            "model.prompt_length": 44,
            "model.completion_length": 120,
            "shopworld.pairs": (40_000, 1_024, 2_048, 1_024),
            "sft.steps": 1_500,
            "sft.micro_batches": 4,
            "sft.checkpoint_every": 500,
            "filter.pairs": 0,
            "rl.aim": "even",
            "rl.refill": 0,
            "rl.prompts": 16,
            "rl.group_size": 4,
            "rl.loss.micro_batches": 16,  # of a group each
            "rl.srpo.w_outcome": 0.0,  # the label is a step like the others
            "rl.steps": 240,
            "rl.eval_every": 60,
            "eval.pass_k": 0,
        }
    )
    return config


def _examiner() -> Any:
    config = reward_model.get_config().unlock()
    config.update_from_flattened_dict(
        {
            "solve.steps": 0,  # 20 minutes that an evidence run does not have
            "sft.steps": 750,
            "examiner.pairs": 10_000,
            "examiner.policy_pairs": 5_000,
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
    those that had no right rollout yet, and the policy that samples them is better.

    A round samples as many rollouts as it takes rows, and imitates what is right in every annotated
    step.
    """
    own = {"method": "sft", "rl.prompts": 64, "rl.group_size": 1} | SHORT
    return {f"stage{n}": own | {"rl.missed": n > 1} for n in range(1, count + 1)}


def _stages() -> dict[str, dict[str, Any]]:
    """Of full SHE: first imitate what goes right, then practise what does not.

    Two rounds of imitation, then SRPO with replay on the prompts that are left: as many updates and
    rollouts as the other arms have. Little is left to learn by then, and so the rate is lower.
    """
    last = {"rl.missed": True, "rl.learning_rate": 1e-4, "rl.replay": REPLAY}
    return _rounds(2) | {"stage3": last | SHORT}


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
        "seeds": seeds,  # it is run with the first so many
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
    return _main() | _short() | _checks() | _coverages() | _ablations() | _estimators() | _orders()


def _main() -> dict[str, dict[str, Any]]:
    chains = {"method": "sft", "offline.chains": "written"}
    gold = chains | {"shopworld.chains": "gold"}
    teacher = chains | {"offline.pairs": 15_360}  # a new chain for every row

    def arm(title: str, settings: Any, tuned: str, **own: Any) -> Any:
        usual: dict[str, Any] = {"against": ("srpo", "she")}
        return _arm(title, "main", settings, tuned=tuned, **usual | own)

    return {
        "cold_start": _arm("cold start", "main", {}, tuned=False, against=("srpo",), trained=False),
        "grpo": arm(*COMPARED["grpo"], "short_grpo"),
        "srpo": arm(*COMPARED["srpo"], "short_srpo", against=("she",)),
        "sft": arm(*COMPARED["sft"], "short_sft", seeds=3),
        "she": arm("full SHE", {}, "short_srpo", against=(), stages=_stages()),
        "sft_rounds": arm(
            "SFT, own right chains, three rounds",
            {},
            "short_sft",
            seeds=3,
            stages=_rounds(3),
        ),
        # As GRPO knows them: the label, and of the steps nothing.
        "sft_labels": arm(
            "SFT, own right labels",
            COMPARED["sft"][1] | {"shopworld.coverage": 0.0},
            "short_sft",
            seeds=1,
        ),
        "dpo": arm("DPO", {"method": "dpo"}, "short_dpo", seeds=1),
        "sft_teacher": arm("SFT, teacher's chains", teacher, "short_sft", seeds=1),
        "sft_gold": arm("SFT, gold chains (ceiling)", gold, "short_sft", seeds=1),
    }


def _short() -> dict[str, dict[str, Any]]:
    """The main arms on which rates are chosen; SRPO's is what its variants are compared with."""
    own = COMPARED | {"dpo": ("DPO", {"method": "dpo"})}
    return {
        f"short_{name}": _variant(
            title, "a third of the updates", settings, tuned=True, against=_against("short", name)
        )
        for name, (title, settings) in own.items()
    }


def _checks() -> dict[str, dict[str, Any]]:
    """What is compared, from starts with fewer and more checks, at the rates of the short arms."""
    table, every = "checks, a third of the updates", {}
    for n in CHECKS:
        start, what = f"checks_{n}", f"{n} checks"
        every[f"{start}_start"] = _arm(
            f"cold start, {what}", table, {}, start=start, seeds=1, tuned=False, trained=False
        )
        for name, (title, settings) in COMPARED.items():
            own = {"start": start, "tuned": f"short_{name}", "against": _against(start, name)}
            every[f"{start}_{name}"] = _variant(f"{title}, {what}", table, settings, **own)
    return every


def _against(start: str, name: str) -> tuple[str, ...]:
    return () if name == "srpo" else (f"{start}_srpo",)


def _coverages() -> dict[str, dict[str, Any]]:
    # All of them have the outcome beside the steps: what has no annotation learns from it alone.
    table, outcome = "coverage, a third of the updates", {"rl.srpo.w_outcome": 1.0}
    tol = {"rl.tol": EXAMINED["rl.tol"]}  # the two differ in the examiner alone
    kinds = {"verifier": ("verifier only", tol), "hybrid": ("hybrid", EXAMINED)}
    whole = {"srpo_outcome": _variant("SRPO, outcome weight 1", table, outcome)}
    return whole | {
        f"{name}_coverage_{100 * share:.0f}": _variant(
            f"SRPO, {title}, {share:.0%} annotated",
            table,
            outcome | own | {"shopworld.coverage": share},
            against=("srpo_outcome",),
        )
        for share in COVERAGES
        for name, (title, own) in kinds.items()
    }


def _estimators() -> dict[str, dict[str, Any]]:
    # Without its dynamic sampling (rl.refill), which would sample more than the others do.
    dapo = {"rl.estimator": "grpo", "rl.kl_weight": 0.0, "rl.loss.clip_high": 0.28}
    constant = {"rl.estimator": "dr_grpo", "rl.normalisation": "constant"}
    # Sums over steps, which a clamp of 2 would make all alike; its paper has none.
    process = {"rl.estimator": "process", "rl.clamp": 100.0}
    scalar = {"rl.estimator": "grpo", "reward.scalar": SCALAR, "rl.tol": 0.05}
    own = {
        "dapo": ("DAPO, no resampling", dapo, "short_grpo"),
        "dr_grpo": ("Dr.GRPO", constant, "short_grpo"),
        "rloo": ("RLOO", {"rl.estimator": "rloo"}, "short_grpo"),
        "process": ("process supervision", process, "short_srpo"),
        "prorag": ("dual granularity (ProRAG)", {"rl.estimator": "prorag"}, "short_srpo"),
        "grpo_scalar": ("GRPO, scalar reward model", scalar, "short_grpo"),
    }
    table = "estimators, a third of the updates"
    return {
        name: _variant(title, table, settings, tuned=tuned)
        for name, (title, settings, tuned) in own.items()
    }


def _ablations() -> dict[str, dict[str, Any]]:
    critical, table = "rl.srpo.critical", "ablations, a third of the updates"
    outcome = {"rl.srpo.w_outcome": 1.0}
    model = EXAMINED | {"reward.combine": "model_only"}
    own = {
        "srpo_all": ("SRPO, all steps count", {critical: "all"}),
        "srpo_outcome_consistent": ("SRPO, outcome-consistent", {critical: "outcome_consistent"}),
        "srpo_half": (
            "SRPO, outcome weight 1, step weight 0.5",
            outcome | {"rl.srpo.w_step": 0.5},
        ),
        "srpo_model": ("SRPO, examiner only", model),
    }
    return {name: _variant(title, table, values) for name, (title, values) in own.items()}


def _orders() -> dict[str, dict[str, Any]]:
    return {
        f"label_first_{name}": _variant(
            f"{COMPARED[name][0]}, label first",
            "label first, a third of the updates",
            COMPARED[name][1],
            start="label_first",
            tuned=f"short_{name}",
            against=_against("label_first", name),
        )
        for name in ("grpo", "srpo")
    }


def _variant(title: str, table: str, settings: dict[str, Any], **own: Any) -> dict[str, Any]:
    """One seed and a third of the updates, beside SRPO's."""
    usual = {"seeds": 1, "tuned": "short_srpo", "against": ("short_srpo",)}
    return _arm(title, table, settings | SHORT, **usual | own)


def _plots() -> dict[str, Any]:
    """Which arms the plots show; a line's points are arms, placed by what their config says."""
    return {
        "curves": ("srpo", "grpo", "dpo", "sft", "sft_rounds", "she"),
        "confusion": ("cold_start", "grpo", "srpo"),
        # The lead is that of the first line over each of the others.
        "checks": tuple(
            (COMPARED[name][0], (f"checks_2_{name}", f"short_{name}", f"checks_8_{name}"))
            for name in ("srpo", "grpo", "sft")
        ),
        "coverage": (
            ("SRPO, hybrid", ("srpo_outcome", *_names("hybrid_coverage"))),
            ("SRPO, verifier only", ("srpo_outcome", *_names("verifier_coverage"))),
            ("GRPO", ("short_grpo",)),
        ),
    }


def _names(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}_{100 * share:.0f}" for share in COVERAGES)


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
