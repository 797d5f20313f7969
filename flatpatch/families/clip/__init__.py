"""Classification by text prompts with CLIP: each task is a data set, and a class is what its name says."""
