"""Towers of video language models, alone and with what reads them: `python -m benchmarks.towers`."""
