"""What an experiment may say. Frozen, strict, finite: a misspelt key, a nan and an infinity are errors.

Limits stand in the annotation, meanings under the field. A rule across fields is a validator whose message says what to
change.
"""

import re
from typing import Annotated, Any, Literal, get_args
from zoneinfo import available_timezones

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

TrainedStage = Literal["sft", "grpo", "ppo", "rl"]
"""What an experiment can train, in order; `rl` is by the algorithm of a plugin."""
Stage = Literal["base", TrainedStage]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""With the step in it, it must still be a number of 64 bits."""
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
Owner = Annotated[str, Field(pattern=r"^(team:[A-Za-z0-9_.-]+|[^@\s]+@[^@\s]+\.[^@\s.]+)$")]
MAY_CHANGE = Field(json_schema_extra={"may_change_on_resume": True})
"""Marks a field that a resumed run may find changed."""


class Strict(BaseModel):
    """Frozen; a misspelt key, a nan and an infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Plugin(Strict):
    """A registered class and its options, which its own model validates."""

    name: str
    """Its registered name."""
    options: dict[str, Any] = {}
    """Its own settings, which its `Options` model checks."""


# ---- data ----------------------------------------------------------------------------------------------------------


class JsonlSource(Strict):
    kind: Literal["jsonl"] = "jsonl"
    """Says that this is a file of JSON lines."""
    path: str
    """A `.jsonl` or `.jsonl.gz` file; relative paths are taken from the folder the command runs in."""


class HuggingFaceSource(Strict):
    kind: Literal["huggingface"] = "huggingface"
    """Says that this is a dataset of the hub or in its layout."""
    path: str
    """A hub id (`openai/gsm8k`) or a local folder that `datasets.load_dataset` reads."""
    subset: str | None = None
    """The dataset's configuration, such as `main`."""
    split: str = "train"
    """Which of its splits."""
    revision: str | None = None
    """A commit of the hub repository. A hub id without one is refused: the data would change under the run."""

    @model_validator(mode="after")
    def _pinned(self) -> "HuggingFaceSource":
        local = self.path.startswith((".", "/", "~"))
        if not local and self.revision is None:
            raise ValueError(
                f"revision: {self.path!r} is a hub id; pin a commit hash so that the data can't change under the run"
            )
        return self


class ReasoningGymTask(Strict):
    name: str
    """A dataset of reasoning-gym, such as `chain_sum`."""
    options: dict[str, Any] = {}
    """Keyword arguments of that dataset's configuration."""
    weight: PositiveFloat = 1.0
    """Share of the examples, against the other tasks' weights."""


class ReasoningGymSource(Strict):
    """Procedural tasks with verifiers (the `synthetic` source)."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    """Says that these are problems that reasoning-gym makes."""
    tasks: Annotated[tuple[ReasoningGymTask, ...], Field(min_length=1)]
    """Which datasets of reasoning-gym, mixed by weight."""
    size: PositiveInt = 1000
    """Problems, over all tasks."""
    seed: Seed = 0
    """Of the problems."""
    solution: Literal["answer", "steps"] = "answer"
    """What SFT imitates: the bare answer, or the worked steps and the answer (arithmetic chains only)."""
    steps_share: Fraction = 1.0
    """With `solution: steps`, the share of examples that are worked out; the others' target is its last line alone."""


class PluginSource(Strict):
    """A loader that a plugin registered."""

    kind: Literal["plugin"] = "plugin"
    """Says that a plugin's loader reads it."""
    name: str
    """Its registered name."""
    options: dict[str, Any] = {}
    """Its own settings, which its `Options` model checks."""


Source = Annotated[JsonlSource | HuggingFaceSource | ReasoningGymSource | PluginSource, Field(discriminator="kind")]


