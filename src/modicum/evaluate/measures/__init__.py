"""What is measured on a model: one file for each measure."""
