"""Every key of a run, with its default and its meaning. The other recipes say what differs."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> Any:  # a ConfigDict, whose typed attributes no checker can follow
    """The defaults: a small decoder from scratch on ShopWorld, sized for two CPU cores."""
    config: Any = ConfigDict()
    config.kind = "train"  # what is done with the recipe; see she_jax.runs.run.KINDS
    config.seed = 0  # of parameters, data order and sampling
    config.export = False  # also write the policy as a Hugging Face directory, <workdir>/export
    config.checkpoint = ""  # evaluate: a run's folder, a Hugging Face directory or a .gguf file

    # Checkpoints of another run with the same chain and model, DIR/checkpoints/sft or
    # DIR/checkpoints/policy: the best of them takes the place of a cold start. "" trains one.
    config.init_from = ""

    # The recipe of an earlier run, which is run first if its checkpoint (init_from) is missing.
    config.prerequisite = ConfigDict()

    # The pairs.
    config.data = ConfigDict()
    # shopworld | esci | wands | table | trec | prepared, or package.module:Class with
    # examples(split); jsonl is another name of table
    config.data.name = "shopworld"
    # esci, wands: the folder; prepared: of a prepared data set; table, trec: the judgments, a file
    # (.csv, .tsv, .parquet, .jsonl, each also .gz), a folder of its parts or a pattern
    config.data.path = ""
    # Of table and trec: the products and the queries in tables of their own, which the columns
    # docid and qid of the judgments find.
    config.data.products = ""
    config.data.queries = ""
    # Which column is read as what: query=q,docid=sku,label=rating,title=name,brand=supplier,
    # raters=rater_1+rater_2. Of the judgments no other column reaches a prompt.
    config.data.columns = ""
    config.data.locales = ""  # of esci: any of us,jp,es; "" for all
    config.data.subset = "all"  # of esci: all | small | large
    # Shares of the queries that go to validation and, if the set has no test split, to test. A
    # column ``split`` comes first. With three queries or more no split with a share is empty.
    config.data.validation_share = 0.1
    config.data.test_share = 0.2
    config.data.markup = True  # read HTML in the products' fields: tags go, entities are read
    config.data.dir = ""  # where the TFDS data set is written; "" for <workdir>/data
    # The labels, worst to best: 0-3 | 5-1 | binary | esci | poor,fair,good | a file with a line
    # "value: meaning" for each. "" for 1-4, or what the pairs' own data set says.
    config.data.labels = ""
    config.data.good = ""  # the labels that count as relevant, such as 2,3; "" for the upper half
    config.data.max_bad_share = 0.05  # largest share of rows that may be unusable
    # Draw the classes in equal shares while training; None: where the labels are real.
    config.data.balance = placeholder(bool)
    config.data.eval_split = "test"  # split that is evaluated before and after
    config.data.eval_pairs = 0  # evaluate this many pairs of it, evenly spaced; 0 for all

    # ShopWorld's options; see World and TeacherErrors in she_jax.data.shopworld.builder.
    config.shopworld = ConfigDict()
    config.shopworld.seed = 0
    config.shopworld.pairs = (40_000, 512, 2_048, 1_024)  # train, validation, test, test_longtail
    config.shopworld.class_balance = (0.25, 0.25, 0.25, 0.25)  # shares of the labels 1 to 4
    config.shopworld.annotated = 1.0  # share of the training pairs with label and annotated steps
    config.shopworld.coverage = 1.0  # of these pairs, the share of the steps; the label always is
    config.shopworld.chains = "teacher"  # who writes the rationales: teacher | gold | none
    config.shopworld.errors = ConfigDict()
    config.shopworld.errors.negation = 0.6
    config.shopworld.errors.unstated = 0.6
    config.shopworld.errors.near = 0.6
    config.shopworld.errors.price = 0.6
    config.shopworld.errors.likeness = 0.6

    # The chain of thought; see she_jax.cot.CotSchema.build.
    config.chain = ConfigDict()
    # A chain of other steps, each as its line in a chain: "name: what to write => yes|no", with a ?
    # behind the name of an optional one. The step "label" takes its verdicts from data.labels.
    config.chain.steps = ()
    config.chain.instruction = ""  # a file with a jinja2 template of the task in the prompt
    config.chain.label_first = False
    config.chain.checks = 0  # steps for single attributes; ShopWorld takes 0, 2, 4 or 8

    # The policy.
    config.model = ConfigDict()
    config.model.name = "scratch"  # scratch | smollm2 | a directory, .gguf file or hub name
    config.model.dtype = "float32"  # of the computation; the parameters are float32
    config.model.remat = True  # recompute layers in the backward pass: less memory, not slower here
    # Tokens; longer products are cut, and counted. 0: as many as 95% of the training prompts need,
    # at most 64 from scratch and 256 otherwise; 32 for ShopWorld.
    config.model.prompt_length = 0
    # Tokens, the end included. 0: as many as 99% of the chains need; 72 for ShopWorld.
    config.model.completion_length = 0
    # enable_thinking of a chat template that knows it. A thought counts as text outside the chain.
    config.model.thinking = False
    config.model.vocab_size = 1_280  # from scratch only, like all below
    config.model.dim = 128
    config.model.layers = 3
    config.model.heads = 4
    config.model.kv_heads = 1
    config.model.head_dim = 32
    config.model.ffn = 384

    # Without an accelerator JAX splits the CPU into this many devices, each with a share of the
    # batch and a copy of the parameters: two devices are faster than one with two threads.
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

    # What follows the cold start: rl (fresh rollouts of the policy), or sft and dpo (chains that
    # exist before the first update). All take the number of updates, the rows per update (prompts x
    # group_size) and the learning rate from ``rl``.
    config.method = "rl"  # rl | sft | dpo
    config.offline = ConfigDict()  # of sft and dpo; she_jax.rollouts.offline
    config.offline.chains = "rejection"  # for sft: rejection | written
    config.offline.pairs = 0  # prompts; 0 for as many as rl would draw
    config.offline.beta = 0.1  # of DPO

    # SRPO and its relatives.
    config.rl = _optimizer(learning_rate=3e-4, warmup=5)
    config.rl.steps = 100  # updates; 0 ends with the cold start
    config.rl.prompts = 32  # N, prompts per batch
    config.rl.group_size = 8  # G, rollouts per prompt
    config.rl.temperature = 1.0
    config.rl.top_k = 0  # 0 for the whole vocabulary
    config.rl.top_p = 1.0
    config.rl.batch_compactions = 1  # on one device: how often the sampler drops finished rows
    config.rl.kl_coef = 0.01  # weight of the KL to the reference policy; 0 for none
    config.rl.format_weight = 0.1  # outcome reward of a well-formed chain with a wrong label
    config.rl.loss_aggregation = "token"  # token | sequence | step | constant
    config.rl.advantage_clip = 2.0  # bound on the size of a token's advantage
    config.rl.negative_advantage_weight = 1.0  # at 0 only what did better than its group counts
    # srpo | grpo | rloo | dr_grpo | process | prorag, or package.module:function
    config.rl.estimator = "srpo"
    # Standard deviations within a group up to this one count as none. Set more, 0.05 say, with
    # reward.prm or reward.orm: the scores of a model are never quite equal.
    config.rl.min_std = 1e-6
    # The order of the prompts: shuffled (even), or by running pass rate; she_jax.data.curriculum.
    config.rl.difficulty = "even"  # even | easy | medium | hard
    # Share of the prompts drawn from those that the run behind init_from, a rejection-sampling
    # fine-tuning, did not solve; the rest are pairs that it never saw. 0: all training pairs.
    config.rl.unsolved_share = 0.0
    # Groups whose rollouts the verifier cannot tell apart are replaced by informative groups of
    # other prompts, in this many further batches at most.
    config.rl.dynamic_sampling_rounds = 0
    # Groups without any advantage are replaced by correct rollouts of earlier groups, which are
    # imitated with this advantage; 0 for never. she_jax.rollouts.self_imitation
    config.rl.self_imitation = 0.0
    config.rl.patience = 0  # end after this many evaluations without improvement; 0 for never
    config.rl.eval_every = 50
    config.rl.checkpoint_every = 20
    config.rl.sample_every = 25  # updates between two pages of rollouts, samples/
    config.rl.loss = ConfigDict()  # she_jax.rl.losses.LossConfig
    config.rl.loss.clip_low = 0.2
    config.rl.loss.clip_high = 0.2
    config.rl.loss.micro_batches = 8
    config.rl.srpo = ConfigDict()  # she_jax.rl.advantages.srpo_advantages
    config.rl.srpo.w_outcome = 1.0
    config.rl.srpo.w_step = 1.0
    config.rl.srpo.critical = "first_error"  # first_error | all
    config.rl.srpo.after_error = 0.5
    config.rl.srpo.correct_from = 1.0  # a step with at least this verifier reward is right

    # Diversified data filtering; see she_jax.filtering.select.FilterConfig.
    config.filter = filtering()

    # Rewards; see she_jax.rewards. With method=sft and offline.chains=rejection the process reward
    # model has a say in what is imitated.
    config.reward = ConfigDict()
    config.reward.step = ""  # package.module:function in place of the verifier
    config.reward.outcome = ""  # package.module:function in place of the outcome reward
    config.reward.prm = ""  # folder of a process reward model (configs/reward_model.py)
    config.reward.combine = "precedence"  # precedence | gate | verifier_only | model_only
    config.reward.votes = 0  # critiques per step; 0: the verdict directly, 1: the most likely one
    # Folder of an outcome reward model (configs/scalar_reward.py), whose score takes the place of
    # the outcome reward in the advantages.
    config.reward.orm = ""
    config.reward.batch_size = 16  # chains that a reward model reads at a time; with votes, steps
    config.reward.devices = 0  # devices reserved for the process reward model; 0: shared
    # The process reward model may keep learning from annotated steps of the current policy.
    config.reward.refresh_every = 0  # policy updates between two refreshes; 0 for never
    config.reward.refresh_steps = 50  # updates of the reward model at each refresh
    config.reward.refresh_batch_size = 32  # chains in each of these updates
    config.reward.refresh_learning_rate = 3e-4  # constant

    # Evaluation.
    config.eval = ConfigDict()
    config.eval.batch_size = 256
    config.eval.pass_k = 8  # rollouts per pair for pass@k, before and after; 0 leaves it out
    config.eval.pass_pairs = 256  # pairs for pass@k
    return config.lock()  # a recipe that misspells a key fails


def filtering() -> Any:
    """What a filter measures, and its thresholds and quotas.

    By default it drops near-duplicates and unlabeled pairs only.
    """
    config: Any = ConfigDict()
    config.pairs = 0  # measure this many training pairs; 0 leaves filtering out
    config.skip = 0  # after skipping this many, which an earlier stage measured
    config.rollouts = 8  # of each of them
    config.records = ""  # folder of the rollouts, reusable with other thresholds; "" for the run's
    config.part = 0  # with several runs on one folder of records: this run's number ...
    config.parts = 1  # ... and how many runs share the work
    config.similarity = 0.9  # of a near-duplicate to an earlier pair of its query; 0: off
    config.confidence = 1.0  # drop pairs of whose label the policy is more confident than this
    config.low = 0.0  # lowest pass rate to keep
    config.high = 1.0  # highest
    config.min_entropy = 0.0  # lowest path entropy to keep, nats
    config.size = 0  # keep this many; 0 for all that pass
    config.balance = True  # even quotas over label, kind, difficulty and cluster
    config.clusters = 16  # of the embeddings; 0 for none
    config.front = ()  # kinds of query that come first, such as negation,brand
    config.front_share = 0.75  # of the size, for these kinds
    return config


def _optimizer(*, learning_rate: float, warmup: int) -> Any:
    """AdamW with a linear warm-up and a cosine schedule."""
    config: Any = ConfigDict()
    config.learning_rate = learning_rate  # peak
    config.final_share = 0.05  # of the peak, at the end of the cosine
    config.warmup = warmup  # steps
    config.b1 = 0.9
    config.b2 = 0.98
    config.weight_decay = 0.01
    config.clip_norm = 1.0  # of the whole gradient
    return config
