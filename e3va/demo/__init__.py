"""The demo: digits in scenes, a trunk pretrained on single digits, three methods side by side."""
