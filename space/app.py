"""The web demo of timm-convmix as a Hugging Face Space."""

from pathlib import Path

from timm_convmix.demo import build, serve

demo = build(examples=Path(__file__).parent / "examples")

if __name__ == "__main__":
    serve(demo, host="0.0.0.0")  # noqa: S104  (a Space is reached from outside its container)
