"""Libraries that say timm.create_model(name) work after the import; each runs where it is installed."""

from copy import deepcopy

import pytest
import timm
import torch
from desks import NAME, REPO
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from timm_convmix import predict


@pytest.fixture(scope="module")
def photographs():
    """Two photographs, (2, 3, 64, 64) in 0 to 1."""
    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    return F.interpolate(images.permute(0, 3, 1, 2) / 255, size=64, mode="bilinear")


@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
def test_segmentation_models_pytorch(decoder, photographs):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, decoder)("tu-convmix_resnet18", encoder_weights=None, classes=2)
    masks = (photographs.mean(1) > photographs.mean()).long()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0  # FPN's, whose luck hides what a step does
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(photographs), masks))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    weights = [p for name, p in model.named_parameters() if name.endswith("mixer.expand.weight")]
    assert len(weights) == 1
    assert weights[0].grad.count_nonzero() > 0


def test_effdet_reads_the_feature_info():
    efficientdet = pytest.importorskip("effdet.efficientdet")
    features = timm.create_model("convmix_resnet18", features_only=True, out_indices=(2, 3, 4))
    info = efficientdet.get_feature_info(features)
    assert [(stage["num_chs"], stage["reduction"]) for stage in info] == [(128, 8), (256, 16), (512, 32)]


def test_transformers_pipeline(packed, digits):
    transformers = pytest.importorskip("transformers")
    folder = packed.folders / NAME
    classify = transformers.pipeline("image-classification", model=str(folder))
    files = [next((digits / "validation" / label).iterdir()) for label in "047"]
    for file in files:
        expected = predict(file, model=folder, topk=3, quiet=True)
        got = classify(Image.open(file), top_k=3)
        assert [row["label"] for row in got] == [row["label"] for row in expected]
        assert [row["score"] for row in got] == pytest.approx([row["probability"] for row in expected], abs=1e-4)


def test_transformers_pipeline_from_a_hub(hub, desks, packed, published, digits):
    pytest.importorskip("transformers")
    hub.repos[REPO] = deepcopy(published.repo)
    file = next((digits / "validation" / "0").iterdir())
    code = f"""
import timm_convmix
from transformers import pipeline

print(pipeline("image-classification", model={REPO!r})({str(file)!r})[0]["label"])
"""
    client = desks(None).python(code)
    assert client.status == 0, client.err
    assert client.out.split() == [predict(file, model=packed.folders / NAME, topk=1, quiet=True)[0]["label"]]


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForImageClassification"])
def test_transformers_round_trip(auto, packed, photographs, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, auto).from_pretrained(packed.folders / NAME).eval()
    model.save_pretrained(tmp_path)
    again = getattr(transformers, auto).from_pretrained(tmp_path).eval()
    for output, other in zip(model(photographs).to_tuple(), again(photographs).to_tuple(), strict=True):
        assert torch.equal(output, other)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Lightning's own, of torch
def test_lightning(photographs):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model("convmix_resnet18", num_classes=2)

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    classifier = Classifier()
    before = classifier.model.mixer.expand.weight.detach().clone()
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, torch.utils.data.DataLoader([*zip(photographs, [0, 1], strict=True)], batch_size=2))
    assert trainer.global_step == 2
    assert not torch.equal(classifier.model.mixer.expand.weight, before)


def test_fastai_vision_learner_keeps_the_mixer(digits):
    vision = pytest.importorskip("fastai.vision.all")
    files = sorted((digits / "validation").rglob("*.png"))[:32]
    images = vision.ImageDataLoaders.from_lists(
        digits, files, [file.parent.name for file in files], bs=8, num_workers=0
    )
    learner = vision.vision_learner(images, "convmix_resnet18", pretrained=False)
    [(name, weight)] = [
        (name, p) for name, p in learner.model.named_parameters() if name.endswith("mixer.expand.weight")
    ]
    before = weight.detach().clone()
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=1e-3)
    assert not torch.equal(weight.cpu(), before), name
