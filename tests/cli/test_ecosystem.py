"""Round trips with timm, torchvision and the hub's layout, in processes that never import sophon;
model cards; TensorBoard logs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sophon import _models as models
from sophon._base.errors import AuditError, CheckpointError, SpecError
from sophon._cli import app
from sophon._cli.tensorboard import SCALARS, RoundLog
from sophon._records.audit_record import AuditRecord
from sophon._records.round import Round
from sophon._reporting.export import Exported, export, load_protected, model_card
from sophon._reporting.report import report
from sophon._specs import ModelSpec

RUN = """
[model]
{model}

[original]
source = "embedded"
name = "digits"
limit = 12
image_size = 32
mean = [0.4]
std = [0.25]

[[restricted]]
source = "embedded"
name = "letters"
limit = 6
classes = [0, 1, 2]

[protect]
rounds = 3
original_batch_size = 8
precision = "fp32"
[protect.rehearsal]
steps = 2
query_batch_size = 4
[protect.rehearsal.distribution]
batch_sizes = [4]
[protect.guard]
tolerance_points = 100.0
every = 1

[audit]
steps = 2
evaluations = 2
batch_size = 4
precision = "fp32"
"""
MODELS = {
    "timm": 'name = "timm:resnet18"\narguments = { channels = [8, 16, 32, 64] }',
    "torchvision": 'name = "torchvision:mobilenet_v3_small"',
    "sophon": 'name = "small_convnet"',
}
# Another process: these lines stand in for whoever downloads the folder.
ALONE = """
import sys
sys.modules["sophon"] = None
import torch
import warnings
warnings.simplefilter("ignore")
library = torch.library.Library("torchvision", "FRAGMENT")
for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
               "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
    if torch.version.cuda is None:
        library.define(schema)
from pathlib import Path
import timm, torchvision
from timm.models import save_for_hf
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
here = Path(sys.argv[1])
images = load_file(here / "images.safetensors")["images"]
NARROW = dict(channels=(8, 16, 32, 64))
def logits(model):
    with torch.no_grad():
        return model.eval()(images)
class Hub(timm.models.resnet.ResNet, PyTorchModelHubMixin):
    def __init__(self, num_classes=1000, model_args=None):
        args = dict(model_args or NARROW)
        args.setdefault("layers", (2, 2, 2, 2))
        args["channels"] = tuple(args["channels"])
        super().__init__(timm.models.resnet.BasicBlock, num_classes=num_classes,
            **{key: args[key] for key in ("layers", "channels")})
"""
READ = """
found = {}
folder = here / "timm"
made = timm.create_model("resnet18", num_classes=10, checkpoint_path=folder / "model.safetensors",
                         **NARROW)
found["checkpoint_path"] = logits(made)
found["local-dir"] = logits(timm.create_model(f"local-dir:{folder}", pretrained=True))
found["from_pretrained"] = logits(Hub.from_pretrained(folder))
plain = torchvision.models.get_model("mobilenet_v3_small", num_classes=10)
plain.load_state_dict(load_file(here / "torchvision" / "model.safetensors"))
found["torchvision"] = logits(plain)
save_file(found, here / "found.safetensors")
card = ModelCard.load(folder / "README.md")
print(card.data.to_dict()["sophon"]["verdict"], len(card.data.eval_results))
"""
WRITE = """
torch.manual_seed(1)
made = timm.create_model("resnet18", num_classes=10, **NARROW)
save_for_hf(made, here / "saved", safe_serialization=True)
plain = torchvision.models.get_model("mobilenet_v3_small", num_classes=10)
torch.save(plain.state_dict(), here / "plain.pth")
Hub(num_classes=10).save_pretrained(here / "hub")
hub = Hub.from_pretrained(here / "hub")
save_file({"timm": logits(made), "torchvision": logits(plain), "hub": logits(hub)},
          here / "written.safetensors")
