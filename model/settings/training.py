"""How the model is trained (`configs/training/`)."""

from dataclasses import dataclass
from typing import Any, Literal

from model.settings.option import Settings, expect, option

_MAX_STEPS = 10**9


@dataclass
class TrainingSettings(Settings, group="training"):
    """How the model is trained (`configs/training/`); names are those of transformers.TrainingArguments."""

    max_steps: int = option(500, "Optimizer steps.", unit="steps", above=0, maximum=_MAX_STEPS)
    per_device_train_batch_size: int = option(
        2, "Windows in one forward and backward pass of a process.", unit="windows", above=0, maximum=65_536
    )
    per_device_eval_batch_size: int = option(
        4, "Windows in one evaluation pass of a process.", unit="windows", above=0, maximum=65_536
    )
    gradient_accumulation_steps: int = option(
        1, "Passes summed into one optimizer step.", unit="passes", above=0, maximum=65_536
    )
    optim: Literal["muon", "adamw"] = option(
        "muon", "muon: Muon for the matrices, AdamW for embeddings and norms; adamw: AdamW for all."
    )
    learning_rate: float = option(1e-2, "Peak learning rate of AdamW.", above=0, maximum=100.0)
    muon_learning_rate: float = option(2e-2, "Peak learning rate of Muon.", above=0, maximum=100.0)
    muon_momentum: float = option(0.95, "Decay of Muon's momentum.", minimum=0, below=1)
    muon_momentum_warmup_steps: int = option(
        0,
        "Steps in which Muon's momentum rises linearly from muon_momentum_start to muon_momentum; 0: constant.",
        unit="steps",
        minimum=0,
        maximum=_MAX_STEPS,
    )
    muon_momentum_start: float = option(
        0.85,
        "Muon's momentum at the first step of its warm-up, and at the last step of the training, to which it falls "
        "with the learning rate.",
        minimum=0,
        below=1,
    )
    muon_normalize_rows: bool = option(
        False, "Scale each row of Muon's updates by the root of its second moment (NorMuon)."
    )
    muon_cautious_weight_decay: bool = option(
        False, "Apply Muon's weight decay only where weight and update agree in sign."
    )
    newton_schulz_steps: int = option(
        5,
        "Newton-Schulz steps that orthogonalize an update of Muon; more are closer to orthogonal and cost more.",
        unit="steps",
        above=0,
        maximum=100,
    )
    newton_schulz_coefficients: Literal["jordan", "polar_express"] = option(
        "jordan",
        "jordan: the same for each step; polar_express: the best for each, which comes nearer to orthogonal.",
    )
    weight_decay: float = option(
        0.1, "Decoupled weight decay of matrices and embeddings; norms have none.", minimum=0, maximum=100.0
    )
    adam_beta1: float = option(0.9, "Decay of AdamW's first moment.", minimum=0, below=1)
    adam_beta2: float = option(0.95, "Decay of AdamW's second moment.", minimum=0, below=1)
    max_grad_norm: float = option(
        1.0, "Largest gradient norm; larger gradients are scaled down; 0: no clipping.", minimum=0, maximum=1e9
    )
    z_loss: float = option(
        0.0,
        "Weight in the loss of the squared log of the softmax denominator; 1e-4 keeps logits from drifting.",
        minimum=0,
        maximum=100.0,
    )
    mixture_weights: dict[str, Any] = option(
        {},
        "Share of the training windows of each source of corpus.mixture, by name, relative to their sum; empty: every "
        "window is as frequent.",
    )
    init_from: str = option(
        "",
        "Checkpoint, or stock Llama, GLM, GLM-4 or Qwen3, whose weights training starts from: its folder, or "
        "latest:EXPERIMENT; empty: random weights.",
    )
    initial_embeddings: Literal["random", "cooccurrence"] = option(
        "random",
        "cooccurrence: tokens that occur near the same tokens of the training text start with similar embeddings, "
        "which saves a short training many steps; without init_from.",
    )
    lora_rank: int = option(
        0,
        "Rank of LoRA adapters beside every projection, which alone are trained and are merged at the end; 0: all "
        "weights are trained.",
        minimum=0,
        maximum=4096,
    )
    lora_alpha: int = option(16, "Adapters count lora_alpha / lora_rank times.", above=0, maximum=10**6)
    preferences: list[str] = option(
        [],
        "Files, globs or URLs of preferences (.jsonl with prompt, chosen and rejected), on which init_from is tuned by "
        "DPO instead of trained on text.",
    )
    preference_beta: float = option(
        0.1, "Strength with which DPO keeps the model near to the initial one.", above=0, maximum=1000.0
    )
    distill_from: str = option(
        "", "Teacher for distillation: a checkpoint's folder, or latest:EXPERIMENT; empty: none."
    )
    distill_weight: float = option(0.5, "Share of the divergence from the teacher in the loss.", minimum=0, maximum=1)
    distill_temperature: float = option(
        1.0,
        "Divides both models' logits in the divergence; higher gives unlikely tokens more weight.",
        above=0,
        maximum=1000.0,
    )
    distill_top_k: int = option(
        0,
        "The teacher's most likely tokens in the divergence, the others as their sum; 0: all tokens.",
        unit="tokens",
        minimum=0,
        maximum=2**20,
    )
    warmup_steps: int = option(
        20,
        "Steps from zero to the peak learning rate; at most max_steps.",
        unit="steps",
        minimum=0,
        maximum=_MAX_STEPS,
    )
    decay_fraction: float = option(
        0.4, "Fraction of the steps, at the end, in which the learning rate decays linearly.", minimum=0, maximum=1
    )
    final_learning_rate: float = option(0.0, "Final learning rate as a fraction of the peak.", minimum=0, maximum=1)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Precision of the forward and backward pass; auto: bfloat16 if the hardware computes it fast."
    )
    torch_compile: bool = option(False, "Compile the model; pays from about ten minutes of training on.")
    activation_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, a third more work."
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU if there is one.")
    eval_steps: int = option(100, "Interval between evaluations.", unit="steps", above=0, maximum=_MAX_STEPS)
    eval_windows: int = option(
        64,
        "Validation windows of an evaluation during training; the last one reads the whole split.",
        unit="windows",
        above=0,
        maximum=10**9,
    )
    early_stopping_patience: int = option(
        0,
        "Evaluations without improvement before training stops; 0: never stop early.",
        unit="evaluations",
        minimum=0,
        maximum=10**9,
    )
    save_steps: int = option(
        100,
        "Interval between checkpoints; a multiple of eval_steps.",
        unit="steps",
        above=0,
        maximum=_MAX_STEPS,
    )
    save_total_limit: int = option(
        2, "Newest checkpoints to keep, in addition to the best one.", unit="checkpoints", above=0, maximum=1000
    )
    logging_steps: int = option(
        10, "Interval between log lines with tracked metrics.", unit="steps", above=0, maximum=_MAX_STEPS
    )
    self_check: bool = option(
        True,
        "Compare loss and gradients of one batch with plain float32 on the CPU before the first step; a difference "
        "ends the run.",
    )
    self_check_tolerance: float = option(
        0.0,
        "Largest relative error of a gradient in the self-check; 0: 0.001 in float32, 0.01 in TF32, 0.08 in bfloat16 "
        "and float16.",
        minimum=0,
        maximum=1000.0,
    )
    watch_after: float = option(
        0.1,
        "Fraction of the steps after which it warns if the validation loss is not below that of token "
        "frequencies, or if a parameter has not changed.",
        minimum=0,
        maximum=1,
    )
    watch_repeats: int = option(
        3,
        "Consecutive log lines with the same gradient norm that cause a warning; a norm of exactly 0 warns at once.",
        unit="log lines",
        minimum=2,
        maximum=10**6,
    )
    seed: int = option(0, "Seed of the initial weights and the data order.", minimum=0, maximum=2**32 - 1)
    sample_prompts: list[str] = option(
        ["def", "class", "import"], "Prompts that the model continues at each evaluation, shown with the run."
    )
    sample_tokens: int = option(96, "Length of each continuation.", unit="tokens", minimum=0, maximum=2**20)
    arguments: dict[str, Any] = option({}, "Any further transformers.TrainingArguments, by name.")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(
            self.warmup_steps <= self.max_steps,
            "training.warmup_steps",
            self.warmup_steps,
            f"at most training.max_steps ({self.max_steps})",
        )
        for name in ("lora_rank", "preferences"):
            starts = bool(self.init_from) or not getattr(self, name)
            expect(starts, f"training.{name}", getattr(self, name), "none without training.init_from, which it changes")
        values = self.mixture_weights.values()
        are_weights = all(isinstance(value, int | float) and 0 <= value <= 1e9 for value in values)
        expect(
            are_weights and (not values or sum(values) > 0),
            "training.mixture_weights",
            self.mixture_weights,
            "numbers of 0 or more, not all 0, by source",
        )
        expect(
            len(self.sample_prompts) <= 64, "training.sample_prompts", self.sample_prompts, "a list of at most 64 texts"
        )
