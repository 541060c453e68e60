"""A trained net that is packed, a Hub for a test, and users who publish to it and load from it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from desks import NAME, REPO, Desk
from forks import Forks
from loopback_hub import serve
from timm.data import create_dataset, create_loader
from timm.utils import random_seed

import timm_convmix
from timm_convmix.weights.manifest import MANIFEST_NAME
from timm_convmix.weights.packing import Checkpoint, Images, pack


def pytest_terminal_summary(terminalreporter):
    """How many faults were tried and survived: a test counts for one, or for as many as it notes."""
    passed = [report for report in terminalreporter.stats.get("passed", []) if "test_hub_faults.py" in report.nodeid]
    if faults := sum(dict(report.user_properties).get("faults", 1) for report in passed):
        terminalreporter.write_line(f"{faults} faults of the Hub, the network, the disk and the process survived")


@pytest.fixture(scope="session")
def packed(digits, tmp_path_factory):
    """Two epochs on the digits, packed; `package` is a copy of this package whose manifest says so."""
    root = tmp_path_factory.mktemp("packed")
    package = root / "package"
    ignore = shutil.ignore_patterns("__pycache__", "embedded", MANIFEST_NAME)
    shutil.copytree(Path(timm_convmix.__file__).parent, package / "timm_convmix", ignore=ignore)
    random_seed(0)
    args = dict(model="convmix_test_resnet", seed=0, img_size=32, crop_pct=1.0, mean=[0.5] * 3, std=[0.5] * 3)
    model = timm.create_model(args["model"], num_classes=10)
    images = create_loader(
        create_dataset("", root=digits, split="train", is_training=True),
        input_size=(3, 32, 32),
        batch_size=64,
        mean=args["mean"],
        std=args["std"],
        is_training=True,
        no_aug=True,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for x, y in [batch for _ in range(2) for batch in images]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    saved = Checkpoint(Path("last.pth.tar"), model.state_dict(), args, epochs=2)
    manifest = package / MANIFEST_NAME
    record = pack(
        saved, name=NAME, images=Images(data_dir=digits), output=root / "folders", manifest=manifest, quiet=True
    )
    assert record.metrics.top1 > 40
    return SimpleNamespace(package=package, folders=root / "folders", manifest=manifest, record=record)


@pytest.fixture(scope="session")
def forks(packed, tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks"), packed.package) as forks:
        yield forks


@pytest.fixture
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture
def desks(hub, packed, forks, tmp_path):
    """Make the desk of a user with a token, `None` for one without; nothing that comes from one shows a token."""
    made = []
    before = len(forks.clients)

    def make(user="alice", role="write", hub=hub, manifest=packed.manifest, **kwargs):
        folder = tmp_path / f"desk{len(made)}"
        folder.mkdir()
        made.append(Desk(folder, packed, hub, forks, user and hub.token(user, role, **kwargs)))
        shutil.copy(manifest, made[-1].manifest)
        return made[-1]

    yield make
    texts = [path.read_bytes() for client in forks.clients[before:] for path in client.folder.iterdir()]
    texts += [desk.manifest.read_bytes() for desk in made]
    repos = {repo.id: repo for desk in made for repo in desk.hub.repos.values()}
    texts += [data for repo in repos.values() for oid in repo.commits for data in repo.files(oid).values()]
    tokens = {token for desk in made for token in (desk.token, *desk.hub.users) if token}
    assert not [text for text in texts for token in tokens if token.encode() in text]


@pytest.fixture
def desk(desks):
    return desks()


@pytest.fixture(scope="session")
def published(packed, forks, tmp_path_factory):
    """The packed net on a Hub: the repository to put on another, and a copy of this package that pins it."""
    root = tmp_path_factory.mktemp("published")
    shutil.copytree(packed.package, root / "package", ignore=shutil.ignore_patterns("__pycache__"))
    with serve() as hub:
        desk = Desk(root, packed, hub, forks, hub.token("alice"))
        client = desk.run("publish")
        assert client.status == 0, client.err
        repo = hub.repos[REPO]
        reference = desk.load(f"local-dir:{packed.folders / NAME}")
        assert reference.status == 0, reference.err
    shutil.copy(desk.manifest, root / "package" / MANIFEST_NAME)
    logits = reference.out.strip()
    return SimpleNamespace(
        package=root / "package", manifest=desk.manifest, repo=repo, record=desk.record, logits=logits
    )


@pytest.fixture(scope="session")
def few(digits, tmp_path_factory):
    """Two images a class and split, for what does not depend on how many there are."""
    folder = tmp_path_factory.mktemp("few") / "few"
    for split in ("train", "validation"):
        for label in "0123456789":
            (folder / split / label).mkdir(parents=True)
            for path in sorted(Path(digits, split, label).iterdir())[:2]:
                (folder / split / label / path.name).write_bytes(path.read_bytes())
    return folder
