"""What merging does to what a model says: clips, ways to be cheaper at equal GFLOPs, accuracy and agreement."""