class FieldsConfig(Strict):
    """Which column of the source is which part of an example."""

    id: str | None = None
    """Defaults to a hash of the prompt."""
    prompt: str = "prompt"
    """The column of the question."""
    messages: str | None = None
    """A column of chat messages (`[{"role": …, "content": …}]`), used instead of `prompt`."""
    target: str | None = None
    """The column that SFT imitates."""
    answer: str | None = None
    """The column that rewards compare with."""


class DatasetConfig(Strict):
    name: Name
    """Experiments that name the same dataset share one asset, and must agree on its settings."""
    train: Source
    """Where the training examples come from."""
    test: Source | None = None
    """A test set of its own; without one, `held_out` of the train source is split off by a hash of the example."""
    held_out: Fraction = 0.1
    """Share of the train source that is split off for testing, where there is no `test`."""
    fields: FieldsConfig = FieldsConfig()
    """Which column is which part of an example."""
    max_prompt_chars: PositiveInt = 20_000
    """Longer prompts are set aside (the length filter in tokens is `max_prompt_tokens` of the training sections)."""
    max_bad_rows: Fraction = 0.01
    """Share of rows that may be set aside before the asset fails."""
    deduplicate: bool = True
    """Set examples aside whose prompt was seen before, in either split."""
    limit: PositiveInt | None = None
    """Keep the first so many examples of each split."""


class PromptConfig(Strict):
    """How an example becomes text for the model."""

    system: str | None = None
    """A system message before the prompt."""
    template: str = "{prompt}"
    """Around the example's prompt; `{prompt}` stands for it, `{name}` for another column, a list by its lines."""
    chat: bool = True
    """Apply the tokenizer's chat template; off for base models and bare completion."""
    chat_template_args: dict[str, str | bool | int] = {}
    """Passed to the chat template, for instance `enable_thinking: false`."""

    @model_validator(mode="after")
    def _placeholder(self) -> "PromptConfig":
        if "{prompt}" not in self.template:
            raise ValueError("template: must contain {prompt}")
        if self.system is not None and not self.chat:
            raise ValueError("system: needs chat: true; put the text into template instead")
        return self


# ---- model ---------------------------------------------------------------------------------------------------------


class PretrainedModel(Strict):
    kind: Literal["pretrained"] = "pretrained"
    """Says that this is a model that exists."""
    path: str
    """A hub id or a local folder in mlx-lm's or Hugging Face's layout, quantised or not."""
    revision: str | None = None
    """A commit or branch of the hub repository."""


class ScratchModel(Strict):
    """Random weights of an mlx-lm architecture, and a byte-level BPE tokenizer trained on the dataset."""

    kind: Literal["scratch"] = "scratch"
    """Says that this is a model from random weights."""
    architecture: Annotated[str, Field(pattern=r"^[a-z0-9_.-]+$")] = "llama"
    """A model type of mlx-lm."""
    vocab_size: Annotated[int, Field(ge=260)] = 512
    """Tokens of the tokenizer that is trained, at most."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    intermediate_size: PositiveInt = 384
    """Width of the MLP."""
    num_hidden_layers: PositiveInt = 4
    """Blocks."""
    num_attention_heads: PositiveInt = 4
    """Heads of queries."""
    num_key_value_heads: PositiveInt = 4
    """Heads of keys and values; fewer than queries is grouped attention."""
    max_position_embeddings: PositiveInt = 2048
    """Longest sequence, in tokens."""
    extra: dict[str, Any] = {}
    """Further fields of the architecture's configuration."""

    @model_validator(mode="after")
    def _divisible(self) -> "ScratchModel":
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("hidden_size must divide by num_attention_heads, and that by num_key_value_heads")
        return self


Model = Annotated[PretrainedModel | ScratchModel, Field(discriminator="kind")]


class FullAdapter(Strict):
    """Every weight is trained."""

    kind: Literal["full"] = "full"
    """Says that every weight is trained."""


