"""Diffusion models from end to end: pre-training, protection, audit, report, and bad input."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from denoisers import (
    CONFIG,
    digits,
    quick_spec,
    unet,
    write_latent_pipeline,
    write_npz,
    write_prompted,
)
from sophon._auditing.audit import Audit
from sophon._auditing.executors import Workload
from sophon._auditing.samples import SampleStage, check_samples
from sophon._auditing.trial import Bench, Job, Start
from sophon._base.errors import CheckpointError, DataError, SophonError, SpecError
from sophon._cli import app
from sophon._cli.run_file import load
from sophon._data import load_domain
from sophon._judgement.pictures import moment
from sophon._models import DenoiserSource, blocks, diffusers, weights_sha256
from sophon._protection.protection import Protection
from sophon._records.audit_record import AuditRecord, ErrorScore
from sophon._records.store import DocumentStore
from sophon._reporting.report import report
from sophon._specs import (
    AuditSpec,
    DomainSpec,
    FreshHead,
    PretrainSpec,
    RescaleWeights,
    ResetLastBlocks,
    SampleSpec,
    Strategy,
)
from sophon._tasks import Denoising
from sophon._training.loop import check_preparations
from sophon._training.pretrain import Pretraining

# Loads a pipeline as anybody would: diffusers alone, which needs torchvision's schemas here.
PLAIN = """
import sys, torch
if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        library.define(schema)
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained(sys.argv[1], local_files_only=True)
images = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
assert "sophon" not in sys.modules
total = sum(float(p.double().sum()) for p in pipeline.unet.parameters())
print(type(pipeline.unet).__name__, images.shape, f"{total:.6f}")
"""

RUN = """
[model]
name = "{model}"

[task]
name = "denoising"

[original]
source = "npz"
path = "low.npz"
labels = "none"

[[restricted]]
source = "npz"
path = "high.npz"
labels = "none"
join = true

[pretrain]
steps = 6
batch_size = 16
every = 3
precision = "fp32"

[protect]
suppression = "dos"
rounds = 2
original_batch_size = 8
precision = "fp32"
guard = {{ every = 1, tolerance_relative = 10.0 }}

[protect.rehearsal]
steps = 2
query_batch_size = 8
fixed = {{ optimizer = "sgd", learning_rate = 1e-4, batch_size = 8 }}

