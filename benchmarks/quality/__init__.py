"""Quality of merging on a task that is learned here: made clips, a small VideoMAE trained on them."""