class LoraAdapter(Strict):
    """Low-rank adapters (arXiv:2106.09685); over a quantised model this is QLoRA."""

    kind: Literal["lora", "dora"] = "lora"
    """`dora` splits the weight into magnitude and direction (arXiv:2402.09353)."""
    rank: PositiveInt = 16
    """Of the two factors."""
    scale: PositiveFloat = 2.0
    """Factor on the adapter's output (alpha / rank elsewhere)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is left out; SFT only."""
    layers: Annotated[int, Field(ge=-1)] = -1
    """How many of the last blocks carry adapters; -1 for all."""
    keys: tuple[str, ...] | None = None
    """Which linear layers of a block; all of them where absent."""


Adapter = Annotated[FullAdapter | LoraAdapter, Field(discriminator="kind")]


# ---- optimisation --------------------------------------------------------------------------------------------------


class OptimizerConfig(Strict):
    kind: Literal["adamw", "lion", "adafactor"] = "adamw"
    """AdamW (arXiv:1711.05101), Lion (arXiv:2302.06675) or Adafactor (arXiv:1804.04235)."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled from the gradient."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; linear and cosine end at `final_fraction` of the learning rate."""
    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises from 0."""
    final_fraction: Fraction = 0.0
    """Of the learning rate, where a linear or cosine schedule ends."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm, computed in float32."""


class CheckpointConfig(Strict):
    save_every: Annotated[PositiveInt, MAY_CHANGE] = 50
    """Steps between checkpoints."""
    keep_last: Annotated[PositiveInt, MAY_CHANGE] = 2
    """Newest checkpoints that are kept."""
    keep_every: Annotated[PositiveInt | None, MAY_CHANGE] = None
    """Also keep each checkpoint whose step is a multiple of this."""
    best_metric: str | None = None
    """A metric's name; the checkpoint with its best value is kept and published. None publishes the last."""
    best_mode: Literal["max", "min"] = "max"
    """Whether a greater or a smaller `best_metric` is better."""


class TrainingConfig(Strict):
    """What every training stage has."""

    steps: Annotated[PositiveInt, MAY_CHANGE] = 100
    """Optimizer steps of SFT; rollouts of reinforcement learning, each followed by its updates."""
    learning_rate: PositiveFloat = 1e-6
    """The highest one of the schedule."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Which optimizer, its moments, its schedule."""
    adapter: Adapter = FullAdapter()
    """Which weights are trained."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often the state is saved, and what is kept."""
    max_prompt_tokens: PositiveInt = 512
    """Examples with longer prompts are left out, and counted."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass: less memory, a third more time."""
    compile_update: bool = True
    """On a GPU, compile the gradient of batch shapes that come often: a fifth sooner, after a trace of some 0.5 s."""
    max_nonfinite_steps: Annotated[PositiveInt, MAY_CHANGE] = 3
    """So many skipped steps in a row (loss or gradient not finite) stop the run."""
    tokens_per_microbatch: Annotated[PositiveInt | None, MAY_CHANGE] = None
    """Padded tokens of one forward and backward pass; None takes what the device's memory allows. Changes no result."""


class SFTConfig(TrainingConfig):
    learning_rate: PositiveFloat = 2e-5
    """The highest one of the schedule."""
    batch_size: PositiveInt = 32
    """Sequences of one optimizer step."""
    max_length: PositiveInt = 1024
    """Prompt and target; longer ones are left out, and counted."""
    neftune_alpha: NonNegativeFloat = 0.0
    """Noise on the input embeddings (arXiv:2310.05914); 0 is off."""
    packing: bool = False
    """Several examples in a row of `max_length`, with attention that doesn't cross them. Changes no result."""
    loss: Literal["nll", "dft"] = "nll"
    """`dft` weighs each token by the probability it has already (dynamic fine-tuning, arXiv:2508.05629)."""
    loss_on: Literal["target", "assistant"] = "target"
    """What is imitated of a chat: the target (or the assistant's last turn), or every turn of the assistant."""
    validation_every: PositiveInt | None = 50
    """Steps between validation losses on the held-out split; None never."""
    validation_examples: PositiveInt = 128
    """Held-out examples of a validation loss, at most."""

    @model_validator(mode="after")
    def _rules(self) -> "SFTConfig":
        if self.checkpoint.best_metric == "validation_loss":
            if self.checkpoint.best_mode != "min":
                raise ValueError("checkpoint.best_mode: set min; max would keep the highest validation_loss")
            if self.validation_every is None:
                raise ValueError("validation_every: null gives no validation_loss for checkpoint.best_metric")
        if self.gradient_checkpointing and isinstance(self.adapter, LoraAdapter) and self.adapter.dropout:
            raise ValueError(
                "gradient_checkpointing: computes layers twice, with another dropout each time; set adapter.dropout: 0"
            )
        return self


