"""The fine-tuning loop, where it runs, and what it resumes from."""