"""


def alone(folder: Path, script: str) -> str:
    """Run a script that cannot import sophon; return what it printed."""
    run = subprocess.run(
        [sys.executable, "-c", ALONE + script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


def command(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three protections, the audit of one and their exports."""
    folder = tmp_path_factory.mktemp("ecosystem")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_file({"images": images}, folder / "images.safetensors")
    for name, model in MODELS.items():
        run, out = folder / f"{name}.toml", folder / f"{name}-protected"
        run.write_text(RUN.format(model=model))
        logs = ("--tensorboard", folder / "logs") if name == "timm" else ()
        command("protect", run, "--out", out, "--quiet", *logs)
    audit = folder / "audit"
    command(
        "audit",
        folder / "timm.toml",
        "--model",
        folder / "timm-protected",
        "--out",
        audit,
        "--quiet",
    )
    command("export", folder / "timm-protected", "--to", folder / "timm", "--record", audit)
    for name in ("torchvision", "sophon"):
        command("export", folder / f"{name}-protected", "--to", folder / name)
    return folder


def record_of(place: Path) -> AuditRecord:
    return AuditRecord.model_validate_json((place / "audit" / "record.json").read_text())


def test_others_load_what_is_exported(place: Path) -> None:
    printed = alone(place, READ)
    found = load_file(place / "found.safetensors")
    images = load_file(place / "images.safetensors")["images"]
    for name, keys in {
        "timm": ("checkpoint_path", "local-dir", "from_pretrained"),
        "torchvision": ("torchvision",),
    }.items():
        model = load_protected(place / f"{name}-protected").model
        with torch.no_grad():
            expected = model(images)
        for key in keys:
            assert torch.equal(found[key], expected), key
    assert printed.splitlines()[-1] == f"{report(record_of(place)).verdict} 2"