class SamplingConfig(Strict):
    """How completions are drawn."""

    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens of so much probability; 1 is off."""
    top_k: NonNegativeInt = 0
    """0 is off."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Leave tokens out that are less likely than so many times the likeliest; 0 is off."""
    max_tokens: PositiveInt = 256
    """A completion is cut here."""

    @property
    def truncates(self) -> bool:
        """Some tokens can't be drawn although the policy gives them probability."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class ImportanceCorrection(Strict):
    """Weights for the difference between the sampling and the training distribution (truncated importance sampling)."""

    level: Literal["token", "sequence"] = "token"
    """A weight for each token, or one for the completion."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Bound the weights, or leave out what lies outside."""
    low: NonNegativeFloat = 0.0
    """Smallest weight that counts."""
    high: PositiveFloat = 3.0
    """Largest weight that counts."""


class PolicyConfig(TrainingConfig):
    """What GRPO and PPO share: rollouts, clipping, KL."""

    prompts_per_step: PositiveInt = 16
    """P: prompts of one rollout."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    order: Literal["sequential", "shuffled", "weighted", "by_length"] = "shuffled"
    """How examples follow each other; `weighted` reads the dataset's `weight` column."""
    epochs: PositiveInt = 1
    """Passes over each rollout."""
    minibatches: PositiveInt = 1
    """Optimizer steps of one pass."""
    clip_range: PositiveFloat = 0.2
    """Ratios below 1 - clip_range stop pushing down."""
    clip_range_high: PositiveFloat | None = None
    """Ratios above 1 + clip_range_high stop pushing up; None takes clip_range (0.28 is DAPO's clip-higher)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss of bad completions at large ratios (arXiv:1912.09729); 3 is usual."""
    aggregation: Literal["token_mean", "sequence_mean", "dr_grpo"] = "token_mean"
    """How token losses become one number, over the whole optimizer step."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty to the reference; 0 never loads the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Which estimate of the KL (Schulman 2020); its gradient is that of the KL."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus; 0 is off."""
    importance_correction: ImportanceCorrection | None = None
    """Weights for what sampler and trainer disagree in; null is off."""
    off_policy_threshold: PositiveFloat | None = None
    """Leave bad completions (A < 0) out once the policy is further from them than this, in nats a token (0.5)."""
    mask_truncated: bool = False
    """Leave completions that were cut at the token limit out of the loss (DAPO's overlong filtering)."""
    ref_refresh_every: PositiveInt | None = None
    """The reference becomes the policy after every so many steps; None keeps it for ever."""
    watchdog: "WatchdogConfig" = Field(default_factory=lambda: WatchdogConfig())
    """When a run is named as not learning."""
    eval_every: PositiveInt | None = None
    """Steps between greedy accuracies on the held-out split during training; None never."""
    eval_examples: PositiveInt = 64
    """Held-out examples of such an accuracy, at most."""

    @model_validator(mode="after")
    def _sampling_is_trainable(self) -> "PolicyConfig":
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: 0 is greedy, so a group's completions are equal; 1.0 is usual")
        if self.sampling.truncates and self.importance_correction is None:
            raise ValueError(
                "sampling: top_p, top_k and min_p draw from another distribution than the one that is trained; "
                "turn them off, or set importance_correction"
            )
        return self

    @model_validator(mode="after")
    def _no_dropout(self) -> "PolicyConfig":
        if isinstance(self.adapter, LoraAdapter) and self.adapter.dropout:
            raise ValueError("adapter.dropout: the policy that samples has none, so an update must have none; set 0")
        return self

    @model_validator(mode="after")
    def _reference_is_used(self) -> "PolicyConfig":
        if self.ref_refresh_every is not None and self.kl_coef == 0:
            raise ValueError("ref_refresh_every: has no effect with kl_coef: 0, which loads no reference")
        return self

    @property
    def updates_per_step(self) -> int:
        return self.epochs * self.minibatches

    @property
    def policy_updates(self) -> int:
        """Optimizer steps of the policy in the whole run, on which its learning-rate schedule stands."""
        return self.steps * self.updates_per_step

    def _refuse_idle_clip(self) -> None:
        if self.updates_per_step == 1 and {"clip_range", "clip_range_high", "dual_clip"} & self.model_fields_set:
            raise ValueError(
                "clip_range: with epochs: 1 and minibatches: 1 the ratio is exactly 1 and the clip never acts; "
                "raise epochs or minibatches, or leave the clip ranges out"
            )


