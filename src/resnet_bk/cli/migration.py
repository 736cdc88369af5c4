"""Names of the earlier prototype's configuration, and what took their place."""

from __future__ import annotations

PROTOTYPE_KEYS: dict[str, str] = {
    # The model.
    "n_seq": "use training.sequence_length; the model itself has no fixed length",
    "max_seq_len": "use training.sequence_length; the model itself has no fixed length",
    "n_layers": "use model.num_layers",
    "hidden_dim": "use model.feed_forward_dim",
    "epsilon": "use model.absorption_floor, the smallest imaginary part of the resolvent's spectral parameter",
    "use_semiseparable": "leave it out; the mixing is always semiseparable",
    "use_complex": "leave it out; the resolvent is always complex",
    "use_birman_schwinger": "use model.dynamics, which chooses the operator",
    "use_prime_bump": "leave it out; the potential is computed from the tokens",
    "prime_bump_init": "leave it out; the potential is computed from the tokens",
    "use_mourre": "leave it out; stability follows from model.absorption_floor",
    "use_lap": "leave it out; stability follows from model.absorption_floor",
    "use_scattering_router": "leave it out; this version has no experts",
    "num_experts": "leave it out; this version has no experts",
    "top_k": "leave it out; this version has no experts (for sampling: resnet-bk generate --top-k)",
    "dropout_p": "use model.dropout",
    "grad_blend": "leave it out; the gradient is exact",
    "use_hybrid_analytic": "leave it out; the gradient is exact",
    "v_max": "leave it out; nothing is clamped",
    "feature_clamp": "leave it out; nothing is clamped",
    # Training and memory.
    "lr": "use training.learning_rate",
    "num_epochs": "use training.steps, which counts optimizer steps",
    "epochs": "use training.steps, which counts optimizer steps",
    "max_steps": "use training.steps",
    "seq_len": "use training.sequence_length",
    "max_grad_norm": "use training.gradient_clip_norm",
    "mixed_precision": "use training.precision: auto, float32, bfloat16 or float16",
    "use_amp": "use training.precision: auto, float32, bfloat16 or float16",
    "gradient_checkpointing": "leave it out; it switches itself on at the lengths that need it",
    "use_gradient_checkpointing": "leave it out; it switches itself on at the lengths that need it",
    "cpu_offloading": "leave it out; lower training.batch_size and raise training.gradient_accumulation_steps",
    "checkpoint_dir": "use training.output_dir",
    "save_dir": "use training.output_dir",
    "save_interval": "use training.checkpoint_every, in steps",
    "log_interval": "use training.log_every, in steps",
    "eval_interval": "use training.evaluate_every, in steps",
    "dataset": "use data.name",
    "dataset_name": "use data.name",
    "data_limit": "use data.max_bytes",
}
"""Last part of a prototype key -> what to do instead."""


def prototype_hint(key: str) -> str | None:
    """The sentence for a key that only the prototype had, such as `model.n_seq`; None for any other key."""
    name = key.rsplit(".", 1)[-1]
    if name not in PROTOTYPE_KEYS:
        return None
    return f"Configuration key {key!r} belongs to the prototype: {PROTOTYPE_KEYS[name]} (table: docs/migration.md)."
