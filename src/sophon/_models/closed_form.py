"""A classifier head fitted in closed form: ridge regression on what reaches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sophon._base.errors import UnsupportedModelError
from sophon._models.batch_norm import batch_norm_reestimated
from sophon._models.heads import heads
from sophon._models.probing import keeping_modes
from sophon._specs import FeatureScaling

# Penalties that are tried, relative to the mean of the features' squared singular values.
_PENALTIES = torch.logspace(-4, 4, 33, dtype=torch.float64)
# What the outputs are multiplied by, so that a softmax over them is neither flat nor certain.
_SCALES = torch.logspace(-1, 2, 61, dtype=torch.float64)
# Below this share of the largest singular value, or of the features, all is rounding.
_RANK = 1e-6
# Quartile distances that a feature may be off its median.
_CLIPPED = 3.0


@torch.no_grad()
def fit_head(
    model: nn.Module,
    head: str,
    batches: Iterable[tuple[Tensor, Tensor]],
    scaling: FeatureScaling = "plain",
) -> bool:
    """Fit the layer that `head` names to `batches` of images and labels; nothing else changes.

    Ridge regression to one-hot labels; the penalty is the one with the least squared error on
    images left out one at a time, and the outputs are scaled to the least cross-entropy on these.
    What it is fitted to is scaled first; its weights take the features as they are.
    BatchNorm runs as in training, all else as in evaluation. False, and the head as it was, where
    nothing can be fitted: outputs that are not finite, or alike for every image. Raises
    UnsupportedModelError for a head whose input has no feature dimension to regress on.
    """
    labels: list[Tensor] = []

    def images() -> Iterator[Tensor]:
        for pixels, answers in batches:
            labels.append(answers)
            yield pixels

    fits: list[tuple[Any, tuple[Tensor, Tensor]]] = []
    for name, inputs in _inputs(model, heads(model, head), images()).items():
        features = torch.cat(inputs) if inputs else torch.full((1, 1), torch.nan)
        if not bool(features.isfinite().all()):
            return False
        layer: Any = model.get_submodule(name)
        fitted = _scaled_ridge(features, torch.cat(labels).cpu(), layer.weight.shape[0], scaling)
        if fitted is None:
            return False
        fits.append((layer, fitted))
    for layer, (weight, bias) in fits:
        layer.weight.copy_(weight.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(bias)
    return True


def _inputs(
    model: nn.Module, names: tuple[str, ...], batches: Iterable[Tensor]
) -> dict[str, list[Tensor]]:
    """Return what reaches each head, (batch, features) in double precision, batch by batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[name].append(_flat(layer, given[0], name).detach().double().cpu())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        with keeping_modes(model), batch_norm_reestimated(model, batches) as anew:
            if not anew:
                model.eval()
                for images in batches:
                    model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _flat(layer: nn.Module, given: Tensor, head: str) -> Tensor:
    """Return (batch, features): positions are averaged, as the pooling around the head does."""
    if isinstance(layer, nn.Conv2d) and given.dim() == 4:
        return given.mean(dim=(2, 3))
    if isinstance(layer, nn.Linear) and given.dim() >= 2:
        return given.flatten(1, -2).mean(dim=1) if given.dim() > 2 else given
    raise UnsupportedModelError(
        f"ridge_head: what reaches {head!r} has the shape {tuple(given.shape)}; (batch, features)"
        " is needed"
    )


def _scaled_ridge(
    features: Tensor, labels: Tensor, classes: int, scaling: FeatureScaling
) -> tuple[Tensor, Tensor] | None:
    """Return weight and bias as `_ridge` does, fitted to features scaled first."""
    if scaling == "plain" or bool((features == features[:1]).all()):
        return _ridge(features, labels, classes)
    centre, change = _whitening(features) if scaling == "whitened" else _quartiles(features)
    most = _CLIPPED if scaling == "robust" else torch.inf
    fitted = _ridge(((features - centre) @ change).clamp(-most, most), labels, classes)
    if fitted is None:
        return None
    weight = fitted[0] @ change.T
    return weight, fitted[1] - weight @ centre


def _whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is subtracted, (features), and what multiplies, (features, directions)."""
    centre = features.mean(0)
    centred = features - centre
    left, squares = _left_singular(centred)
    return centre, centred.T @ (left / squares) * len(features) ** 0.5


def _quartiles(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same by each feature's quartiles; by its spread where these are one."""
    low, centre, high = features.quantile(torch.tensor([0.25, 0.5, 0.75]).to(features), dim=0)
    size = torch.where(high > low, high - low, features.std(0))
    return centre, torch.diag(torch.where(size > 0, 1 / size, 0.0))


def _ridge(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor] | None:
    """Return weight (classes, features) and bias (classes) from features (images, features)."""
    targets = nn.functional.one_hot(labels, classes).to(features)
    centre, mean = features.mean(0), targets.mean(0)
    centred, wanted = features - centre, targets - mean
    if bool(centred.norm() <= _RANK * features.norm()):
        return None
    left, squares = _left_singular(centred)
    coded = left.T @ wanted
    best: tuple[float, Tensor, Tensor] | None = None
    for penalty in (_PENALTIES * squares.mean()).tolist():
        shrunk = squares / (squares + penalty)
        # What an image adds to its own prediction; the mean's share is 1 / n.
        leverage = left.square() @ shrunk + 1 / len(features)
        residual = wanted - left @ (shrunk[:, None] * coded)
        residual /= (1 - leverage).clamp_min(1e-9)[:, None]
        error = float(residual.square().mean())
        if best is None or error < best[0]:
            best = (error, left @ (coded / (squares + penalty)[:, None]), wanted - residual)
    assert best is not None
    _, dual, without = best
    losses = [float(nn.functional.cross_entropy(s * without, labels)) for s in _SCALES.tolist()]
    scale = float(_SCALES[losses.index(min(losses))])
    weight = scale * (centred.T @ dual).T
    return weight, scale * mean - weight @ centre


def _left_singular(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors, one a column, and squared singular values, but for rounding."""
    wide = centred.shape[0] <= centred.shape[1]
    gram = centred @ centred.T if wide else centred.T @ centred
    squares, vectors = torch.linalg.eigh(gram)
    kept = squares > _RANK**2 * squares.max()
    squares, vectors = squares[kept], vectors[:, kept]
    return (vectors if wide else centred @ vectors / squares.sqrt()), squares