class WatchdogConfig(Strict):
    """When a run is named as not learning."""

    patience: PositiveInt = 20
    """Steps in a row that a symptom must last."""
    stop: Annotated[bool, MAY_CHANGE] = False
    """Stop the run, rather than warn."""
    min_entropy: NonNegativeFloat = 0.01
    """Nats a token, estimated by the sampler's own log-probabilities."""
    max_truncated: Fraction = 0.9
    """Share of completions that are cut at the token limit."""
    max_logprob_difference: PositiveFloat = 0.1
    """Mean absolute difference between the sampler's and the trainer's log-probabilities, in nats."""
    max_value_loss: PositiveFloat = 100.0
    """A critic's loss above this is named."""


class GRPOConfig(PolicyConfig):
    """Group-relative policy optimisation (arXiv:2402.03300). A preset is values of these fields and nothing else."""

    algorithm: Literal["grpo"] = "grpo"
    """Says that this is GRPO."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions sampled for each prompt (G)."""
    advantage: Literal["group_mean", "leave_one_out", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"] = (
        "group_mean"
    )
    """The baseline that a completion's reward is compared with."""
    scale_advantages: Literal["group", "batch", "none"] = "group"
    """Which standard deviation divides the advantages (Dr. GRPO: none)."""
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Add the rewards up and compare within the group, or compare each reward and add up."""
    loss: Literal["clip", "cispo", "sapo", "reinforce"] = "clip"
    """The surrogate: PPO's clip, CISPO, SAPO, or the plain policy gradient."""
    ratio_level: Literal["token", "sequence"] = "token"
    """`sequence` is GSPO's (arXiv:2507.18071)."""
    dynamic_sampling: NonNegativeInt = 0
    """Rollout rounds that may be added to a step to replace groups without signal (DAPO); 0 drops them only."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """`preset: dapo` fills the fields that the YAML leaves out."""
        if not isinstance(data, dict) or "preset" not in data:
            return data
        name = data["preset"]
        if not isinstance(name, str) or name not in GRPO_PRESETS:
            raise ValueError(f"preset: unknown {name!r}; there are {sorted(GRPO_PRESETS)}")
        return GRPO_PRESETS[name] | {key: value for key, value in data.items() if key != "preset"}

    @model_validator(mode="after")
    def _rules(self) -> "GRPOConfig":
        if self.prompts_per_step < 2:
            raise ValueError("prompts_per_step: an update from one prompt is noise; set at least 2, 8 is a good start")
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"minibatches: {self.minibatches} of {self.prompts_per_step} prompts; a minibatch holds whole groups"
            )
        explicit = self.model_fields_set
        if self.loss != "clip" and "dual_clip" in explicit and self.dual_clip is not None:
            raise ValueError(f"dual_clip: has no effect with loss: {self.loss}")
        if self.loss in ("sapo", "reinforce") and {"clip_range", "clip_range_high"} & explicit:
            raise ValueError(f"clip_range: has no effect with loss: {self.loss}; leave it out")
        if self.loss == "cispo" and "clip_range" in explicit:
            raise ValueError("clip_range: has no effect with loss: cispo, which bounds the ratio above; leave it out")
        if self.loss != "clip" and self.ratio_level == "sequence":
            raise ValueError(f"ratio_level: sequence needs loss: clip, not {self.loss}")
        if self.advantage != "group_mean" and self.reward_aggregation == "normalize_then_sum":
            raise ValueError(f"reward_aggregation: normalize_then_sum has its own baseline; leave out {self.advantage}")
        if self.advantage == "leave_one_out" and "scale_advantages" in explicit and self.scale_advantages == "group":
            raise ValueError("scale_advantages: leave_one_out goes with none or batch")
        if self.advantage not in ("group_mean", "leave_one_out") and "scale_advantages" in explicit:
            raise ValueError(f"scale_advantages: has no effect with advantage: {self.advantage}; leave it out")
        if self.loss in ("clip", "cispo"):
            self._refuse_idle_clip()
        return self


GRPO_PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence_mean"},
    "dr_grpo": {"aggregation": "dr_grpo", "scale_advantages": "none"},
    "dapo": {
        "clip_range": 0.2,
        "clip_range_high": 0.28,
        "minibatches": 2,
        "dynamic_sampling": 2,
        "mask_truncated": True,
    },
    "gspo": {
        "ratio_level": "sequence",
        "aggregation": "sequence_mean",
        "clip_range": 3e-4,
        "clip_range_high": 4e-4,
        "minibatches": 2,
    },
    "rloo": {
        "advantage": "leave_one_out",
        "scale_advantages": "none",
        "loss": "reinforce",
        "aggregation": "dr_grpo",
    },
    "cispo": {"loss": "cispo", "clip_range_high": 4.0, "minibatches": 2},
}


class CriticConfig(Strict):
    kind: Literal["head", "separate"] = "head"
    """A value head on the policy's trunk, or a critic model of its own; both start at zero."""
    learning_rate: PositiveFloat = 1e-5
    """Of the head, and of the critic's own trunk where it has one; a shared trunk moves at the policy's rate."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of the critic's own weights."""
    warmup_steps: NonNegativeInt = 0
    """First steps that train the critic alone."""
    value_clip_range: PositiveFloat | None = 0.2
    """Values further than this from the ones before the update gain nothing by moving on; None is off."""
    coef: PositiveFloat = 0.5
    """Weight of the value loss on the shared trunk (kind `head`)."""

    @model_validator(mode="after")
    def _coef_is_used(self) -> "CriticConfig":
        if self.kind == "separate" and "coef" in self.model_fields_set:
            raise ValueError("coef: has no effect with kind: separate; set learning_rate")
        return self


