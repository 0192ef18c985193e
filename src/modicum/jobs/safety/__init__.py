"""Data of safety reasoning: guidelines, rows, arms, and prompts in installed packages."""
