"""The denoising task against diffusers' own schedulers, and what makes its scores comparable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from denoisers import digits, unet
from sophon._base.errors import DataError, SpecError, UnsupportedModelError
from sophon._models import diffusers, fresh_copy, predict
from sophon._models.networks import SmallConvNet
from sophon._records.audit_record import ErrorScore
from sophon._tasks import Denoising, Distillation
from sophon._training.evaluate import evaluate
from sophon._training.setting import Setting, make_setting


class Recorder(nn.Module):
    """Passes for a U-Net and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, images: torch.Tensor, times: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        self.shown.append((images, times))
        return (torch.zeros_like(images),)


def _setting(model: nn.Module, task: Denoising | None = None, **changes: Any) -> Setting:
    arguments: dict[str, Any] = {
        "task": task or Denoising(),
        "original": digits(0, 5),
        "restricted": (digits(5, 10),),
        "head": None,
        "precision": "fp32",
        "device": "cpu",
    }
    return make_setting(model, **(arguments | changes))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_noisy_images_and_targets_are_those_of_the_scheduler(
    prediction: str, schedule: str
) -> None:
    scheduler = diffusers().DDPMScheduler(
        num_train_timesteps=40, beta_schedule=schedule, prediction_type=prediction
    )
    task, model = Denoising(scheduler), Recorder()
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    _, targets = task.outputs(
        model, images, torch.zeros(6, dtype=torch.long), torch.Generator().manual_seed(1)
    )
    noisy, times = model.shown[0]
    # The noise is drawn after each image's timestep.
    stream, noise = torch.Generator().manual_seed(1), []
    for expected in times:
        assert torch.randint(0, 40, (1,), generator=stream) == expected
        noise.append(torch.randn(1, 8, 8, generator=stream))
    drawn = torch.stack(noise)
    torch.testing.assert_close(noisy, scheduler.add_noise(images, drawn, times))
    wanted = {
        "epsilon": drawn,
        "v_prediction": scheduler.get_velocity(images, drawn, times),
        "sample": images,
    }[prediction]
    torch.testing.assert_close(targets, wanted)
    assert len(times.unique()) > 1


def test_one_timestep_is_that_timestep_and_the_name_says_so() -> None:
    task, model = Denoising(timestep=1), Recorder()
    images = torch.zeros(5, 1, 8, 8)
    task.outputs(model, images, torch.zeros(5, dtype=torch.long), torch.Generator())
    assert model.shown[0][1].tolist() == [1] * 5
    assert "timestep 1 alone of 1000" in task.name
    assert len(task.parts) == 1


def test_scores_depend_on_the_images_place_and_not_on_the_batch_size() -> None:
    model = unet()
    setting, domain = _setting(model), digits(5, 10)
    scores = [
        evaluate(model, setting, domain, domain.validation, batch_size=size) for size in (7, 64)
    ]
    assert all(isinstance(score, ErrorScore) for score in scores)
    assert scores[0].value == pytest.approx(scores[1].value, abs=1e-6)
    assert scores[0] == evaluate(model, setting, domain, domain.validation, batch_size=7)