class PPOConfig(PolicyConfig):
    """Proximal policy optimisation with a critic (arXiv:1707.06347) and GAE (arXiv:1506.02438)."""

    algorithm: Literal["ppo"] = "ppo"
    """Says that this is PPO."""
    completions_per_prompt: PositiveInt = 1
    """Completions sampled for each prompt."""
    gamma: Fraction = 1.0
    """Discount of a token."""
    gae_lambda: Fraction = 0.95
    """GAE's lambda: 1 is the whole return, 0 one step."""
    whiten_advantages: bool = True
    """Advantages with mean 0 and variance 1 over all tokens of the rollout; returns stay as they are."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the KL penalty is taken off the reward of each token, or added to the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """As for GRPO; k1 in the reward is the usual one."""
    kl_target: PositiveFloat | None = None
    """Adaptive KL controller (arXiv:1909.08593): the KL, in nats a token, it steers to; None keeps kl_coef fixed."""
    kl_horizon: PositiveInt = 10_000
    """Rollouts over which the controller corrects; larger is slower."""
    max_approx_kl: PositiveFloat | None = None
    """Leave the remaining epochs of a rollout out once the policy has moved so far (k3, nats a token)."""
    critic: CriticConfig = CriticConfig()
    """What estimates the values."""
    epochs: PositiveInt = 2
    """Passes over each rollout."""
    minibatches: PositiveInt = 2
    """Optimizer steps of one pass."""

    @model_validator(mode="after")
    def _rules(self) -> "PPOConfig":
        rows = self.prompts_per_step * self.completions_per_prompt
        if self.minibatches > rows:
            raise ValueError(f"minibatches: {self.minibatches} of {rows} completions a step")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target: a coefficient of 0 stays 0; set kl_coef to where the controller starts")
        if self.max_approx_kl is not None and self.epochs == 1:
            raise ValueError("max_approx_kl: has no effect with epochs: 1")
        if self.critic.warmup_steps >= self.steps:
            raise ValueError(f"critic.warmup_steps: {self.critic.warmup_steps} of {self.steps} steps leave none")
        self._refuse_idle_clip()
        return self

    @property
    def group_size(self) -> int:
        """Completions sampled for each prompt."""
        return self.completions_per_prompt

    @property
    def policy_updates(self) -> int:
        return (self.steps - self.critic.warmup_steps) * self.updates_per_step


class PluginPolicyConfig(PolicyConfig):
    """An algorithm that a plugin registered."""

    algorithm: str
    """Its registered name."""
    options: dict[str, Any] = {}
    """Its own settings, which its `Options` model checks."""
    group_size: PositiveInt = 8
    """Completions sampled for each prompt."""

    @model_validator(mode="after")
    def _not_built_in(self) -> "PluginPolicyConfig":
        if self.algorithm in ("grpo", "ppo"):
            raise ValueError(f"algorithm: {self.algorithm!r} has a section of its own, `{self.algorithm}:`")
        return self


# ---- judging -------------------------------------------------------------------------------------------------------


class RewardConfig(Plugin):
    weight: float = 1.0
    """0 makes it a metric."""


class EvaluationConfig(Strict):
    """One benchmark; each stage of the experiment gets a report of it."""

    benchmark: str
    """A registered evaluator: held_out, gsm8k, …"""
    name: Name | None = None
    """Asset and report name; the benchmark's where absent."""
    limit: PositiveInt | None = None
    """First so many items; None for all."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=512)
    """How completions are drawn; greedy unless it says otherwise."""
    samples: PositiveInt = 1
    """Completions an item."""
    batch_size: PositiveInt = 128
    """Rows generated at once."""
    options: dict[str, Any] = {}
    """The benchmark's own settings."""

    @property
    def key(self) -> str:
        return self.name or self.benchmark


