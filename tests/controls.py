"""Controls on small real images, for the test files that share them out."""

from __future__ import annotations

from pathlib import Path

from sophon._controls import Controls
from sophon._data import load_domain
from sophon._models import resolve_model
from sophon._specs import AuditSpec, DomainSpec, ModelSpec


def real_controls(shared_data: Path, store: Path) -> Controls:
    """Return the controls of a real ResNet-20 that keeps CIFAR-10, on real traffic signs."""
    kept = DomainSpec(source="npz", path="cifar10.npz", limit=30)
    signs = DomainSpec(source="npz", path="gtsrb10.npz", image_size=16, limit=150)
    spec = ModelSpec(name="resnet20", weights="resnet20_cifar10.safetensors")
    model, scratch = resolve_model(spec, base=shared_data)
    return Controls(
        model,
        original=load_domain(kept, base=shared_data),
        restricted=load_domain(signs, base=shared_data),
        spec=AuditSpec(steps=30, evaluations=2, batch_size=16),
        store=store,
        scratch=scratch,
    )
