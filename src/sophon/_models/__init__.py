"""Build networks, load their weights, find and replace their heads, and look inside them.

Image shapes are (channels, height, width). Nothing here changes a model unless its name says
so: probing leaves weights, buffers, modes and the random generators as they were.
"""

from sophon._models.batch_norm import (
    BatchNorms,
    batch_norm_reestimated,
    batch_statistics,
    reestimate_batch_norm,
    tracked_batch_norms,
)
from sophon._models.building import (
    DIFFUSERS,
    Blueprint,
    architecture,
    blueprint,
    denoiser_name,
    require_model,
    resolve_model,
)
from sophon._models.closed_form import fit_head
from sophon._models.comparing import code_differences, similarity
from sophon._models.denoisers import (
    DenoiserSource,
    check_denoiser,
    check_sample_size,
    class_embeddings,
    diffusers,
    is_conditional,
    is_denoiser,
    predict,
    require_parts,
    write_pipeline,
)
from sophon._models.fresh import (
    Bare,
    bare_parameters,
    fresh_copy,
    reinitialise,
)
from sophon._models.gradient_checkpointing import checkpoint_gradients
from sophon._models.heads import find_head, head_classes, replace_head
from sophon._models.hooks import drop_foreign_hooks, foreign_hooks
from sophon._models.lora import add_lora, lora_parameters, merged_lora, real_name, require_peft
from sophon._models.probing import (
    Names,
    Shape,
    check_images,
    check_single_image,
    expected_channels,
    probe_images,
    probing,
    run,
    run_probe,
)
from sophon._models.structure import (
    blocks,
    choose_channels_last,
    choose_precision,
    layers_in_order,
    normalised_pairs,
)
from sophon._models.weights import (
    load_weights,
    network_identity,
    read_tensors,
    require_finite,
    weights_sha256,
)

__all__ = [
    "add_lora",
    "architecture",
    "Bare",
    "bare_parameters",
    "batch_norm_reestimated",
    "batch_statistics",
    "BatchNorms",
    "blocks",
    "Blueprint",
    "blueprint",
    "check_denoiser",
    "check_sample_size",
    "check_images",
    "check_single_image",
    "checkpoint_gradients",
    "choose_channels_last",
    "choose_precision",
    "class_embeddings",
    "code_differences",
    "DenoiserSource",
    "denoiser_name",
    "drop_foreign_hooks",
    "DIFFUSERS",
    "diffusers",
    "expected_channels",
    "find_head",
    "foreign_hooks",
    "fresh_copy",
    "fit_head",
    "head_classes",
    "is_conditional",
    "is_denoiser",
    "layers_in_order",
    "load_weights",
    "lora_parameters",
    "merged_lora",
    "Names",
    "network_identity",
    "normalised_pairs",
    "predict",
    "probe_images",
    "probing",
    "read_tensors",
    "real_name",
    "reestimate_batch_norm",
    "reinitialise",
    "replace_head",
    "require_finite",
    "require_model",
    "require_parts",
    "require_peft",
    "resolve_model",
    "run",
    "run_probe",
    "Shape",
    "similarity",
    "tracked_batch_norms",
    "weights_sha256",
    "write_pipeline",
]