class NightlyConfig(Strict):
    cron: str = "0 2 * * *"
    """When, as cron writes it."""
    timezone: str = "UTC"
    """IANA name of the time zone that `cron` is in."""
    benchmarks: tuple[str, ...] | None = None
    """Names of evaluations; None for all."""

    @model_validator(mode="after")
    def _known_zone(self) -> "NightlyConfig":
        if self.timezone not in available_timezones():
            raise ValueError(f"timezone: {self.timezone!r} is not an IANA time zone such as Europe/Berlin")
        return self


class AlertsConfig(Strict):
    """Who hears of failed runs and of scores that fell, beside the daemon's log."""

    webhook: str | None = None
    """An http(s) address, or the name of the environment variable that holds it (Slack's are secret); gets JSON."""
    wandb: bool = False
    """An alert of W&B, which mails or posts it as the account says."""

    @model_validator(mode="after")
    def _address_or_variable(self) -> "AlertsConfig":
        if self.webhook is not None and not re.fullmatch(r"https?://\S+|[A-Z_][A-Z0-9_]*", self.webhook):
            raise ValueError(f"webhook: {self.webhook!r} is no http(s) address and no NAME of an environment variable")
        return self


class MonitoringConfig(Strict):
    wandb: Literal["off", "offline", "online"] = "off"
    """Where W&B's own server can't be reached, `online` falls back to `offline`, to be synced later."""
    wandb_project: str = "mlx-rl-trainer"
    """W&B's project."""
    wandb_checkpoints: bool = False
    """Upload each stage's published checkpoint as an artifact."""
    log_samples: PositiveInt = 8
    """Completions of the best and of the worst reward, each, on the checkpoint's page and in W&B's tables."""
    alerts: AlertsConfig = AlertsConfig()
    """Who hears of failed runs and fallen scores."""


