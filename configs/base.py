"""Every key of a run, with its default and what it means. The other files say what differs."""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> Any:  # a ConfigDict, whose typed attributes no checker can follow
    """The defaults: a small decoder from scratch on ShopWorld, sized for two CPU cores."""
    config: Any = ConfigDict()
    config.kind = "train"  # what launch.py does with it; see she_jax.runs.run.KINDS
    config.seed = 0  # parameters, order of the data and sampling
    config.export = False  # also write the judge as a Hugging Face directory, <workdir>/export
    config.checkpoint = ""  # evaluate: a run's folder, a Hugging Face directory or a .gguf file

    # Begin with the best of these checkpoints, in place of a cold start: DIR/checkpoints/sft or
    # DIR/checkpoints/srpo of another run, of the same chain and model.
    config.start = ""

    # The recipe of the stage before, which is run where what this one starts from is not there.
    config.before = ConfigDict()

    # The pairs.
    config.data = ConfigDict()
    config.data.name = "shopworld"  # shopworld | esci | wands | jsonl | made
    config.data.path = ""  # folder (esci, wands, made: of a made data set) or file (jsonl)
    config.data.dir = ""  # where the TFDS data set goes; "" for <workdir>/data
    config.data.max_bad_share = 0.05  # share of rows that may be unusable
    config.data.balance = False  # draw the classes in equal shares while training
    config.data.eval_split = "test"  # split that is judged before and after
    config.data.eval_pairs = 0  # judge so many pairs of it, evenly spread out; 0 for all

    # ShopWorld's options; see she_jax.data.shopworld.builder.World and TeacherErrors.
    config.shopworld = ConfigDict()
    config.shopworld.seed = 0
    config.shopworld.pairs = (40_000, 512, 2_048, 1_024)  # train, validation, test, test_longtail
    config.shopworld.class_balance = (0.25, 0.25, 0.25, 0.25)
    config.shopworld.annotated = 1.0  # share of the training pairs that humans looked at
    config.shopworld.coverage = 1.0  # of these, the share of the steps that they annotated
    config.shopworld.chains = "teacher"  # teacher | gold | none
    config.shopworld.errors = ConfigDict()
    config.shopworld.errors.negation = 0.6
    config.shopworld.errors.unstated = 0.6
    config.shopworld.errors.near = 0.6
    config.shopworld.errors.price = 0.6
    config.shopworld.errors.likeness = 0.6

    # The chain of thought; see she_jax.cot.CotSchema.build.
    config.chain = ConfigDict()
    config.chain.label_first = False
    config.chain.checks = 0  # steps for single attributes; ShopWorld takes 0, 2, 4 or 8

    # The policy.
    config.model = ConfigDict()
    config.model.name = "scratch"  # scratch | smollm2 | a Hugging Face directory or .gguf file
    config.model.dtype = "float32"  # of the computation; the parameters are float32
    config.model.remat = True  # recompute layers in the backward pass: less memory, not slower here
    config.model.prompt_length = 32  # tokens; longer products are cut, and counted
    config.model.completion_length = 72  # tokens, the end included
    config.model.vocab_size = 1_280  # from scratch only, like all below
    config.model.dim = 128
    config.model.layers = 3
    config.model.heads = 4
    config.model.kv_heads = 1
    config.model.head_dim = 32
    config.model.ffn = 384

    # Without an accelerator JAX takes the CPU for so many devices, each with a share of the batch
    # and all of the parameters: two devices are faster than one with two threads.
    config.cpu_devices = 2

    # The devices: sizes of the mesh, -1 for all that are left.
    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    # The cold start.
    config.sft = _optimizer(learning_rate=2e-3, warmup=60)
    config.sft.steps = 1_800
    config.sft.batch_size = 32
    config.sft.micro_batches = 2  # small enough for the cache: on CPU faster than one
    config.sft.checkpoint_every = 300

    # What comes after the cold start: rollouts of the policy itself (online), or chains that are
    # there before (offline); all of them take from rl the updates, the rows of each and the rate.
    config.method = "online"  # online | sft | dpo
    config.offline = ConfigDict()  # she_jax.rollouts.offline
    config.offline.chains = "rejection"  # for sft: rejection | written
    config.offline.pairs = 0  # prompts; 0 for as many as learning online would meet
    config.offline.beta = 0.1  # of DPO

    # SRPO.
    config.rl = _optimizer(learning_rate=3e-4, warmup=5)
    config.rl.steps = 100  # updates; 0 ends with the cold start
    config.rl.prompts = 32  # N, prompts a step
    config.rl.group_size = 8  # G, rollouts a prompt
    config.rl.temperature = 1.0
    config.rl.top_k = 0  # 0 for the whole vocabulary
    config.rl.top_p = 1.0
    config.rl.halvings = 1  # on one device, ended rollouts are left behind so many times
    config.rl.kl_weight = 0.01  # 0 leaves the reference out
    config.rl.format_weight = 0.1  # outcome of a well-formed chain with the wrong label
    config.rl.normalisation = "token"  # token | sequence | step | constant
    config.rl.clamp = 2.0  # of a token's advantage
    config.rl.negative = 1.0  # weight of advantages below 0; with 0 only what did better counts
    config.rl.estimator = "srpo"  # srpo | grpo | rloo | dr_grpo | process | prorag
    # Rewards of a group, of a step or the outcome, that deviate no more than this teach nothing.
    # With reward.model or reward.scalar set more, 0.05 say: a model's scores are never quite equal.
    config.rl.tol = 1e-6
    # Prompts come shuffled (even), or by their running pass rate; she_jax.data.curriculum.
    config.rl.aim = "even"  # even | easy | medium | hard
    # The share of the prompts of which the run behind ``start``, an SFT on its own right rollouts,
    # found no right one; the others are new. 0: prompts of all kinds.
    config.rl.missed = 0.0
    # Groups that the verifier cannot tell apart give way to those of so many further batches.
    config.rl.refill = 0
    # Groups without any advantage give way to right rollouts of earlier ones, which are imitated
    # with this advantage; 0 for never. she_jax.rollouts.self_imitation
    config.rl.replay = 0.0
    config.rl.patience = 0  # end after so many judgings without a better one; 0 for never
    config.rl.eval_every = 50
    config.rl.checkpoint_every = 20
    config.rl.sample_every = 25
    config.rl.loss = ConfigDict()  # she_jax.rl.losses.LossConfig
    config.rl.loss.clip_low = 0.2
    config.rl.loss.clip_high = 0.2
    config.rl.loss.micro_batches = 8
    config.rl.srpo = ConfigDict()  # she_jax.rl.advantages.srpo_advantages
    config.rl.srpo.w_outcome = 1.0
    config.rl.srpo.w_step = 1.0
    config.rl.srpo.critical = "first_error"  # first_error | all | outcome_consistent
    config.rl.srpo.after_error = 0.5
    config.rl.srpo.correct_from = 1.0  # a step is right from this reward of the verifier's on

    # Diversified data filtering; see she_jax.filtering.select.FilterConfig.
    config.filter = filtering()

    # The hybrid examination; see she_jax.rewards.hybrid.combine_rewards. With method=sft and
    # offline.chains=rejection the examiner has a say in what is imitated.
    config.reward = ConfigDict()
    config.reward.model = ""  # folder of an examiner, from configs/reward_model.py; "" for none
    config.reward.combine = "precedence"  # precedence | mean | gate | verifier_only | model_only
    config.reward.model_weight = 0.5  # of the examiner's word, for mean
    config.reward.votes = 0  # critiques a step; 0 reads its verdict directly, 1 takes the likeliest
    # Folder of a scalar reward model, from configs/scalar_reward.py, whose score takes the place of
    # the outcome reward; "" for none.
    config.reward.scalar = ""
    config.reward.batch_size = 16  # chains that a reward model reads at a time; with votes, steps
    config.reward.devices = 0  # set so many apart for the examiner; 0: it shares the policy's mesh
    # The examiner may go on learning from annotated steps that the policy writes by now.
    config.reward.refresh_every = 0  # SRPO updates between two refreshes; 0 for never
    config.reward.refresh_steps = 50  # updates of the examiner at each refresh
    config.reward.refresh_batch_size = 32  # chains in each of these updates
    config.reward.refresh_learning_rate = 3e-4  # constant

    # Judging.
    config.eval = ConfigDict()
    config.eval.batch_size = 256
    config.eval.pass_k = 8  # rollouts a pair for pass@k, before and after; 0 leaves it out
    config.eval.pass_pairs = 256  # pairs for pass@k
    return config.lock()  # a recipe that misspells a key fails


