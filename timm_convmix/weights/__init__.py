"""The weights wing: from bytes to a loaded model."""