class ExperimentConfig(Strict):
    """One experiment: data, model, stages, judging."""

    name: Name
    """The file's stem; also the asset group, the key prefix and the job."""
    description: str = ""
    """What it is for, in a sentence; shown in Dagster and on the model card."""
    owners: tuple[Owner, ...] = ()
    """Who answers for it, on each asset's page in Dagster: mail addresses and `team:name`s."""
    seed: Seed = 0
    """Of every draw: initial weights, order of the examples, completions."""
    plugins: tuple[str, ...] = ()
    """Modules or `.py` files (relative to the YAML) that register rewards, evaluators, loaders and algorithms."""
    dataset: DatasetConfig
    """Where the examples come from."""
    prompt: PromptConfig = PromptConfig()
    """How an example becomes text for the model."""
    model: Model
    """What training starts from."""
    sft: SFTConfig | None = None
    """Supervised fine-tuning; absent: none."""
    grpo: GRPOConfig | None = None
    """Group-relative policy optimisation; absent: none."""
    ppo: PPOConfig | None = None
    """Proximal policy optimisation with a critic; absent: none."""
    rl: PluginPolicyConfig | None = None
    """Reinforcement learning by an algorithm of a plugin."""
    rewards: tuple[RewardConfig, ...] = ()
    """What judges the completions; their weighted scores are added up."""
    evaluations: tuple[EvaluationConfig, ...] = ()
    """The benchmarks that each stage's model is put to."""
    nightly: NightlyConfig | None = None
    """When the newest checkpoint is evaluated again; absent: never."""
    monitoring: MonitoringConfig = MonitoringConfig()
    """Where numbers go beside the run directory."""

    @model_validator(mode="after")
    def _rules(self) -> "ExperimentConfig":
        if (self.grpo or self.ppo or self.rl) and not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: grpo, ppo and rl need at least one reward with a weight other than 0")
        keys = [evaluation.key for evaluation in self.evaluations]
        if len(set(keys)) != len(keys):
            raise ValueError(f"evaluations: two share a name in {keys}; set `name`")
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards: a name twice in {names}")
        if self.nightly and self.nightly.benchmarks and set(self.nightly.benchmarks) - set(keys):
            raise ValueError(
                f"nightly.benchmarks: {sorted(set(self.nightly.benchmarks) - set(keys))} are not in evaluations {keys}"
            )
        fields = self.dataset.fields
        if self.sft and not (fields.target or fields.messages) and self.dataset.train.kind in ("jsonl", "huggingface"):
            raise ValueError(
                "dataset.fields.target: sft needs the column that it imitates, or chats in fields.messages"
            )
        if isinstance(self.model, ScratchModel) and self.sft is None:
            raise ValueError("sft: a model from scratch needs it before reinforcement learning")
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """The models that are evaluated, in order: the untrained base, then each trained stage."""
        return ("base", *(stage for stage in get_args(TrainedStage) if getattr(self, stage) is not None))
