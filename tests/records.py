"""Entries of a weights_manifest.json that no training made."""

import copy
from hashlib import sha256

from timm_convmix.weights.manifest import WeightRecord

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "convmix_test_resnet.digits"
ENTRY = {
    "state": "packed",
    "sha256": "ab" * 32,
    "bytes": 1000,
    "model_args": {"mixer": "convmix", "mixer_args": {"rank": 4}, "stages": [0, 2], "global_pool": "avg"},
    "num_classes": 4,
    "label_names": ["null", "eins", "zwei", "drei"],
    "input_size": [3, 64, 48],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "interpolation": "bilinear",
    "crop_pct": 0.9,
    "dataset": {"name": "digits", "split": "validation", "checksum": "cd" * 32},
    "metrics": {"top1": 91.25, "top5": 100, "loss": 0.25, "count": 360},
    "probe": {"classes": [2, 0, 3, 1], "logits": [3.5, 1, -0.25, -2.0], "tolerance": 0.004},
    "recipe": {"lr": 0.05, "model": "convmix_test_resnet", "seed": 7},
    "seeds": [7],
    "epochs": 2,
    "versions": {"timm": "1.0.31", "torch": "2.14.1"},
    "hardware": "CPU",
    "license": "apache-2.0",
    "date": "2026-11-24",
}


def entry(**changes):
    """A valid entry as JSON has it, of a weight that is packed only."""
    return copy.deepcopy(ENTRY) | changes


def record(**changes):
    """The same as a record; ``weights``, a path, gives sha256 and bytes."""
    if path := changes.pop("weights", None):
        data = path.read_bytes()
        changes |= {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
    return WeightRecord(**entry(**changes))


def published(hub_id="someone/net", **changes):
    """A record that names a repository at ``COMMIT``."""
    return record(state="published", hub_id=hub_id, revision=COMMIT, **changes)
