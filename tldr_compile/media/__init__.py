"""Clips, models and pictures: how they are loaded, prepared and drawn. Nothing here knows of merging."""
