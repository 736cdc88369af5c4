"""Configuration names of the earlier prototype, and what took their place. docs/migration.md shows this table."""

from __future__ import annotations

_NO_LIMIT = "use training.sequence_length; the model has no fixed length"
_NO_EXPERTS = "leave it out: this version has no experts and no router"
_NO_BUMPS = "leave it out: the potential is computed from the tokens"
_ALWAYS_STABLE = "leave it out: bounds follow from model.absorption_floor, nothing is clamped or upgraded"
_EXACT = "leave it out: the gradient is the exact one"
_STEPS = "use training.steps, counted in optimizer steps"
_PRECISION = "use training.precision: auto, float32, bfloat16 or float16"
_AUTOMATIC = "leave it out: activations are recomputed by themselves at the lengths that need it"
_DATASET = "use data.name"
_FOLDER = "use training.output_dir"

PROTOTYPE_KEYS: dict[str, str] = {
    "n_seq": _NO_LIMIT,
    "seq_len": _NO_LIMIT,
    "n_layers": "use model.num_layers",
    "dropout_p": "use model.dropout",
    "epsilon": "use model.absorption_floor, the smallest imaginary part of the spectral parameter",
    "epsilon_schedule": "use stability.absorption_start, from which the floor moves to model.absorption_floor",
    "epsilon_anneal_steps": "use stability.epsilon_share, a share of training.steps",
    "use_semiseparable": "leave it out: the mixing is always semiseparable",
    "low_rank": "use model.state_size",
    "use_birman_schwinger": "use model.dynamics to choose where the decay comes from",
    "use_prime_bump": _NO_BUMPS,
    "prime_bump_init": _NO_BUMPS,
    "prime_bump_scale": _NO_BUMPS,
    "k_max": _NO_BUMPS,
    "use_scattering_router": _NO_EXPERTS,
    "scattering_scale": _NO_EXPERTS,
    "use_clark_measure": _NO_EXPERTS,
    "num_experts": _NO_EXPERTS,
    "top_k": f"{_NO_EXPERTS}; for sampling, use resnet-bk generate --top-k",
    "use_mourre": _ALWAYS_STABLE,
    "use_lap": _ALWAYS_STABLE,
    "schatten_threshold": _ALWAYS_STABLE,
    "precision_upgrade_threshold": _ALWAYS_STABLE,
    "v_max": _ALWAYS_STABLE,
    "feature_clamp": _ALWAYS_STABLE,
    "grad_blend": _EXACT,
    "use_analytic_gradient": _EXACT,
    "use_act": "leave it out: this version has no adaptive computation",
    "use_adaptive_computation": "leave it out: this version has no adaptive computation",
    "lr": "use training.learning_rate",
    "lr_scheduler": "use training.schedule: cosine, wsd or constant",
    "adam_beta1": "use training.beta1",
    "adam_beta2": "use training.beta2",
    "max_grad_norm": "use training.gradient_clip_norm",
    "grad_clip": "use training.gradient_clip_norm",
    "epochs": _STEPS,
    "num_epochs": _STEPS,
    "max_steps": _STEPS,
    "mixed_precision": _PRECISION,
    "use_mixed_precision": _PRECISION,
    "gradient_checkpointing": _AUTOMATIC,
    "use_gradient_checkpointing": _AUTOMATIC,
    "cpu_offloading": "lower training.batch_size and raise training.gradient_accumulation_steps instead",
    "use_cpu_offload": "lower training.batch_size and raise training.gradient_accumulation_steps instead",
    "eval_interval": "use training.evaluate_every, in steps",
    "eval_steps": "use training.evaluation_tokens",
    "log_interval": "use training.log_every, in steps",
    "save_interval": "use training.checkpoint_every, in steps",
    "keep_last_n": "use training.keep_checkpoints",
    "save_dir": _FOLDER,
    "checkpoint_dir": _FOLDER,
    "use_tensorboard": "use training.tensorboard",
    "dataset": _DATASET,
    "data_dir": "use data.path",
    "data_limit": "use data.max_bytes",
}
"""Last part of a key that only the prototype had -> what to do instead."""


def prototype_hint(key: str) -> str | None:
    """The sentence for a key of the prototype, such as `model.n_seq`; None for any other key."""
    name = key.rsplit(".", 1)[-1]
    if name not in PROTOTYPE_KEYS:
        return None
    return f"Configuration key {key!r} is the prototype's: {PROTOTYPE_KEYS[name]} (see docs/migration.md)."
