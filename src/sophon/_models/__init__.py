# ruff: noqa: F401
# mypy: implicit-reexport
"""Build networks, load their weights, find and replace their heads, and look inside them.

Image shapes are (channels, height, width). Nothing here changes a model unless its name says
so: probing leaves weights, buffers, modes and the random generators as they were.
"""

from sophon._models.accepting import require_network
from sophon._models.batch_norm import (
    BatchNorms,
    batch_norm_reestimated,
    batch_statistics,
    reestimate_batch_norm,
    tracked_batch_norms,
)
from sophon._models.building import (
    DIFFUSERS,
    PATHS,
    architecture,
    blueprint,
    brings_weights,
    input_side,
    placed_name,
    renamed,
    require_model,
    resolve_model,
    stated_input,
)
from sophon._models.closed_form import fit_head
from sophon._models.comparing import code_differences, differing_keys, similarity
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
from sophon._models.fresh import Bare, bare_parameters, fresh_copy, reinitialise, shrink_towards
from sophon._models.gradient_checkpointing import checkpoint_gradients, computes_twice
from sophon._models.heads import (
    encoder_weights,
    find_head,
    head_classes,
    head_parameters,
    heads,
    replace_head,
)
from sophon._models.hooks import drop_foreign_hooks, foreign_hooks
from sophon._models.lora import add_lora, lora_parameters, merged_lora, real_name, require_peft
from sophon._models.own_input import OwnInput, checkpoint_input, folder_input, own_input
from sophon._models.probing import (
    Names,
    Shape,
    check_images,
    check_single_image,
    expected_channels,
    keeping_modes,
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
from sophon._models.transformers import (
    TRANSFORMERS,
    of_transformers,
    save_classifier,
    stated_classes,
    write_classifier,
)
from sophon._models.weights import (
    load_weights,
    network_identity,
    read_tensors,
    untied,
    weights_sha256,
)