def test_sophon_loads_what_others_write(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    save_file({"images": images}, tmp_path / "images.safetensors")
    alone(tmp_path, WRITE)
    written = load_file(tmp_path / "written.safetensors")
    narrow = {"channels": [8, 16, 32, 64]}
    specs = {
        "timm": ModelSpec(
            name="timm:resnet18", weights="saved/model.safetensors", arguments=narrow
        ),
        "torchvision": ModelSpec(name="torchvision:mobilenet_v3_small", weights="plain.pth"),
        "hub": ModelSpec(name="timm:resnet18", weights="hub/model.safetensors", arguments=narrow),
    }
    for name, spec in specs.items():
        model, _ = models.resolve_model(spec, base=tmp_path)
        with torch.no_grad():
            assert torch.equal(model(images), written[name]), name


def test_the_card_carries_the_verdict_where_the_hub_reads_it(place: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(place / "timm" / "README.md")
    made, record = report(record_of(place)), record_of(place)
    held = card.data.to_dict()
    assert held["sophon"]["verdict"] == made.verdict
    assert (held["sophon"]["suite"], held["sophon"]["steps"]) == ("quick-1", 2)
    assert [one["name"] for one in held["sophon"]["domains"]] == ["letters"]
    assert (held["library_name"], held["pipeline_tag"]) == ("timm", "image-classification")
    values = {one.dataset_name: one.metric_value for one in card.data.eval_results}
    protected = next(s for s in record.subjects if s.name == "protected")
    assert protected.original is not None
    assert values["digits"] == pytest.approx(protected.original.value)
    assert set(values) == {"digits", "letters"}
    assert {one.metric_type for one in card.data.eval_results} == {"accuracy"}
    assert "# Fine-tuning audit" in card.text
    assert str(place) not in card.content


def test_a_card_without_an_audit_says_so(place: Path) -> None:
    from huggingface_hub import ModelCard

    for name in ("torchvision", "sophon"):
        card = ModelCard.load(place / name / "README.md")
        assert card.data.to_dict()["sophon"]["verdict"] == "not audited"
        assert card.data.eval_results is None
        assert "**Not audited**" in card.text


@pytest.mark.parametrize(
    ("network", "size"),
    [
        ({"name": "timm:resnet18", "arguments": {"channels": [8, 16, 32, 64]}}, 32),
        (
            {
                "name": "timm:resnet18",
                "in_channels": 1,
                "arguments": {"channels": [8, 16, 32, 64]},
            },
            32,
        ),
        ({"name": "timm:vit_tiny_patch16_224"}, 64),
        ({"name": "torchvision:mobilenet_v3_small"}, 32),
        ({"name": "torchvision:googlenet"}, 64),
        ({"name": "small_convnet", "in_channels": 1}, 32),
        ({"name": "small_vgg"}, 32),
    ],
    ids=lambda value: str(value["name"]) if isinstance(value, dict) else None,
)
def test_the_code_of_a_card_gives_the_model(
    network: dict[str, Any], size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec(**network)
    model, _ = models.resolve_model(spec, base=tmp_path, default_classes=7)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    text = model_card(Exported(spec, model, {}, 7), None)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    alone = spec.name.startswith(("timm:", "torchvision:"))
    assert ("They load without Sophon:" in text) == alone == ("sophon" not in code)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    images = torch.rand(2, spec.in_channels, size, size)
    with torch.no_grad():
        assert torch.equal(found["model"].eval()(images), model(images))


def test_the_configuration_is_the_librarys_own(place: Path) -> None:
    held = json.loads((place / "timm" / "config.json").read_text())
    assert (held["architecture"], held["num_classes"]) == ("resnet18", 10)
    assert held["model_args"]["channels"] == [8, 16, 32, 64]
    assert held["pretrained_cfg"]["mean"] == pytest.approx([0.4] * 3)
    assert held["pretrained_cfg"]["input_size"] == [3, 32, 32]
    # What timm says of its own published weights is not said of these.
    foreign = {"tag", "license", "origin_url", "paper_ids", "hf_hub_id", "url"}
    assert not foreign & held["pretrained_cfg"].keys()
    assert (held["pretrained_cfg"]["classifier"], held["pretrained_cfg"]["num_classes"]) == (
        "fc",
        10,
    )
    images = ("crop_pct", "crop_mode", "interpolation")
    assert [held["pretrained_cfg"][key] for key in images] == [1.0, "center", "bilinear"]
    other = json.loads((place / "torchvision" / "config.json").read_text())
    assert (other["architecture"], other["library_name"]) == ("mobilenet_v3_small", "torchvision")


def test_exports_that_cannot_be_made_write_nothing(place: Path, tmp_path: Path) -> None:
    record = record_of(place)
    to = tmp_path / "new"
    with pytest.raises(AuditError, match="other weights"):
        export(place / "sophon-protected", to, record)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        export(place, to)
    with pytest.raises(SpecError, match="not empty"):
        export(place / "sophon-protected", place / "timm")
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("model.json", "model.safetensors"):
        (changed / name).write_bytes((place / "sophon-protected" / name).read_bytes())
    held = json.loads((changed / "model.json").read_text())
    for change, error in (
        ({"protection": None}, "is not protected"),
        ({"model": None}, "does not name the network"),
        ({"sha256": "0"}, "checksum"),
    ):
        (changed / "model.json").write_text(json.dumps({**held, **change}))
        with pytest.raises(CheckpointError, match=error):
            export(changed, to)
    (changed / "model.json").write_text(json.dumps({**held, "model": {"name": "diffusers:unet"}}))
    with pytest.raises(CheckpointError, match=r"model_index\.json cannot be read"):
        export(changed, to)
    assert not to.exists()


# --- TensorBoard ---------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events: Any = accumulator.EventAccumulator(str(folder)).Reload()
    return {
        tag: [(one.step, one.value) for one in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_reads_every_round(place: Path) -> None:
    found = scalars(place / "logs")
    lines = (place / "timm-protected" / "rounds.jsonl").read_text().splitlines()
    rounds = [Round.model_validate_json(line) for line in lines]
    assert len(rounds) == 3
    for name, tag in SCALARS.items():
        expected = [(r.index, getattr(r, name)) for r in rounds if getattr(r, name) is not None]
        # Without a price there is no such curve.
        logged = found[tag] if expected else found.get(tag, [])
        assert [step for step, _ in logged] == [step for step, _ in expected]
        assert [v for _, v in logged] == pytest.approx([v for _, v in expected])


def test_rounds_run_again_replace_those_in_the_log(place: Path, tmp_path: Path) -> None:
    line = (place / "timm-protected" / "rounds.jsonl").read_text().splitlines()[0]
    first = Round.model_validate_json(line)

    def at(index: int, loss: float) -> Round:
        return first.model_copy(update={"index": index, "suppression_loss": loss})

    with RoundLog(tmp_path, done=0) as log:
        for index in range(4):
            log.add(at(index, 1.0))
    with RoundLog(tmp_path, done=2) as log:
        for index in (2, 3):
            log.add(at(index, 2.0))
    assert scalars(tmp_path)["suppression/loss"] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


def test_nothing_is_logged_unasked(place: Path) -> None:
    assert list(place.glob("sophon-protected/**/*tfevents*")) == []
    assert len(list((place / "logs").glob("*tfevents*"))) == 1