def test_an_evaluation_takes_every_quarter_of_the_schedule_and_tells_them_apart() -> None:
    model = unet()
    nn.init.zeros_(model.conv_out.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(model.conv_out.bias)  # type: ignore[union-attr, arg-type]
    score = evaluate(model, _setting(model), digits(5, 10), digits(5, 10).test)
    # A network that predicts nothing leaves the noise as it is: its variance is 1.
    assert isinstance(score, ErrorScore)
    assert len(score.quarters) == 4
    assert score.mse == pytest.approx(1, abs=0.02)
    assert score.mse == pytest.approx(sum(score.quarters) / 4)
    assert score.value == pytest.approx(1 - score.mse)
    bounds = [part.timesteps for part in Denoising().parts]
    assert bounds == [(0, 250), (250, 500), (500, 750), (750, 1000)]


def test_outputs_that_are_not_finite_count_as_a_large_error() -> None:
    task = Denoising()
    outputs = torch.tensor([[torch.nan], [torch.inf], [0.5]]).view(3, 1, 1, 1)
    assert task.score(outputs, torch.zeros(3, 1, 1, 1)).tolist() == [1 - 1e4, 1 - 1e4, 0.75]


def test_class_conditional_networks_are_given_the_classes() -> None:
    model = unet(num_class_embeds=3)
    images, times = torch.zeros(2, 1, 8, 8), torch.ones(2, dtype=torch.long)
    with torch.no_grad():
        first, second = (
            predict(model, images, times, torch.tensor(labels)) for labels in ([0, 0], [0, 2])
        )
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_a_student_of_a_denoiser_meets_the_same_noisy_images_from_minus_1_to_1() -> None:
    model = unet()
    setting = _setting(model)
    student, teacher = Recorder(), Recorder()
    distilled = replace(setting, task=Distillation(setting.task, teacher))
    feed = distilled.feed(digits(0, 5), digits(0, 5).train, batch_size=8)
    images, labels = feed.batch(0)
    assert float(images.min()) == -1
    assert float(images.max()) == 1
    distilled.task.outputs(student, images, labels, torch.Generator().manual_seed(0))
    assert torch.equal(student.shown[0][0], teacher.shown[0][0])
    assert torch.equal(student.shown[0][1], teacher.shown[0][1])


def test_a_fresh_network_has_other_weights_of_the_same_shapes() -> None:
    model = unet()
    fresh = fresh_copy(model, None, seed=1, names=("scratch",))
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, fresh.get_parameter(n))]
    assert "conv_out.weight" in changed
    assert "mid_block.resnets.0.conv1.weight" in changed


def test_bad_schedulers_and_timesteps_are_refused() -> None:
    library = diffusers()
    with pytest.raises(SpecError, match=r"timestep = 1000.*0 to 999"):
        Denoising(timestep=1000)
    with pytest.raises(SpecError, match=r"'v_prediction'.*scheduler says 'epsilon'"):
        Denoising(library.DDPMScheduler(), prediction="v_prediction")
    with pytest.raises(SpecError, match="no alphas_cumprod"):
        Denoising(library.FlowMatchEulerDiscreteScheduler())


def test_networks_and_images_that_do_not_fit_are_refused() -> None:
    model = unet(
        block_out_channels=[8, 8, 8],
        down_block_types=["DownBlock2D"] * 3,
        up_block_types=["UpBlock2D"] * 3,
    )
    thirds = digits(0, 5)
    odd = type(thirds).from_arrays("odd", thirds.train.pixels[:60, 0, :6, :6].numpy())
    with pytest.raises(DataError, match=r"'odd' has 6x6 images.*halve 2 times.*multiple of 4"):
        _setting(model, original=odd)
    with pytest.raises(UnsupportedModelError, match=r"SmallConvNet.*diffusers"):
        _setting(SmallConvNet(2, 1))
    labelled = type(thirds).from_arrays(
        "five", thirds.train.pixels[:100, 0].numpy(), torch.arange(100).remainder(5).numpy()
    )
    with pytest.raises(DataError, match="5 classes and the U-Net has embeddings for 3"):
        _setting(unet(num_class_embeds=3), original=labelled)
    with pytest.raises(UnsupportedModelError, match="returns 2: networks that predict a variance"):
        _setting(unet(out_channels=2))
    rgb = type(thirds).from_arrays(
        "colour", thirds.train.pixels[:60, 0, :, :, None].repeat(1, 1, 1, 3).numpy()
    )
    with pytest.raises(DataError, match="3-channel images and the model takes 1"):
        _setting(unet(), original=rgb)
    shifted = type(thirds).from_arrays(
        "shifted", thirds.train.pixels[:60, 0].numpy(), mean=(0.4,), std=(0.2,)
    )
    with pytest.raises(DataError, match=r"mean = \[0.4\].*-1 to 1"):
        _setting(unet(), original=shifted)


def test_one_class_is_refused_for_a_classifier() -> None:
    from sophon._tasks import Classification

    with pytest.raises(DataError, match="one class only"):
        _setting(SmallConvNet(2, 1), Classification())  # type: ignore[arg-type]