def filtering() -> Any:
    """What a filter looks at, and its thresholds and quotas, all of them open."""
    config: Any = ConfigDict()
    config.pairs = 0  # look at so many training pairs; 0 leaves filtering out
    config.skip = 0  # but not at so many others, which an earlier stage has seen
    config.rollouts = 8  # of each of them
    config.records = ""  # folder of rollouts, kept for other thresholds; "" for <workdir>/filter
    config.part = 0  # measure only each parts-th block of prompts, this one and on ...
    config.parts = 1  # ... where several runs share the folder of the records
    config.similarity = 0.9  # of texts from which on a pair repeats an earlier one; 0 for off
    config.confidence = 1.0  # drop pairs of whose class the policy is surer than that
    config.low = 0.0  # lowest pass rate to keep
    config.high = 1.0  # highest
    config.min_entropy = 0.0  # lowest path entropy to keep, nats
    config.size = 0  # keep so many; 0 for all that pass
    config.balance = True  # even quotas over class, kind, difficulty and cluster
    config.clusters = 16  # of the embeddings; 0 for none
    config.front = ()  # kinds of query that come first
    config.front_share = 0.75  # of the size, for the kinds in front
    return config


def _optimizer(*, learning_rate: float, warmup: int) -> Any:
    """AdamW under a cosine schedule with a linear warm-up."""
    config: Any = ConfigDict()
    config.learning_rate = learning_rate  # peak
    config.final_share = 0.05  # of the peak, at the end of the cosine
    config.warmup = warmup  # steps
    config.b1 = 0.9
    config.b2 = 0.98
    config.weight_decay = 0.01
    config.clip_norm = 1.0  # of the whole gradient
    return config