[audit]
suite = "quick-1"
steps = 2
evaluations = 2
seeds = [0]
batch_size = 8
precision = "fp32"
samples = {{ count = 24, steps = 2, grid = 4, extractor_steps = 5, kid_subset = 12 }}
"""


def run_file(folder: Path, model: str = "diffusers:unet.json", text: str = RUN) -> Path:
    """Write two domains, a U-Net's configuration and a run file; return the run file."""
    write_npz(folder / "low.npz", 0, 5)
    write_npz(folder / "high.npz", 5, 10)
    (folder / "unet.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    file = folder / "run.toml"
    file.write_text(text.format(model=model), encoding="utf-8")
    return file


def sophon(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `base`, `protected` and `audit`, made on the command line."""
    folder = tmp_path_factory.mktemp("generation")
    first = run_file(folder)
    assert sophon("pretrain", first, "--out", folder / "base", "--quiet").exit_code == 0
    second = folder / "second.toml"
    second.write_text(RUN.format(model="diffusers:base"), encoding="utf-8")
    arguments = ("protect", second, "--out", folder / "protected", "--quiet")
    assert sophon(*arguments).exit_code == 0
    audit = sophon(
        "audit", second, "--model", folder / "protected", "--out", folder / "audit", "--quiet"
    )
    assert audit.exit_code == 0, audit.output
    return folder


def test_what_protect_writes_loads_with_diffusers_alone(made: Path) -> None:
    folder = made / "protected"
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder)], capture_output=True, text=True, check=True
    )
    name, *rest = done.stdout.split(maxsplit=1)
    assert name == "UNet2DModel"
    assert rest[0].startswith("(1, 8, 8, 1)")
    model = DenoiserSource(folder).load()
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    assert float(rest[0].split()[-1]) == pytest.approx(total, abs=1e-4)


def test_an_export_is_a_pipeline_with_its_verdict_and_no_other_weights(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import ModelCard

    to = tmp_path / "published"
    result = sophon("export", made / "protected", "--to", to, "--record", made / "audit")
    assert result.exit_code == 0, result.output
    # The states to resume from hold the unprotected weights.
    assert (made / "protected" / "states").is_dir()
    assert {path.name for path in to.iterdir()} == {
        "README.md",
        "model_index.json",
        "scheduler",
        "unet",
    }
    assert len(list(to.rglob("*.safetensors"))) == 1
    card = ModelCard.load(to / "README.md")
    held = card.data.to_dict()
    record = AuditRecord.model_validate_json((made / "audit" / "record.json").read_text())
    assert held["sophon"]["verdict"] == report(record).verdict
    assert (held["library_name"], held["pipeline_tag"]) == (
        "diffusers",
        "unconditional-image-generation",
    )
    errors = {one.dataset_name: one.metric_value for one in card.data.eval_results}
    own = next(s.original for s in record.subjects if s.name == "protected")
    assert own is not None
    assert errors["low"] == pytest.approx(1 - own.value, abs=1e-6)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(to)
    found: dict[str, Any] = {}
    exec(code, found)
    protected = DenoiserSource(made / "protected").load()
    assert weights_sha256(found["model"]) == weights_sha256(protected)


def test_pretraining_learns_resumes_and_says_where_the_weights_come_from(made: Path) -> None:
    lines = (made / "base" / "stages.jsonl").read_text().splitlines()
    stages = [json.loads(line) for line in lines]
    assert [stage["step"] for stage in stages] == [3, 6]
    assert stages[1]["loss"] < stages[0]["loss"]
    described = sophon("inspect", made / "base").output
    assert "trained on low: validation" in described
    again = sophon("pretrain", made / "run.toml", "--out", made / "base")
    assert again.exit_code == 0
    assert "trained: validation" in again.output


def test_pretraining_resumed_ends_at_the_same_bits(tmp_path: Path) -> None:
    spec = PretrainSpec(steps=4, batch_size=8, every=2, precision="fp32")
    whole = Pretraining(unet(), original=digits(0, 5), task=Denoising(), spec=spec)
    assert len(list(whole)) == 2
    for _ in Pretraining(
        unet(), original=digits(0, 5), task=Denoising(), spec=spec, out=tmp_path / "run"
    ):
        break
    rest = Pretraining(
        unet(), original=digits(0, 5), task=Denoising(), spec=spec, out=tmp_path / "run"
    )
    assert rest.done == 1
    assert len(list(rest)) == 1
    assert weights_sha256(rest.result().model) == weights_sha256(whole.result().model)


def test_the_audit_has_errors_by_quarter_pictures_and_no_batch_norm(made: Path) -> None:
    record = AuditRecord.model_validate_json((made / "audit" / "record.json").read_text())
    assert record.task == "denoising"
    assert "timesteps 0 to 999" in record.task_name
    assert record.model == "diffusers:base"
    assert {trial.outcome.kind for trial in record.trials} == {"completed"}
    tests = [trial.test for trial in record.trials]
    assert all(isinstance(test, ErrorScore) and len(test.quarters) == 4 for test in tests)
    # Before and after on the faces for three subjects, as it is on the original for two.
    assert len(record.samples) == 8
    after = [row for row in record.samples if row.attack]
    assert {row.subject for row in after} == {"protected", "unprotected", "scratch"}
    assert all("classifier of low+high (1 + 1 classes)" in row.extractor for row in record.samples)
    assert all(row.grid.startswith("data:image/png;base64,") for row in record.samples)


def test_the_report_shows_errors_pictures_and_what_the_verdict_rests_on(made: Path) -> None:
    record = AuditRecord.model_validate_json((made / "audit" / "record.json").read_text())
    made_report = report(record)
    page, text = made_report.html(), made_report.markdown()
    for words in ("Error by timestep", "Pictures", "squared error", "penultimate features"):
        assert words in page
        assert words in text
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    assert "unprotected, as it is" in page
    # Errors, not percentages of anything.
    cells = [row[2] for row in made_report.table()[1:]]
    assert all(re.fullmatch(r"\d\.\d{4}", cell) for cell in cells)


def test_adapters_a_fresh_last_layer_and_last_blocks_attack_a_denoiser() -> None:
    model = unet()
    names = [part[0] for part in blocks(model, "conv_out")]
    assert names.index("mid_block") < names.index("up_blocks.0") < names.index("up_blocks.1")
    assert "conv_out" not in names
    setting = Protection(
        model,
        original=digits(0, 5),
        restricted=digits(5, 10),
        task=Denoising(),
        spec=quick_spec(rounds=1),
    ).setting
    check_preparations(
        model, [(RescaleWeights(),), (ResetLastBlocks(blocks=2), FreshHead())], setting, steps=4
    )
    bench = Bench(setting, 2)
    start = Start(model, "unet", weights_sha256(model))
    for changes in (
        {"lora_rank": 2},
        {"scope": "head", "preparations": (FreshHead(),)},
        {"preparations": (ResetLastBlocks(), FreshHead())},
    ):
        strategy = Strategy(optimizer="adam", learning_rate=1e-2, batch_size=8, steps=4, **changes)
        trial = bench.run(Job("protected", digits(5, 10).name, strategy, 0), start)
        assert trial.outcome.kind == "completed", trial.outcome
        values = [point.validation.value for point in trial.curve]
        assert max(values[1:]) > values[0]


@pytest.mark.slow
def test_a_class_conditional_network_that_predicts_v_is_protected_and_attacked(
    tmp_path: Path,
) -> None:
    scheduler = diffusers().DDPMScheduler(
        prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"
    )
    task, model = Denoising(scheduler), unet(num_class_embeds=5)
    kept, refused = (
        load_domain(DomainSpec(source="npz", path=file.name, join=True), base=tmp_path)
        for file in (write_npz(tmp_path / "low.npz", 0, 5), write_npz(tmp_path / "high.npz", 5, 10))
    )
    assert refused.class_count == 5
    run = Protection(
        model, original=kept, restricted=refused, task=task, spec=quick_spec(), out=tmp_path / "p"
    )
    assert len(list(run)) == 3
    protected = run.result().model
    held, moved = model.state_dict(), protected.state_dict()
    embedding = next(name for name in held if "class_embedding" in name)
    assert not torch.equal(held[embedding], moved[embedding])
    pipeline = DenoiserSource(tmp_path / "p")
    loaded = pipeline.load()
    assert all(torch.equal(moved[n], value) for n, value in loaded.state_dict().items())
    written = pipeline.scheduler()
    assert written is not None
    assert written.config["prediction_type"] == "v_prediction"
    assert written.config["beta_schedule"] == "squaredcos_cap_v2"
    samples = SampleSpec(
        count=12, steps=2, grid=4, extractor_steps=3, kid_subset=6, budgets=(0.5,), extra=True
    )
    # A share of the images smaller than a batch: the batch shrinks, the attack is still that one.
    named = Strategy(optimizer="sgd", learning_rate=1e-5, batch_size=16, data_fraction=0.1)
    spec = AuditSpec(
        steps=2, evaluations=2, batch_size=8, precision="fp32", samples=samples, extra=(named,)
    )
    audit = Audit(
        protected, unprotected=model, original=kept, restricted=refused, task=task, spec=spec
    )
    assert all(trial.outcome.kind == "completed" for trial in audit)
    record = audit.record()
    assert "v_prediction" in record.task_name
    moments = {
        "as it is",
        "after its best attack within 1 step",
        "after its best attack",
        "after direct-all sgd 1e-05 (batch size 15, data fraction 0.1)",
    }
    assert {(row.subject, moment(row)) for row in record.samples} == {
        (name, moment) for name in ("protected", "unprotected", "scratch") for moment in moments
    }
    for name in ("protected", "unprotected", "scratch"):
        own = [row for row in record.samples if row.subject == name and row.budget is None]
        # As it is and after its best attack it is one network, of one seed.
        assert len({row.seed for row in own if not row.named}) == 1
    assert len({row.seed for row in record.samples if row.named}) == 1
    assert len({row.extractor_key for row in record.samples}) == 1


def test_a_latent_pipeline_is_protected_and_attacked_through_adapters(tmp_path: Path) -> None:
    write_latent_pipeline(tmp_path / "pipeline")
    write_prompted(tmp_path / "low", 0, 5, "a low digit")
    write_prompted(tmp_path / "high", 5, 10, "a high digit")
    file = tmp_path / "run.toml"
    domains = "".join(
        f'[{key}]\nsource = "prompts"\npath = "{path}"\n'
        for key, path in (("original", "low"), ("[restricted]", "high"))
    )
    file.write_text(
        f'[model]\nname = "diffusers:pipeline"\n[task]\nname = "denoising"\n{domains}',
        encoding="utf-8",
    )
    case = load(file, None)
    assert case.original.classes == case.restricted[0].classes
    assert "a high digit 7" in case.original.classes
    run = Protection(
        case.model,
        original=case.original,
        restricted=case.restricted,
        task=case.task,
        spec=quick_spec(rounds=2),
        out=tmp_path / "out",
    )
    frozen = weights_sha256(case.task.latents.vae)  # type: ignore[attr-defined]
    for _ in run:
        pass
    protected = run.result()
    assert weights_sha256(case.task.latents.vae) == frozen  # type: ignore[attr-defined]
    assert weights_sha256(protected.model) != weights_sha256(case.model)
    start = Start(protected.model, "unet", weights_sha256(protected.model))
    strategy = Strategy(optimizer="adam", learning_rate=1e-2, batch_size=4, steps=4, lora_rank=2)
    job = Job("protected", case.restricted[0].name, strategy, 0)
    trial = Bench(run.setting, 2).run(job, start)
    assert trial.outcome.kind == "completed", trial.outcome
    assert trial.curve[-1].validation.value > trial.curve[0].validation.value
    spec = SampleSpec(count=8, steps=2, grid=4, extractor_steps=2, kid_subset=2, neighbours=2)
    check_samples(run.setting, AuditSpec(samples=spec), case.restricted)
    workload = Workload(Bench(run.setting, 2), {("protected", 0): start})
    store = DocumentStore(tmp_path / "samples")
    stage = SampleStage(workload, spec, case.restricted[0], store)
    rows = stage.records([trial], ("protected",))
    assert [(row.domain, row.attack != "") for row in rows] == [
        (case.restricted[0].name, False),
        (case.original.name, False),
        (case.restricted[0].name, True),
    ]
    assert all(math.isfinite(row.kid) and math.isfinite(row.fid) for row in rows)
    # The attack went through adapters and moved what is drawn.
    assert rows[0].grid != rows[2].grid
    pipeline = diffusers().StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    shipped = pipeline.unet.state_dict()
    assert all(torch.equal(shipped[n], v) for n, v in protected.model.state_dict().items())
    drawn = pipeline("a high digit 7", num_inference_steps=2, output_type="np", height=16, width=16)
    assert drawn.images.shape == (1, 16, 16, 3)


def test_a_run_file_says_what_is_predicted_and_when(tmp_path: Path) -> None:
    drawn = set()
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        case = load(run_file(folder), ["task.timestep=3", "task.prediction=sample"])
        assert "sample prediction, timestep 3 alone" in case.task.name
        drawn.add(weights_sha256(case.model))
    # Random weights are the same wherever the configuration lies.
    assert len(drawn) == 1


def test_averaged_weights_of_a_pipeline_are_taken(tmp_path: Path) -> None:
    library = diffusers()
    pipeline = library.DDPMPipeline(unet(), library.DDPMScheduler(prediction_type="sample"))
    pipeline.save_pretrained(tmp_path / "p")
    averaged = unet()
    with torch.no_grad():
        averaged.conv_out.bias.fill_(3.0)  # type: ignore[union-attr, operator]
    averaged.save_pretrained(tmp_path / "p" / "unet_ema")  # type: ignore[operator]
    source = DenoiserSource(tmp_path / "p")
    assert source.load().conv_out.bias.tolist() == [3.0]  # type: ignore[union-attr, operator]
    assert Denoising(source.scheduler()).prediction == "sample"


def _refused(folder: Path, text: str, error: type[SophonError], words: str) -> None:
    (folder / "bad.toml").write_text(text, encoding="utf-8")
    with pytest.raises(error, match=words):
        load(folder / "bad.toml", None)


def test_bad_models_and_schedulers_are_refused_before_work(tmp_path: Path) -> None:
    run_file(tmp_path)
    library = diffusers()
    library.DDPMPipeline(unet(), library.DDPMScheduler()).save_pretrained(tmp_path / "p")
    text = RUN.format(model="diffusers:p")
    _refused(
        tmp_path,
        text.replace('"denoising"', '"denoising"\nprediction = "v_prediction"'),
        SpecError,
        "'v_prediction', and the scheduler says 'epsilon'",
    )
    _refused(
        tmp_path,
        text.replace('"denoising"', '"denoising"\nschedule = { timesteps = 50 }'),
        SpecError,
        "the pipeline has a scheduler of its own",
    )
    _refused(
        tmp_path, text.replace('name = "denoising"', ""), SpecError, "set task.name = 'denoising'"
    )
    _refused(tmp_path, RUN.format(model="diffusers:no"), CheckpointError, "correct the path")
    _refused(tmp_path, RUN.format(model="resnet20"), SpecError, "does not fit model.name")
    wrong = CONFIG | {"blocks": 3}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong), encoding="utf-8")
    _refused(tmp_path, RUN.format(model="diffusers:wrong.json"), SophonError, "blocks")
    shutil.rmtree(tmp_path / "p" / "scheduler")
    _refused(tmp_path, text, CheckpointError, "p lacks scheduler")


def test_losses_that_do_not_fit_and_pictures_too_few_are_refused(tmp_path: Path) -> None:
    file = run_file(tmp_path)
    out = tmp_path / "out"
    for setting, words in (
        ("protect.suppression=klu", "'klu' does not fit this task: use one of dos, negated_mse"),
        ("original.image_size=7", "cannot halve 1 times: set image_size to a multiple of 2"),
    ):
        result = sophon("protect", file, "--out", out, "--set", setting)
        assert result.exit_code == 2
        assert words in result.output
        assert not out.exists()
    for setting, words in (
        ("protect.guard.tolerance_points=1", "tolerance_points = 1 is not for this task: set"),
    ):
        result = sophon("protect", file, "--out", out, "--set", setting)
        assert result.exit_code == 2
        assert words in result.output
    larger = ("--set", "original.image_size=16", "--set", "restricted.0.image_size=16")
    result = sophon("pretrain", file, "--out", out, *larger)
    assert result.exit_code == 2
    assert "16x16 images, and the U-Net's configuration says sample_size = 8" in result.output
    assert sophon("pretrain", file, "--out", out, "--quiet").exit_code == 0
    result = sophon("audit", file, "--model", out, "--out", out)
    assert result.exit_code == 2
    assert "is the folder of the model to audit" in result.output
    for setting, words in (
        ("audit.samples.neighbours=64", "at least 66 samples are needed"),
        ("audit.samples.kid_subset=400", "at least 800 samples are needed"),
        ("restricted.0.test=0.02", "too few for KID: at least 24 are needed"),
        ("audit.samples.extractor=no.pth", "'no.pth' does not exist"),
        ("audit.samples.width=2048", "width = 2048, and the features of the small classifier"),
        ("audit.samples.budgets=[0.001]", "0.001: that is 0 of audit.steps = 2, and attacks are"),
        ("audit.samples.budgets=[0.5, 0.501]", "0.5 and 0.501 are both 1 of audit.steps = 2"),
        ("audit.samples.extra=true", "and audit.extra names no attack"),
        ("audit.samples.steps=2000", "steps = 2000: the schedule has timesteps 0 to 999, too few"),
        (f"audit.samples.extractor={out}", "is a Conv2d: give a classifier"),
        (f"audit.samples.extractor={file}", "is no file of weights"),
    ):
        arguments = ("audit", file, "--model", out, "--out", tmp_path / "a", "--set", setting)
        result = sophon(*arguments)
        assert result.exit_code == 2, setting
        assert words in result.output
        assert not (tmp_path / "a").exists()


def test_prompts_and_images_must_match(tmp_path: Path) -> None:
    from sophon._data import load_domain
    from sophon._specs import DomainSpec

    folder = write_prompted(tmp_path / "pictures", 0, 3, "digit")
    # The order of the lines is not that of the alphabet.
    table = folder / "metadata.jsonl"
    lines = table.read_text().splitlines()[::-1]
    table.write_text("\n".join(lines), encoding="utf-8")
    expected = tuple(dict.fromkeys(json.loads(line)["text"] for line in lines))
    assert sorted(expected) == ["digit 0", "digit 1", "digit 2"] != list(expected)
    spec = DomainSpec(source="prompts", path=str(folder))
    domain = load_domain(spec, base=tmp_path)
    assert domain.classes == expected
    assert len(domain.train) + len(domain.validation) + len(domain.test) == 40
    faults = {
        "prompts have no image, for instance none.png": [
            *lines,
            '{"file_name": "none.png", "text": "x"}',
        ],
        r"has no prompt for .* \(1 images lack one\)": lines[1:],
        r"line 1: give \{": ["[]", *lines],
        "has no lines": [],
    }
    for words, changed in faults.items():
        table.write_text("\n".join(changed), encoding="utf-8")
        with pytest.raises(DataError, match=words):
            load_domain(spec, base=tmp_path)
