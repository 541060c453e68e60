"""The model card: what a weight is, what it measured beside its baseline, how it was made, and how it is loaded."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_arch_pretrained_cfgs, is_model, split_model_name_tag

from timm_convmix.weights.manifest import Metrics, WeightRecord

BEGIN, END = "<!-- timm-convmix: begin -->", "<!-- timm-convmix: end -->"
"""What stands between is written anew; what stands outside is the author's own."""


def format_card(name: str, record: WeightRecord, *, repo: str | None = None, existing: str | None = None) -> str:
    """Write a card, metadata and text.

    Args:
        name: ``arch.tag``.
        record: What to tell.
        repo: ``NAMESPACE/NAME`` on the Hub, where the weight is or will be.
        existing: The present card, whose hand-written text and further metadata are kept.

    Returns:
        Markdown with a YAML header that the Hub reads, a model-index of the metrics among it.
    """
    card = ModelCard(existing, ignore_metadata_errors=True) if existing else None
    known = card.data.to_dict() if card else {}
    metadata = known | {key: value for key, value in card_data(name, record).to_dict().items() if value is not None}
    metadata.pop("eval_results", None)
    text = card.text.replace("\r\n", "\n").strip("\n") if card else ""
    own = f"{BEGIN}\n{card_text(name, record, repo)}\n{END}"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    text = before + own + after if begin and end else f"{own}\n\n{text}"
    header = ModelCardData(**metadata, ignore_metadata_errors=True).to_yaml()
    return f"---\n{header}\n---\n\n{text.strip()}\n"


def card_data(name: str, record: WeightRecord) -> ModelCardData:
    """The metadata; top-1 and top-5 accuracy go into the model-index, in percent."""
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=record.dataset.name,
            dataset_name=record.dataset.name,
            dataset_split=record.dataset.split,
            dataset_revision=record.dataset.revision,
            metric_type="accuracy",
            metric_name=label,
            metric_value=round(value, 4),
        )
        for label, value in (("top-1 accuracy, %", record.metrics.top1), ("top-5 accuracy, %", record.metrics.top5))
    ]
    return ModelCardData(
        license=record.license,
        library_name="timm_convmix",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "timm_convmix"],
        datasets=[record.dataset.name],
        base_model=f"timm/{record.base.name}" if record.base and is_of_timm(record.base.name) else None,
        model_name=name,
        eval_results=results,
    )


def is_of_timm(name: str) -> bool:
    """Whether timm itself publishes weights of this name: a file's name may look alike."""
    arch = split_model_name_tag(name)[0]
    return is_model(arch) and not arch.startswith("convmix_") and name in get_arch_pretrained_cfgs(arch)


def card_text(name: str, record: WeightRecord, repo: str | None) -> str:
    """The part of the card that is written from the record."""
    mixer = record.model_args.get("mixer", "convmix")
    about = (
        "A plain backbone, trained as the baseline that a ConvMix weight is compared with."
        if mixer == "none"
        else "A ConvMix model: intermediate stages of the backbone are mixed into its final map by a learned module."
    )
    data = record.dataset
    origin = f", {data.source}" if data.source else ""
    at = f" at {data.revision}" if data.revision else ""
    rows = [("this model", record.metrics)]
    if record.baseline:
        rows.append((f"paired baseline without mixer, {record.baseline.name}", record.baseline.metrics))
    base = f"Fine-tuned from {record.base.name} ({record.base.license})." if record.base else "Trained from scratch."
    size = "x".join(map(str, record.input_size))
    versions = ", ".join(f"{package} {version}" for package, version in sorted(record.versions.items()))
    return f"""# {name}

{about}

```python
import timm
import timm_convmix  # registers the architecture: without it timm knows no such model

model = timm.create_model("{f"hf-hub:{repo}" if repo else name}", pretrained=True).eval()
```

## Measured

{data.name}{origin}{at}, split `{data.split}`, {record.metrics.count} images; seed {", ".join(map(str, record.seeds))}.
A difference between two single runs proves nothing: see the evidence in the project's README.

{metrics_table(rows)}

## Made with

timm's `train.py -c recipe.yaml` (beside this card), {record.epochs} epochs. {base}
Packed and measured with {versions}; {record.hardware}.

## For, and not for

For classifying images like those of {data.name}, at {size}, for fine-tuning, and for comparing ways to combine stages.
Not for images of another kind, and not for decisions about people: it always answers with one of its
{record.num_classes} classes, and its probabilities are not calibrated.

## Trust

`{record.filename}` has {record.bytes} bytes of sha256
`{record.sha256}`.
timm_convmix checks the bytes before it parses them: against its own manifest where that lists this commit, else against
this repository's config.json. Neither says that the accuracy is right; `timm-convmix verify --data DIR` measures it
again."""


def metrics_table(rows: list[tuple[str, Metrics]]) -> str:
    """A Markdown table of metrics, one row a model."""
    lines = ["| | top-1, % | top-5, % | cross-entropy |", "|---|---|---|---|"]
    lines += [f"| {label} | {m.top1:.2f} | {m.top5:.2f} | {m.loss:.4f} |" for label, m in rows]
    return "\n".join(lines)
