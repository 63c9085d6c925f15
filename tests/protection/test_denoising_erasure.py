"""Erasure for U-Nets: what its readers find, what cannot fool them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from denoisers import digits, unet, write_latent_pipeline, write_prompted
from sophon._base.errors import DataError, SpecError, UnsupportedModelError
from sophon._base.seeding import generator
from sophon._data import load_domain, share_prompts
from sophon._models import resolve_model
from sophon._protection.denoising_readers import (
    DenoisingReaders,
    DenoisingReadersSpec,
    pixels_explained,
)
from sophon._protection.protection import Protection
from sophon._protection.readers import standardised
from sophon._protection.spec import ProtectSpec
from sophon._protection.term import Surroundings
from sophon._specs import DomainSpec, Guard, ModelSpec
from sophon._tasks import Denoising, Latents
from sophon._training.setting import make_setting

ONE = DenoisingReadersSpec(networks=1, components=4)


def _around(model: nn.Module, task: Denoising | None = None) -> Surroundings:
    setting = make_setting(
        model,
        task=task or Denoising(),
        original=digits(0, 5),
        restricted=(digits(5, 10),),
        device="cpu",
    )
    return Surroundings(setting, model, 0)


def _run(model: nn.Module | None = None, **changes: Any) -> Protection:
    """Return a run with the term; `erasure` holds its settings."""
    erasure = {"kind": "denoising_erasure", "batch_size": 32} | changes.pop("erasure", {})
    usual: dict[str, Any] = {"original": digits(0, 5), "restricted": digits(5, 10)}
    spec = {
        "keep": ({"kind": "task"}, {"kind": "distil"}),
        "hinder": (erasure,),
        "update": "joint",
        "guard": Guard(every=20, tolerance_relative=0.5),
        "original_batch_size": 32,
        "precision": "fp32",
        **changes.pop("spec", {}),
    }
    usual |= {"task": Denoising(), "device": "cpu"} | changes
    return Protection(unet() if model is None else model, **usual, spec=ProtectSpec(**spec))


# --- What it reads --------------------------------------------------------------------------------


def test_it_looks_at_every_block_in_order_for_noise_and_content_in_the_quarters() -> None:
    names = DenoisingReaders(ONE, _around(unet()), 32).names
    blocks = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    bands = ("0 to 249", "250 to 499", "500 to 749", "750 to 999")
    assert names == tuple(
        f"{block}, {what} at {band}"
        for block in blocks
        for what in ("noise", "content")
        for band in bands
    )


@pytest.mark.parametrize(("left_out", "kept"), [("noise", "content"), ("components", "noise")])
def test_one_of_both_kinds_can_be_left_out(left_out: str, kept: str) -> None:
    spec = DenoisingReadersSpec(networks=1, **{left_out: 0 if left_out == "components" else False})  # type: ignore[arg-type]
    names = DenoisingReaders(spec, _around(unet()), 32).names
    assert all(f", {kept} at " in name for name in names)


def test_a_pixel_that_shows_the_noise_is_read_and_one_that_does_not_is_not() -> None:
    stream = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 400, 3, generator=stream)
    mixed = noise @ torch.randn(3, 5, generator=stream)
    blind = torch.randn(2, 400, 5, generator=stream)
    ridge = torch.tensor([1e-3, 1e-3])
    seen, unseen = (
        pixels_explained(standardised(one, 3.0), noise, 200, ridge) for one in (mixed, blind)
    )
    assert bool((seen > 0.95).all())
    assert bool((unseen < 0.1).all())


def _scaled(model: nn.Module, factor: float) -> nn.Module:
    """Return the network with one channel of a block's output multiplied."""

    def multiplied(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        factors = torch.ones(output.shape[1]).index_fill_(0, torch.tensor([1]), factor)
        return output * factors[:, None, None]

    model.get_submodule("up_blocks.1").register_forward_hook(multiplied)
    return model


@pytest.mark.parametrize("factor", [0.1, 1e2, -3.0])
def test_rescaling_a_channel_changes_nothing_that_is_read(factor: float) -> None:
    spec = DenoisingReadersSpec(networks=1, components=4, depths=("up_blocks.1",))
    readers, domain = DenoisingReaders(spec, _around(unet()), 32), digits(5, 10)
    images, labels = readers.around.setting.feed(domain, domain.train, batch_size=32).batch(0)
    found = [
        torch.cat(readers.read(model, images, labels, domain, generator(0, "test")))
        for model in (unet(), _scaled(unet(), factor))
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_training_erases_and_keeps_the_original_task() -> None:
    """Of a network that was trained a little, so that there is something to erase."""
    model, task = unet(), Denoising()
    around = _around(model)
    domain = digits(0, 5)
    feed = around.setting.feed(domain, domain.train, batch_size=32)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(100):
        outputs, targets = task.outputs(model.train(), *feed.batch(step), generator(0, step))
        task.loss(outputs, targets).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    readers = {"networks": 1, "components": 4}
    run = _run(model, erasure={"readers": readers, "batch_size": 32}, spec={"rounds": 40})
    losses = [record.readings["erasure"] for record in run]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    result = run.result()
    assert 1 - result.after.value <= 1.5 * (1 - result.before.value)
    (table,) = run._description(result)["readers"].values()
    assert sum(table["protected"]) < sum(table["given"])


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readers", "told"),
    [
        ({"bands": ((0, 4),)}, r"bands: 0 up to 4 holds 4 timesteps, and a reader needs 8"),
        ({"bands": ((0, 100), (90, 1001))}, r"bands: 90 up to 1001 is no band of the timesteps 0"),
        ({"bands": ((500, 100),)}, r"bands: 500 up to 100 is no band"),
        ({"depths": ("mid",)}, r"no block 'mid'; there is down_blocks\.0, .*mid_block"),
        ({"components": 65}, r"readers\.components = 65: .* have 64: lower it"),
        ({"noise": False, "components": 0}, r"let them read one of both"),
    ],
)
def test_what_readers_cannot_do_is_told_before_work_starts(
    readers: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=told) as caught:
        _run(erasure={"readers": readers}, out=tmp_path / "new")
    assert str(caught.value).count("\n") < 2
    assert not (tmp_path / "new").exists()


def test_one_timestep_alone_is_refused() -> None:
    with pytest.raises(SpecError, match=r"holds 1 timesteps.*leave task\.timestep out"):
        _run(task=Denoising(timestep=1))


def test_a_batch_that_is_too_small_for_its_bands_is_told_the_size_that_suffices() -> None:
    with pytest.raises(SpecError, match=r"batch_size = 8 in 4 bands .* use at least 16"):
        _run(erasure={"batch_size": 8})
    _run(erasure={"batch_size": 16})


def test_images_that_reach_the_deepest_block_as_a_point_are_refused() -> None:
    deep = {
        "block_out_channels": [8, 8, 8, 8],
        "down_block_types": ["DownBlock2D"] * 4,
        "up_block_types": ["UpBlock2D"] * 4,
    }
    with pytest.raises(DataError, match=r"reach 'down_blocks\.2' as 1x1.*larger image_size"):
        _run(unet(**deep))
    shallow = ("down_blocks.0", "up_blocks.3")
    assert _run(unet(**deep), erasure={"readers": {"depths": shallow}})


def test_a_unet_that_is_told_classes_is_refused() -> None:
    told = r"'denoising_erasure' reads U-Nets that are told no class: use kind = 'rehearsal'"
    with pytest.raises(UnsupportedModelError, match=told):
        _run(unet(num_class_embeds=3))


def test_a_latent_pipeline_is_refused(tmp_path: Path) -> None:
    folders = [
        write_prompted(tmp_path / "low", 0, 5, "a small"),
        write_prompted(tmp_path / "high", 5, 10, "a large"),
    ]
    domains = share_prompts(
        [load_domain(DomainSpec(source="prompts", path=str(folder))) for folder in folders]
    )
    folder = write_latent_pipeline(tmp_path / "pipeline")
    model, _ = resolve_model(ModelSpec(name=f"diffusers:{folder}"), default_classes=1)
    task = Denoising(latents=Latents.from_pipeline(folder, domains[0].classes))
    with pytest.raises(UnsupportedModelError, match=r"reads images, not latents with prompts"):
        _run(
            model,
            original=domains[0],
            restricted=domains[1],
            task=task,
            erasure={"batch_size": 16},
            spec={"original_batch_size": 4},
        )
